"""Formats of what runs and exports leave behind, and the keys that were renamed between them.

1: before formats had numbers. 2: `RENAMED`.
"""

from collections.abc import Mapping
from typing import Any

FORMAT = 2  # of run folders, manifests of checkpoints and records of exports

RENAMED = {
    "model.sliding": "sliding_window",
    "checkpoint.milestone": "keep_every",
    "checkpoint.patience": "max_failures",
}


def upgraded(section: str, values: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The keys of a recipe's section as format `number` wrote them, under the names that they have now."""
    if number >= FORMAT:
        return dict(values)
    return {RENAMED.get(f"{section}.{key}", key): value for key, value in values.items()}
