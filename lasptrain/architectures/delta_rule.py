"""Parts that the architectures with gates of the data share: Gated DeltaNet, Kimi Delta Attention, GLA."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lasptrain.architectures.base import Architecture, Norm, State, Work
from lasptrain.architectures.decay import slopes
from lasptrain.architectures.section import Eps, Problem, optional
from lasptrain.architectures.stack import Recompute

# FLOPs of a chunk of 64 tokens in the form with blocks, per key and value channel of a head: forward, and both
# directions; 22.3 and 64 million for K = V = 128
FORWARD, BOTH = 22.3e6 / (64 * 128 * 128), 64e6 / (64 * 128 * 128)

STEP = 0.01  # geometric mean of the steps 0.001 to 0.1 with which the papers start


class GatedByData(Architecture):
    """Linear attention whose decays come from the data, behind short convolutions, with a gated norm."""

    kernels: ClassVar[tuple[str, ...]] = ("chunked", "reference")

    conv: Annotated[int, Field(ge=0, le=16)] = optional(4, "tokens seen by convolutions of q, k and v; 0: none")
    decay: Literal["window", "paper"] = optional(
        "window",
        "decays at the start: window, the slowest head keeps 1/1000 over the whole window; paper, as the papers start",
    )
    norm_eps: Eps = optional(1e-6, "eps of all norms")

    @property
    def norm(self) -> Norm:
        """Return the norm of `norm_eps`."""
        return Norm(eps=self.norm_eps)

    @property
    def output_eps(self) -> float:
        """The eps of the gated norm on a mixer's output."""
        return self.norm_eps

    @property
    def decays_by_data(self) -> bool:
        """Return True: the data decide."""
        return True

    @property
    def channels(self) -> int:
        """Channels of the convolution: q, k and v."""
        return self.heads * (2 * self.K + self.V)

    def problems(self) -> Iterator[Problem]:
        """Yield a convolution that sees no other token."""
        yield from super().problems()
        if self.conv == 1:
            yield "model.conv", "found 1, which sees no other token; expected 0 or at least 2"

    def description(self) -> Iterator[tuple[str, str]]:
        """Yield the decay beside the heads, and a missing kernel."""
        (title, heads), *rest = super().description()
        yield title, f"{heads}, decay by data, starts as {self.decay}"
        yield from rest
        if "triton" not in self.kernels:
            yield "kernel", f"{self.arch} has no Triton kernel yet: on GPUs, too, it runs in PyTorch, in chunks"

    def mixer_parameters(self, layer: int) -> dict[str, int]:
        """Return the products' matrices, the convolution, and the norm over the V of a head."""
        matrices = self.dim * (self.channels + 2 * self.heads * self.V)  # q, k, v; gate and output
        convolution = {"convolution": self.channels * self.conv} if self.conv else {}
        return {"mixer": matrices, **convolution, "norms": self.V}

    def recurrence_flops(self, layer: int) -> int:
        """Return the model FLOPs per token of the forward: 2·K·V each to predict, to write and to read."""
        return 6 * self.heads * self.K * self.V

    def recurrence_work(self, layer: int) -> Work:
        """Return the work of the form with blocks; its products take longer than its bytes."""
        size, width = self.heads * self.K * self.V, self.heads * (self.K + self.V)
        return Work((9 * width, 30 * width), (round(FORWARD * size), round(BOTH * size)))

    def state(self, layer: int) -> State:
        """Return the size of the state, of the matrix per head that moves it, and of the rows of the convolution."""
        rows = max(self.conv - 1, 0) * self.channels
        return State(self.heads * self.K * self.V, self.heads * self.K * self.K, rows)

    def kept(self, recompute: Recompute, compiled: bool) -> int:
        """Return the numbers per token that a mixer keeps: q, k and v before and after the convolution, gate and o."""
        match recompute:
            case "none":
                return 2 * self.channels + (2 if compiled else 5) * self.heads * self.V
            case "selective":
                return 2 * self.channels + 2 * self.heads * self.V
            case _:
                return 0

    def first_slopes(self) -> list[float]:
        """Return the slopes by head with which the papers start, times their median step."""
        raise NotImplementedError

    def decays(self, window: int) -> list[list[float]]:
        """Return the slopes at the start of training by layer and head."""
        if self.decay == "window":
            return slopes("window", self.layers, self.heads, window)
        return [self.first_slopes()] * self.layers
