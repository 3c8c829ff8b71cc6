"""The dataset that a recipe names: prepared once, then taken from the cache."""

from __future__ import annotations

from collections.abc import Iterator

from data_tools.commands import told_left_out
from data_tools.prepare import Progress, ensure_dataset, is_dataset
from data_tools.prepared import cache_folder, preparations, sources
from data_tools.sources import PYTHON_SOURCE
from data_tools.sources import left_out as not_read
from lasptrain.data.dataset import TokenDataset
from lasptrain.data.mixture import MixedDataset, mix
from lasptrain.recipe.sections import Data


def open_dataset(data: Data, progress: Progress | None = None) -> TokenDataset:
    """Open the dataset that `data.source` names, and prepare it first if need be; any number of ranks may call at once.

    Raises DataError where it is missing, damaged, or made with another tokenizer than `data.tokenizer`.
    """
    parts = [
        TokenDataset.open(ensure_dataset(preparation, cache_folder(data)))
        for preparation in preparations(data, progress)
    ]
    if isinstance(data.source, str):
        return parts[0]
    return mix(parts, [part.weight for part in data.source], data.mix_block)


def left_out(data: Data, dataset: TokenDataset) -> Iterator[str]:
    """Yield lines for each source of text that has files which are not read, or documents that were dropped."""
    parts = dataset.parts if isinstance(dataset, MixedDataset) else (dataset,)
    for (name, _), part in zip(sources(data), parts, strict=True):
        if name != PYTHON_SOURCE and not is_dataset(name):
            told = told_left_out(not_read([name]), part.manifest.dropped)
            yield from (f"data.source: {name}: {line}" for line in told.splitlines() if line)
