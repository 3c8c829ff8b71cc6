"""The dataset that a recipe names: prepared once, then taken from the cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_tools import remembered
from data_tools.commands import told_left_out
from data_tools.prepare import ensure_dataset, is_dataset
from data_tools.prepared import cache_folder, preparations, sources
from data_tools.remembered import Told
from data_tools.shards import Progress
from data_tools.sources import PYTHON_SOURCE
from data_tools.sources import left_out as not_read
from lasptrain.data.dataset import TokenDataset
from lasptrain.data.mixture import MixedDataset, mix
from lasptrain.recipe.sections import Data


def open_dataset(data: Data, progress: Progress | None = None, run: Path | None = None) -> TokenDataset:
    """Open the dataset that `data.source` names, and prepare it first if need be; any number of ranks may call at once.

    With `run`, the dataset that it was trained on, if it is still there. Raises DataError where it is missing, damaged,
    or made with another tokenizer than `data.tokenizer`.
    """
    kept = remembered.recall(run, data)
    folders = None if kept is None else remembered.folders(data, kept)
    if folders is None:
        folders = [ensure_dataset(one, cache_folder(data)) for one in preparations(data, progress)]
    return _mixed(data, folders)


def resume_dataset(data: Data, progress: Progress | None, run: Path, told: Told) -> TokenDataset:
    """Open the dataset as `open_dataset` does; of a run that goes on after a look at its text."""
    kept = remembered.recall(run, data)
    if kept is None:
        return open_dataset(data, progress)
    return _mixed(data, remembered.checked_folders(data, kept, preparations(data, progress), told))


def _mixed(data: Data, folders: list[Path]) -> TokenDataset:
    parts = [TokenDataset.open(folder) for folder in folders]
    if isinstance(data.source, str):
        return parts[0]
    return mix(parts, [part.weight for part in data.source], data.mix_block)


def left_out(data: Data, dataset: TokenDataset) -> Iterator[str]:
    """Yield lines for each source of text that has files which are not read, or documents that were dropped."""
    parts = dataset.parts if isinstance(dataset, MixedDataset) else (dataset,)
    for (name, _), part in zip(sources(data), parts, strict=True):
        if name != PYTHON_SOURCE and not is_dataset(name) and remembered.exists(name):
            told = told_left_out(not_read([name]), part.manifest.dropped)
            yield from (f"data.source: {name}: {line}" for line in told.splitlines() if line)
