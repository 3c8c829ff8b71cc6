"""Softmax attention as a layer of a hybrid stack: grouped-query, over all tokens before or over a sliding window."""

from __future__ import annotations

import torch
from torch import Tensor

from lasptrain.architectures.base import Architecture
from lasptrain.models.layers import Phases, RMSNorm, Rotary
from lasptrain.models.linear import Linear, multi_linear
from lasptrain.models.mixer import Context, Mixer, State
from lasptrain.ops import softmax, state_dtype
from lasptrain.parallel import softmax as spread
from lasptrain.parallel.halo import halo
from lasptrain.parallel.place import Place
from lasptrain.parallel.recurrence import ShardedRecurrence


def mixer(model: Architecture, layer: int, attention: ShardedRecurrence) -> Softmax:
    """Return the softmax attention of a layer."""
    return Softmax(model, attention)


class Softmax(Mixer):
    """y = W attend(q, k, v), q, k, v linear, scores scaled by K^−½.

    By the keys of the model q and k are normed, over each head's channels or over all of them, and some of a head's
    channels rotated; o may have a gate, o ⊙ sigmoid(W h).

    Keys are rotated to their positions in the window. The state is the prefix, all keys and values before, or the last
    rows of them that the sliding window reaches; beside it stands the edge up to which the window has been read.
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
            _, eps, centred = cfg.norm
            self.q_norm = RMSNorm(wide if self.whole else cfg.head_dim, eps, centred=centred)
            self.k_norm = RMSNorm(narrow if self.whole else cfg.head_dim, eps, centred=centred)
        self.turned = cfg.rotated
        self.rotary = None if cfg.rotary is None else Rotary(self.turned, cfg.rotary)

    def forward(self, h: Tensor, phases: None, context: Context) -> tuple[Tensor, State]:
        q, k, v, *gate = multi_linear(h, self.q, self.k, self.v, *([self.gate] if self.gate else []))
        place = _place(context)
        q, k = self.rotated(self._tables(h, place), self._normed(q, self.q_norm), self._normed(k, self.k_norm))
        if context.saved.signals is not None:
            context.saved.signals.scores(q, k)
        o, state = (self._whole if self.sliding_window is None else self._near)(q, k, self._heads(v), place, context)
        y: Tensor = self.out(o.flatten(2) * torch.sigmoid(gate[0]) if gate else o.flatten(2))
        return y, (state, place.after)

    def state(self, h: Tensor, phases: None, context: Context) -> State:
        """Return the next segment's initial state, without computing outputs."""
        k, v = multi_linear(h, self.k, self.v)
        place, (carry, *_) = _place(context), context.carry
        (k,), v = self.rotated(self._tables(h, place), self._normed(k, self.k_norm)), self._heads(v)
        if self.sliding_window is None:
            return spread.grow(k, v, place, carry, self.attention.storage, context.saved), place.after
        return self._before(k, v, context)[1], place.after

    def _normed(self, x: Tensor, norm: RMSNorm | None) -> Tensor:
        """Return x [B, T, channels of all heads] normed, over all of them or by head."""
        if norm is None:
            return x
        y: Tensor = norm(x) if self.whole else norm(self._heads(x)).flatten(2)
        return y

    def _tables(self, h: Tensor, place: Place) -> Phases | None:
        """Return the phases of the positions in the window of h [B, T, D]."""
        if self.rotary is None:
            return None
        return self.rotary(h.shape[1], h.device, state_dtype(h), place.rotation)

    def rotated(self, tables: Phases | None, *parts: Tensor) -> list[Tensor]:
        """Return each of q or k [B, T, channels of all heads] by heads, [B, T, ·, K], some channels of each rotated."""
        return [self._turned(x, tables) for x in parts]

    def _turned(self, x: Tensor, tables: Phases | None) -> Tensor:
        x = self._heads(x)
        if tables is None or self.turned == self.head_dim:
            return x if tables is None else tables.rotated(x)
        first, rest = x.split([self.turned, self.head_dim - self.turned], dim=-1)
        return torch.cat([tables.rotated(first), rest], dim=-1)

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, place: Place, context: Context) -> tuple[Tensor, object]:
        """Return o [B, T, H, K] over all tokens before, and the prefix if it is wanted."""
        (carry, *_), saved, wanted = context.carry, context.saved, context.output_final_state
        return spread.attend(q, k, v, place, carry, self.attention.storage, saved, wanted)

    def _near(self, q: Tensor, k: Tensor, v: Tensor, place: Place, context: Context) -> tuple[Tensor, object]:
        """Return o [B, T, H, K] over the tokens that the window reaches, and the last rows if they are wanted."""
        before, final_state = self._before(k, v, context)
        n, sizes = before.shape[1], [k[0, 0].numel(), v[0, 0].numel()]
        reach = min(n, place.start)  # none on some ranks, and yet its gradient is part of the exchange
        rows = before[:, n - reach :].split(sizes, dim=-1)
        k, v = (torch.cat([self._heads(x), own], dim=1) for x, own in zip(rows, (k, v), strict=True))
        o = softmax.attend(q, k, v, place.documents, place.start, place.start - reach, self.sliding_window)
        return o, final_state

    def _before(self, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        """Return the rows [B, n, C] before the slice that the window reaches, and those before the next segment."""
        doc_ids, (carry, *_), saved, wanted, _ = context
        assert self.sliding_window is not None
        rows, n = (k.flatten(2), v.flatten(2)), self.sliding_window - 1
        if n == 0:
            return torch.cat(rows, dim=-1)[:, :0], None
        return halo(rows, n, doc_ids, carry, self.attention.scan, saved, wanted)

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim))
        return heads


def _place(context: Context) -> Place:
    assert context.place is not None  # the model has softmax layers
    return context.place
