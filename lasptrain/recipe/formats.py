"""Formats of what runs and exports leave behind, and the keys that were renamed between them.

1: before formats had numbers. 2: `RENAMED`.
"""

from collections.abc import Mapping
from typing import Any, TypeGuard

FORMAT = 2  # of run folders, manifests of checkpoints and records of exports

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

    A key that is there under both names stays, to be refused.
    """
    if number >= FORMAT:
        return dict(values)
    renamed = {key: RENAMED.get(f"{section}.{key}", key) for key in values}
    return {key if renamed[key] in values else renamed[key]: value for key, value in values.items()}
