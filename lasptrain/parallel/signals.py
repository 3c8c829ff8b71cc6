"""Signals of health: what layers report of a slice while they train, as sums and maxima that add up over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ParamSpec

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

from lasptrain.ops.recurrence import Gates
from lasptrain.parallel.collectives import all_reduce_largest, all_reduce_sum

P = ParamSpec("P")


def _beside(report: Callable[P, None]) -> Callable[P, None]:
    """Let a report leave no trace in the pass that it looks at: no gradient, nothing that recomputation counts."""

    def reported(*arguments: P.args, **named: P.kwargs) -> None:
        with torch.no_grad(), no_dispatch():
            report(*arguments, **named)

    return reported


class Signals:
    """The signals of one layer, or of the head, on this rank: sums in fp64 and maxima in at least fp32, by name.

    | sum | of |
    |---|---|
    | `rate` [H] or [H, K], `tokens` | −ln a over tokens, by head or key channel, and their number |
    | `beta`, `above_one`, `betas` | β over tokens and heads, how many are above one, and their number |
    | `state`, `states` | squares of the states' Frobenius norms at the end of windows, by head, and their number |

    Maxima: `query`, over √K, and `key`, lengths by head, in softmax layers; `logit` in the head.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.maxima: dict[str, Tensor] = {}
        self.ends = False  # the slice belongs to the last segment of its window

    @_beside
    def gates(self, gates: Gates, tokens: int) -> None:
        """Report the decays and β of `tokens` tokens, as a recurrence names them."""
        log_decay, beta = gates
        if log_decay is not None:
            constant = log_decay.dim() == 1
            self._add("rate", log_decay.double() * -tokens if constant else -log_decay.sum((0, 1)).double())
            self._add("tokens", log_decay.new_tensor(tokens))
        if beta is not None:
            self._add("beta", beta.sum())
            self._add("above_one", (beta > 1).sum())
            self._add("betas", beta.new_tensor(beta.numel(), dtype=torch.float64))

    @_beside
    def states(self, final_state: Tensor, *, counts: bool) -> None:
        """Report the states [B, H, K, V] at the end of windows; they only count on the rank that has them."""
        squares = torch.linalg.vector_norm(final_state, dim=(-2, -1)).double().square()
        self._add("state", squares.sum() * counts)
        self._add("states", torch.full_like(squares, counts).sum())

    @_beside
    def scores(self, q: Tensor, k: Tensor) -> None:
        """Report queries [B, T, H, K] and keys [B, T, G, K] of a softmax layer, whose scores are q k / √K."""
        for name, x, scale in (("query", q, q.shape[-1] ** -0.5), ("key", k, 1.0)):
            wide = torch.promote_types(x.dtype, torch.float32)
            self._raise(name, torch.linalg.vector_norm(x, dim=-1, dtype=wide).amax((0, 1)) * scale)

    @_beside
    def logits(self, logits: Tensor) -> None:
        """Report logits of the head, of any shape."""
        self._raise("logit", logits.amax())

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0) + value.double()

    def _raise(self, name: str, value: Tensor) -> None:
        self.maxima[name] = torch.maximum(self.maxima.get(name, value), value)


def reduce(signals: Iterable[Signals]) -> None:
    """Sum the sums and raise the maxima over all ranks, which have reported the same names. Collective."""
    everyone = list(signals)
    for parts, combine in (
        ([one.sums for one in everyone], all_reduce_sum),
        ([one.maxima for one in everyone], all_reduce_largest),
    ):
        values = [value.double() for part in parts for value in part.values()]
        if not values:
            continue
        reduced = iter(combine(torch.cat([value.flatten() for value in values])).split([v.numel() for v in values]))
        for part in parts:
            part.update({name: next(reduced).view(value.shape) for name, value in part.items()})
