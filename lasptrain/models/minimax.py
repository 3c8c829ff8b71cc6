"""Lightning attention of MiniMax-01 (arXiv:2501.08313): linear attention with a constant decay per head and a gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasptrain.models.layers import RMSNorm
from lasptrain.models.linear import Linear, products
from lasptrain.models.mixers import State
from lasptrain.parallel.attention import Attention, Memory, Pending


class Lightning(nn.Module):
    """q, k, v = silu(W h); y = W (sigmoid(gate) ⊙ rms(o)), one mean over all heads; no scale, no positions."""

    def __init__(
        self, dim: int, heads: int, key_dim: int, value_dim: int, *, decayed: bool = True, attention: Attention
    ):
        super().__init__()
        self.heads, self.attention = heads, attention
        self.q, self.k = Linear(dim, heads * key_dim), Linear(dim, heads * key_dim)
        self.v, self.gate = Linear(dim, heads * value_dim), Linear(dim, heads * value_dim)
        self.out = Linear(heads * value_dim, dim)
        self.norm = RMSNorm(heads * value_dim)
        self.slope: Tensor | None
        self.register_buffer("slope", torch.empty(heads) if decayed else None)

    def phases(self, length: int) -> None:
        return None

    def forward(
        self, h: Tensor, phases: None, doc: Tensor | None, carry: State, memory: Memory, leave: bool
    ) -> tuple[Tensor, State]:
        if self.attention.scan.size > 1:
            pending = self._begin(*self.keys(h), doc, carry, memory, leave)
            q, gate = self.queries(h)
        else:
            k, v, q, gate = self.project(h)
            pending = self._begin(k, v, doc, carry, memory, leave)
        o, leaving = self.attention.finish(pending, q)
        return self.output(o, gate), (leaving,)

    def state(self, h: Tensor, phases: None, doc: Tensor | None, carry: State, memory: Memory) -> State:
        """What leaves the segment, without outputs."""
        return (self.attention.leave(self._begin(*self.keys(h), doc, carry, memory, True)),)

    def _begin(self, k: Tensor, v: Tensor, doc: Tensor | None, carry: State, memory: Memory, leave: bool) -> Pending:
        decay = None if self.slope is None else -self.slope
        return self.attention.begin(k, v, decay, doc, carry=carry[0], memory=memory, leave=leave)

    def keys(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """k and v, [B, T, H, ·]."""
        k, v = products(h, self.k, self.v)
        return self._active(k), self._active(v)

    def queries(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """q [B, T, H, K] and the gate [B, T, H·V]."""
        q, gate = products(h, self.q, self.gate)
        return self._active(q), gate

    def project(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`keys` and `queries` at once."""
        k, v, q, gate = products(h, self.k, self.v, self.q, self.gate)
        return self._active(k), self._active(v), self._active(q), gate

    def _active(self, x: Tensor) -> Tensor:
        return F.silu(x).view(*x.shape[:2], self.heads, -1)

    def output(self, o: Tensor, gate: Tensor) -> Tensor:
        """y [B, T, D] from o [B, T, H, V] and the gate."""
        y: Tensor = self.out(torch.sigmoid(gate) * self.norm(o.flatten(2)))
        return y
