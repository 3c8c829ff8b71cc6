"""Gated DeltaNet (arXiv:2412.06464) in numbers."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from lasptrain.architectures.base import Norm
from lasptrain.architectures.delta_rule import STEP, GatedByData
from lasptrain.architectures.nearest import nearest_fits
from lasptrain.architectures.section import Eps, Few, Problem, optional


class Gdn(GatedByData):
    """The delta rule with a decay per head and token."""

    implementation: ClassVar[str] = "lasptrain.models.gdn"
    kernels: ClassVar[tuple[str, ...]] = ("triton", "chunked", "reference")

    arch: Literal["gdn"] = "gdn"
    key_heads: Few | None = optional(
        None, "heads of q and k, each shared by neighbouring value heads; `heads` if not given"
    )
    negative_eigenvalues: bool = optional(False, "beta in (0, 2) instead of (0, 1)")
    gate: Literal["silu", "sigmoid"] = optional("silu", "function of the gate on the output")
    output_norm_eps: Eps | None = optional(None, "eps of the gated norm on the output; norm_eps if not given")
    centred_norms: bool = optional(False, "all norms but the gated one multiply by 1 + weight, which starts at zero")

    @property
    def norm(self) -> Norm:
        """Return the norm, around weights of one or of zero."""
        return Norm(eps=self.norm_eps, centred=self.centred_norms)

    @property
    def output_eps(self) -> float:
        """The eps of the gated norm on a mixer's output."""
        return self.output_norm_eps or self.norm_eps

    @property
    def Hk(self) -> int:
        """Heads of q and k."""
        return self.key_heads or self.heads

    @property
    def channels(self) -> int:
        """Channels of the convolution: q, k and v."""
        return 2 * self.Hk * self.K + self.heads * self.V

    def problems(self) -> Iterator[Problem]:
        """Yield key heads that do not divide the value heads."""
        yield from super().problems()
        if self.heads % self.Hk:
            nearest = nearest_fits(self.Hk, lambda heads: self.heads % heads == 0, self.heads)
            yield "model.key_heads", f"{self.Hk} do not divide model.heads = {self.heads}; nearest: {nearest}"

    def mixer_parameters(self, layer: int) -> dict[str, int]:
        """Return the common parts, beta, and weight, bias and slope of the decay."""
        return super().mixer_parameters(layer) | {"beta": self.heads * self.dim, "decay": self.heads * (self.dim + 2)}

    def first_slopes(self) -> list[float]:
        """Return slopes spread evenly over (0, 16), times the median step."""
        return [STEP * 16 * (head + 0.5) / self.heads for head in range(self.heads)]
