"""Causal softmax attention within documents and, if it slides, within a window: one block of keys at a time.

Letters as in `lasptrain.ops`; J is the number of keys of a block, G that of their heads. A query at position p sees the
keys at max(start of its document, p − window + 1) to p. Attention over all of them is put together from that over
blocks of consecutive keys, each with the log-sum-exp of its scores:

    o, lse = forward(q, k, v, …)                              of each block
    o, lse = merge(o, lse, *forward(q, other_k, other_v, …))  over both
    dq, dk, dv = backward(q, k, v, o, lse, do, …)             of each block, given o and lse over all

These record no graph; `attend`, over one block, has gradients.

Common arguments:

| name | shape, dtype | meaning |
|---|---|---|
| `q` | [B, T, H, K] | queries at positions `query_start` to `query_start` + T − 1 |
| `k`, `v` | [B, J, G, K], [B, J, G, V] | keys and values at `key_start` and after; J may be 0, a key after its queries is unseen. G divides H: H / G consecutive heads of q share a head of k and v |
| `documents` | `Documents` | of the queries |
| `query_start`, `key_start` | ints below 2⁴⁰ | positions of the first query and the first key in the window; keys of negative ones, which are no tokens, are unseen |
| `window` | int or None | keys that a query sees at most, its own included; None: all of its document |
| `o`, `do` | [B, T, H, V] | outputs, and the gradient of the loss by them |
| `lse` | [B, H, T], at least fp32 | log Σ exp(scores), natural; −∞ (and o = 0) for a query that sees nothing |
"""  # noqa: E501

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lasptrain.ops import fake, operator, softmax_fused, softmax_kernels, softmax_reference, state_dtype
from lasptrain.ops.softmax_documents import Documents, Place, Plan
from lasptrain.ops.softmax_kernels import Kernels
from lasptrain.ops.softmax_plan import read
from lasptrain.ops.softmax_reference import merge

__all__ = ["ATTEND", "Documents", "attend", "backward", "forward", "merge"]


def attend(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, query_start: int, key_start: int, window: int | None
) -> Tensor:
    """Return o in the dtype of q, with gradients for q, k and v: attention where one block has all keys."""
    o: Tensor = _Attend.apply(q, k, v, documents, query_start, key_start, window)  # type: ignore[no-untyped-call]
    return o


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    query_start: int,
    key_start: int,
    window: int | None,
    *,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return o, in the dtype of q or, if `wide`, in at least fp32, and lse, over this block of keys alone.

    Raises ValueError for shapes that do not fit, and a window of no key.
    """
    _check(q, k, v, documents, window)
    kernels = softmax_kernels.select(q, v)
    if kernels is None:
        return _softmax_reference_forward(q, k, v, documents.start, query_start, key_start, window, wide)
    plan = _plan(kernels, q, k, documents, query_start, key_start, window)
    return _softmax_forward(q, k, v, *plan, wide)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    documents: Documents,
    query_start: int,
    key_start: int,
    window: int | None,
    *,
    wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return this block's part of dq and all of its dk and dv, in their inputs' dtypes or, if `wide`, at least fp32.

    o and lse are those over all blocks that the queries see.
    """
    kernels = softmax_kernels.select(q, v)
    if kernels is None:
        place = documents.start, query_start, key_start, window
        return _softmax_reference_backward(q, k, v, o, lse, do, *place, wide)
    plan = _plan(kernels, q, k, documents, query_start, key_start, window)
    return _softmax_backward(q, k, v, o, lse, do, *plan, wide)


class _Attend(Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Documents,
        query_start: int,
        key_start: int,
        window: int | None,
    ) -> Tensor:
        o, lse = forward(q, k, v, documents, query_start, key_start, window)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.place = documents, query_start, key_start, window
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        return *backward(q, k, v, o, lse, do, *ctx.place), None, None, None, None


def _check(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None) -> None:
    """Raise ValueError for arguments of `forward` that do not fit each other."""
    (b, t, h, kdim), (batch, j, groups, dim), start = q.shape, k.shape, documents.start
    if batch != b or dim != kdim or h % groups:
        raise ValueError(f"k: expected [{b}, J, a divisor of {h}, {kdim}] beside q, found {list(k.shape)}")
    if v.shape[:3] != (b, j, groups):
        raise ValueError(f"v: expected [{b}, {j}, {groups}, V] beside k, found {list(v.shape)}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v: expected one dtype, found {q.dtype}, {k.dtype} and {v.dtype}")
    if start is not None and start.shape not in ((b, t), (b, 1)):
        raise ValueError(f"documents.start: expected [{b}, {t}], found {list(start.shape)}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1 key, found {window}")


def _plan(
    kernels: Kernels, q: Tensor, k: Tensor, documents: Documents, query_start: int, key_start: int, window: int | None
) -> Plan:
    place = Place(q.shape[0], q.shape[1], query_start, k.shape[1], key_start, window)
    return documents.plan(place, kernels.dense_forward is not None, q.device)


@operator
def _softmax_forward(
    q: Tensor, k: Tensor, v: Tensor, calls: list[int], edges: Tensor, wide: bool
) -> tuple[Tensor, Tensor]:
    return softmax_fused.forward(_selected(q, v), q, k, v, read(calls), edges, wide)


@operator
def _softmax_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    calls: list[int],
    edges: Tensor,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return softmax_fused.backward(_selected(q, v), q, k, v, o, lse, do, read(calls), edges, wide)


@operator
def _softmax_reference_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor | None,
    query_start: int,
    key_start: int,
    window: int | None,
    wide: bool,
) -> tuple[Tensor, Tensor]:
    o, lse = softmax_reference.forward(q, k, v, start, query_start, key_start, window)
    return o if wide else o.to(q.dtype), lse


@operator
def _softmax_reference_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    start: Tensor | None,
    query_start: int,
    key_start: int,
    window: int | None,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = softmax_reference.backward(q, k, v, o, lse, do, start, query_start, key_start, window)
    return (dq, dk, dv) if wide else (dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype))


ATTEND = _softmax_forward, _softmax_reference_forward  # kept where activations are selectively recomputed


@fake("softmax_forward")
@fake("softmax_reference_forward")
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    (b, t, h, _), wide = q.shape, state_dtype(q)
    o = q.new_empty((b, t, h, v.shape[-1]), dtype=wide if rest[-1] else q.dtype)
    return o, q.new_empty((b, h, t), dtype=wide)


@fake("softmax_backward")
@fake("softmax_reference_backward")
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape, dtype=state_dtype(x) if rest[-1] else x.dtype) for x in (q, k, v))
    return dq, dk, dv


def _selected(q: Tensor, v: Tensor) -> Kernels:
    kernels = softmax_kernels.select(q, v)
    assert kernels is not None
    return kernels
