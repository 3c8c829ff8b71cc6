"""The run folder asked for, and the resolved recipe written into it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from data_tools.dataset import left_out, resume_stages
from data_tools.prepared import check_held_out, every_source
from data_tools.remembered import remember
from lasptrain.console.progress import preparing
from lasptrain.console.tables import show
from lasptrain.data.dataset import TokenDataset
from lasptrain.errors import CheckpointError
from lasptrain.recipe.resolve import with_meshes, with_vocabulary
from lasptrain.recipe.schema import Recipe
from lasptrain.run import folder as runs
from lasptrain.run import origin as origins
from lasptrain.run.origin import Origin


class RunLocation(NamedTuple):
    """The run folder asked for: `folder` instead of runs/NAME; `fresh`: one that does not exist yet.

    `origin`: the checkpoint that it begins with, unless it is there already and began so.
    """

    folder: Path | None = None
    fresh: bool = False
    origin: Origin | None = None


DEFAULT = RunLocation()


class Prepared(NamedTuple):
    """A recipe with its mesh and vocabulary as numbers, and the datasets of `every_source`."""

    recipe: Recipe
    parts: tuple[TokenDataset, ...]


def resolve(recipe: Recipe, world: int, run: Path) -> Prepared:
    """Prepare the data, those of `run` where it has trained, and return them with the recipe for `world` ranks."""
    recipe = with_meshes(recipe, world)
    with preparing() as progress:
        opened = resume_stages(recipe, progress, run, _say)
    recipe = with_vocabulary(recipe, opened.dataset.vocab_size)
    for line in left_out(every_source(recipe), opened.parts):
        _say(line)
    check_held_out(recipe, [part.manifest for part in opened.parts])
    return Prepared(recipe, opened.parts)


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def choose(recipe: Recipe, place: RunLocation) -> Path:
    """Return the path of the run folder. CheckpointError where `place.folder` has saved and began otherwise."""
    run = runs.choose(recipe.name, place.folder, place.fresh).absolute()
    if place.origin is None or not runs.committed(run) or origins.is_of(run, place.origin):
        return run
    if place.folder is not None:
        found = f"{run}: has saved steps and did not begin with {place.origin.what}"
        raise CheckpointError(f"{found}; expected another --run, or --fresh")
    return runs.choose(recipe.name, fresh=True).absolute()


@contextmanager
def open_run(prepared: Prepared, run: Path, place: RunLocation) -> Iterator[Path]:
    """Lock the run folder, write recipe and data into it, and yield its path, which is said first and last."""
    with runs.lock(run):
        runs.adopt(run, prepared.recipe)
        remember(run, every_source(prepared.recipe), prepared.parts)
        if place.origin is not None and not runs.committed(run):
            origins.write(run, place.origin)
        (run / runs.RANKS).mkdir(exist_ok=True)
        show(f"run        {run}")
        try:
            yield run
        finally:
            show(f"run        {run}" + (f"; --run {run} without --fresh goes on with it" if place.fresh else ""))
