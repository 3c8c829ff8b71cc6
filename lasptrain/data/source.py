"""The dataset that a recipe names: prepared once, found ever after."""

from __future__ import annotations

import os
from pathlib import Path

from data_tools.packing import BestFit
from data_tools.prepare import Progress, ensure_dataset
from lasptrain.data.dataset import TokenDataset
from lasptrain.data.mixture import mix
from lasptrain.recipe import Data


def cache_folder(data: Data) -> Path:
    """Where prepared datasets are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(data.cache or f"{home}/lasptrain").expanduser()


def open_dataset(data: Data, progress: Progress | None = None) -> TokenDataset:
    """Open what `data.source` names, after preparing it if that was never done; any number of ranks may call at once.

    Raises DataError where it is missing, damaged, or made with another tokenizer than `data.tokenizer`.
    """
    packing = BestFit(data.window, data.long_documents) if data.packing == "best_fit" else None
    names = [data.source] if isinstance(data.source, str) else [part.path for part in data.source]
    parts = [
        TokenDataset.open(
            ensure_dataset(
                name, data.tokenizer, cache_folder(data), data.validation, data.seed, progress, packing=packing
            )
        )
        for name in names
    ]
    if isinstance(data.source, str):
        return parts[0]
    return mix(parts, [part.weight for part in data.source], data.mix_block)
