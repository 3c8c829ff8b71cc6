"""Whether documents of a slice are apart: what is computed of one when another changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

INPUTS = ("q", "k", "v", "beta", "log_decay", "do")  # of tokens


def leaks(
    compute: Callable[[Any], dict[str, Tensor]], x: Any, begins: Sequence[int], inputs: Sequence[str] = INPUTS
) -> set[tuple[str, int, int]]:
    """Results of tokens, that changed in another document than that whose `inputs` did: name, that document, token.

    `x` is a named tuple of inputs [1, T, ...] with documents at `begins`. Outputs of the changed one must move.
    """
    length = x.q.shape[1]
    before, found = compute(x), set()
    for number, (start, end) in enumerate(pairwise([0, *begins, length])):
        inside = torch.arange(length, device=x.q.device)
        inside = (inside >= start) & (inside < end)

        def changed(y: Tensor, inside: Tensor = inside) -> Tensor:
            return torch.where(inside.view(-1, *(1,) * (y.dim() - 2)), y * 0.7, y)

        given = {name: getattr(x, name, None) for name in inputs}
        after = compute(x._replace(**{name: changed(y) for name, y in given.items() if y is not None and y.dim() > 1}))
        for name, y in after.items():
            if y.shape[1] != length:  # a state
                continue
            moved = (y != before[name]).flatten(2).any(2)[0]
            assert name != "o" or bool(moved[inside].any())
            found |= {(name, number, int(token)) for token in (moved & ~inside).nonzero().flatten()}
    return found
