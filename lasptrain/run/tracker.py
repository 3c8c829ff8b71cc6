"""A tracker: a program that shows the curves, tables and samples of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

from lasptrain.recipe.schema import Recipe

Rows: TypeAlias = Sequence[Mapping[str, str | float]]  # of a table, at least one, all with the same columns


class Tracker(Protocol):
    """A program that shows runs. It may raise anything."""

    def start(self, recipe: Recipe, run: Path) -> None:
        """Begin, or go on where the run folder `run` was tracked before, and show the recipe."""
        ...

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add values to curves."""
        ...

    def table(self, step: int, name: str, rows: Rows) -> None:
        """Show a table; text, such as a sample, is a cell."""
        ...

    def close(self, *, failed: bool = False) -> None:
        """End; `failed`: the run has ended with an error."""
        ...
