"""The datasets that a recipe names: their place in the cache, and the epochs that training reads of them. No torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from data_tools.packing import BestFit
from data_tools.prepare import Preparation, find_dataset
from data_tools.shards import Progress
from data_tools.sources import Reading
from lasptrain.console.tables import figures
from lasptrain.data import order
from lasptrain.data.manifest import Manifest
from lasptrain.errors import SetupError
from lasptrain.files import at_home
from lasptrain.recipe.sections import Data


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


def preparations(data: Data, progress: Progress | None = None) -> list[Preparation]:
    """Preparation of each source."""
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
        )
        for name, _ in sources(data)
    ]


def training_tokens(data: Data) -> list[int] | None:
    """Tokens to train on of each source; None where one is not prepared yet. Reads no more text than `find_dataset`."""
    try:
        cache = cache_folder(data)
    except SetupError:  # so nothing has been prepared there
        return None
    folders = [find_dataset(preparation, cache) for preparation in preparations(data)]
    found = [Manifest.load(folder).splits["train"].tokens for folder in folders if folder is not None]
    return found if len(found) == len(folders) else None


def epochs(data: Data, tokens: Sequence[int], windows: int) -> list[str]:
    """Format the epochs that so many `windows` read of each source, a line each; `tokens` are those of the sources."""
    return [
        f"{figures(float(order.epochs(count, data.window, windows * share)))} epochs of {name}: {count:,} tokens"
        for (name, share), count in zip(sources(data), tokens, strict=True)
        if count
    ]
