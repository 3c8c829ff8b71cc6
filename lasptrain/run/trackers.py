"""The trackers of a run. One that fails never stops training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from lasptrain.errors import SetupError
from lasptrain.recipe.schema import Recipe
from lasptrain.run import tensorboard, wandb
from lasptrain.run.outlets import Outlet
from lasptrain.run.tensorboard import TensorBoard
from lasptrain.run.tracker import Rows, Tracker
from lasptrain.run.wandb import WeightsAndBiases

EXTRAS = ("wandb",)  # trackers whose package only an extra brings; all three have one name

log = logging.getLogger(__name__)


class Trackers:
    """Several trackers as one, none of which ever raises.

    A disk that refuses is told once and tried again for a while; then, or at any other error, the tracker is left off.
    What it has missed is counted, and told at the end.
    """

    def __init__(self, trackers: Mapping[str, tuple[Tracker, Path]]) -> None:
        self._all = [_Careful(name, tracker, Outlet(path)) for name, (tracker, path) in trackers.items()]

    def start(self, recipe: Recipe, run: Path) -> None:
        """Begin all of them."""
        for one in self._all:
            one("at the start", lambda tracker: tracker.start(recipe, run))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add values to the curves of each."""
        for one in self._all:
            one(f"at step {step}", lambda tracker: tracker.scalars(step, values))

    def table(self, step: int, name: str, rows: Rows) -> None:
        """Show a table in each."""
        for one in self._all:
            one(f"at step {step}", lambda tracker: tracker.table(step, name, rows))

    def close(self, *, failed: bool = False) -> None:
        """End each."""
        for one in self._all:
            one.close(failed=failed)


class _Careful:
    """A tracker of which errors are told once and counted."""

    def __init__(self, name: str, tracker: Tracker, outlet: Outlet) -> None:
        self._name, self._tracker, self._outlet = name, tracker, outlet
        self._on, self._missed = True, 0

    def __call__(self, when: str, act: Callable[[Tracker], None]) -> None:
        """Act, unless the tracker is off; an error that is not of a disk turns it off."""
        try:
            written = self._on and self._outlet(lambda: act(self._tracker))
        except Exception as error:
            written = self._on = False
            lines, kind = str(error).strip().splitlines() or [""], type(error).__name__
            log.warning("%s: %s: %s (%s); it is left off, training goes on", self._name, when, lines[0], kind)
        self._missed += not written

    def close(self, *, failed: bool) -> None:
        missed = self._missed
        self("at the end", lambda tracker: tracker.close(failed=failed))
        if missed:
            log.warning("%s: writes that it has missed: %d; metrics.jsonl holds its curves", self._name, missed)
        self._on, self._missed = False, 0


def require(recipe: Recipe) -> None:
    """Raise SetupError where a tracker of the recipe is not installed."""
    for name in sorted({*EXTRAS} & {*recipe.track.trackers}):
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # a mere folder of that name, which wandb makes, has no origin
            found = f"track.trackers: {name} is not installed"
            raise SetupError(f"{found}; expected it, pip install 'lasptrain[{name}]', or trackers without it")


def made(name: str, run: Path, start: int) -> tuple[Tracker, Path]:
    """Return a tracker of a run that goes on from step `start`, and its folder there."""
    match name:
        case "wandb":
            return WeightsAndBiases(), run / wandb.FOLDER
        case _:
            folder = run / tensorboard.FOLDER
            return TensorBoard(folder, start), folder


@contextmanager
def tracking(recipe: Recipe, run: Path, start: int, is_main: bool) -> Iterator[Trackers]:
    """Track a run that goes on from step `start`, from the main rank, until the block ends."""
    trackers = Trackers({name: made(name, run, start) for name in recipe.track.trackers if is_main})
    trackers.start(recipe, run)
    try:
        yield trackers
    except BaseException:
        trackers.close(failed=True)
        raise
    trackers.close()
