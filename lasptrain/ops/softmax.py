"""Causal softmax attention within documents and, if it slides, within a window, one block of queries at a time.

Letters as in `lasptrain.ops`; J is the number of keys, G the number of their heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

BLOCK = 1024  # queries


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_doc_ids: Tensor | None,
    key_doc_ids: Tensor | None,
    sliding_window: int | None,
) -> Tensor:
    """Return softmax(q kᵀ / √K) v, [B, T, H, K].

    Args:
        q: [B, T, H, K]. The last query stands at the last key.
        k, v: [B, J, G, K], J ≥ T; G divides H, and H / G consecutive heads of q share one of k and v.
        query_doc_ids, key_doc_ids: [B, T] and [B, J] integers; a query sees keys of its own number. None: all are one.
        sliding_window: keys that a query sees at most, its own included; None: all before.
    """
    if query_doc_ids is None and k.shape[1] == q.shape[1] and (sliding_window is None or sliding_window >= q.shape[1]):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    o: Tensor = _Blocks.apply(q, k, v, query_doc_ids, key_doc_ids, sliding_window)  # type: ignore[no-untyped-call]
    return o


class _Blocks(Function):
    """Attention that saves only its inputs: a block's scores and mask exist only while it is computed, both ways."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        query_doc_ids: Tensor | None,
        key_doc_ids: Tensor | None,
        sliding_window: int | None,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, query_doc_ids, key_doc_ids)
        ctx.sliding_window = sliding_window
        o = torch.empty_like(q, memory_format=torch.contiguous_format)
        for queries, keys in _blocks(q.shape[1], k.shape[1], sliding_window):
            mask = _visible(queries, keys, q, k, query_doc_ids, key_doc_ids, sliding_window)
            o[:, queries] = _block(q[:, queries], k[:, keys], v[:, keys], mask)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, query_doc_ids, key_doc_ids = ctx.saved_tensors
        wide = torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for queries, keys in _blocks(q.shape[1], k.shape[1], ctx.sliding_window):
            mask = _visible(queries, keys, q, k, query_doc_ids, key_doc_ids, ctx.sliding_window)
            part_q, part_k, part_v = (x.detach().requires_grad_() for x in (q[:, queries], k[:, keys], v[:, keys]))
            with torch.enable_grad():
                o = _block(part_q, part_k, part_v, mask)
            dq[:, queries], dpart_k, dpart_v = torch.autograd.grad(o, (part_q, part_k, part_v), do[:, queries])
            dk[:, keys] += dpart_k
            dv[:, keys] += dpart_v
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _blocks(queries: int, keys: int, sliding_window: int | None) -> list[tuple[slice, slice]]:
    """Return blocks of queries, each with the keys that it may see."""
    before = keys - queries
    found = []
    for start in range(0, queries, BLOCK):
        stop = min(start + BLOCK, queries)
        first = 0 if sliding_window is None else max(0, before + start - sliding_window + 1)
        found.append((slice(start, stop), slice(first, before + stop)))
    return found


def _visible(
    queries: slice,
    keys: slice,
    q: Tensor,
    k: Tensor,
    query_doc_ids: Tensor | None,
    key_doc_ids: Tensor | None,
    sliding_window: int | None,
) -> Tensor:
    """Return True where a query of the block sees a key: [rows, columns], or [B, 1, rows, columns] with documents."""
    before = k.shape[1] - q.shape[1]
    row = torch.arange(before + queries.start, before + queries.stop, device=q.device)
    lag = row[:, None] - torch.arange(keys.start, keys.stop, device=q.device)
    mask = lag >= 0 if sliding_window is None else (lag >= 0) & (lag < sliding_window)
    if query_doc_ids is None or key_doc_ids is None:
        return mask
    return mask & (query_doc_ids[:, None, queries, None] == key_doc_ids[:, None, None, keys])


def _block(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attend for one block; heads of k and v are repeated, because a fused kernel with a mask needs as many as q."""
    share = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(share, 2), v.repeat_interleave(share, 2)))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
