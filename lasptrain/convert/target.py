"""An export target: all that is known of a format of another library. Neither it nor a target imports torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lasptrain.architectures.base import Architecture
from lasptrain.convert.rules import Rule
from lasptrain.errors import ConvertError

Json = dict[str, Any]
Demands = Mapping[str, tuple[Any, Any]]
"""By key of a config.json: its default, and the value that our model needs."""


@dataclass(frozen=True)
class Library:
    """A package in which exports run, to be compared with the model that they are of."""

    module: str  # to import before transformers' Auto classes know its models
    package: str  # for `pip install`
    gpu_only: bool = False
    prepare: Callable[[Any], None] = lambda model: None  # a model just loaded: its device, its most exact kernels

    @property
    def name(self) -> str:
        """Name of the top package."""
        return self.module.split(".")[0]


@dataclass(frozen=True)
class Service:
    """A program that serves a target's exports: how, and which not. Tokenizers are named as recipes name them."""

    server: str
    commands: Callable[[str, str], list[str]]  # of a shell, for an export's folder and its tokenizer
    reasons: Callable[[Any, str], Iterator[str]]  # why a model of the target, with its tokenizer, is not served
    remark: str = ""  # for who serves it
    flags: tuple[str, ...] = ()  # of its converter, where it has one
    proviso: Callable[[str], str] = lambda tokenizer: ""  # what else must hold, known only there


@dataclass(frozen=True, kw_only=True)
class Target:
    """A format that models leave in and come back from; each is one file in `targets/`."""

    name: str  # of `--to`
    arch: str | None  # the architecture that it expresses; None: every one, as the format is our own
    hf: bool = False  # `--to hf` means it
    runs_in: str  # libraries, for people
    advice: str = ""  # for who loads it, on the model card
    reasons: Callable[[Any], Iterator[str]] = lambda model: iter(())  # why a model of `arch` does not fit

    # A model leaves.
    model_type: str  # in config.json, as is the class
    loads_as: str | None = None
    config: Callable[[Any], Json]  # the further keys of config.json
    generation: Json = field(default_factory=dict)  # further keys of generation_config.json
    code: str | None = None  # a file beside this one that travels with an export, as it holds the class
    rules: Callable[[Any, Collection[str]], list[Rule]]  # for our tensors of these names

    # A folder comes back, from others too.
    also: tuple[str, ...] = ()  # further values of `model_type`
    unwrapped: Callable[[Json, str], Json] = lambda config, where: config  # the model's part of others' config.json
    canonical: Callable[[str], str | None] = lambda name: name  # our name of others' tensor; None: it is left out
    free: Collection[str] = ()  # keys of config.json that do not change the result
    embedding: str  # the tensor that has a row for each token
    keys: Callable[[Json, str], Json]  # of `model:`, from a config.json and its path; ConvertError names what we lack
    reading: Callable[[list[Rule], Json, Any], list[Rule]] = lambda table, config, model: table  # others' tensors
    computed: tuple[str, ...] = ()  # ends of names of tensors that follow from config.json, but are saved by some

    # An export is served, or verified.
    services: tuple[Service, ...] = ()
    library: Library | None
    reaches: tuple[str, ...] = ()  # keys of config.json, in tokens: windows, convolutions, chunks

    def expresses(self, arch: str) -> bool:
        """True for an architecture whose models can leave, if nothing else is in the way."""
        return self.arch in (None, arch)

    def refusal(self, model: Architecture) -> str | None:
        """Return the reason why a model cannot be expressed, None where it can."""
        if not self.expresses(model.arch):
            return f"{self.name} is arch {self.arch}, not {model.arch}"
        return next(self.reasons(model), None)


PLAIN_SOFTMAX: Json = {"qk_norm": "none", "softmax_gate": False, "softmax_norm": "before", "rotary_fraction": 1.0}


def unlike_softmax(model: Architecture, wanted: Json) -> Iterator[str]:
    """Yield the keys of softmax layers, if there are such, that are not as wanted."""
    for key, value in wanted.items() if model.softmax else ():
        if (found := getattr(model, key)) != value:
            yield f"its softmax layers have model.{key} = {value} only, not {found}"


def unlike_plain_softmax(model: Architecture) -> Iterator[str]:
    """Yield the keys of softmax layers that are more than q, k and v of the width, rotated or not."""
    yield from unlike_softmax(model, PLAIN_SOFTMAX)
    if model.softmax and (model.query_heads, model.query_channels) != (model.heads, model.dim):
        found = f"{model.query_heads} of {model.head_dim} channels"
        yield f"its softmax layers have as many heads as its others, of model.dim / model.heads channels, not {found}"


def demand(config: Json, demands: Demands, where: str) -> None:
    """Raise ConvertError for the first key of others' config.json that is not what our model needs."""
    for key, (default, wanted) in demands.items():
        if (found := config.get(key, default)) != wanted:
            raise ConvertError(f"{where}: {key} is {found!r}; expected {wanted!r}, our model has nothing else")
