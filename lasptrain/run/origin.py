"""The checkpoint that a new run begins with: RUN/origin.json, written when the run is made. No torch."""

import json
import re
from pathlib import Path
from typing import NamedTuple

from lasptrain import files
from lasptrain.errors import CheckpointError
from lasptrain.run import base
from lasptrain.run import folder as runs

FILE = "origin.json"


class Origin(NamedTuple):
    """A step of another run, or its newest one (None), whose weights, and moments of the optimizer, are taken."""

    run: Path
    step: int | None = None
    optimizer: bool = False

    def __str__(self) -> str:
        return f"{self.run}{'' if self.step is None else f'@{self.step}'}"

    @property
    def what(self) -> str:
        """The part that is taken, for people."""
        return f"the weights{' and the optimizer' if self.optimizer else ''} of {self}"


def parse(text: str, optimizer: bool = False) -> Origin:
    """Read `RUN` or `RUN@STEP`. CheckpointError where there is no such run, or it has not saved that step."""
    match = re.fullmatch(r"(.+)@(\d+)", text)
    named = Path(text), None
    run, step = (Path(match[1]), int(match[2])) if match and not named[0].exists() else named
    if not (run / runs.RECIPE).is_file():
        found = f"--from {text}: {run} holds no {runs.RECIPE}; expected a run, such as runs/quickstart or"
        raise CheckpointError(f"{found} runs/quickstart@100; of an export, lasptrain convert --from hf makes one")
    saved = runs.committed(run)
    if not saved or step not in (None, *saved):
        there = f"has saved steps {', '.join(map(str, saved))}" if saved else "has saved none"
        raise CheckpointError(f"--from {text}: {run} {there}; expected one of them")
    return Origin(run.absolute(), step, optimizer)


def write(run: Path, origin: Origin) -> None:
    """Write what a new run begins with, its step as a number, and the base of that."""
    base.carry(origin.run, run)
    step = runs.committed(origin.run)[0] if origin.step is None else origin.step
    files.replace(run / FILE, json.dumps({"run": str(origin.run), "step": step, "optimizer": origin.optimizer}))


def read(run: Path) -> Origin | None:
    """Return the origin of a run, None where it began with initial weights. CheckpointError where it is damaged."""
    file = run / FILE
    try:
        kept = json.loads(files.read(file, own=True))
        return Origin(Path(kept["run"]), int(kept["step"]), bool(kept["optimizer"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file}: not what lasptrain writes ({type(error).__name__}: {error})") from None


def is_of(run: Path, origin: Origin) -> bool:
    """True for a run that began with `origin`, in the same way; with any step of it where `origin` has none."""
    there = read(run)
    return there is not None and there == origin._replace(step=there.step if origin.step is None else origin.step)
