"""A bar on the terminal while data is prepared."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, TaskID


@contextmanager
def preparing() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for each stage of preparing data, which appears with the first report."""
    bars = Progress(*Progress.get_default_columns(), console=Console(stderr=True), transient=True)
    tasks: dict[str, TaskID] = {}

    def show(stage: str, done: int, total: int) -> None:
        if not tasks:
            bars.start()
        if stage not in tasks:
            tasks[stage] = bars.add_task(f"preparing data: {stage}")
        bars.update(tasks[stage], completed=done, total=total)

    try:
        yield show
    finally:
        if tasks:
            bars.stop()
