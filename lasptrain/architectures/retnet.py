"""RetNet (arXiv:2307.08621) in numbers."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from lasptrain.architectures.decay import Decaying, Schedule
from lasptrain.architectures.nearest import nearest_fits
from lasptrain.architectures.section import Problem, optional


class RetNet(Decaying):
    """Linear attention with a constant decay per head, rotated q and k, and a gate."""

    implementation: ClassVar[str] = "lasptrain.models.retnet"

    arch: Literal["retnet"] = "retnet"
    decay: Schedule = optional("retnet", "schedule of the decays by layer and head")

    @property
    def V(self) -> int:
        """Value dim per head: twice dim / heads if not given."""
        return self.value_dim or 2 * self.dim // self.heads

    def problems(self) -> Iterator[Problem]:
        """Yield keys whose channels do not make pairs to rotate."""
        yield from super().problems()
        if self.K % 2:
            nearest = nearest_fits(self.K, lambda channels: channels % 2 == 0)
            yield "model.key_dim", f"{self.K} channels do not make pairs to rotate; nearest: {nearest}"

    def mixer_parameters(self, layer: int) -> dict[str, int]:
        """Return the products' matrices, and the norm over the V of a head."""
        return super().mixer_parameters(layer) | {"norms": self.V}
