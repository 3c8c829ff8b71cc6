"""What `auto` has come to in a run: decided once, reused when the run goes on at a place like that one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lasptrain import files
from lasptrain.recipe.schema import Recipe

FILE = "auto.json"
SECTIONS = {"segment": "train", "reduce": "parallel", "scan": "mesh"}  # of the keys that are decided by trial or memory


def recall(recipe: Recipe, run: Path, place: str) -> Recipe:
    """The recipe with what was decided at such a place; `auto` stays where nothing was."""
    try:
        noted = json.loads((run / FILE).read_text(encoding="utf-8"))
        known = noted["values"] if noted["place"] == place else {}
        for key in _open(recipe) & known.keys():
            values = getattr(recipe, SECTIONS[key])
            checked = type(values).model_validate({**values.model_dump(), key: known[key]})
            recipe = recipe.model_copy(update={SECTIONS[key]: checked})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return recipe  # decided anew
    return recipe


def note(recipe: Recipe, run: Path, place: str, values: dict[str, Any]) -> None:
    """Keep what became of the recipe's keys that are `auto` for the next start at such a place."""
    if decided := _open(recipe):
        told = {"place": place, "values": {key: values[key] for key in sorted(decided)}}
        files.replace(run / FILE, json.dumps(told))


def _open(recipe: Recipe) -> set[str]:
    """Keys that are `auto`."""
    return {key for key, section in SECTIONS.items() if getattr(getattr(recipe, section), key) == "auto"}
