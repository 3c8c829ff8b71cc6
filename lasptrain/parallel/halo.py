"""The rows before a slice, over ranks and segments: the scan of a recurrence whose state is the last n tokens.

A short convolution, or attention over a sliding window, needs the last n rows before its slice. A slice of T < n tokens
moves the rows before it up by T and puts its own below; a longer one passes on its own last n, whatever lies before.
That is a map of states, so ring, all-gather and all-scan carry rows as they carry states, from segment to segment too,
and gradients of rows as gradients of states.
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
from lasptrain.parallel.recurrence import SavedStates
from lasptrain.parallel.scan import Scan
from lasptrain.parallel.transition import FORGET, Transition


def halo(
    parts: Sequence[Tensor],
    n: int,
    doc_ids: Tensor | None,
    carry: Tensor | None,
    scan: Scan,
    saved: SavedStates,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the n rows before this slice that its first tokens may see [B, n, C], and those before the next segment.

    Rows are zero before a window's start and where they belong to an earlier document than the last of them. Those
    before the next segment are None unless `output_final_state`.

    Args:
        parts: this slice, [B, T, ·] each; their channels side by side are the C of a row.
        doc_ids: document numbers in the slice [B, T]; document 0 continues from the left. None: one document.
        carry: rows before the segment, as returned here for it; None at a window's start.
        saved: keeps the rows before the slice, and returns them if the layer is being recomputed.
    """
    if scan.size == 1 and carry is None and not output_final_state:
        first = parts[0]
        return first.new_zeros(first.shape[0], n, sum(part.shape[-1] for part in parts)), None
    rows = torch.cat([_last(part, doc_ids, n) for part in parts], dim=-1).unsqueeze(1)
    initial_state, final_state = _Halo.apply(  # type: ignore[no-untyped-call]
        rows, carry, _transition(parts[0], doc_ids, n), scan, saved, output_final_state
    )
    return initial_state.squeeze(1), final_state


def _transition(x: Tensor, doc_ids: Tensor | None, n: int) -> Transition:
    """Return the transition of a slice x [B, T, ·] of rows: those before a document that starts in it are dropped."""
    if x.shape[1] >= n:
        return FORGET
    goes_on = x.new_ones(x.shape[0]) if doc_ids is None else (doc_ids[:, -1] == 0).to(x.dtype)
    return Transition(goes_on[:, None], rows=x.shape[1])


def _last(x: Tensor, doc_ids: Tensor | None, n: int) -> Tensor:
    """Return the last n rows [B, n, C] of x [B, T, C], as the next token may see them.

    Rows are zero where they lie before x, or belong to an earlier document than the last.
    """
    rows = x[:, -n:]
    if doc_ids is not None:
        rows = rows * (doc_ids[:, -n:] == doc_ids[:, -1:])[..., None]
    return F.pad(rows, [0, 0, n - rows.shape[1], 0])


class _Halo(Function):
    """The scan of rows, as states [B, 1, n, C]."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        carry: Tensor | None,
        transition: Transition,
        scan: Scan,
        saved: SavedStates,
        output_final_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        final_state: Tensor | None
        if saved.ready:  # the final rows are not read again; only their gradient is used
            final_state = unread(rows.shape, rows) if output_final_state else None
        else:
            saved.ready = True
            saved.initial_state, final_state = scan.start(
                rows, transition, carry, output_final_state=output_final_state
            ).wait()
        ctx.scan, ctx.has_carry, ctx.like = scan, carry is not None and ctx.needs_input_grad[1], rows.new_empty(0)
        ctx.shape, ctx.transition = rows.shape, transition
        ctx.set_materialize_grads(False)
        initial_state = torch.zeros_like(rows) if saved.initial_state is None else saved.initial_state.detach()
        return initial_state, final_state.clone() if final_state is rows else final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dinitial: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        if dinitial is None:
            dinitial = ctx.like.new_zeros(ctx.shape)
        exchange = ctx.scan.start(
            dinitial, ctx.transition.transpose(), dfinal, reverse=True, output_final_state=ctx.has_carry
        )
        drows, dcarry = exchange.wait()
        return drows, dcarry, None, None, None, None
