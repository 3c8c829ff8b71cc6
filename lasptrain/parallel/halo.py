"""The rows that lie before a slice, over ranks and segments: the scan of a recurrence that forgets all it knew.

A short convolution, or attention over a sliding window, needs the last n rows of what comes before its slice. A slice
leaves its own last n rows whatever enters it: the scan of states with no decay to speak of. So ring, all-gather and
all-scan carry rows as they carry states, from segment to segment too, and gradients of rows as gradients of states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lasptrain.parallel.attention import Memory
from lasptrain.parallel.scan import Scan, Transition

FORGETTING = Transition(None)


def halo(
    parts: Sequence[Tensor],
    n: int,
    doc: Tensor | None,
    carry: Tensor | None,
    scan: Scan,
    memory: Memory,
    leave: bool,
) -> tuple[Tensor, Tensor | None]:
    """The n rows before this slice that its first tokens may see [B, n, C], and what enters the next segment.

    Rows are zeros before a window's start and where they are of an earlier document than the last of them. What enters
    the next segment is None unless asked for.

    Args:
        parts: this slice, [B, T, ·] each; their channels side by side are the C of a row. Only a slice that is a whole
            segment may have less than n rows.
        doc: numbers of the documents in the slice [B, T]; document 0 goes on from the left. None: all is one.
        carry: rows that entered the segment, as they were handed out here; None at a window's start.
        memory: where the entering rows are kept, or found if the layer is being recomputed.
    """
    first = parts[0]
    short = first.shape[1] < n  # reading, not training
    if scan.size == 1 and (short or (carry is None and not leave)):
        width = sum(part.shape[-1] for part in parts)
        before = first.new_zeros(first.shape[0], n, width) if carry is None else carry.squeeze(1)
        if not leave:
            return before, None
        return before, _last(torch.cat(list(parts), dim=-1), before, doc, n).unsqueeze(1)
    rows = torch.cat([_last(part, None, doc, n) for part in parts], dim=-1).unsqueeze(1)
    entering, leaving = _Halo.apply(rows, carry, scan, memory, leave)  # type: ignore[no-untyped-call]
    return entering.squeeze(1), leaving


def _last(x: Tensor, before: Tensor | None, doc: Tensor | None, n: int) -> Tensor:
    """The n rows that a following token may see [B, n, C]: zeros where they are of an earlier document than the last.

    `before` is needed where x is shorter than n rows.
    """
    if x.shape[1] < n:
        assert before is not None
        if doc is not None:
            before = before * (doc[:, -1] == 0)[:, None, None]
        x = torch.cat([before, x if doc is None else x * (doc == doc[:, -1:])[..., None]], dim=1)
        return x[:, x.shape[1] - n :]
    rows = x[:, x.shape[1] - n :]
    return rows if doc is None else rows * (doc[:, -n:] == doc[:, -1:])[..., None]


class _Halo(Function):
    """Rows are states [B, 1, n, C]."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, carry: Tensor | None, scan: Scan, memory: Memory, leave: bool
    ) -> tuple[Tensor, Tensor | None]:
        leaving: Tensor | None
        if memory.known:  # the rows that leave have no reader left; only their gradient has a use
            leaving = rows.new_empty_strided(rows.shape, (0, 0, 0, 0)) if leave else None
        else:
            memory.known = True
            memory.entering, leaving = scan.start(rows, FORGETTING, carry, leave=leave).wait()
        ctx.scan, ctx.has_carry, ctx.like = scan, carry is not None and ctx.needs_input_grad[1], rows.new_empty(0)
        ctx.shape = rows.shape
        ctx.set_materialize_grads(False)
        entering = torch.zeros_like(rows) if memory.entering is None else memory.entering.detach()
        return entering, leaving.clone() if leaving is rows else leaving

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dentering: Tensor | None, dleaving: Tensor | None) -> tuple[Tensor | None, ...]:
        if dentering is None:
            dentering = ctx.like.new_zeros(ctx.shape)
        exchange = ctx.scan.start(dentering, FORGETTING, dleaving, reverse=True, leave=ctx.has_carry)
        drows, dcarry = exchange.wait()
        return drows, dcarry, None, None, None
