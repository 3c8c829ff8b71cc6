"""Gated linear attention (GLA, arXiv:2312.06635)."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasptrain.architectures.gla import TEMPER, Gla
from lasptrain.models.delta_rule import DeltaRule, LowRank
from lasptrain.models.layers import wide
from lasptrain.models.linear import HasWeight, Linear
from lasptrain.models.mixer import Kinds
from lasptrain.models.start import Start
from lasptrain.parallel.recurrence import ShardedRecurrence


def mixer(model: Gla, layer: int, attention: ShardedRecurrence) -> GatedLinearAttention:
    """Return the mixer of a layer."""
    return GatedLinearAttention(model, attention)


class Bias(nn.Module):
    """The bias b [H·K] of a decay ln a = ln sigmoid(x + b) / 16; it starts at the slopes of the schedule."""

    full_precision = True

    def __init__(self, count: int):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(count))

    def initial(self, part: str, start: Start) -> Tensor:
        """Return b = −ln(e^{16 s} − 1), the same for all channels of a head."""
        assert start.slopes is not None
        first = -torch.log(torch.expm1(TEMPER * start.slopes.double())).to(start.device)
        return first.repeat_interleave(start.shape.numel() // first.numel())

    def forward(self) -> Tensor:
        """Return a copy: where parameters are sharded, they are gathered only while this runs."""
        return self.bias.clone()


class GatedLinearAttention(DeltaRule):
    """Nothing is erased; a decay per key channel and token, through a bottleneck."""

    elementwise: ClassVar[Kinds] = {"decay_proj": "decays", "decay": "decays"}
    erases: ClassVar[bool] = False

    def __init__(self, cfg: Gla, attention: ShardedRecurrence):
        super().__init__(cfg, cfg.heads, cfg.gate, attention)
        self.decay_proj = LowRank(cfg.dim, cfg.decay_rank, cfg.heads * cfg.K, zero=cfg.decay == "window")
        self.decay = Bias(cfg.heads * cfg.K)
        self.gate = Linear(cfg.dim, cfg.heads * cfg.V)

    def _decay_weights(self) -> Tensor:
        bias: Tensor = self.decay()
        return bias

    def _gates(self) -> list[HasWeight]:
        return [self.decay_proj.down]

    def _written(self, products: list[Tensor], decay: Tensor) -> tuple[None, Tensor]:
        x = wide(self.decay_proj.up(products[0])) + decay
        return None, (F.logsigmoid(x) / TEMPER).unflatten(-1, (self.heads, -1))

    def _output_gate(self) -> HasWeight:
        return self.gate
