"""The Linear Transformer (arXiv:2006.16236) in numbers."""

from typing import ClassVar, Literal

from lasptrain.architectures.base import Architecture
from lasptrain.architectures.section import optional


class LinearTransformer(Architecture):
    """Linear attention without decay and gate; φ(x) = elu(x) + 1."""

    implementation: ClassVar[str] = "lasptrain.models.linear_transformer"

    arch: Literal["linear_transformer"] = "linear_transformer"
    decay: Literal["none"] = optional("none", "it has none")
    normalizer: bool = optional(False, "divide by q · Σk")

    def mixer_parameters(self, layer: int) -> dict[str, int]:
        """Return the matrices for q, k, v and output, and the norm over the V of a head."""
        return {"mixer": 2 * self.heads * (self.K + self.V) * self.dim, "norms": self.V}
