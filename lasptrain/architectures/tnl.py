"""TransNormerLLM (arXiv:2307.14995) in numbers."""

import math
from collections.abc import Iterator
from typing import ClassVar, Literal

from lasptrain.architectures.base import Layers, Norm, State
from lasptrain.architectures.decay import Decaying
from lasptrain.architectures.section import Problem, optional


class Tnl(Decaying):
    """Linear attention with a constant decay per head and a gate; LRPE in some layers, norms without weights."""

    implementation: ClassVar[str] = "lasptrain.models.tnl"
    gated_mlp: ClassVar[bool] = False

    arch: Literal["tnl"] = "tnl"
    lrpe: Layers = optional((0,), "indices of the layers with LRPE")

    @property
    def norm(self) -> Norm:
        """Return a norm without weights."""
        return Norm(weighted=False)

    @property
    def embedding_scale(self) -> float:
        """Return √dim."""
        return math.sqrt(self.dim)

    def problems(self) -> Iterator[Problem]:
        """Yield LRPE on layers that do not exist."""
        yield from super().problems()
        yield from self.layer_problems("model.lrpe", self.lrpe)

    def mixer_parameters(self, layer: int) -> dict[str, int]:
        """Return the products' matrices, and the angles of LRPE."""
        angles = {"lrpe": self.heads * self.K} if layer in self.lrpe else {}
        return super().mixer_parameters(layer) | angles

    def state(self, layer: int) -> State:
        """Return the size of the state; LRPE doubles the key dim (cosine and sine)."""
        rows = self.K * (2 if layer in self.lrpe else 1)
        return State(self.heads * rows * self.V, self.heads)
