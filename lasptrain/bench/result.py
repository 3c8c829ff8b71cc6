"""Results of a measurement: rows, printed as tables and written as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from rich.table import Table

from lasptrain.console.tables import number, show

Row = TypeVar("Row")
Column = tuple[str, Callable[[Row], object], str]  # header, value of a row, format: `<` for text


@dataclass(frozen=True)
class Result(Generic[Row]):
    """Rows that were measured (named tuples), their tables, and the facts that hold for all, such as the device.

    In JSON the rows are called `name`.
    """

    rows: list[Row]
    tables: list[Table]
    facts: dict[str, Any]
    name: str = "rows"

    def show(self) -> None:
        """Print the tables."""
        show(*self.tables)

    def write(self, file: Path) -> None:
        """Write facts, rows and the version of torch as JSON."""
        content = {"torch": torch.__version__, **self.facts, self.name: self.rows}
        file.write_text(json.dumps(_plain(content), indent=1) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """Objects in place of named tuples, which JSON would take for lists."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    value = value._asdict() if hasattr(value, "_asdict") else value
    return {key: _plain(one) for key, one in value.items()} if isinstance(value, dict) else value


def table(title: str, rows: Iterable[Row], columns: Sequence[Column[Row]], caption: str = "") -> Table:
    """Format rows; a value that is text is shown as it is, and None is empty."""
    made = Table(title=title, caption=caption or None)
    for header, _, form in columns:
        if form == "<":
            made.add_column(header, no_wrap=True)
        else:
            made.add_column(header, justify="right", overflow="fold")
    for row in rows:
        made.add_row(*(_cell(value(row), form) for _, value, form in columns))
    return made


def _cell(value: Any, form: str) -> str:
    return value if isinstance(value, str) else number(value, form)
