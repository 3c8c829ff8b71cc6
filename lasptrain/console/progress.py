"""Progress on a terminal, or in a log, of preparing data and of evaluating a model."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

PATIENCE = 2.0  # seconds of work that go unreported
PAUSE = 5.0  # seconds between lines of a log
UNITS = {"encode": "B", "read": "B", "check": " tokens", "write": " tokens"}  # of the stages of preparing data


@contextmanager
def preparing() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function `(stage, done, total)`: a bar on stderr for each stage, a line where it is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rate]}"))
    bars = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)
    tasks: dict[str, TaskID] = {}
    began = time.monotonic()

    def show(stage: str, done: int, total: int) -> None:
        if time.monotonic() - began < PATIENCE:
            return
        if not tasks:
            bars.start()
        if stage not in tasks:
            tasks[stage] = bars.add_task(f"preparing data: {stage}", rate="")
            if not console.is_terminal:
                console.print(f"preparing data: {stage}")
        rate = done / (time.monotonic() - began) / 1e6
        bars.update(tasks[stage], completed=done, total=total, rate=f"{rate:.1f} M{UNITS[stage]}/s")

    try:
        yield show
    finally:
        bars.stop()


@contextmanager
def asking(total: int, done: int, is_main: bool) -> Iterator[Callable[[str, int], None]]:
    """Yield a function `(current work, questions just answered)`: a bar on stderr, lines where it is no terminal.

    Args:
        total, done: questions in all, and those answered before.
        is_main: true on the rank that shows it.
    """
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    quiet = not (is_main and console.is_terminal)
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=quiet)
    task, said = bar.add_task("", total=total, completed=done), -PAUSE

    def show(what: str, answered: int = 0) -> None:
        nonlocal done, said
        done += answered
        bar.update(task, advance=answered, description=what)
        if quiet and is_main and time.monotonic() - said >= PAUSE:
            said = time.monotonic()
            console.print(f"{done}{f'/{total}' if done < total else ''}  {what}", soft_wrap=True)

    with bar:
        yield show
