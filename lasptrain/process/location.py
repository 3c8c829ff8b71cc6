"""The run folder that is asked for, and the recipe that it takes."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from data_tools.dataset import left_out, open_dataset
from lasptrain.console.progress import preparing
from lasptrain.recipe import resolve as recipes
from lasptrain.recipe.schema import Recipe
from lasptrain.run import folder as runs


class RunLocation(NamedTuple):
    """Which run folder is asked for: `folder` instead of runs/NAME; `fresh`: one that does not exist yet."""

    folder: Path | None = None
    fresh: bool = False


DEFAULT = RunLocation()


def resolve(recipe: Recipe, world: int) -> Recipe:
    """The recipe with its mesh and vocabulary as numbers; prepares the data, which knows the vocabulary."""
    dp, sp = recipes.resolve_mesh(recipe, world)
    with preparing() as progress:
        recipe = recipes.with_vocabulary(recipe, open_dataset(recipe.data, progress).vocab_size)
    for line in left_out(recipe.data):
        sys.stderr.write(f"{line}\n")
    return recipe.replace(mesh={"dp": dp, "sp": sp})


@contextmanager
def open_run(recipe: Recipe, place: RunLocation) -> Iterator[Path]:
    """The run folder, locked, holding the recipe and no records of failures past."""
    run = runs.choose(recipe.name, place.folder, place.fresh).absolute()
    with runs.lock(run):
        runs.adopt(run, recipe)
        (run / runs.RANKS).mkdir(exist_ok=True)
        yield run
