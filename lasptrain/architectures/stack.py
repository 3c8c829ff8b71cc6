"""A stack of layers: its sizes, and softmax attention, an ingredient of any architecture, with its checks and costs."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from lasptrain.architectures.nearest import nearest_fits
from lasptrain.architectures.section import Count, Few, Index, Problem, Section, optional
from lasptrain.console.tables import figures

Recompute = Literal["none", "full", "selective", "offload"]
SOFTMAX_ONLY = (  # keys that say nothing of other layers
    "kv_heads",
    "sliding_window",
    "softmax_heads",
    "softmax_dim",
    "rotary_fraction",
    "qk_norm",
    "softmax_gate",
    "softmax_norm",
)
EVERY = re.compile(r"every (\d{1,6})(?:st|nd|rd|th)")


def _spelled_out(value: object, info: ValidationInfo) -> object:
    """Return the indices that `every 4th` means among the layers; a list as a tuple, anything else as it is.

    Raises PydanticCustomError where the layers do not divide.
    """
    layers: Any = info.data.get("layers")
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, str) or not isinstance(layers, int):
        return value
    found = EVERY.fullmatch(value)
    if found is None:
        raise PydanticCustomError("every", "a list such as [0], or every 4th")
    step = int(found[1])
    if not step or layers % step:
        fits = nearest_fits(step, lambda n: layers % n == 0, layers)
        raise PydanticCustomError("every", f"a step that divides model.layers = {layers}; nearest: {fits}")
    return tuple(range(step - 1, layers, step))


class Stack(Section):
    """The sizes of a model, and which of its layers are softmax attention of which kind."""

    arch: str = Field(description="the name of an architecture")
    dim: Count = Field(description="the width of the model, such as 256")
    layers: Few = Field(description="the number of layers, such as 4")
    heads: Few = Field(description="the number of heads, such as 4")
    mlp: Count = Field(description="the width of the MLP, such as 704")
    vocab: Count | Literal["auto"] = optional(
        "auto", "rows of the embedding; auto: the tokenizer's, up to a multiple of 64"
    )
    tie: bool = optional(True, "the output head is the embedding")
    softmax: Annotated[tuple[Index, ...], BeforeValidator(_spelled_out)] = optional(
        (),
        "indices of the layers that are softmax attention, or every 4th",
    )
    softmax_heads: Few | None = optional(None, "softmax: heads of q; `heads` if not given")
    softmax_dim: Count | None = optional(None, "softmax: channels of a head; dim / heads of q if not given")
    kv_heads: Few | None = optional(None, "softmax: heads of k and v; as many as of q if not given")
    sliding_window: Count | None = optional(
        None, "softmax: tokens that a token sees, itself included; none: all before it"
    )
    rotary: Annotated[float, Field(gt=1, le=1e12)] | None = optional(
        10000.0,
        "softmax: base of rotary positions; none: without",
    )
    rotary_fraction: Annotated[float, Field(gt=0, le=1)] = optional(
        1.0,
        "softmax: the part of a head's channels that is rotated",
    )
    qk_norm: Literal["none", "head", "whole"] = optional(
        "none",
        "softmax: norms of q and k, each head's or all heads' channels",
    )
    softmax_gate: bool = optional(False, "softmax: o is multiplied by sigmoid(W h)")
    softmax_norm: Literal["before", "after"] = optional(
        "before",
        "softmax: norms of a block stand before, or after its parts",
    )

    @property
    def query_heads(self) -> int:
        """Heads of q in a softmax layer."""
        return self.softmax_heads or self.heads

    @property
    def head_dim(self) -> int:
        """Channels of a softmax layer's head."""
        return self.softmax_dim or self.dim // self.query_heads

    @property
    def query_channels(self) -> int:
        """Channels of a softmax layer's queries."""
        return self.query_heads * self.head_dim

    @property
    def key_channels(self) -> int:
        """Channels of a softmax layer's keys, and of its values."""
        return (self.kv_heads or self.query_heads) * self.head_dim

    @property
    def unbounded(self) -> tuple[int, ...]:
        """Softmax layers that see all tokens before: their state is the prefix, which grows with the window."""
        return () if self.sliding_window else self.softmax

    @property
    def rotated(self) -> int:
        """Channels of a softmax layer's head that are rotated."""
        return round(self.rotary_fraction * self.head_dim)

    def layer_problems(self, key: str, layers: tuple[int, ...]) -> Iterator[Problem]:
        """Yield indices in `layers`, the value of `key`, that do not exist or are out of order."""
        for layer in layers:
            if layer >= self.layers:
                yield key, f"there is no layer {layer}; the {self.layers} layers are 0 to {self.layers - 1}"
        if list(layers) != sorted(set(layers)):
            yield key, f"found {list(layers)}; write {sorted(set(layers))}"

    def softmax_problems(self) -> Iterator[Problem]:
        """Yield keys of softmax layers that do not fit each other, or have no such layer."""
        if not self.softmax:
            for key in SOFTMAX_ONLY:
                if (found := getattr(self, key)) != Stack.model_fields[key].default:
                    shown = str(found).lower() if isinstance(found, bool) else found
                    yield f"model.{key}", f"found {shown} without model.softmax; name its layers, or leave it out"
            return
        heads, key = self.query_heads, "softmax_heads" if self.softmax_heads else "heads"
        if self.softmax_dim is None and self.dim % heads:
            nearest = nearest_fits(heads, lambda n: self.dim % n == 0, self.dim)
            yield f"model.{key}", f"{heads} softmax heads do not divide model.dim = {self.dim}; nearest: {nearest}"
        elif self.rotary is not None and not self.rotated:
            found = f"found {self.rotary_fraction:g} of {self.head_dim} channels, which are none"
            yield "model.rotary_fraction", f"{found}; expected at least {min(2 / self.head_dim, 1):g}"
        elif self.rotary is not None and (odd := self.rotated) % 2:
            found = f"{odd} channels of a head do not make pairs to rotate"
            other = "softmax_dim" if self.softmax_dim else key
            yield "model.rotary", f"{found}; expected null, or another model.{other}"
        if self.kv_heads and heads % self.kv_heads:
            nearest = nearest_fits(self.kv_heads, lambda n: heads % n == 0, heads)
            yield "model.kv_heads", f"{self.kv_heads} do not divide model.{key} = {heads}; nearest: {nearest}"

    def softmax_description(self) -> str:
        """Return what the layers are, in a line."""
        seen = "all tokens before" if self.sliding_window is None else f"the last {self.sliding_window:,} tokens"
        turned = "no positions" if self.rotary is None else f"rotary positions of base {figures(self.rotary, 6)}"
        more = [f"on {self.rotated} of {self.head_dim} channels"] if self.rotary and self.rotary_fraction < 1 else []
        more += [f"q and k normed per {self.qk_norm}"] if self.qk_norm != "none" else []
        more += ["an output gate"] * self.softmax_gate + ["norms after"] * (self.softmax_norm == "after")
        heads = f"{self.kv_heads or self.query_heads} key heads"
        layers = f"layer{'s' * (len(self.softmax) > 1)} {', '.join(map(str, self.softmax))}"
        return f"{layers}: {heads}, over {seen}, {', '.join([turned, *more])}"

    def softmax_parameters(self) -> dict[str, int]:
        """Return a layer's parameters: matrices as `softmax`, norms of q and k as `norms`."""
        wide, narrow = self.query_channels, self.key_channels
        matrices = self.dim * (2 * wide + 2 * narrow + wide * self.softmax_gate)
        norms = {"none": 0, "head": 2 * self.head_dim, "whole": wide + narrow}[self.qk_norm]
        return {"softmax": matrices} | ({"norms": norms} if norms else {})

    def softmax_flops(self, window: int) -> int:
        """Return the FLOPs per token of scores and sums over a window of one document: 2 each per channel and key."""
        reach = min(self.sliding_window or window, window)
        seen = reach - reach * (reach - 1) // (2 * window)  # on average: the first tokens see fewer
        return 4 * self.query_channels * seen

    def softmax_kept(self, recompute: Recompute, compiled: bool) -> int:
        """Return the numbers per token that a layer keeps for its backward: q and o, keys and values with those before
        them joined where they slide; without, o wherever a layer is run again, and keys and values in the prefix.
        """
        wide, narrow = self.query_channels, self.key_channels
        more = wide * self.softmax_gate + (wide + narrow) * (self.qk_norm != "none")
        match recompute:
            case "none":
                return 2 * wide + 2 * narrow * (2 if self.sliding_window else 1) + more
            case "selective":
                return 2 * wide + 2 * narrow + wide * self.softmax_gate
            case _:
                return 0 if self.sliding_window else wide
