"""All-gather of a segment's rows, as softmax layers need it (LASP-2H, arXiv:2502.07563)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lasptrain.parallel.collectives import all_gather, reduce_scatter
from lasptrain.parallel.recurrence import SavedStates
from lasptrain.parallel.scan import Scan


def gather(rows: Tensor, scan: Scan, saved: SavedStates) -> Tensor:
    """All-gather the rows [B, sp · T, C] of all slices from this slice's [B, T, C]; gradients are summed over ranks.

    Args:
        scan: over the ranks that share the window.
        saved: keeps the result, and returns it if the layer is being recomputed.
    """
    if scan.size == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows, scan, saved)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, scan: Scan, saved: SavedStates) -> Tensor:
        ctx.scan = scan
        if not saved.ready or saved.initial_state is None:
            parts = rows.new_empty(scan.size, *rows.shape)
            all_gather(parts.view(-1), rows.contiguous().view(-1), group=scan.group)
            scan.calls += 1
            scan.bytes_sent += rows.numel() * rows.element_size()
            saved.ready, saved.initial_state = True, parts.transpose(0, 1).flatten(1, 2)
        return saved.initial_state.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scan = ctx.scan
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        parts = wide.unflatten(1, (scan.size, -1)).transpose(0, 1).contiguous()
        mine = torch.empty_like(parts[0])
        reduce_scatter(mine.view(-1), parts.view(-1), group=scan.group)
        scan.calls += 1
        scan.bytes_sent += (scan.size - 1) * mine.numel() * mine.element_size()
        return mine.to(grad.dtype), None, None
