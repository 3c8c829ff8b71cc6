"""State-space duality (Mamba-2, arXiv:2405.21060) in numbers."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lasptrain.architectures.base import Norm, State
from lasptrain.architectures.decay import Decaying, Schedule
from lasptrain.architectures.section import Problem, optional


class Ssd(Decaying):
    """Linear attention with a scalar decay per head, constant or per token, a gate, and maybe a convolution."""

    implementation: ClassVar[str] = "lasptrain.models.ssd"

    arch: Literal["ssd"] = "ssd"
    decay: Schedule | Literal["learned"] = optional(  # type: ignore[assignment]
        "window",
        "schedule of the decays by layer and head; learned: trained, starts as window",
    )
    data_dependent: bool = optional(False, "step and decay depend on the input")
    conv: Annotated[int, Field(ge=0, le=16)] = optional(0, "tokens seen by a convolution of q, k and v; 0: none")

    @property
    def norm(self) -> Norm:
        """Return the norm of Mamba-2."""
        return Norm(eps=1e-5)

    @property
    def learned(self) -> bool:
        """Return True where slopes are trained."""
        return self.decay == "learned"

    @property
    def decays_by_data(self) -> bool:
        """Return True with a data-dependent step."""
        return self.data_dependent

    @property
    def channels(self) -> int:
        """Channels of the convolution: q, k and v."""
        return self.heads * (2 * self.K + self.V)

    def problems(self) -> Iterator[Problem]:
        """Yield a convolution that sees no other token, and decays that cannot be learned, or do not exist."""
        yield from super().problems()
        if self.conv == 1:
            yield "model.conv", "found 1, which sees no other token; expected 0 or at least 2"
        if self.learned and not self.data_dependent:
            yield "model.decay", "found 'learned'; only data_dependent: true learns it, write window"
        if self.data_dependent and self.decay == "none":
            yield "model.decay", "found 'none'; with data_dependent = true expected a schedule, such as window"

    def mixer_parameters(self, layer: int) -> dict[str, int]:
        """Return the products' matrices, the step, the convolution, and the norm over all heads."""
        parts = super().mixer_parameters(layer)
        if self.data_dependent:
            parts["step"] = self.heads * (self.dim + 1 + self.learned)
        if self.conv:
            parts["convolution"] = self.channels * (self.conv + 1)
        return parts | {"norms": self.heads * self.V}

    def state(self, layer: int) -> State:
        """Return the size of the state, and of the rows that the convolution reaches."""
        return super().state(layer)._replace(rows=max(self.conv - 1, 0) * self.channels)
