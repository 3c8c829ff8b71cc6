"""flash-linear-attention's RetNet, from `retnet`."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from lasptrain.architectures.retnet import RetNet
from lasptrain.convert.libraries import fla
from lasptrain.convert.rules import Rule
from lasptrain.convert.target import Json, Target, demand

DEMANDS = fla.DEMANDS | {
    "feature_map": (None, None),
    "use_short_conv": (False, False),
    "use_output_gate": (True, True),
    "fuse_norm": (True, True),
}


def reasons(model: RetNet) -> Iterator[str]:
    """Yield what the library's models lack, and other decays."""
    yield from fla.reasons(model)
    if model.decay != "retnet":
        yield f"model.decay is {model.decay}; its kernel computes retnet"


def config(model: RetNet) -> Json:
    """Return the keys of RetNetConfig."""
    return fla.config(model) | {"feature_map": None, "use_output_gate": True}


def keys(config: Json, where: str) -> Json:
    """Return the model that a RetNetConfig describes."""
    demand(config, DEMANDS, where)
    return {"arch": "retnet"} | fla.sizes(config, heads=8, ratio=2, expand_v=2.0)


def rules(model: RetNet, names: Collection[str]) -> list[Rule]:
    """Rename tensors; decays follow from the number of heads."""
    gate = {"attn.g_proj.weight": "mixer.gate.weight", "attn.g_norm_swish_gate.weight": "mixer.norm.weight"}
    return fla.rules(model, names, gate)


TARGET = Target(
    name="retnet",
    arch="retnet",
    runs_in=fla.RUNS_IN,
    advice=fla.ADVICE,
    reasons=reasons,
    model_type="retnet",
    loads_as="RetNetForCausalLM",
    config=config,
    generation=fla.GENERATION,
    rules=rules,
    free=fla.FREE,
    embedding=fla.EMBEDDING,
    keys=keys,
    library=fla.FLA,
)
