"""Retention (RetNet, arXiv:2307.08621): linear attention with a constant decay per head and rotated q and k."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lasptrain.architectures.retnet import RetNet
from lasptrain.models.layers import Phases, RMSNorm, Rotary
from lasptrain.models.linear import Linear, multi_linear
from lasptrain.models.mixer import RecurrentMixer, split_heads
from lasptrain.ops.recurrence import Inputs
from lasptrain.parallel.recurrence import ShardedRecurrence


def mixer(model: RetNet, layer: int, attention: ShardedRecurrence) -> Retention:
    """Return the mixer of a layer."""
    sizes = (model.dim, model.heads, model.K, model.V)
    return Retention(*sizes, decayed=model.decay != "none", attention=attention)


class Retention(RecurrentMixer):
    """q, k, v linear, q and k rotated, q scaled by K^−½; y = W (rms(o) per head ⊙ silu(gate))."""

    def __init__(
        self, dim: int, heads: int, key_dim: int, value_dim: int, *, decayed: bool = True, attention: ShardedRecurrence
    ):
        super().__init__()
        self.heads, self.attention = heads, attention
        self.scale = key_dim**-0.5
        self.q, self.k = Linear(dim, heads * key_dim), Linear(dim, heads * key_dim)
        self.v, self.gate = Linear(dim, heads * value_dim), Linear(dim, heads * value_dim)
        self.out = Linear(heads * value_dim, dim)
        self.norm = RMSNorm(value_dim)
        self.rotary = Rotary(key_dim)
        self.register_buffer("slope", torch.empty(heads) if decayed else None)

    def prepare(self, length: int) -> Phases:
        wide = torch.promote_types(self.q.weight.dtype, torch.float32)
        return self.rotary(length, self.q.weight.device, wide)

    def keys(self, h: Tensor, phases: Phases) -> Inputs:
        """Return k and v, [B, T, H, ·], and the log decay."""
        k, v = multi_linear(h, self.k, self.v)
        return phases.rotated(split_heads(k, self.heads)), split_heads(v, self.heads), self.log_decay

    def queries(self, h: Tensor, phases: Phases) -> tuple[Tensor, Tensor]:
        """Return q [B, T, H, K] and the gate [B, T, H·V]."""
        q, gate = multi_linear(h, self.q, self.gate)
        return phases.rotated(split_heads(q, self.heads) * self.scale), gate

    def project(self, h: Tensor, phases: Phases) -> tuple[Inputs, Tensor, Tensor]:
        """Return `keys` and `queries` at once."""
        k, v, q, gate = multi_linear(h, self.k, self.v, self.q, self.gate)
        inputs = phases.rotated(split_heads(k, self.heads)), split_heads(v, self.heads), self.log_decay
        return inputs, phases.rotated(split_heads(q, self.heads) * self.scale), gate

    def output(self, o: Tensor, gate: Tensor) -> Tensor:
        """Return y [B, T, D] from o [B, T, H, V] and the gate."""
        y: Tensor = self.out(self.norm(o).flatten(2) * F.silu(gate))
        return y
