"""Kimi Delta Attention (arXiv:2510.26692) in numbers."""

from typing import ClassVar, Literal

from lasptrain.architectures.delta_rule import STEP, GatedByData
from lasptrain.architectures.section import optional


class Kda(GatedByData):
    """The delta rule with a decay per key channel and token; decay and gate come through bottlenecks."""

    implementation: ClassVar[str] = "lasptrain.models.kda"

    arch: Literal["kda"] = "kda"
    gate: Literal["silu", "sigmoid"] = optional("sigmoid", "function of the gate on the output")

    def mixer_parameters(self, layer: int) -> dict[str, int]:
        """Return the common parts with bottlenecks of width V and K for gate and decay, beta, biases and slopes."""
        dim, heads, keys, values = self.dim, self.heads, self.K, self.V
        parts = super().mixer_parameters(layer)
        parts["mixer"] += (dim + heads * values) * values - dim * heads * values  # the gate
        parts["mixer"] += (dim + heads * keys) * keys  # the decay
        return parts | {"beta": heads * dim, "decay": heads * (keys + 1)}

    def first_slopes(self) -> list[float]:
        """Return slopes spread evenly over (1, 16), times the median step."""
        return [STEP * (1 + 15 * (head + 0.5) / self.heads) for head in range(self.heads)]
