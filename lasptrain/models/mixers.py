"""Mixers: the layers that move information between tokens.

Each takes the normalised input h [B, T, D] and what the scan needs, and returns y [B, T, D] with its leaving state. It
makes k and v first, so that the exchange between ranks travels while q and the gate are computed. What `phases` returns
is small and full precision; the block makes it outside of recomputation and hands it in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasptrain.models.layers import Linear, Lrpe, Phases, RMSNorm, srms
from lasptrain.parallel.attention import Attention, Memory

State = tuple[Tensor | None, ...]  # what a mixer carries from segment to segment; only the mixer understands it


class TransNormer(nn.Module):
    """Linear attention of TransNormerLLM (arXiv:2307.14995).

    q, k = silu(W h), with LRPE in flagged layers; v and the gate u are linear; y = W (u ⊙ srms(o)) over all heads.
    """

    def __init__(
        self, dim: int, heads: int, key_dim: int, value_dim: int, *, lrpe: bool, decayed: bool, attention: Attention
    ):
        super().__init__()
        self.heads, self.attention = heads, attention
        self.q, self.k = Linear(dim, heads * key_dim), Linear(dim, heads * key_dim)
        self.v, self.gate = Linear(dim, heads * value_dim), Linear(dim, heads * value_dim)
        self.out = Linear(heads * value_dim, dim)
        self.lrpe = Lrpe(heads, key_dim) if lrpe else None
        self.slope: Tensor | None
        self.register_buffer("slope", torch.empty(heads) if decayed else None)

    def phases(self, length: int) -> Phases | None:
        return None if self.lrpe is None else self.lrpe(length)

    def forward(
        self, h: Tensor, phases: Phases | None, doc: Tensor | None, carry: State, memory: Memory, leave: bool
    ) -> tuple[Tensor, State]:
        split = (*h.shape[:2], self.heads, -1)
        k, v = F.silu(self.k(h)).view(split), self.v(h).view(split)
        if phases is not None:
            k = phases.features(k)
        log_decay = None if self.slope is None else -self.slope
        pending = self.attention.begin(
            k,
            v,
            log_decay,
            doc,
            angle=None if phases is None else phases.turn,
            carry=carry[0],
            memory=memory,
            leave=leave,
        )
        q, gate = F.silu(self.q(h)).view(split), self.gate(h)
        if phases is not None:
            q = phases.features(q)
        o, leaving = self.attention.finish(pending, q)
        return self.out(gate * srms(o.flatten(2))), (leaving,)


class Undecayed(nn.Module):
    """The linear transformer's attention (arXiv:2006.16236): φ(x) = elu(x) + 1, no decay, no gate.

    Without normaliser o = rms(q S / √K) per head; with it o = rms(q S / (q z + 1e-10)), where z, the sum of keys, is
    one more column of the state because v gets a column of ones.
    """

    def __init__(self, dim: int, heads: int, key_dim: int, value_dim: int, *, normalizer: bool, attention: Attention):
        super().__init__()
        self.heads, self.normalizer, self.attention = heads, normalizer, attention
        self.scale = key_dim**-0.5
        self.q, self.k = Linear(dim, heads * key_dim), Linear(dim, heads * key_dim)
        self.v, self.out = Linear(dim, heads * value_dim), Linear(heads * value_dim, dim)
        self.norm = RMSNorm(value_dim)

    def phases(self, length: int) -> None:
        return None

    def forward(
        self, h: Tensor, phases: Phases | None, doc: Tensor | None, carry: State, memory: Memory, leave: bool
    ) -> tuple[Tensor, State]:
        split = (*h.shape[:2], self.heads, -1)
        k, v = (F.elu(self.k(h)) + 1).view(split), self.v(h).view(split)
        if self.normalizer:
            v = F.pad(v, (0, 1), value=1.0)
        pending = self.attention.begin(k, v, None, doc, carry=carry[0], memory=memory, leave=leave)
        q = (F.elu(self.q(h)) + 1).view(split)
        o, leaving = self.attention.finish(pending, q if self.normalizer else q * self.scale)
        if self.normalizer:
            o = o[..., :-1] / (o[..., -1:] + 1e-10)
        return self.out(self.norm(o).flatten(2)), (leaving,)
