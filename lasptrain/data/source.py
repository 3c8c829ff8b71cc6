"""The dataset that a recipe names: prepared once, found ever after."""

from __future__ import annotations

from data_tools.prepare import Progress, ensure_dataset
from lasptrain.data.dataset import TokenDataset
from lasptrain.data.mixture import mix
from lasptrain.data.prepared import cache_folder, packing, sources
from lasptrain.recipe import Data


def open_dataset(data: Data, progress: Progress | None = None) -> TokenDataset:
    """Open what `data.source` names, after preparing it if that was never done; any number of ranks may call at once.

    Raises DataError where it is missing, damaged, or made with another tokenizer than `data.tokenizer`.
    """
    parts = [
        TokenDataset.open(
            ensure_dataset(
                name, data.tokenizer, cache_folder(data), data.validation, data.seed, progress, packing=packing(data)
            )
        )
        for name, _ in sources(data)
    ]
    if isinstance(data.source, str):
        return parts[0]
    return mix(parts, [part.weight for part in data.source], data.mix_block)
