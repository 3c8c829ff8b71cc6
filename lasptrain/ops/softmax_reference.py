"""The definition of softmax attention over one block of keys, in plain PyTorch, at most BLOCK × BLOCK scores at a time.

A query at position p sees the keys at max(start of its document, p − window + 1) to p, as far as they are in the block:

    s = q kᵀ / √K    lse = log Σ eˢ    o = Σ eˢ⁻ˡˢᵉ v

Letters as in `lasptrain.ops`. Everything is computed in at least fp32; keys of grouped heads are not repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt

import torch
from torch import Tensor

from lasptrain.ops import state_dtype

BLOCK = 1024  # queries, and keys


def merge(o: Tensor, lse: Tensor, other_o: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return the attention over two sets of keys from that over each: o [B, T, H, V], lse [B, H, T], at least fp32.

    Where one saw nothing (lse −∞) the other stands; where neither did, o is the first one's.
    """
    wide, weight = state_dtype(o), share(lse, other_lse).mT[..., None]
    return torch.lerp(o.to(wide), other_o.to(wide), weight.to(wide)), torch.logaddexp(lse, other_lse)


def share(lse: Tensor, other_lse: Tensor) -> Tensor:
    """Return the weight of the other set's output in that over both, 0 to 1."""
    return torch.sigmoid(other_lse - lse).nan_to_num(nan=0.0)  # both −∞


def forward(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, query_start: int, key_start: int, window: int | None
) -> tuple[Tensor, Tensor]:
    """Return o [B, T, H, V] and lse [B, H, T], at least fp32; 0 and −∞ for queries that see nothing.

    q [B, T, H, K], k [B, J, G, K], v [B, J, G, V], start [B, T] or None (0), as in `lasptrain.ops.softmax.forward`.
    """
    (b, t, h, _), wide = q.shape, state_dtype(q)
    o = q.new_zeros((b, t, h, v.shape[-1]), dtype=wide)
    lse = q.new_full((b, h, t), -torch.inf, dtype=wide)
    for rows, columns in _blocks(t, k.shape[1], start, query_start, key_start, window):
        s = _scores(q, k, rows, columns, start, query_start, key_start, window)
        part = s.logsumexp(-1, keepdim=True)
        weight = (s - part.masked_fill(part == -torch.inf, 0)).exp()
        found = _ungrouped(weight @ _keys(v, columns), h)
        o[:, rows], lse[..., rows] = merge(o[:, rows], lse[..., rows], found, _ungrouped(part, h)[..., 0].mT)
    return o, lse


def backward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what this block of keys adds to dq, and its dk and dv, all at least fp32.

    o, lse: over all keys that the queries see, of whatever blocks. do: the gradient of o.
    """
    h, wide = q.shape[2], state_dtype(q)
    dq, dk, dv = (torch.zeros_like(x, dtype=wide, memory_format=torch.contiguous_format) for x in (q, k, v))
    for rows, columns in _blocks(q.shape[1], k.shape[1], start, query_start, key_start, window):
        s = _scores(q, k, rows, columns, start, query_start, key_start, window)
        total = _grouped(lse[..., rows].mT[..., None].to(wide), k.shape[2])
        weight = (s - total.masked_fill(total == -torch.inf, 0)).exp()
        do_part = _grouped(do[:, rows].to(wide), k.shape[2])
        own = (do_part * _grouped(o[:, rows].to(wide), k.shape[2])).sum(-1, keepdim=True)
        ds = weight * (do_part @ _keys(v, columns).mT - own) / sqrt(q.shape[-1])
        dq[:, rows] += _ungrouped(ds @ _keys(k, columns), h)
        dk[:, columns] += (ds.mT @ _grouped(q[:, rows].to(wide), k.shape[2])).transpose(1, 2)
        dv[:, columns] += (weight.mT @ do_part).transpose(1, 2)
    return dq, dk, dv


def _blocks(
    t: int, j: int, start: Tensor | None, query_start: int, key_start: int, window: int | None
) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries and of keys that they may see; one that no query of a block sees may be among them."""
    for first in range(0, t, BLOCK):
        stop = min(first + BLOCK, t)
        low = 0 if window is None else max(0, query_start + first - window + 1)
        if start is not None and start.device.type == "cpu":  # on another device this would wait for it
            low = max(low, int(start[:, min(first, start.shape[1] - 1)].min()))
        high = min(query_start + stop - key_start, j)
        for column in range(max(low - key_start, 0), high, BLOCK):
            yield slice(first, stop), slice(column, min(column + BLOCK, high))


def _scores(
    q: Tensor,
    k: Tensor,
    rows: slice,
    columns: slice,
    start: Tensor | None,
    query_start: int,
    key_start: int,
    window: int | None,
) -> Tensor:
    """Return the scores [B, G, H / G · rows, columns], −∞ where a query does not see a key."""
    query = torch.arange(query_start + rows.start, query_start + rows.stop, device=q.device)[:, None]
    key = torch.arange(key_start + columns.start, key_start + columns.stop, device=q.device)
    seen = (key <= query)[None]
    if window is not None:
        seen = seen & (key > query - window)
    if start is not None:
        seen = seen & (key >= start.expand(-1, q.shape[1])[:, rows, None])
    s = _grouped(q[:, rows].to(state_dtype(q)), k.shape[2]) @ _keys(k, columns).mT / sqrt(q.shape[-1])
    return s.masked_fill_(~seen.repeat(1, q.shape[2] // k.shape[2], 1)[:, None], -torch.inf)


def _keys(x: Tensor, columns: slice) -> Tensor:
    """Return columns of x [B, J, G, K] as [B, G, columns, K], at least fp32."""
    return x[:, columns].transpose(1, 2).to(state_dtype(x))


def _grouped(x: Tensor, groups: int) -> Tensor:
    """Return x [B, T, H, K] as [B, G, H / G · T, K]: the queries of all heads that share a key's, one after another."""
    b, t, h, _ = x.shape
    return x.view(b, t, groups, h // groups, -1).permute(0, 2, 3, 1, 4).reshape(b, groups, h // groups * t, -1)


def _ungrouped(x: Tensor, heads: int) -> Tensor:
    """Return x [B, G, H / G · T, K] as [B, T, H, K]."""
    b, groups, n, _ = x.shape
    share = heads // groups
    return x.view(b, groups, share, n // share, -1).permute(0, 3, 1, 2, 4).reshape(b, n // share, heads, -1)
