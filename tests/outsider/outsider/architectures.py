"""The two architectures in numbers."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lasptrain.architectures.base import Architecture, State
from lasptrain.architectures.section import Problem


class _Slow(Architecture):
    """Linear attention with transitions made of the input, and a norm per head without weights."""

    implementation: ClassVar[str] = "outsider.mixers"

    slowest: Annotated[float, Field(gt=0, lt=1)] = 0.999  # decay of the slowest head at the start

    @property
    def transition(self) -> int:
        """Numbers of a transition per head."""
        return self.K

    @property
    def decays_by_data(self) -> bool:
        """Return True: transitions are made of the input."""
        return True

    def mixer_parameters(self, layer: int) -> dict[str, int]:
        """Return the matrices of k, v, q, transition and output, and the decay of each head."""
        width = 2 * self.K + 2 * self.V + self.transition
        return {"mixer": self.heads * width * self.dim, "decay": self.heads}

    def state(self, layer: int) -> State:
        """Return the size of the state, and of the transition beside it."""
        return super().state(layer)._replace(transition=self.heads * self.transition)


class SlowMatrix(_Slow):
    """S_t = A_t S_{t−1} + k_tᵀ v_t with A_t = a (I + mixing · tanh(W h_t)), a matrix."""

    arch: Literal["slow_matrix"] = "slow_matrix"
    mixing: Annotated[float, Field(ge=0, le=1)] = 0.1  # how far a transition may be from a decay

    @property
    def transition(self) -> int:
        """Numbers of a transition per head."""
        return self.K * self.K

    def problems(self) -> Iterator[Problem]:
        """Yield keys that are too wide for a matrix per token."""
        yield from super().problems()
        if self.K > 16:
            yield "model.key_dim", f"found {self.K}; expected at most 16, a matrix per token is large"


class SlowDiagonal(_Slow):
    """S_t = diag(a_t) S_{t−1} + k_tᵀ v_t with a_t = a^(2 σ(W h_t)), a number per row."""

    arch: Literal["slow_diagonal"] = "slow_diagonal"
