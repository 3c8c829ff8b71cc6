"""The dataset that a recipe names: prepared once, then taken from the cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_tools import remembered
from data_tools.files import counted
from data_tools.prepare import Progress, ensure_dataset, is_dataset
from data_tools.prepared import cache_folder, preparations, sources
from data_tools.remembered import Told
from data_tools.sources import left_out as not_read
from lasptrain.data.dataset import TokenDataset
from lasptrain.data.mixture import mix
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


def left_out(data: Data) -> Iterator[str]:
    """Yield a line for each source of text that has files which are not read."""
    for name, _ in sources(data):
        found = {} if is_dataset(name) or not remembered.exists(name) else not_read([name])
        if found:
            yield f"data.source: {name}: left out: {counted(found)}"
