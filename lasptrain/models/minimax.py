"""Lightning attention of MiniMax-01 (arXiv:2501.08313): linear attention with a constant decay per head and a gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lasptrain.architectures.minimax import MiniMax
from lasptrain.models.layers import RMSNorm
from lasptrain.models.linear import Linear, multi_linear
from lasptrain.models.mixer import RecurrentMixer, split_heads
from lasptrain.ops.recurrence import Inputs
from lasptrain.parallel.recurrence import ShardedRecurrence


def mixer(model: MiniMax, layer: int, attention: ShardedRecurrence) -> Lightning:
    """Return the mixer of a layer."""
    sizes = (model.dim, model.heads, model.K, model.V)
    return Lightning(*sizes, decayed=model.decay != "none", attention=attention)


class Lightning(RecurrentMixer):
    """q, k, v = silu(W h); y = W (sigmoid(gate) ⊙ rms(o)), one mean over all heads; no scale, no positions."""

    def __init__(
        self, dim: int, heads: int, key_dim: int, value_dim: int, *, decayed: bool = True, attention: ShardedRecurrence
    ):
        super().__init__()
        self.heads, self.attention = heads, attention
        self.q, self.k = Linear(dim, heads * key_dim), Linear(dim, heads * key_dim)
        self.v, self.gate = Linear(dim, heads * value_dim), Linear(dim, heads * value_dim)
        self.out = Linear(heads * value_dim, dim)
        self.norm = RMSNorm(heads * value_dim)
        self.register_buffer("slope", torch.empty(heads) if decayed else None)

    def keys(self, h: Tensor, phases: None) -> Inputs:
        """Return k and v, [B, T, H, ·], and the log decay."""
        k, v = multi_linear(h, self.k, self.v)
        return self._active(k), self._active(v), self.log_decay

    def queries(self, h: Tensor, phases: None) -> tuple[Tensor, Tensor]:
        """Return q [B, T, H, K] and the gate [B, T, H·V]."""
        q, gate = multi_linear(h, self.q, self.gate)
        return self._active(q), gate

    def project(self, h: Tensor, phases: None) -> tuple[Inputs, Tensor, Tensor]:
        """Return `keys` and `queries` at once."""
        k, v, q, gate = multi_linear(h, self.k, self.v, self.q, self.gate)
        return (self._active(k), self._active(v), self.log_decay), self._active(q), gate

    def _active(self, x: Tensor) -> Tensor:
        return split_heads(F.silu(x), self.heads)

    def output(self, o: Tensor, gate: Tensor) -> Tensor:
        """Return y [B, T, D] from o [B, T, H, V] and the gate."""
        y: Tensor = self.out(torch.sigmoid(gate) * self.norm(o.flatten(2)))
        return y
