"""Kimi Delta Attention (arXiv:2510.26692)."""

from __future__ import annotations

import torch
from torch import Tensor

from lasptrain.architectures.kda import Kda
from lasptrain.models.delta_rule import Decay, DeltaRule, LowRank, Rate, log_decay
from lasptrain.models.layers import wide
from lasptrain.models.linear import HasWeight, Linear
from lasptrain.parallel.recurrence import ShardedRecurrence


def mixer(model: Kda, layer: int, attention: ShardedRecurrence) -> KimiDeltaAttention:
    """Return the mixer of a layer."""
    return KimiDeltaAttention(model, attention)


class KimiDeltaAttention(DeltaRule):
    """β = sigmoid(W_β h); a decay per key channel and token, and a gate, both through bottlenecks."""

    def __init__(self, cfg: Kda, attention: ShardedRecurrence):
        super().__init__(cfg, cfg.heads, cfg.gate, attention)
        paper, keys, values = cfg.decay == "paper", cfg.heads * cfg.K, cfg.heads * cfg.V
        self.beta = Linear(cfg.dim, cfg.heads)
        self.decay_proj = LowRank(cfg.dim, cfg.K, keys, zero=not paper)
        self.decay = Decay(cfg.heads, keys, paper=paper)
        self.gate = LowRank(cfg.dim, cfg.V, values)

    def _decay_weights(self) -> Rate:
        rate: Rate = self.decay()
        return rate

    def _gates(self) -> list[HasWeight]:
        return [self.beta, self.decay_proj.down]

    def _written(self, products: list[Tensor], decay: Rate) -> tuple[Tensor, Tensor]:
        beta, x = products
        return torch.sigmoid(wide(beta)), log_decay(self.decay_proj.up(x), decay, self.heads)

    def _output_gate(self) -> HasWeight:
        return self.gate.down

    def _opened(self, gate: Tensor) -> Tensor:
        y: Tensor = self.gate.up(gate)
        return y
