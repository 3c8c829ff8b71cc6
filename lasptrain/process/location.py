"""The run folder asked for, and the resolved recipe written into it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from data_tools.dataset import left_out, open_dataset
from lasptrain.console.progress import preparing
from lasptrain.recipe.resolve import resolve_mesh, with_vocabulary
from lasptrain.recipe.schema import Recipe
from lasptrain.run import folder as runs


class RunLocation(NamedTuple):
    """The run folder asked for: `folder` instead of runs/NAME; `fresh`: one that does not exist yet."""

    folder: Path | None = None
    fresh: bool = False


DEFAULT = RunLocation()


def resolve(recipe: Recipe, world: int) -> Recipe:
    """Prepare the data and return the recipe with mesh and vocabulary (the data's) as numbers."""
    dp, sp = resolve_mesh(recipe, world)
    with preparing() as progress:
        dataset = open_dataset(recipe.data, progress)
    recipe = with_vocabulary(recipe, dataset.vocab_size)
    for line in left_out(recipe.data, dataset):
        sys.stderr.write(f"{line}\n")
    return recipe.replace(mesh={"dp": dp, "sp": sp})


@contextmanager
def open_run(recipe: Recipe, place: RunLocation) -> Iterator[Path]:
    """Lock the run folder, write the recipe into it, and yield its path."""
    run = runs.choose(recipe.name, place.folder, place.fresh).absolute()
    with runs.lock(run):
        runs.adopt(run, recipe)
        (run / runs.RANKS).mkdir(exist_ok=True)
        yield run
