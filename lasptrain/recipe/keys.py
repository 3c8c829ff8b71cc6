"""A table of every key of a recipe: where it stands, what fits, its default and its meaning; from the schema alone."""

import json
import re
from typing import Any, NamedTuple

from lasptrain import architectures
from lasptrain.architectures.base import Architecture
from lasptrain.architectures.section import LARGEST, Section
from lasptrain.recipe.schema import SECTIONS, Recipe
from lasptrain.recipe.sections import Part, Stage

_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}  # of JSON Schema
_TYPES = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}


class Key(NamedTuple):
    """A key as it is written in `--set`, or under its section, in words."""

    name: str
    fits: str
    default: str
    meaning: str

    @property
    def section(self) -> str:
        """The section that the key is in; of a key in none, the key itself."""
        return re.split(r"[.[]", self.name)[0]


COLUMNS = ("key", "fits", "default", "meaning")


def rows() -> list[Key]:
    """Return every key, section by section; those of `model:` that an architecture adds or changes behind the common
    ones, with the architectures' names before the meaning.
    """
    whole = {key.name: key for key in _own(Recipe, "")}
    found = [whole["name"], *_of_model()]
    for name, section in SECTIONS.items():
        if name != "model":
            found += _own(section, f"{name}.")
        if name == "data":
            found += _own(Part, "data.source[].")
    return [*found, whole["stages"], *_own(Stage, "stages[].")]


def markdown(found: list[Key]) -> str:
    """Return the keys as a table in Markdown."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(key._replace(name=f"`{key.name}`") for key in found)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _own(section: type[Section], prefix: str) -> list[Key]:
    schema = section.model_json_schema()
    return [
        Key(f"{prefix}{name}", _fits(value), _default(value), value.get("description", ""))
        for name, value in schema["properties"].items()
    ]


def _default(schema: dict[str, Any]) -> str:
    return json.dumps(schema["default"]).strip('"') if "default" in schema else "required"


def _of_model() -> list[Key]:
    """Return the keys of all architectures, and those of some, each once for all that have the same."""
    common = _own(Architecture, "model.")
    owners: dict[Key, list[str]] = {}
    for arch in architectures.OURS:
        for key in _own(architectures.named(arch), "model."):
            if key not in common and key.name != "model.arch":
                owners.setdefault(key, []).append(arch)
    some = [key._replace(meaning=f"{', '.join(owners[key])}: {key.meaning}") for key in sorted(owners)]
    named = [k._replace(fits=", ".join(architectures.OURS)) if k.name == "model.arch" else k for k in common]
    return [*named, *some]


def _fits(schema: dict[str, Any]) -> str:
    """Return what JSON Schema allows for a value, in words."""
    if parts := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(map(_fits, parts))
    if "$ref" in schema:
        return "keys"
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if schema["type"] == "array":
        pair = schema.get("prefixItems")
        return f"[{', '.join(map(_fits, pair))}]" if pair else f"list of {_fits(schema['items'])}"
    given = {sign: schema[bound] for bound, sign in _BOUNDS.items() if schema.get(bound, LARGEST) < LARGEST}
    bounds = [f"{sign} {bound:,}" if isinstance(bound, int) else f"{sign} {bound:g}" for sign, bound in given.items()]
    return " ".join([_TYPES[schema["type"]], " and ".join(bounds)]).rstrip()
