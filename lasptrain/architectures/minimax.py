"""MiniMax-01's lightning attention (arXiv:2501.08313) in numbers."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lasptrain.architectures.base import Norm
from lasptrain.architectures.decay import Decaying, Schedule
from lasptrain.architectures.section import optional


class MiniMax(Decaying):
    """Linear attention with a constant decay per head and a gate, on a residual that carries the normalised value."""

    implementation: ClassVar[str] = "lasptrain.models.minimax"

    arch: Literal["minimax"] = "minimax"
    decay: Schedule = optional("minimax_hf", "schedule of the decays by layer and head")
    alpha: Annotated[float, Field(gt=0, le=1e3)] | None = optional(
        None, "factor of the residual; (2·layers)^¼ if not given"
    )

    @property
    def norm(self) -> Norm:
        """Return the norm of MiniMax-01."""
        return Norm(eps=1e-5)

    @property
    def residual(self) -> float:
        """Return α."""
        return self.alpha or float((2 * self.layers) ** 0.25)

    def mixer_parameters(self, layer: int) -> dict[str, int]:
        """Return the products' matrices, and the norm over all heads."""
        return super().mixer_parameters(layer) | {"norms": self.heads * self.V}
