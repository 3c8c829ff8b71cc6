"""TransNormerLLM's mixer (arXiv:2307.14995)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lasptrain.architectures.tnl import Tnl
from lasptrain.models.layers import Lrpe, Phases, srms
from lasptrain.models.linear import Linear, multi_linear
from lasptrain.models.mixer import RecurrentMixer, split_heads
from lasptrain.ops.recurrence import Inputs
from lasptrain.parallel.recurrence import ShardedRecurrence


def mixer(model: Tnl, layer: int, attention: ShardedRecurrence) -> TransNormer:
    """Return the mixer of a layer."""
    sizes = (model.dim, model.heads, model.K, model.V)
    return TransNormer(*sizes, lrpe=layer in model.lrpe, decayed=model.decay != "none", attention=attention)


class TransNormer(RecurrentMixer):
    """Linear attention of TransNormerLLM (arXiv:2307.14995).

    q, k = silu(W h), with LRPE in flagged layers; v and the gate u are linear; y = W (u ⊙ srms(o)) over all heads.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        *,
        lrpe: bool,
        decayed: bool,
        attention: ShardedRecurrence,
    ):
        super().__init__()
        self.heads, self.attention = heads, attention
        self.q, self.k = Linear(dim, heads * key_dim), Linear(dim, heads * key_dim)
        self.v, self.gate = Linear(dim, heads * value_dim), Linear(dim, heads * value_dim)
        self.out = Linear(heads * value_dim, dim)
        self.lrpe = Lrpe(heads, key_dim) if lrpe else None
        self.register_buffer("slope", torch.empty(heads) if decayed else None)

    def prepare(self, length: int) -> Phases | None:
        return None if self.lrpe is None else self.lrpe(length)

    def keys(self, h: Tensor, phases: Phases | None) -> Inputs:
        """Return k and v, [B, T, H, ·], and the log decay."""
        k, v = multi_linear(h, self.k, self.v)
        return self._features(k, phases), split_heads(v, self.heads), self.log_decay

    def queries(self, h: Tensor, phases: Phases | None) -> tuple[Tensor, Tensor]:
        """Return q [B, T, H, ·] and the gate [B, T, H·V]."""
        q, gate = multi_linear(h, self.q, self.gate)
        return self._features(q, phases), gate

    def project(self, h: Tensor, phases: Phases | None) -> tuple[Inputs, Tensor, Tensor]:
        """Return `keys` and `queries` at once."""
        k, v, q, gate = multi_linear(h, self.k, self.v, self.q, self.gate)
        inputs = self._features(k, phases), split_heads(v, self.heads), self.log_decay
        return inputs, self._features(q, phases), gate

    def _features(self, x: Tensor, phases: Phases | None) -> Tensor:
        x = split_heads(F.silu(x), self.heads)
        return x if phases is None else phases.features(x)

    def output(self, o: Tensor, gate: Tensor) -> Tensor:
        """Return y [B, T, D] from o [B, T, H, V] and the gate."""
        y: Tensor = self.out(gate * srms(o.flatten(2)))
        return y
