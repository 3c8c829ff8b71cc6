"""Softmax attention over one block of keys by the kernels of `softmax_kernels`, in the calls of `softmax_plan`.

Letters as in `lasptrain.ops`. Queries and keys of a batch are packed into [B · T] and [B · J] rows, of which a call
reads some. Where calls share queries, their outputs are merged and their dq summed; where they share keys, their dk and
dv: all in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from lasptrain.ops import state_dtype
from lasptrain.ops.softmax_kernels import Gradients, Kernels, Lengths, Mask, width
from lasptrain.ops.softmax_plan import Call
from lasptrain.ops.softmax_reference import merge

Span = tuple[int, int]


def forward(
    kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, calls: list[Call], edges: Tensor, wide: bool
) -> tuple[Tensor, Tensor]:
    """Return o [B, T, H, V], in the dtype of q or at least fp32, and lse [B, H, T], at least fp32.

    q [B, T, H, K], k [B, J, G, K], v [B, J, G, V]; edges: int32, as `softmax_plan.calls` returns them.
    """
    (b, t, h, kdim), vdim, dim = q.shape, v.shape[-1], width(q, v)
    q, k, v = (_packed(x, dim) for x in (q, k, v))
    shared = _overlap([(call.row, call.row + call.rows) for call in calls])
    o = q.new_zeros(q.shape, dtype=state_dtype(q) if shared else q.dtype)
    lse = q.new_full((h, len(q)), -torch.inf, dtype=state_dtype(q))
    for number, (call, lengths) in enumerate(_each(calls, edges)):
        rows = slice(call.row, call.row + call.rows)
        part, part_lse = _run(kernels, q[rows], k, v, call, lengths, 1 / sqrt(kdim))
        if number == 0 and call.rows == len(q):
            o, lse = part.to(o.dtype), part_lse
            continue
        if shared:
            part, part_lse = _merged(o[rows], lse[:, rows], part, part_lse)
        o[rows], lse[:, rows] = part, part_lse
    o = o[..., :vdim].to(state_dtype(q) if wide else q.dtype)
    return o.contiguous().unflatten(0, (b, t)), lse.unflatten(1, (b, t)).transpose(0, 1).contiguous()


def backward(
    kernels: Kernels,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    calls: list[Call],
    edges: Tensor,
    wide: bool,
) -> Gradients:
    """Return dq, dk and dv in the dtypes of their inputs or at least fp32; o and lse may be over other keys too."""
    shapes, dim, scale, dtype = (q.shape, k.shape, v.shape), width(q, v), 1 / sqrt(q.shape[-1]), q.dtype
    q, k, v, o, do = (_packed(x.to(dtype), dim) for x in (q, k, v, o, do))
    lse = lse.transpose(0, 1).flatten(1)
    of_rows, of_keys = (
        [(x[0], x[0] + x[1]) for x in spans] for spans in ([c[:2] for c in calls], [c[2:4] for c in calls])
    )
    totals = [_Sum(x, spans) for x, spans in ((q, of_rows), (k, of_keys), (v, of_keys))]
    for call, lengths in _each(calls, edges):
        rows, keys = slice(call.row, call.row + call.rows), slice(call.key, call.key + call.keys)
        given = q[rows], k[keys], v[keys], o[rows], lse[:, rows].contiguous(), do[rows]
        if lengths is None:
            assert kernels.dense_backward is not None
            found = kernels.dense_backward(*given, bool(call.causal), scale)
        else:
            found = kernels.varlen_backward(*given, lengths, Mask(bool(call.causal), call.left), scale)
        for total, part, span in zip(totals, found, (rows, keys, keys), strict=True):
            total.add(span, part)
    dq, dk, dv = (
        total.value()[..., : shape[-1]].to(state_dtype(q) if wide else dtype).contiguous().unflatten(0, shape[:2])
        for total, shape in zip(totals, shapes, strict=True)
    )
    return dq, dk, dv


class _Sum:
    """A tensor of which calls give parts: a part that is all of it as it is, in fp32 where parts overlap."""

    def __init__(self, like: Tensor, spans: Sequence[Span]):
        self.like, self.dtype = like, state_dtype(like) if _overlap(spans) else like.dtype
        self.total: Tensor | None = None

    def add(self, span: slice, part: Tensor) -> None:
        if self.total is None and len(part) == len(self.like):
            self.total = part.to(self.dtype)
            return
        if self.total is None:
            self.total = self.like.new_zeros(self.like.shape, dtype=self.dtype)
        self.total[span] += part

    def value(self) -> Tensor:
        return self.like.new_zeros(self.like.shape) if self.total is None else self.total


def _run(
    kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, call: Call, lengths: Lengths | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return o and lse of a call's rows, q, which see some of k and v."""
    k, v = k[call.key :][: call.keys], v[call.key :][: call.keys]
    if lengths is None:
        assert kernels.dense_forward is not None
        return kernels.dense_forward(q, k, v, bool(call.causal), scale)
    return kernels.varlen_forward(q, k, v, lengths, Mask(bool(call.causal), call.left), scale)


def _each(calls: Sequence[Call], edges: Tensor) -> Iterator[tuple[Call, Lengths | None]]:
    """Yield each call and the lengths of its sequences, None for a dense one."""
    start = 0
    for call in calls:
        if not call.sequences:
            yield call, None
            continue
        middle, stop = start + call.sequences + 1, start + 2 * (call.sequences + 1)
        yield call, Lengths(edges[start:middle], edges[middle:stop], call.most_rows, call.most_keys)
        start = stop


def _merged(o: Tensor, lse: Tensor, other_o: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return `merge` of packed outputs [R, H, D] and their lse [H, R]."""
    found, total = merge(o[None], lse[None], other_o[None], other_lse[None])
    return found[0], total[0]


def _overlap(spans: Sequence[Span]) -> bool:
    ordered = sorted(spans)
    return any(stop > start for (_, stop), (start, _) in pairwise(ordered))


def _packed(x: Tensor, dim: int) -> Tensor:
    """Return x [B, T, H, K] as [B · T, H, dim], zeros behind its channels, and those side by side in memory."""
    x = x.flatten(0, 1)
    if x.shape[-1] < dim:
        return F.pad(x, (0, dim - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()
