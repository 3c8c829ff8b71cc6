"""Architectures in numbers: one class each, found by name, of which only the named one is imported. No torch.

Add one: `README.md`.
"""

import difflib
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import ValidationError

from lasptrain.architectures.base import Architecture
from lasptrain.errors import RecipeError

GROUP = "lasptrain.architectures"
OURS = {
    "tnl": "lasptrain.architectures.tnl:Tnl",
    "linear_transformer": "lasptrain.architectures.linear_transformer:LinearTransformer",
    "ssd": "lasptrain.architectures.ssd:Ssd",
    "retnet": "lasptrain.architectures.retnet:RetNet",
    "gdn": "lasptrain.architectures.gdn:Gdn",
    "kda": "lasptrain.architectures.kda:Kda",
    "gla": "lasptrain.architectures.gla:Gla",
    "minimax": "lasptrain.architectures.minimax:MiniMax",
}


def named(arch: object) -> type[Architecture]:
    """Return the class of an architecture: ours, or one that an installed package offers under the entry-point group
    `lasptrain.architectures`. RecipeError for another name, with the nearest, for one that several offer, and for a
    package that does not load.
    """
    offered: dict[str, dict[str, str]] = {name: {place: "lasptrain"} for name, place in OURS.items()}
    for point in entry_points(group=GROUP):
        offered.setdefault(point.name, {})[point.value] = point.dist.name if point.dist else "a package"
    if isinstance(arch, str) and arch in offered:
        (place, _), *others = offered[arch].items()
        if others:
            found = " and ".join(f"{place} of {package}" for place, package in offered[arch].items())
            raise RecipeError(f"model.arch: {arch} is {found}; expected a name of its own for each")
        return _loaded(arch, place)
    known = sorted(offered)
    close = difflib.get_close_matches(arch, known, n=1) if isinstance(arch, str) else []
    found = "missing" if arch is None else f"found {arch!r}"
    hint = (
        f"did you mean {close[0]}?" if close else f"expected {', '.join(known)} or one that an installed package offers"
    )
    raise RecipeError(f"model.arch: {found}; {hint}")


def model(keys: Mapping[str, Any]) -> Architecture:
    """Return the model that the keys of a recipe's section `model:` describe.

    Raises RecipeError for an unknown architecture, pydantic.ValidationError for keys that are not its own.
    """
    return named(keys.get("arch")).model_validate(dict(keys))


def completed(keys: dict[str, Any]) -> dict[str, Any]:
    """Return a model's keys with the defaults of those that were not there when they were written, as JSON has them.

    Keys that no longer make a model, or one of a package that is not installed, come back as they are.
    """
    try:
        return model(keys).model_dump(mode="json")
    except (RecipeError, ValidationError):
        return keys


def having(key: str) -> list[str]:
    """Return the names of our architectures that have a key of their own called `key`."""
    return [arch for arch, place in OURS.items() if key in _loaded(arch, place).model_fields]


def _loaded(arch: str, place: str) -> type[Architecture]:
    """Import `module:Class`."""
    try:
        found = EntryPoint(arch, place, GROUP).load()
    except Exception as error:  # a package may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RecipeError(f"model.arch: {arch} is {place}, which does not load: {reason}") from None
    if not (isinstance(found, type) and issubclass(found, Architecture)):
        raise RecipeError(
            f"model.arch: {arch} is {place}; expected a subclass of {Architecture.__module__}.Architecture"
        )
    if not hasattr(found, "implementation"):
        raise RecipeError(f"model.arch: {arch} is {place}; expected its implementation, the module of its layers")
    return found
