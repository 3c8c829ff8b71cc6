"""Softmax attention by a mask, in float64, and kernels in plain PyTorch that take what those of a GPU take."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lasptrain.ops.softmax import Documents
from lasptrain.ops.softmax_kernels import Gradients, Kernels, Lengths, Mask


class Scene(NamedTuple):
    """A block of keys and queries: sizes, places, and the first queries of documents, the same in rows 0, 2, …"""

    t: int
    j: int
    query_start: int
    key_start: int
    window: int | None = None
    begins: tuple[int, ...] | None = None  # None: no documents
    carry: int | None = None  # where the document began that goes on from the left; one earlier in every other row
    b: int = 1
    heads: tuple[int, int] = (2, 1)  # of q, of k
    dims: tuple[int, int] = (8, 8)  # K, V

    def documents(self, device: str = "cpu") -> Documents:
        ids = None
        if self.begins is not None:
            starts = torch.zeros(self.b, self.t, dtype=torch.int32)
            for row in range(self.b):
                starts[row, [max(first - row % 2, 0) for first in self.begins]] = 1
            ids = starts.cumsum(1, dtype=torch.int32).to(device)
        carry = None
        if self.carry is not None:
            carry = torch.tensor([max(self.carry - row % 2, 0) for row in range(self.b)]).to(device)
        return Documents.of(ids, self.query_start, carry)

    def tensors(self, seed: int = 0) -> list[Tensor]:
        """q, k, v and do, normal, float64."""
        g = torch.Generator().manual_seed(seed)
        (h, groups), (kdim, vdim) = self.heads, self.dims
        shapes = (self.t, h, kdim), (self.j, groups, kdim), (self.j, groups, vdim), (self.t, h, vdim)
        return [torch.randn(self.b, *shape, generator=g, dtype=torch.float64) for shape in shapes]

    @property
    def place(self) -> tuple[int, int, int | None]:
        return self.query_start, self.key_start, self.window

    def visible(self) -> Tensor:
        """True where a query sees a key, [B, T, J]: counted token by token."""
        documents = self.documents()
        seen = torch.zeros(self.b, self.t, self.j, dtype=torch.bool)
        for row in range(self.b):
            for i in range(self.t):
                position = self.query_start + i
                start = 0 if documents.start is None else int(documents.start.expand(self.b, self.t)[row, i])
                for n in range(self.j):
                    near = self.window is None or position - (self.key_start + n) < self.window
                    seen[row, i, n] = start <= self.key_start + n <= position and near
        return seen


def brute(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """o and lse by a mask [B, T, J] over all scores, with gradients by autograd; 0 and −∞ where nothing is seen."""
    share = q.shape[2] // k.shape[2]
    score = torch.einsum("bihk,bjhk->bhij", q, k.repeat_interleave(share, 2)) / q.shape[-1] ** 0.5
    score = score.masked_fill(~visible[:, None], -torch.inf)
    lse = score.logsumexp(-1)
    weight = (score - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    return torch.einsum("bhij,bjhk->bihk", weight, v.repeat_interleave(share, 2)), lse


def gradients(scene: Scene, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> Gradients:
    """Gradients of `brute`."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o, _ = brute(q, k, v, scene.visible())
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), do)
    return dq, dk, dv


def fake_kernels(dense: bool = True) -> Kernels:
    """Kernels with the interface and the peculiarities of those of a GPU, for tensors of any device and dtype."""
    return Kernels(_varlen, _varlen_back, _dense, _dense_back) if dense else Kernels(_varlen, _varlen_back)


def _seen(n: int, m: int, mask: Mask, most: int) -> Tensor:
    """Visible [1, n, m] as flash attention has it: a window that reaches the longest sequence is none, and one that
    leaves the right side free frees it by the longest sequence's length only."""
    lag = torch.arange(n)[:, None] + m - n - torch.arange(m)
    seen = lag >= 0 if mask.causal else torch.ones(n, m, dtype=torch.bool)
    if 0 <= mask.left < most:
        seen = seen & (lag <= mask.left) & (lag >= (0 if mask.causal else -most))
    return seen[None]


def _sequences(q: Tensor, k: Tensor, lengths: Lengths) -> list[tuple[slice, slice]]:
    rows, keys = lengths.rows.tolist(), lengths.keys.tolist()
    assert lengths.rows.dtype == lengths.keys.dtype == torch.int32 and len(rows) == len(keys)
    assert (rows[0], rows[-1], keys[0], keys[-1]) == (0, len(q), 0, len(k)), "every row belongs to a sequence"
    assert lengths.most_rows > 1, "one query at most: queries would be swapped for heads"
    found = [(slice(*r), slice(*c)) for r, c in zip(pairwise(rows), pairwise(keys), strict=True)]
    # A kernel's grid covers the longest sequence: what lies beyond is not written.
    assert all(0 <= r.stop - r.start <= lengths.most_rows for r, _ in found)
    assert all(0 <= c.stop - c.start <= lengths.most_keys for _, c in found)
    return found


def _varlen(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    o, lse = torch.full_like(q, torch.nan), q.new_full((q.shape[1], len(q)), torch.nan, dtype=_wide(q))
    for rows, keys in _sequences(q, k, lengths):
        n, m = rows.stop - rows.start, keys.stop - keys.start
        assert not m or m >= n or mask == Mask(False), "a query of a sequence with keys sees some"
        o[rows], lse[:, rows] = _one(q[rows], k[keys], v[keys], _seen(n, m, mask, lengths.most_keys), scale)
    return o, lse


def _varlen_back(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    lengths: Lengths,
    mask: Mask,
    scale: float,
) -> Gradients:
    dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))
    for rows, keys in _sequences(q, k, lengths):
        seen = _seen(rows.stop - rows.start, keys.stop - keys.start, mask, lengths.most_keys)
        given = q[rows], k[keys], v[keys], o[rows], lse[:, rows], do[rows]
        dq[rows], dk[keys], dv[keys] = _one_back(*given, seen, scale)
    return dq, dk, dv


def _dense(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    seen = _seen_densely(q, k, causal)
    o, lse = zip(*(_one(q[n], k[n], v[n], seen, scale) for n in range(len(q))), strict=True)
    return torch.stack(o), torch.stack(lse)


def _dense_back(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, causal: bool, scale: float
) -> Gradients:
    seen = _seen_densely(q, k, causal)
    found = [_one_back(q[n], k[n], v[n], o[n], lse[n], do[n], seen, scale) for n in range(len(q))]
    dq, dk, dv = (torch.stack(parts) for parts in zip(*found, strict=True))
    return dq, dk, dv


def _seen_densely(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    (batch, n), m = q.shape[:2], k.shape[1]
    assert not causal or n == m
    assert batch.bit_count() == n.bit_count() == m.bit_count() == 1, "few shapes"
    return _seen(n, m, Mask(causal), m)


def _wide(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _one(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    dtype = _wide(q)
    scaled = q.to(dtype) * (scale * q.shape[-1] ** 0.5)
    o, lse = brute(scaled[None], k.to(dtype)[None], v.to(dtype)[None], seen)
    return o[0].to(q.dtype), lse[0]


def _one_back(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, seen: Tensor, scale: float
) -> Gradients:
    dtype, share = _wide(q), q.shape[1] // k.shape[1]
    q, k, v, o, do = (x.to(dtype) for x in (q, k, v, o, do))
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    score = torch.einsum("ihk,jhk->hij", q, k) * scale
    p = (score.masked_fill(~seen, -torch.inf) - lse[..., None]).exp()
    ds = p * (torch.einsum("ihk,jhk->hij", do, v) - (do * o).sum(-1).T[..., None]) * scale
    dq, dk = torch.einsum("hij,jhk->ihk", ds, k), torch.einsum("hij,ihk->jhk", ds, q)
    dv = torch.einsum("hij,ihk->jhk", p, do)
    return dq, dk.unflatten(1, (-1, share)).sum(2), dv.unflatten(1, (-1, share)).sum(2)
