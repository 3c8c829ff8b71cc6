"""The part of an architecture that all share: sizes, softmax layers, the ingredients of a block, and default costs."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, NamedTuple

from pydantic import BeforeValidator

from lasptrain.architectures.nearest import nearest_fits
from lasptrain.architectures.section import Count, Index, Problem, as_tuple, optional
from lasptrain.architectures.stack import Recompute, Stack

Layers = Annotated[tuple[Index, ...], BeforeValidator(as_tuple)]  # their indices


class Norm(NamedTuple):
    """A root-mean-square norm over the width."""

    weighted: bool = True
    eps: float = 1e-6
    centred: bool = False  # multiplies by 1 + weight


class State(NamedTuple):
    """The numbers that a layer carries from slice to slice, per window."""

    values: int  # in at least fp32; they cross every link
    transition: int = 0  # in at least fp32, beside them in an all-gather
    rows: int = 0  # in the dtype of activations: last tokens that a window slides over


class Work(NamedTuple):
    """The work of one layer's recurrence per token, forward, and forward and backward together."""

    bytes: tuple[int, int]  # moved, where activations have 16 bits
    flops: tuple[int, int] = (0, 0)  # of matrix products, where these and not the bytes bound it


class Architecture(Stack):
    """A model in numbers: `heads` heads of key dim K and value dim V on a residual stream of `dim` channels.

    One class per architecture adds its keys, overrides what differs, and names the module of its layers, which has a
    function `mixer(model, layer, recurrence)`. Layers in `softmax` are softmax attention instead, in any architecture.
    """

    implementation: ClassVar[str]  # module of its layers
    gated_mlp: ClassVar[bool] = True  # silu on the gate of the MLP
    kernels: ClassVar[tuple[str, ...]] = ("triton", "chunked", "reference")  # of its recurrence, the fastest first

    key_dim: Count | None = optional(None, "K, per head; dim / heads if not given")
    value_dim: Count | None = optional(None, "V, per head; dim / heads if not given (some: twice that)")

    @property
    def K(self) -> int:
        """Key dim per head."""
        return self.key_dim or self.dim // self.heads

    @property
    def V(self) -> int:
        """Value dim per head."""
        return self.value_dim or self.dim // self.heads

    @property
    def mixers(self) -> list[int]:
        """Indices of the layers that are not softmax attention."""
        return [layer for layer in range(self.layers) if layer not in self.softmax]

    @property
    def norm(self) -> Norm:
        """The norm before mixer and MLP, and before the head."""
        return Norm()

    @property
    def embedding_scale(self) -> float:
        """Factor of the embedding."""
        return 1.0

    @property
    def residual(self) -> float | None:
        """Factor α of a residual that carries the normalised value; None: a plain residual beside the norms."""
        return None

    def problems(self) -> Iterator[Problem]:
        """Yield heads that do not divide the width, and keys of softmax layers that do not fit."""
        if (self.key_dim is None or self.value_dim is None) and self.dim % self.heads:
            nearest = nearest_fits(self.heads, lambda heads: self.dim % heads == 0, self.dim)
            fits = f"nearest: {nearest} (or give model.key_dim and model.value_dim)"
            yield "model.heads", f"{self.heads} heads do not divide model.dim = {self.dim}; {fits}"
        yield from self.layer_problems("model.softmax", self.softmax)
        yield from self.softmax_problems()
        if self.softmax_norm == "after" and self.residual is not None:
            found = "found 'after' where the residual carries the normalised value"
            yield "model.softmax_norm", f"{found}; expected before"

    def description(self) -> Iterator[tuple[str, str]]:
        """Yield lines for `lasptrain check`: a title and a text."""
        yield "heads", f"key dim {self.K}, value dim {self.V}"
        if self.softmax:
            yield "softmax", self.softmax_description()

    # Costs of one layer of the architecture's own mixer. Defaults: products for q, k, v, gate and output, and a state
    # of K × V per head that fades by a number per head.

    def mixer_parameters(self, layer: int) -> dict[str, int]:
        """Return the parameters by part; those of the part `mixer` are matrices that each token is multiplied by."""
        return {"mixer": 2 * self.heads * (self.K + self.V) * self.dim + self.dim * self.heads * self.V}

    def recurrence_flops(self, layer: int) -> int:
        """Return the model FLOPs per token of the recurrence's forward: 2·K·V each to update the state and read it."""
        return 4 * self.state(layer).values

    def recurrence_work(self, layer: int) -> Work:
        """Return the work that predicts seconds, from passes over q, k, v and o: 3 forward, 9 in both directions."""
        width = 2 * self.heads * (self.K + self.V)
        return Work((6 * width, 18 * width))

    def state(self, layer: int) -> State:
        """Return the size of the state."""
        return State(self.heads * self.K * self.V, self.heads)

    def kept(self, recompute: Recompute, compiled: bool) -> int:
        """Return the numbers per token that a mixer keeps for its backward, without its input."""
        keys, values = self.heads * self.K, self.heads * self.V
        match recompute:
            case "none":  # q and k before and after their activation, v, gate and o; a compiler recomputes the rest
                return 4 * keys + (3 if compiled else 6) * values
            case "selective":
                return 2 * keys + 3 * values
            case _:
                return 0

    def decays(self, window: int) -> list[list[float]]:
        """Return slopes s = −ln a, all ≥ 0, by layer and head, at the start of training on windows of that length."""
        return [[0.0] * self.heads] * self.layers

    @property
    def decays_by_data(self) -> bool:
        """Return True where training, or the text itself, moves the decays away from `decays`."""
        return False

    # The same of any layer, softmax layers included.

    def layer_parameters(self, layer: int) -> dict[str, int]:
        """Return the parameters of a layer's mixer by part; `mixer` and `softmax` are matrices."""
        if layer in self.softmax:
            return self.softmax_parameters()
        return self.mixer_parameters(layer)

    def layer_flops(self, layer: int, window: int) -> int:
        """Return the FLOPs per token of a layer's forward over a window of one document, matrices left out."""
        return self.softmax_flops(window) if layer in self.softmax else self.recurrence_flops(layer)

    def layer_state(self, layer: int) -> State:
        """Return the size of what a layer carries; softmax without a sliding window: nothing of fixed size."""
        if layer not in self.softmax:
            return self.state(layer)
        return State(0, rows=((self.sliding_window or 1) - 1) * 2 * self.key_channels)

    def layer_kept(self, layer: int, recompute: Recompute, compiled: bool) -> int:
        """Return the numbers per token that a layer's mixer keeps for its backward."""
        return self.softmax_kept(recompute, compiled) if layer in self.softmax else self.kept(recompute, compiled)
