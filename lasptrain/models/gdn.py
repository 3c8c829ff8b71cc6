"""Gated DeltaNet (arXiv:2412.06464)."""

from __future__ import annotations

import torch
from torch import Tensor

from lasptrain.architectures.gdn import Gdn
from lasptrain.models.delta_rule import Decay, DeltaRule, Rate, ZeroLinear, log_decay
from lasptrain.models.layers import wide
from lasptrain.models.linear import HasWeight, Linear
from lasptrain.parallel.recurrence import ShardedRecurrence


def mixer(model: Gdn, layer: int, attention: ShardedRecurrence) -> GatedDeltaNet:
    """Return the mixer of a layer."""
    return GatedDeltaNet(model, attention)


class GatedDeltaNet(DeltaRule):
    """β = sigmoid(W_β h), or twice that; a decay per head and token; a gate of full rank."""

    def __init__(self, cfg: Gdn, attention: ShardedRecurrence):
        super().__init__(cfg, cfg.Hk, cfg.gate, attention)
        paper = cfg.decay == "paper"
        self.most = 2.0 if cfg.negative_eigenvalues else 1.0
        self.beta = Linear(cfg.dim, cfg.heads)
        self.decay_proj = (Linear if paper else ZeroLinear)(cfg.dim, cfg.heads)
        self.decay = Decay(cfg.heads, cfg.heads, paper=paper)
        self.gate = Linear(cfg.dim, cfg.heads * cfg.V)

    def _decay_weights(self) -> Rate:
        rate: Rate = self.decay()
        return rate

    def _gates(self) -> list[HasWeight]:
        return [self.beta, self.decay_proj]

    def _written(self, products: list[Tensor], decay: Rate) -> tuple[Tensor, Tensor]:
        beta, x = products
        return self.most * torch.sigmoid(wide(beta)), log_decay(x, decay, self.heads)

    def _output_gate(self) -> HasWeight:
        return self.gate
