"""The rows that lie before a slice, over ranks and segments: the scan of a recurrence that forgets all it knew.

A short convolution, or attention over a sliding window, needs the last n rows of what comes before its slice. A slice
leaves its own last n rows whatever enters it: the scan of states with no decay to speak of. So ring, all-gather and
all-scan carry rows as they carry states, from segment to segment too, and gradients of rows as gradients of states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lasptrain.parallel.attention import Memory
from lasptrain.parallel.scan import Scan, Transition

FORGETTING = Transition(None)


def halo(rows: Tensor, carry: Tensor | None, scan: Scan, memory: Memory, leave: bool) -> tuple[Tensor, Tensor | None]:
    """The last rows of the slice before this one, and what enters the next segment (None unless asked for).

    Args:
        rows: the last n rows [B, n, C] of this slice, which has n or more.
        carry: rows that entered the segment, as they were handed out here; None at a window's start, which zeros enter.
        memory: where the entering rows are kept, or found if the layer is being recomputed.
    """
    entering, leaving = _Halo.apply(rows.unsqueeze(1), carry, scan, memory, leave)  # type: ignore[no-untyped-call]
    return entering.squeeze(1), leaving


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
