"""Softmax attention as a layer of a hybrid stack: grouped-query, over all tokens before or over a sliding window."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lasptrain.architectures.base import Architecture
from lasptrain.models.layers import Phases, RMSNorm, Rotary
from lasptrain.models.linear import Linear, multi_linear
from lasptrain.models.mixer import Context, Mixer, State
from lasptrain.ops import softmax
from lasptrain.parallel.all_gather import gather
from lasptrain.parallel.halo import halo
from lasptrain.parallel.recurrence import ShardedRecurrence


def mixer(model: Architecture, layer: int, attention: ShardedRecurrence) -> Softmax:
    """Return the softmax attention of a layer."""
    return Softmax(model, attention)


class Seen(NamedTuple):
    """The keys and values that queries of a slice may see, up to the last query's own."""

    rows: Tensor  # [B, J, C], a key and a value side by side in each
    query_doc_ids: Tensor | None  # [B, T]; None: all is one document
    key_doc_ids: Tensor | None  # [B, J]
    final_state: Tensor | None  # carried to the next segment

    def documents(self) -> softmax.Documents:
        """Return the documents of the queries, at positions that count from the first key."""
        if self.query_doc_ids is None or self.key_doc_ids is None:
            return softmax.Documents()
        of_keys = softmax.Documents.of(self.key_doc_ids - self.key_doc_ids[:, :1], 0).start
        assert of_keys is not None
        return softmax.Documents(of_keys[:, -self.query_doc_ids.shape[1] :])


class Softmax(Mixer):
    """y = W attend(q, k, v), q, k, v linear, scores scaled by K^−½.

    By the keys of the model q and k are normed, over each head's channels or over all of them, and some of a head's
    channels rotated; o may have a gate, o ⊙ sigmoid(W h).

    Rows cross slices: k (before it is rotated, because positions count from the first visible key), v, and a column
    with document information. A sliding window takes the rows that it reaches from the slice before, over segments too;
    without one, all rows of the segment are gathered, and the final state is all rows so far.
    """

    compiled = ("rotated",)

    def __init__(self, cfg: Architecture, attention: ShardedRecurrence):
        super().__init__()
        self.sliding_window, self.attention, self.head_dim = cfg.sliding_window, attention, cfg.head_dim
        wide, narrow = cfg.query_channels, cfg.key_channels
        self.q, self.out = Linear(cfg.dim, wide), Linear(wide, cfg.dim)
        self.k, self.v = Linear(cfg.dim, narrow), Linear(cfg.dim, narrow)
        self.gate = Linear(cfg.dim, wide) if cfg.softmax_gate else None
        self.whole = cfg.qk_norm == "whole"
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if cfg.qk_norm != "none":
            self.q_norm = RMSNorm(wide if self.whole else cfg.head_dim, cfg.norm.eps)
            self.k_norm = RMSNorm(narrow if self.whole else cfg.head_dim, cfg.norm.eps)
        self.turned = cfg.rotated
        self.rotary = None if cfg.rotary is None else Rotary(self.turned, cfg.rotary)

    def forward(self, h: Tensor, phases: None, context: Context) -> tuple[Tensor, State]:
        q, k, v, *gate = multi_linear(h, self.q, self.k, self.v, *([self.gate] if self.gate else []))
        seen = self._seen(torch.cat([self._normed(k, self.k_norm), v], dim=-1), context)
        keys, values = seen.rows.split(k.shape[-1], dim=-1)
        q, keys = self.rotated(self._heads(self._normed(q, self.q_norm)), self._heads(keys))
        before = keys.shape[1] - q.shape[1]
        o = softmax.attend(q, keys, self._heads(values), seen.documents(), before, 0, self.sliding_window)
        y: Tensor = self.out(o.flatten(2) * torch.sigmoid(gate[0]) if gate else o.flatten(2))
        return y, (seen.final_state,)

    def state(self, h: Tensor, phases: None, context: Context) -> State:
        """Return the next segment's initial state, without computing outputs."""
        k, v = multi_linear(h, self.k, self.v)
        return (self._seen(torch.cat([self._normed(k, self.k_norm), v], dim=-1), context).final_state,)

    def _normed(self, x: Tensor, norm: RMSNorm | None) -> Tensor:
        """Return x [B, T, channels of all heads] normed, over all of them or by head."""
        if norm is None:
            return x
        y: Tensor = norm(x) if self.whole else norm(self._heads(x)).flatten(2)
        return y

    def _seen(self, rows: Tensor, context: Context) -> Seen:
        """Return what the queries of a slice see, given its own rows [B, T, C]: keys and values side by side."""
        if self.attention.scan.size == 1 and context.carry[0] is None and not context.output_final_state:
            return Seen(rows, context.doc_ids, context.doc_ids, None)
        if self.sliding_window is None:
            return self._all(rows, context)
        return self._near(rows, context, self.sliding_window - 1)

    def _near(self, rows: Tensor, context: Context, n: int) -> Seen:
        """Return rows and the n before them that the window reaches; in transit, a last column is 0 where none are."""
        doc_ids, (carry, *_), saved, output_final_state = context
        if n == 0:
            return Seen(rows, doc_ids, doc_ids, None)
        marked = rows, torch.ones_like(rows[..., :1])
        before, final_state = halo(marked, n, doc_ids, carry, self.attention.scan, saved, output_final_state)
        own = rows.new_zeros(rows.shape[:2], dtype=torch.int32) if doc_ids is None else doc_ids
        unseen = (before[..., -1] == 0).to(own.dtype)
        return Seen(torch.cat([before[..., :-1], rows], dim=1), own, torch.cat([-unseen, own], dim=1), final_state)

    def _all(self, rows: Tensor, context: Context) -> Seen:
        """Return all rows up to this slice's last.

        In transit, their last column is 1 where a document starts, as one does with a window.
        """
        doc_ids, (carry, *_), saved, output_final_state = context
        scan, length = self.attention.scan, rows.shape[1]
        starts = torch.zeros_like(rows[..., 0])
        if doc_ids is not None:
            starts.copy_(torch.diff(doc_ids, dim=1, prepend=doc_ids[:, :1] * 0))
        if carry is None and scan.rank == 0:
            starts[:, 0] = 1
        marked = gather(torch.cat([rows, starts[..., None]], dim=-1), scan, saved)
        before = 0 if carry is None else carry.shape[1]
        if carry is not None:
            marked = torch.cat([carry, marked], dim=1)
        final_state = marked if output_final_state else None
        stop = before + (scan.rank + 1) * length
        numbers = marked[:, :stop, -1].int().cumsum(1)
        return Seen(marked[:, :stop, :-1], numbers[:, stop - length :], numbers, final_state)

    def rotated(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate q [B, T, H, K] and k [B, J, G, K] to positions that count from the first key."""
        if self.rotary is None:
            return q, k
        wide = torch.promote_types(q.dtype, torch.float32)
        tables = self.rotary(k.shape[1], q.device, wide)
        return self._turned(q, tables, k.shape[1] - q.shape[1]), self._turned(k, tables, 0)

    def _turned(self, x: Tensor, tables: Phases, start: int) -> Tensor:
        """Return x [B, T, H, K] with its first channels rotated, and the others as they are."""
        if self.turned == self.head_dim:
            return tables.rotated(x, start)
        first, rest = x.split([self.turned, self.head_dim - self.turned], dim=-1)
        return torch.cat([tables.rotated(first, start), rest], dim=-1)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim)
