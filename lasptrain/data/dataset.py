"""A folder of shards opened for training: totals, tokenizer facts, and its splits as rings of tokens."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from lasptrain.data.manifest import FILE, Manifest
from lasptrain.data.order import Stretch, epoch_of, window_start
from lasptrain.data.shard import Shard, Tokens
from lasptrain.errors import DataError


class Split:
    """One split, a ring of `tokens` tokens laid over its shards: after the last token comes the first."""

    def __init__(self, name: str, shards: list[Shard], align: int) -> None:
        self.name = name
        self.shards = shards
        self.align = align
        self._stretch: Stretch | None = None
        self._ends = list(accumulate(shard.header.n_tokens for shard in shards))
        self.tokens = self._ends[-1] if shards else 0

    def window_start(self, window: int, seed: int, sample: int) -> int:
        """Token at which a sample's window starts."""
        return window_start(self.tokens, window, self.align, seed, sample, self._stretch)

    def counted(self, seed: int, samples: int) -> list[int]:
        """Return the windows that so many samples read of each of its datasets."""
        return [samples]

    def reading(self, stretches: Sequence[Stretch]) -> Split:
        """Return the split as a stage reads it, in the one stretch that is given."""
        found = copy.copy(self)
        (found._stretch,) = stretches
        return found

    def begins(self, window: int, seed: int, sample: int) -> tuple[int, int] | None:
        """(0, number of the epoch, 2 or more) if a sample begins to read tokens again, else None."""
        number = self.epoch(window, sample)
        return (0, number) if number > self.epoch(window, sample - 1) else None

    def epoch(self, window: int, sample: int) -> int:
        """Number of the epoch in which a sample ends; 1 before the first one too."""
        return epoch_of(self.tokens, window, sample, self._stretch)

    def validation_starts(self, window: int) -> Sequence[int]:
        """Starts of windows cut from the start of the split, without shift or shuffle."""
        return range(0, self.tokens // window * window, window)

    def read(self, start: int, count: int) -> torch.Tensor:
        """Read tokens [start, start + count) of the ring: int64 [count].

        Every block touched, every id, and the number of BOS are verified. Raises DataError with shard and place.
        """
        if self.tokens == 0:
            raise DataError(f"split {self.name}: it has no tokens")
        parts: list[Tokens] = []
        while count > 0:
            start %= self.tokens
            number = bisect_right(self._ends, start)
            shard = self.shards[number]
            begin = start - self._ends[number] + shard.header.n_tokens
            size = min(count, shard.header.n_tokens - begin)
            part = shard.read(begin, size)
            shard.check_tokens(begin, part)
            parts.append(part)
            start, count = start + size, count - size
        tokens = np.concatenate(parts) if parts else np.empty(0)
        return torch.from_numpy(tokens.astype(np.int64))


class Windows(Protocol):
    """One split, or several mixed. A place is the start of a window or of a slice of it."""

    name: str
    tokens: int  # of the shortest ring
    align: int

    def window_start(self, window: int, seed: int, sample: int) -> int:
        """Place of the window that a sample reads."""

    def begins(self, window: int, seed: int, sample: int) -> tuple[int, int] | None:
        """(source, epoch) by number if a sample begins to read tokens of a source again, else None."""

    def validation_starts(self, window: int) -> Sequence[int]:
        """Places of fixed windows, for validation."""

    def read(self, start: int, count: int) -> torch.Tensor:
        """Read tokens from a place on: int64 [count]."""


@dataclass(frozen=True)
class TokenDataset:
    """A dataset whose files are all there and are the ones that `dataset.json` names."""

    folder: Path
    manifest: Manifest
    splits: Mapping[str, Windows]

    @classmethod
    def open(cls, folder: Path) -> TokenDataset:
        """Open `folder`: reads headers and checksums, no tokens. Raises DataError naming the file that does not fit."""
        manifest = Manifest.load(folder)
        listed = {entry.name for entry in manifest.shards}
        extra = sorted(path.name for path in folder.glob("*.ltok") if path.name not in listed)
        if extra or len(listed) != len(manifest.shards):
            raise DataError(
                f"{folder / FILE}: it does not list the shard {extra[0]}"
                if extra
                else f"{folder / FILE}: it lists a shard twice"
            )
        shards: dict[str, list[Shard]] = {name: [] for name in manifest.splits}
        for entry in manifest.shards:
            shards.setdefault(entry.split, []).append(manifest.open(folder, entry))
        splits = {name: Split(name, members, manifest.order.align) for name, members in shards.items()}
        return cls(folder, manifest, splits)

    def whole(self, name: str) -> Split:
        """Split of that name of a dataset that is not mixed."""
        split = self.split(name)
        assert isinstance(split, Split)
        return split

    def split(self, name: str) -> Windows:
        """Split of that name. Raises DataError when there is none."""
        if name not in self.splits:
            raise DataError(f"{self.folder}: no split {name!r}, it has {', '.join(sorted(self.splits)) or 'none'}")
        return self.splits[name]

    @property
    def members(self) -> tuple[TokenDataset, ...]:
        """The datasets that it is mixed of, or itself."""
        return (self,)

    @property
    def mixed(self) -> dict[str, str]:
        """The order in which datasets are mixed, as checkpoints keep it."""
        return {}

    @property
    def content(self) -> str:
        """SHA-256 over what it was made of; see `Manifest.content`."""
        return self.manifest.content

    @property
    def fingerprint(self) -> str:
        """SHA-256 over shards, tokenizer and order: equal for two datasets that give the same tokens."""
        return self.manifest.fingerprint

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.manifest.tokenizer.vocab_size

    @property
    def bos(self) -> int:
        """The id every document starts with."""
        return self.manifest.tokenizer.bos

    @property
    def tokenizer_sha256(self) -> str:
        """SHA-256 of the tokenizer the shards were made with."""
        return self.manifest.tokenizer.sha256

    @property
    def unigram_entropy(self) -> float:
        """Nats per token that a model of token frequencies alone would reach on the training split."""
        return self.manifest.unigram_entropy

    @property
    def token_bytes(self) -> torch.Tensor:
        """Bytes of text for each id, 0 for BOS: int64 [vocab_size]."""
        return torch.tensor(self.manifest.tokenizer.token_bytes, dtype=torch.int64)
