"""The dataset that a recipe names: prepared once, then taken from the cache."""

from __future__ import annotations

from collections.abc import Iterator

from data_tools.files import counted
from data_tools.prepare import Progress, ensure_dataset, is_dataset
from data_tools.prepared import cache_folder, preparations, sources
from data_tools.sources import left_out as not_read
from lasptrain.data.dataset import TokenDataset
from lasptrain.data.mixture import mix
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


def left_out(data: Data) -> Iterator[str]:
    """Yield a line for each source of text that has files which are not read."""
    for name, _ in sources(data):
        found = {} if is_dataset(name) else not_read([name])
        if found:
            yield f"data.source: {name}: left out: {counted(found)}"
