"""Printed tables as data, whatever they look like."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table


def cells(table: Table) -> list[list[str]]:
    """Return the rows of a table, without header and footer."""
    return [[str(cell) for cell in row] for row in zip(*(column.cells for column in table.columns), strict=True)]


@contextmanager
def printed() -> Iterator[list[Table]]:
    """Collect the tables that this process prints meanwhile."""
    found, print_as_before = list[Table](), Console.print

    def collect(console: Console, *parts: Any, **options: Any) -> None:
        found.extend(part for part in parts if isinstance(part, Table))
        print_as_before(console, *parts, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Console, "print", collect)
        yield found
