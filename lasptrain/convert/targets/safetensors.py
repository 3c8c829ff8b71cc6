"""Our own names and sizes, from any model."""

from __future__ import annotations

from collections.abc import Collection

from lasptrain.architectures.base import Architecture
from lasptrain.convert.rules import Rule, rows
from lasptrain.convert.target import Json, Target
from lasptrain.recipe.formats import upgraded

EXACT = ("mixer.slope", "mixer.theta", "dt.weight", "dt.bias", "dt.log_slope", "conv.weight", "conv.bias", "lrpe.theta",
         "decay.bias", "decay.log_slope")  # fmt: skip


def config(model: Architecture) -> Json:
    """Return the model's keys."""
    return {"model": model.model_dump(mode="json")}


def keys(config: Json, where: str) -> Json:
    """Return the model's keys, which a file has without the number of their format."""
    return upgraded("model", config["model"], 1)


def rules(model: Architecture, names: Collection[str]) -> list[Rule]:
    """Keep all names."""
    return [rows(name, name, full_precision=name.endswith(EXACT)) for name in names]


TARGET = Target(
    name="safetensors",
    arch=None,
    runs_in="lasptrain",
    model_type="lasptrain",
    config=config,
    rules=rules,
    embedding="embed.weight",
    keys=keys,
    library=None,
)
