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


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y; a product of matrices is slow where there are only one or two terms."""
    return x @ y if x.shape[-1] > 2 else (x[..., None] * y[..., None, :, :]).sum(-2)


def _sums(each: Tensor) -> Iterator[Level]:
    """Logarithms of all levels, of log decays [N, n, C, D], and at last of the chunk as one half.

    A level's tensors change when the next is asked for.
    """
    upto, behind = each.clone(), torch.zeros_like(each)
    half = 1
    while half < each.shape[-2]:
        upto_lower, upto_upper = halves(upto, half)
        behind_lower, _ = halves(behind, half)
        yield Level(half, upto_upper, behind_lower)
        behind_lower += upto_upper[..., -1:, :]
        upto_upper += upto_lower[..., -1:, :]
        half *= 2
    yield Level(half, upto, behind)


class Edges:
    """Decays between a chunk's tokens and its edges, of log decays `each` [N, n, C, D]."""

    def __init__(self, each: Tensor):
        self.each = each

    @cached_property
    def _levels(self) -> list[Level]:
        """Factors of all levels, from neighbours to halves of the chunk, and of the whole chunk."""
        return [Level(half, upper.exp(), lower.exp()) for half, upper, lower in _sums(self.each)]

    @property
    def lead(self) -> Tensor:
        """Weight of the chunk's initial state in token t, [N, n, C, D]."""
        return self._levels[-1].upper

    @property
    def fold(self) -> Tensor:
        """Weight of token j in the chunk's final state, [N, n, C, D]."""
        return self._levels[-1].lower

    @property
    def through(self) -> Tensor:
        """Decay over each chunk, [N, n, D, 1], as a factor of rows of states."""
        return self.lead[..., -1, :, None]

    def _by_decay(self, flow: Tensor) -> Tensor:
        """Sum over channels that decay together."""
        return flow if self.each.shape[-1] > 1 else flow.sum(-1, keepdim=True)

    def read_over(self, x: Tensor, dx: Tensor) -> Tensor:
        """Gradient of log decays [N, n, C, D] by what x_t reads of the chunk's initial state."""
        return self._by_decay(x * dx).flip(-2).cumsum(-2).flip(-2)

    def sent_over(self, y: Tensor, dy: Tensor) -> Tensor:
        """Gradient of log decays [N, n, C, D] by what y_j adds to the chunk's final state."""
        return F.pad(self._by_decay(y * dy)[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)

    def sent_through(self, states: Tensor, dstates: Tensor) -> Tensor:
        """Gradient of log decays [N, n, 1, D] by what goes from initial states [N, n, K, V] to final ones."""
        return self._by_decay((self.through * states * dstates).sum(-1)[..., None, :])


class HeadGates(Edges):
    """One decay per head and token."""

    @cached_property
    def _weights(self) -> Tensor:
        """Decay from token j to token t, [N, n, C, C]."""
        c = self.each.shape[-2]
        weights = torch.eye(c, dtype=self.each.dtype, device=self.each.device).repeat(*self.each.shape[:-2], 1, 1)
        for half, upper, lower in self._levels[:-1]:
            between(weights, half).copy_(upper * lower.mT)
        return weights

    def scores(self, x: Tensor, y: Tensor) -> Tensor:
        """⟨x_t, decay from j to t, y_j⟩ for j ≤ t, [N, n, C, C]; zero above the diagonal."""
        return (x @ y.mT).mul_(self._weights)

    def scores_grad(self, d: Tensor, x: Tensor, y: Tensor, dx: Tensor, dy: Tensor, crossing: bool) -> Tensor | None:
        """Add the gradients of x and y to dx and dy, and return that of the log decays if `crossing`, [N, n, C, D].

        The last is, of token t, the sum over the pairs j < t ≤ s of what goes through each with its decay.
        Σ x·dx − Σ y·dy from t on is equal, but cancels.

        Args:
            d: gradient of the scores, which are constant above the diagonal.
            dx, dy: what goes from x_s over the chunk's left edge, and from y_j over its right edge.
        """
        d = d * self._weights
        over = None
        if crossing:
            near = F.pad((x @ y.mT).mul_(d)[..., :-1], (1, 0)).cumsum(-1).tril_()  # [s, t]: of row s, before t
            over = near.sum(-2)[..., None]
            over += self.read_over(x, dx) + self.sent_over(y, dy)
        dx += d @ y
        dy += d.mT @ x
        return over


class ChannelGates(Edges):
    """One decay per key channel and token."""

    def scores(self, x: Tensor, y: Tensor) -> Tensor:
        """As of `HeadGates`."""
        out = torch.diag_embed((x * y).sum(-1))
        for half, upper, lower in self._levels[:-1]:
            readers, writers = halves(x, half)[1] * upper, halves(y, half)[0] * lower
            between(out, half).copy_(readers @ writers.mT)
        return out

    def scores_grad(self, d: Tensor, x: Tensor, y: Tensor, dx: Tensor, dy: Tensor, crossing: bool) -> Tensor | None:
        """As of `HeadGates`. From halves of the chunk down to neighbours, dx and dy are what has gone over the edges
        of ever shorter runs of tokens, so that each level's decays get what is read and sent over all of a half.
        """
        over = torch.zeros_like(x) if crossing else None
        for half, upper, lower in reversed(self._levels[:-1]):
            (_, x_upper), (y_lower, _), (_, dx_upper), (dy_lower, _) = (halves(z, half) for z in (x, y, dx, dy))
            if over is not None:
                over_lower, over_upper = halves(over, half)
                over_lower += (x_upper * dx_upper).sum(-2, keepdim=True)
                over_upper += (y_lower * dy_lower).sum(-2, keepdim=True)
            pairs = between(d, half).contiguous()
            dx_upper.addcmul_(_product(pairs, y_lower * lower), upper)
            dy_lower.addcmul_(_product(pairs.mT, x_upper * upper), lower)
        if over is not None:
            over.addcmul_(x, dx)
        own = d.diagonal(dim1=-2, dim2=-1)[..., None]
        dx.addcmul_(own, y)
        dy.addcmul_(own, x)
        return over


Gates = HeadGates | ChannelGates


def gates(each: Tensor) -> Gates:
    """Return the gates of log decays [N, n, C, 1 or K]."""
    return HeadGates(each) if each.shape[-1] == 1 else ChannelGates(each)
