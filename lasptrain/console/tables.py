"""Tables and lines for a terminal or a file."""

from __future__ import annotations

from contextlib import nullcontext
from decimal import Decimal

from rich.console import Console
from rich.table import Table

WIDE = 200  # columns, where there is no terminal


def number(value: float | None, form: str) -> str:
    """Format a value, such as with `.3f`; empty for None."""
    return "" if value is None else format(value, form)


def figures(value: float, count: int = 3) -> str:
    """Format a finite number to `count` significant figures, written out: 100, where format's `.2g` has 1e+02."""
    return format(Decimal(f"{value:.{count}g}"), ",f")


def show(*parts: Table | str) -> None:
    """Print tables and lines, as wide as the terminal. Title and caption may be wider than their table."""
    for part in parts:
        console = Console(highlight=False, markup=False, emoji=False)
        if not console.is_terminal:
            console.width = WIDE
        if isinstance(part, Table):
            title, caption, part.title, part.caption = part.title, part.caption, None, None
            lines = [title, part, caption]
        else:
            lines = [part]
        for line in lines:
            if line:
                with nullcontext() if console.is_terminal else console.capture() as captured:
                    console.print(line, soft_wrap=isinstance(line, str))
                if captured is not None:  # cells without a frame are filled with blanks, which a file does not need
                    console.file.writelines(f"{text.rstrip()}\n" for text in captured.get().splitlines())
