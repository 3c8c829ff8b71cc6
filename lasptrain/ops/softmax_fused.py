"""Softmax attention over one block of keys by the kernels of `softmax_kernels`, in the calls of `softmax_plan`.

Letters as in `lasptrain.ops`. Queries and keys of a batch are packed into [B · T] and [B · J] rows, of which a call
reads some. Where calls share queries, their outputs are merged and their dq summed; where they share keys, their dk and
dv: all in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from lasptrain.ops import state_dtype
from lasptrain.ops.softmax_kernels import Gradients, Kernels, Lengths, Mask, width
from lasptrain.ops.softmax_plan import Call
from lasptrain.ops.softmax_reference import share


def forward(
    kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, calls: list[Call], edges: Tensor, wide: bool
) -> tuple[Tensor, Tensor]:
    """Return o [B, T, H, V], in the dtype of q or at least fp32, and lse [B, H, T], at least fp32.

    q [B, T, H, K], k [B, J, G, K], v [B, J, G, V]; edges: int32, as `softmax_plan.calls` returns them.
    """
    (b, t), vdim, dim, scale = q.shape[:2], v.shape[-1], width(q, v), 1 / sqrt(q.shape[-1])
    q, k, v = (_packed(x, dim) for x in (q, k, v))
    spans = [(call.row, call.rows) for call in calls]
    o, lse = _Rows(q, spans), _Rows(q.new_empty((), dtype=state_dtype(q)).expand(q.shape[:2]), spans, -torch.inf)
    for number, (call, lengths) in enumerate(_each(calls, edges)):
        part, part_lse = _run(kernels, q[call.row :][: call.rows], k, v, call, lengths, scale)
        if not (o.put(number, part) and lse.put(number, part_lse.mT)):
            own, own_lse = o.of(number), lse.of(number)
            own.lerp_(part.to(own.dtype), share(own_lse, part_lse.mT)[..., None])
            own_lse.copy_(torch.logaddexp(own_lse, part_lse.mT))
    found = o.rows[..., :vdim].to(state_dtype(q) if wide else q.dtype).contiguous()
    return found.unflatten(0, (b, t)), lse.rows.unflatten(0, (b, t)).transpose(1, 2).contiguous()


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
    of_rows, of_keys = [(call.row, call.rows) for call in calls], [(call.key, call.keys) for call in calls]
    totals = _Rows(q, of_rows), _Rows(k, of_keys), _Rows(v, of_keys)
    for number, (call, lengths) in enumerate(_each(calls, edges)):
        rows, keys = slice(call.row, call.row + call.rows), slice(call.key, call.key + call.keys)
        given = q[rows], k[keys], v[keys], o[rows], lse[:, rows].contiguous(), do[rows]
        if lengths is None:
            found = _dense_backward(kernels, *given, call, scale)
        else:
            found = kernels.varlen_backward(*given, lengths, Mask(bool(call.causal), call.left), scale)
        for total, part in zip(totals, found, strict=True):
            if not total.put(number, part):
                total.of(number).add_(part)
    dq, dk, dv = (
        total.rows[..., : shape[-1]].to(state_dtype(q) if wide else dtype).contiguous().unflatten(0, shape[:2])
        for total, shape in zip(totals, shapes, strict=True)
    )
    return dq, dk, dv


class _Rows:
    """Rows of which every call gives some, in at least fp32 where calls share rows; what the first gives may be all.

    like: a tensor of the shape and dtype; spans: first row and number of rows of each call; fill: of rows without any.
    """

    def __init__(self, like: Tensor, spans: list[tuple[int, int]], fill: float = 0.0):
        self.spans = [slice(first, first + count) for first, count in spans]
        self.new = [
            all(span.stop <= other.start or other.stop <= span.start for other in self.spans[:number])
            for number, span in enumerate(self.spans)
        ]
        self.dtype = like.dtype if all(self.new) else state_dtype(like)
        self.whole = spans[:1] == [(0, len(like))]
        self.rows = like if self.whole else like.new_full(like.shape, fill, dtype=self.dtype)

    def put(self, number: int, part: Tensor) -> bool:
        """Put a call's rows in their place; return False, and do not, where calls before have given some of them."""
        if number == 0 and self.whole:
            self.rows = part.to(self.dtype)
        elif self.new[number]:
            self.of(number).copy_(part)
        return self.new[number]

    def of(self, number: int) -> Tensor:
        """Return the place of a call's rows."""
        return self.rows[self.spans[number]]


def _run(
    kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, call: Call, lengths: Lengths | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return o and lse of a call's rows, q, which see some of k and v."""
    k, v = k[call.key :][: call.keys], v[call.key :][: call.keys]
    if lengths is None:
        assert kernels.dense_forward is not None
        q, k, v = (_batch(x, call.sequences) for x in (q, k, v))
        o, lse = kernels.dense_forward(q, k, v, bool(call.causal), scale)
        return o.flatten(0, 1), lse.transpose(0, 1).flatten(1)
    return kernels.varlen_forward(q, k, v, lengths, Mask(bool(call.causal), call.left), scale)


def _dense_backward(
    kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, call: Call, scale: float
) -> Gradients:
    """Return the gradients of a dense call's rows."""
    assert kernels.dense_backward is not None
    q, k, v, o, do = (_batch(x, call.sequences) for x in (q, k, v, o, do))
    found = kernels.dense_backward(q, k, v, o, _batch(lse, call.sequences, 1), do, bool(call.causal), scale)
    dq, dk, dv = (x.flatten(0, 1) for x in found)
    return dq, dk, dv


def _each(calls: Sequence[Call], edges: Tensor) -> Iterator[tuple[Call, Lengths | None]]:
    """Yield each call and the lengths of its sequences, None for a dense one."""
    start = 0
    for call in calls:
        if call.dense:
            yield call, None
            continue
        middle, stop = start + call.sequences + 1, start + 2 * (call.sequences + 1)
        yield call, Lengths(edges[start:middle], edges[middle:stop], call.most_rows, call.most_keys)
        start = stop


def _batch(x: Tensor, count: int, dim: int = 0) -> Tensor:
    """Return packed rows [R, …], or those of another dimension, as [count, …]: sequences of the same length."""
    batch: Tensor = x.unflatten(dim, (count, -1))
    return batch.movedim(dim, 0)


def _packed(x: Tensor, dim: int) -> Tensor:
    """Return x [B, T, H, K] as [B · T, H, dim], zeros behind its channels, and those side by side in memory."""
    x = x.flatten(0, 1)
    if x.shape[-1] < dim:
        return F.pad(x, (0, dim - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()
