"""Formats of what runs and exports leave behind, and the keys that were renamed between them.

1: before formats had numbers. 2: `RENAMED`. 3: a model has the keys of its own architecture only.
"""

from collections.abc import Mapping
from typing import Any, TypeGuard

from lasptrain import architectures

FORMAT = 3  # of run folders, manifests of checkpoints and records of exports

RENAMED = {
    "model.sliding": "sliding_window",
    "checkpoint.milestone": "keep_every",
    "checkpoint.patience": "max_failures",
}


def is_format(number: object) -> TypeGuard[int]:
    """Return True for the number of a format, of a later one too."""
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1


def upgraded(section: str, values: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The keys of a recipe's section as format `number` wrote them, under the names that they have now.

    A key that is there under both names stays, to be refused. Keys of other architectures, which had their defaults,
    are left out.
    """
    keys = dict(values)
    if number < 2:
        renamed = {key: RENAMED.get(f"{section}.{key}", key) for key in keys}
        keys = {key if renamed[key] in keys else renamed[key]: value for key, value in keys.items()}
    if number < 3 and section == "model" and keys.get("arch") in architectures.OURS:
        own = architectures.named(keys["arch"]).model_fields
        keys = {key: value for key, value in keys.items() if key in own or not architectures.having(key)}
    return keys
