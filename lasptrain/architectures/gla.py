"""Gated linear attention (GLA, arXiv:2312.06635) in numbers."""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lasptrain.architectures.base import State
from lasptrain.architectures.delta_rule import GatedByData
from lasptrain.architectures.section import Count, optional

TEMPER = 16  # ln a = ln sigmoid(x) / TEMPER


class Gla(GatedByData):
    """Linear attention with a decay per key channel and token; nothing is erased but by decay."""

    implementation: ClassVar[str] = "lasptrain.models.gla"

    arch: Literal["gla"] = "gla"
    conv: Annotated[int, Field(ge=0, le=16)] = optional(0, "tokens seen by convolutions of q, k and v; 0: none")
    decay_rank: Count = optional(16, "channels of the bottleneck through which the decay comes")
    gate: Literal["silu", "sigmoid"] = optional("silu", "function of the gate on the output")

    def mixer_parameters(self, layer: int) -> dict[str, int]:
        """Return the common parts, and the bottleneck and bias of the decay."""
        parts = super().mixer_parameters(layer)
        parts["mixer"] += (self.dim + self.heads * self.K) * self.decay_rank
        return parts | {"decay": self.heads * self.K}

    def recurrence_flops(self, layer: int) -> int:
        """Return the model FLOPs per token of the forward: 2·K·V each to write and to read."""
        return 4 * self.heads * self.K * self.V

    def state(self, layer: int) -> State:
        """Return the size of the state; a number per row moves it."""
        return super().state(layer)._replace(transition=self.heads * self.K)

    def first_slopes(self) -> list[float]:
        """Return ln 2 / 16, from a bias of zero."""
        return [math.log(2) / TEMPER] * self.heads
