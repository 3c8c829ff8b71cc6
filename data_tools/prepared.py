"""The datasets that a recipe names: their place in the cache, and the epochs that training reads of them. No torch."""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path

from data_tools.packing import BestFit
from data_tools.prepare import Preparation, find_dataset
from data_tools.shards import Progress
from data_tools.sources import Reading
from lasptrain.console.tables import figures
from lasptrain.data import order
from lasptrain.data.manifest import Manifest
from lasptrain.errors import DataError, SetupError
from lasptrain.files import at_home
from lasptrain.recipe.schema import Recipe
from lasptrain.recipe.sections import Data, Part


def cache_folder(data: Data) -> Path:
    """Folder in which prepared datasets are kept. SetupError where there is no home, and no other place is named."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = data.cache or at_home(f"{home}/lasptrain")
    if folder.startswith("~"):
        found = f"user {os.getuid()} has no account and HOME is not set, so there is no ~/.cache"
        raise SetupError(f"data.cache: {found}; expected it, XDG_CACHE_HOME or HOME to name a folder")
    return Path(folder)


def sources(data: Data) -> list[tuple[str, Fraction]]:
    """Sources, each with the share of all windows that comes from it."""
    if isinstance(data.source, str):
        return [(data.source, Fraction(1))]
    total = sum(Fraction(part.weight) for part in data.source)
    return [(part.path, Fraction(part.weight) / total) for part in data.source]


def every_source(recipe: Recipe) -> Data:
    """The recipe's data with all sources that it or a stage of it names, each once."""
    if not recipe.stages:
        return recipe.data
    named = (sources(data) for data in (recipe.data, *(span.recipe.data for span in recipe.spans())))
    parts = tuple(Part(path=name, weight=1.0) for name in dict.fromkeys(name for found in named for name, _ in found))
    return recipe.data.model_copy(update={"source": parts})


def preparations(
    data: Data, progress: Progress | None = None, revisions: Sequence[str | None] = ()
) -> list[Preparation]:
    """Preparation of each source; of datasets of the Hub at these revisions, where they are known."""
    packing = BestFit(data.window, data.long_documents) if data.packing == "best_fit" else None
    return [
        Preparation(
            [name],
            data.tokenizer,
            reading=Reading(field=data.field),
            validation_ppm=data.validation,
            seed=data.seed,
            packing=packing,
            progress=progress,
            revision=revision,
        )
        for (name, _), revision in zip_longest(sources(data), revisions)
    ]


def manifests(data: Data) -> list[Manifest] | None:
    """Manifest of each source; None where one is not prepared yet. Reads no more text than `find_dataset`."""
    try:
        cache = cache_folder(data)
    except SetupError:  # so nothing has been prepared there
        return None
    folders = [find_dataset(preparation, cache) for preparation in preparations(data)]
    found = [Manifest.load(folder) for folder in folders if folder is not None]
    return found if len(found) == len(folders) else None


def check_held_out(recipe: Recipe, manifests: Sequence[Manifest]) -> None:
    """Raise DataError where `eval.windows` are more than fit into held-out text; manifests are of `every_source`."""
    named = dict(zip((name for name, _ in sources(every_source(recipe))), manifests, strict=True))
    held = {name: named[name].splits["validation"].tokens for name, _ in sources(recipe.data)}
    asked, window = recipe.eval.windows, recipe.eval.window or recipe.data.window
    short = {name: tokens for name, tokens in held.items() if tokens < window}  # each source gives a window or more
    fit = 0 if short else sum(tokens // window for tokens in held.values())
    if asked <= fit:
        return
    split = [span.recipe.mesh.sp for span in recipe.spans() if span.recipe.mesh.sp != "auto"]
    grid = math.lcm(*split, *(named[name].order.align for name in held))
    lengths = range(grid, min(held.values()) + 1, grid)
    longest = grid * bisect_right(lengths, -asked, key=lambda n: -sum(tokens // n for tokens in held.values()))
    there = " and ".join(f"{tokens:,} tokens of {name}" for name, tokens in (short or held).items())
    raise DataError(
        f"eval.windows: found {asked:,} of {window:,} tokens, but {fit:,} fit into the {there} that are held out; "
        f"expected eval.windows: {fit}{f' or eval.window: {longest}' if longest else ''} at most, or more held out by "
        "data.validation (prepare --validation)"
    )


def epochs(recipe: Recipe, tokens: Sequence[int]) -> list[str]:
    """Format the epochs that all steps read of each source, a line each; `tokens` are those of `every_source`."""
    count = dict(zip((name for name, _ in sources(every_source(recipe))), tokens, strict=True))
    read = defaultdict[str, Fraction](Fraction)
    for span in recipe.spans():
        for name, share in sources(span.recipe.data):
            if count[name]:
                read[name] += order.epochs(count[name], span.recipe.data.window, span.samples * share)
    return [f"{figures(float(times))} epochs of {name}: {count[name]:,} tokens" for name, times in read.items()]
