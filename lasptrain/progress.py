"""What a terminal shows while data is prepared."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

PATIENCE = 2.0  # seconds of work that need no word
UNITS = {"encode": "B", "write": " tokens"}  # of the stages of preparing data


@contextmanager
def preparing() -> Iterator[Callable[[str, int, int], None]]:
    """Yields a function `(stage, done, total)`: a bar on stderr for each stage, a line where it is no terminal."""
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
