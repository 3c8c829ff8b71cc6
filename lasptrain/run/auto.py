"""Choices made for `auto` keys, stored so a resumed run on the same mesh and GPU reuses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lasptrain import files
from lasptrain.recipe.schema import Recipe
from lasptrain.recipe.sections import Stage

FILE = "auto.json"
SECTIONS = {
    "segment": "train",
    "reduce": "parallel",
    "prefix": "parallel",
    "scan": "mesh",
}  # of keys decided by timing or by memory


def load(recipe: Recipe, run: Path, place: str) -> Recipe:
    """Return the recipe with the choices stored for `place`; keys without one stay `auto`."""
    try:
        stored = json.loads(files.read(run / FILE, own=True))
        choices = stored["values"] if stored["place"] == place else {}
        for key in _open(recipe) & choices.keys():
            if key == "segment" and recipe.stages:
                recipe = _with_segments(recipe, choices[key])
                continue
            values = getattr(recipe, SECTIONS[key])
            checked = type(values).model_validate({**values.model_dump(), key: choices[key]})
            recipe = recipe.model_copy(update={SECTIONS[key]: checked})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return recipe  # decide again
    return recipe


def store(recipe: Recipe, run: Path, place: str, values: dict[str, Any]) -> None:
    """Store the `values` chosen for the recipe's `auto` keys, for the next start at the same `place`."""
    if decided := _open(recipe):
        stored = {"place": place, "values": {key: values[key] for key in sorted(decided)}}
        files.replace(run / FILE, json.dumps(stored))


def _with_segments(recipe: Recipe, segments: list[int]) -> Recipe:
    """Return the recipe with the segments of its stages that are `auto`."""
    stages = [
        Stage.model_validate({**stage.model_dump(), "segment": segment if own == "auto" else own})
        for stage, segment, own in zip(recipe.stages, segments, _values(recipe, "segment"), strict=True)
    ]
    return recipe.model_copy(update={"stages": tuple(stages)})


def _open(recipe: Recipe) -> set[str]:
    """Keys that are `auto`, in any stage."""
    return {key for key in SECTIONS if "auto" in _values(recipe, key)}


def _values(recipe: Recipe, key: str) -> list[Any]:
    """Values of a key by stage."""
    return [getattr(getattr(span.recipe, SECTIONS[key]), key) for span in recipe.spans()]
