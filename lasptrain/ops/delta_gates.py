"""Decays between the tokens of a chunk, one number per head or one per key channel.

Logarithms are summed from one token to the other, never subtracted: a difference of two sums would lose a weak decay
behind a strong one, and be undefined behind one of −∞. So nothing is clamped, and −∞ is the start of a document.

A pair of tokens j < t belongs to the level of the highest bit in which t and j differ: a group of 2·`half` tokens has
j in its lower half and t in its upper one, and the decay between them is that from j to the middle times that from the
middle to t. Both are at most 1, whatever the decays, so that a level is a product of matrices. All levels of a chunk
have half the terms of one product of the chunk (secondary chunking of Yang et al., arXiv:2312.06635, section 4.3, at
every power of two).

Letters: N = B·H, n chunks, C tokens of a chunk, G groups of a chunk, D 1 or K.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Level(NamedTuple):
    """Decays of one level, as factors or as their logarithms."""

    half: int  # tokens
    upper: Tensor  # [N, n, G, half, D], from the middle up to and including a token of the upper half
    lower: Tensor  # [N, n, G, half, D], from behind a token of the lower half to the middle


def halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Views [N, n, G, half, ·] of the lower and upper halves of groups of x [N, n, C, ·]."""
    lower, upper = x.unflatten(-2, (-1, 2, half)).unbind(-3)
    return lower, upper


def between(scores: Tensor, half: int) -> Tensor:
    """View [N, n, G, half, half] of scores [N, n, C, C]: rows of upper halves, columns of lower ones."""
    rows: Tensor = scores.unflatten(-2, (-1, 2, half))[..., 1, :, :].unflatten(-1, (-1, 2, half))[..., 0, :]
    pairs: Tensor = rows.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
    return pairs


def before(x: Tensor) -> Tensor:
    """Sums of x […, C, ·] over the tokens before each token."""
    return F.pad(x[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)


def following(x: Tensor) -> Tensor:
    """Sums of x […, C, ·] over each token and those after it."""
    return x.flip(-2).cumsum(-2).flip(-2)


def _levels(each: Tensor) -> Iterator[Level]:
    """Logarithms of all levels, of log decays [N, n, C, D]; a level's tensors change when the next is asked for."""
    upto, behind = each.clone(), torch.zeros_like(each)
    half = 1
    while half < each.shape[-2]:
        upto_lower, upto_upper = halves(upto, half)
        behind_lower, _ = halves(behind, half)
        yield Level(half, upto_upper, behind_lower)
        behind_lower += upto_upper[..., -1:, :]
        upto_upper += upto_lower[..., -1:, :]
        half *= 2


class Edges:
    """Decays between a chunk's tokens and its edges, of log decays `each` [N, n, C, D]."""

    def __init__(self, each: Tensor):
        self.each = each

    @cached_property
    def lead(self) -> Tensor:
        """Weight of the chunk's initial state in token t, [N, n, C, D]."""
        return self.each.cumsum(-2).exp_()

    @cached_property
    def fold(self) -> Tensor:
        """Weight of token j in the chunk's final state, [N, n, C, D]."""
        return before(self.each.flip(-2)).flip(-2).exp_()

    @property
    def through(self) -> Tensor:
        """Decay over each chunk, [N, n, D, 1], as a factor of rows of states."""
        return self.lead[..., -1, :, None]


class HeadGates(Edges):
    """One decay per head and token."""

    @cached_property
    def _weights(self) -> Tensor:
        """Decay from token j to token t, [N, n, C, C]."""
        c = self.each.shape[-2]
        logs = self.each.new_zeros(*self.each.shape[:-2], c, c)
        for half, upper, lower in _levels(self.each):
            between(logs, half).copy_(upper + lower.mT)
        return logs.exp_().tril_()

    def scores(self, x: Tensor, y: Tensor) -> Tensor:
        """⟨x_t, decay from j to t, y_j⟩ for j ≤ t, [N, n, C, C]; zero above the diagonal."""
        return (x @ y.mT).mul_(self._weights)

    def scores_grad(self, d: Tensor, x: Tensor, y: Tensor, crossing: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the gradients of x and y and, if `crossing`, of the log decays [N, n, C, D], from those of the scores.

        The last are, of token t, sums over the pairs j < t ≤ s of what goes through each, with the decay between them.
        Σ x·dx − Σ y·dy from t on is equal, but cancels. Scores above the diagonal are taken for constants.
        """
        d = d * self._weights
        dx, dy = d @ y, d.mT @ x
        if not crossing:
            return dx, dy, None
        near = d.mul_(x @ y.mT)
        earlier = F.pad(near[..., :-1], (1, 0)).cumsum(-1).tril_()  # what row s reads from before t, [s, t]
        return dx, dy, earlier.sum(-2)[..., None]


class ChannelGates(Edges):
    """One decay per key channel and token."""

    @cached_property
    def _factors(self) -> list[Level]:
        return [Level(half, upper.exp(), lower.exp()) for half, upper, lower in _levels(self.each)]

    def scores(self, x: Tensor, y: Tensor) -> Tensor:
        """As of `HeadGates`."""
        out = torch.diag_embed((x * y).sum(-1))
        for half, upper, lower in self._factors:
            readers, writers = halves(x, half)[1] * upper, halves(y, half)[0] * lower
            between(out, half).copy_(readers @ writers.mT)
        return out

    def scores_grad(self, d: Tensor, x: Tensor, y: Tensor, crossing: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """As of `HeadGates`."""
        own = d.diagonal(dim1=-2, dim2=-1)[..., None]
        dx, dy = own * y, own * x
        over = torch.zeros_like(x) if crossing else None
        for half, upper, lower in self._factors:
            (y_lower, _), (_, x_upper) = halves(y, half), halves(x, half)
            part = between(d, half).contiguous()
            readers = (part @ (y_lower * lower)).mul_(upper)
            writers = (part.mT @ (x_upper * upper)).mul_(lower)
            halves(dx, half)[1].add_(readers)
            halves(dy, half)[0].add_(writers)
            if over is not None:
                over_lower, over_upper = halves(over, half)
                over_upper += following(readers.mul_(x_upper))
                over_lower += before(writers.mul_(y_lower))
        return dx, dy, over


Gates = HeadGates | ChannelGates


def gates(each: Tensor) -> Gates:
    """Return the gates of log decays [N, n, C, 1 or K]."""
    return HeadGates(each) if each.shape[-1] == 1 else ChannelGates(each)
