"""The dataset that a recipe names: prepared once, then taken from the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from data_tools import remembered
from data_tools.commands import told_left_out
from data_tools.prepare import ensure_dataset, is_dataset
from data_tools.prepared import cache_folder, every_source, preparations, sources
from data_tools.remembered import Told
from data_tools.shards import Progress
from data_tools.sources import PYTHON_SOURCE
from data_tools.sources import left_out as not_read
from lasptrain.data.dataset import TokenDataset
from lasptrain.data.mixture import mix
from lasptrain.data.stages import in_turn
from lasptrain.recipe.schema import Recipe
from lasptrain.recipe.sections import Data


def open_dataset(data: Data, progress: Progress | None = None, run: Path | None = None) -> TokenDataset:
    """Open the dataset that `data.source` names, and prepare it first if need be; any number of ranks may call at once.

    With `run`, the dataset that it was trained on, if it is still there. Raises DataError where it is missing, damaged,
    or made with another tokenizer than `data.tokenizer`.
    """
    return _mixed(data, [TokenDataset.open(folder) for folder in _folders(data, progress, run)])


class Opened(NamedTuple):
    """The datasets of a recipe: that of `data`, which text is held out of, and those of its stages, read in turn.

    Without stages there is one of all steps. `parts`: each source's, in the order of `every_source`.
    """

    dataset: TokenDataset
    stages: tuple[TokenDataset, ...]
    parts: tuple[TokenDataset, ...]


def open_stages(recipe: Recipe, progress: Progress | None = None, run: Path | None = None) -> Opened:
    """Open the datasets of a recipe and of its stages as `open_dataset` does."""
    return _opened(recipe, _folders(every_source(recipe), progress, run))


def resume_stages(recipe: Recipe, progress: Progress | None, run: Path, told: Told) -> Opened:
    """Open the datasets as `open_stages` does; of a run that goes on after a look at its text."""
    data = every_source(recipe)
    kept = remembered.recall(run, data)
    if kept is None:
        return open_stages(recipe, progress, run)
    preparing = preparations(data, progress, remembered.revisions(run, data))
    return _opened(recipe, remembered.checked_folders(data, kept, preparing, told))


def _folders(data: Data, progress: Progress | None, run: Path | None) -> list[Path]:
    kept = remembered.recall(run, data)
    folders = None if kept is None else remembered.folders(data, kept)
    preparing = preparations(data, progress, remembered.revisions(run, data))
    return folders or [ensure_dataset(one, cache_folder(data)) for one in preparing]


def _opened(recipe: Recipe, folders: list[Path]) -> Opened:
    parts = tuple(TokenDataset.open(folder) for folder in folders)
    if not recipe.stages:
        dataset = _mixed(recipe.data, parts)
        return Opened(dataset, (dataset,), parts)
    named = dict(zip((name for name, _ in sources(every_source(recipe))), parts, strict=True))

    def dataset_of(data: Data) -> TokenDataset:
        return _mixed(data, [named[name] for name, _ in sources(data)])

    spans = recipe.spans()
    stages = in_turn(
        ((dataset_of(span.recipe.data), span.recipe.data.window, span.samples) for span in spans), recipe.data.seed
    )
    return Opened(dataset_of(recipe.data), tuple(stages), parts)


def _mixed(data: Data, parts: Sequence[TokenDataset]) -> TokenDataset:
    if isinstance(data.source, str):
        return parts[0]
    return mix(parts, [part.weight for part in data.source], data.mix_block)


def left_out(data: Data, parts: Sequence[TokenDataset]) -> Iterator[str]:
    """Yield lines for each source of text that has files which are not read, or documents that were dropped."""
    for (name, _), part in zip(sources(data), parts, strict=True):
        if name != PYTHON_SOURCE and not is_dataset(name) and remembered.exists(name):
            told = told_left_out(not_read([name]), part.manifest.dropped)
            yield from (f"data.source: {name}: {line}" for line in told.splitlines() if line)
