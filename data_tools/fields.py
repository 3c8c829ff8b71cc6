"""Fields of rows: the text under a key, or at the end of a path of keys such as `doc.text`; and what else is there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from lasptrain.console.stdio import printable

SHOWN = 12  # keys of a row
LONGEST = 60  # characters of a key
ASK = "name one with --field, or data.field in a recipe"


def under(row: Any, field: str) -> Any:
    """Return the value of a row's field, null too if that is where a path of keys ends. Raises KeyError without any.

    A key with dots in its name comes before a path of keys.
    """
    if not isinstance(row, Mapping):
        raise KeyError(field)
    if field in row:
        return row[field]
    head, _, rest = field.partition(".")
    if not rest or head not in row:
        raise KeyError(field)
    return None if row[head] is None else under(row[head], rest)


def as_text(value: Any) -> str | None:
    """Return the text of a value: "" for null, the lines of a list of texts; None for anything else."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return "\n".join(value)
    return None


def told(names: Iterable[str]) -> str:
    """Format the names of a row's fields, or of a table's columns, as a hint."""
    return f"it has {listed(names)}; {ASK}"


def listed(names: Iterable[str]) -> str:
    """Format the first few names, and of long ones the beginning."""
    known = list(islice(names, SHOWN + 1))
    shown = [printable(name if len(name) <= LONGEST else f"{name[:LONGEST]}…") for name in known[:SHOWN]]
    return ", ".join(shown + ["…"] * (len(known) > SHOWN)) or "none"


def names(row: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys of a row, those of an object in it as a path."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from (f"{key}.{inner}" for inner in value)
        else:
            yield key
