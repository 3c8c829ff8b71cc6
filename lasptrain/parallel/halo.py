"""The rows that lie before a slice, over ranks and segments: the scan of a recurrence that knows the last n tokens.

A short convolution, or attention over a sliding window, needs the last n rows of what comes before its slice. A slice
of T < n tokens moves the rows that enter it up by T and puts its own below; a longer one leaves its own last n whatever
enters. That is a map of states, so ring, all-gather and all-scan carry rows as they carry states, from segment to
segment too, and gradients of rows as gradients of states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lasptrain.parallel.host import unread
from lasptrain.parallel.recurrence import Memory
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
        parts: this slice, [B, T, ·] each; their channels side by side are the C of a row.
        doc: numbers of the documents in the slice [B, T]; document 0 goes on from the left. None: all is one.
        carry: rows that entered the segment, as they were handed out here; None at a window's start.
        memory: where the entering rows are kept, or found if the layer is being recomputed.
    """
    if scan.size == 1 and carry is None and not leave:
        first = parts[0]
        return first.new_zeros(first.shape[0], n, sum(part.shape[-1] for part in parts)), None
    rows = torch.cat([_last(part, doc, n) for part in parts], dim=-1).unsqueeze(1)
    entering, leaving = _Halo.apply(  # type: ignore[no-untyped-call]
        rows, carry, _moves(parts[0], doc, n), scan, memory, leave
    )
    return entering.squeeze(1), leaving


def _moves(x: Tensor, doc: Tensor | None, n: int) -> Transition:
    """What a slice x [B, T, ·] does to the rows that enter it; a document that starts in it has no use for them."""
    if x.shape[1] >= n:
        return FORGETTING
    goes_on = x.new_ones(x.shape[0]) if doc is None else (doc[:, -1] == 0).to(x.dtype)
    return Transition(goes_on[:, None], rows=x.shape[1])


def _last(x: Tensor, doc: Tensor | None, n: int) -> Tensor:
    """Of the n rows that a following token may see those in x [B, n, C]: zeros where they lie before it, or are of an
    earlier document than the last.
    """
    rows = x[:, -n:]
    if doc is not None:
        rows = rows * (doc[:, -n:] == doc[:, -1:])[..., None]
    return F.pad(rows, [0, 0, n - rows.shape[1], 0])


class _Halo(Function):
    """Rows are states [B, 1, n, C]."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        carry: Tensor | None,
        transition: Transition,
        scan: Scan,
        memory: Memory,
        leave: bool,
    ) -> tuple[Tensor, Tensor | None]:
        leaving: Tensor | None
        if memory.known:  # the rows that leave have no reader left; only their gradient has a use
            leaving = unread(rows.shape, rows) if leave else None
        else:
            memory.known = True
            memory.entering, leaving = scan.start(rows, transition, carry, leave=leave).wait()
        ctx.scan, ctx.has_carry, ctx.like = scan, carry is not None and ctx.needs_input_grad[1], rows.new_empty(0)
        ctx.shape, ctx.transition = rows.shape, transition
        ctx.set_materialize_grads(False)
        entering = torch.zeros_like(rows) if memory.entering is None else memory.entering.detach()
        return entering, leaving.clone() if leaving is rows else leaving

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dentering: Tensor | None, dleaving: Tensor | None) -> tuple[Tensor | None, ...]:
        if dentering is None:
            dentering = ctx.like.new_zeros(ctx.shape)
        exchange = ctx.scan.start(dentering, ctx.transition.transpose(), dleaving, reverse=True, leave=ctx.has_carry)
        drows, dcarry = exchange.wait()
        return drows, dcarry, None, None, None, None
