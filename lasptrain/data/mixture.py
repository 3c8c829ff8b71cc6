"""Several datasets in fixed shares: the dataset and the place that a sample reads are a function of (seed, sample).

Of every block of `sum(counts)` samples, dataset k gives exactly counts[k] windows, at places that a permutation of the
block says; each has its own ring, order and epochs, and its windows come in that order: all are read before one is read
again, wherever in a block training ends. A window comes from one dataset.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

import torch

from lasptrain.data.dataset import Split, TokenDataset
from lasptrain.data.order import Stretch, permuted, splitmix64
from lasptrain.errors import DataError

SPAN = 1 << 48  # tokens between the places of one dataset and of the next


def shares(weights: Sequence[float], block: int) -> list[int]:
    """Windows of each dataset in a block: weights · block, by largest remainders.

    Raises DataError where one would get none, naming the least weight that fits.
    """
    if block < len(weights):
        raise DataError(f"data.mix_block: {block} windows for {len(weights)} sources; expected one for each at least")
    exact = [Fraction(weight) for weight in weights]
    parts = [weight / sum(exact) * block for weight in exact]
    counts = [int(part) for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda k: (counts[k] - parts[k], k))
    for k in by_remainder[: block - sum(counts)]:
        counts[k] += 1
    for number, (count, weight) in enumerate(zip(counts, weights, strict=True)):
        if count == 0:
            rest = float(sum(exact) - exact[number])
            raise DataError(
                f"data.source.{number}.weight: {weight:g} is no window in {block}; the least that fits is "
                f"{math.ceil(rest / max(1, block - 1) * 1e6) / 1e6:g}, or a larger data.mix_block"
            )
    return counts


@lru_cache(maxsize=4)
def _dealt(ends: tuple[int, ...], seed: int, block: int) -> list[tuple[int, int]]:
    """Return the datasets of the samples of a block, each with how many samples of it came before in the block.

    `ends`: of the datasets' shares of the block.
    """
    seen, found = Counter[int](), []
    for number in (bisect_right(ends, slot) for slot in permuted(ends[-1], splitmix64(seed), block)):
        found.append((number, seen[number]))
        seen[number] += 1
    return found


class Mixture:
    """One split of several datasets. A place is `number of the dataset · SPAN + token of its ring`."""

    def __init__(self, splits: Sequence[Split], counts: Sequence[int]):
        self.splits, self.counts = splits, counts
        self.name = splits[0].name
        self.tokens = min(split.tokens for split in splits)
        self.align = math.lcm(*(split.align for split in splits))
        self._ends = tuple(accumulate(counts))

    def sample(self, seed: int, sample: int) -> tuple[int, int]:
        """Map a sample to (number of the dataset, sample of that dataset)."""
        block, place = divmod(sample, self._ends[-1])
        number, before = _dealt(self._ends, seed, block)[place]
        return number, block * self.counts[number] + before

    def counted(self, seed: int, samples: int) -> list[int]:
        """Return the windows that so many samples read of each of its datasets."""
        blocks, rest = divmod(samples, self._ends[-1])
        last = Counter(number for number, _ in _dealt(self._ends, seed, blocks)[:rest])
        return [blocks * count + last[number] for number, count in enumerate(self.counts)]

    def reading(self, stretches: Sequence[Stretch]) -> Mixture:
        """Return the mixture as a stage reads it, each dataset in its stretch."""
        splits = [split.reading([stretch]) for split, stretch in zip(self.splits, stretches, strict=True)]
        return Mixture(splits, self.counts)

    def window_start(self, window: int, seed: int, sample: int) -> int:
        """Place of a sample's window."""
        number, own = self.sample(seed, sample)
        return number * SPAN + self.splits[number].window_start(window, seed, own)

    def begins(self, window: int, seed: int, sample: int) -> tuple[int, int] | None:
        """(source, epoch) by number if a sample begins to read tokens of a source again, else None."""
        number, own = self.sample(seed, sample)
        begun = self.splits[number].begins(window, seed, own)
        return begun and (number, begun[1])

    def validation_starts(self, window: int) -> list[int]:
        """Places of windows from the starts of the splits, the datasets' first ones first."""
        places = [split.validation_starts(window) for split in self.splits]
        longest = max(map(len, places))
        return [k * SPAN + p[i] for i in range(longest) for k, p in enumerate(places) if i < len(p)]

    def read(self, start: int, count: int) -> torch.Tensor:
        """Read tokens [start, start + count) of the ring that the place is in: int64 [count]."""
        number, token = divmod(start, SPAN)
        return self.splits[number].read(token, count)


@dataclass(frozen=True)
class MixedDataset(TokenDataset):
    """Datasets in shares; folder and manifest are those of the first."""

    parts: tuple[TokenDataset, ...] = ()
    counts: tuple[int, ...] = ()

    @property
    def members(self) -> tuple[TokenDataset, ...]:
        return self.parts

    @property
    def mixed(self) -> dict[str, str]:
        return {"mixed": "each in its order"}

    @property
    def content(self) -> str:
        return self._digest([part.content for part in self.parts])

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the datasets' fingerprints and shares."""
        return self._digest([part.fingerprint for part in self.parts])

    def _digest(self, parts: list[str]) -> str:
        shares = [[part, count] for part, count in zip(parts, self.counts, strict=True)]
        return hashlib.sha256(json.dumps(shares).encode()).hexdigest()

    @property
    def unigram_entropy(self) -> float:
        """Mean over windows, nats per token: of a model of token frequencies that knows a window's dataset."""
        pairs = zip(self.parts, self.counts, strict=True)
        return sum(part.unigram_entropy * count for part, count in pairs) / sum(self.counts)


def mix(parts: Sequence[TokenDataset], weights: Sequence[float], block: int) -> TokenDataset:
    """Mix datasets in shares of `weights`. Raises DataError where they were made with different tokenizers."""
    first = parts[0]
    for part in parts[1:]:
        if part.tokenizer_sha256 != first.tokenizer_sha256:
            raise DataError(
                f"data.source: {part.folder} was made with tokenizer {part.manifest.tokenizer.name}, "
                f"{first.folder} with {first.manifest.tokenizer.name}; sources that are mixed share one"
            )
    counts = shares(weights, block)
    splits = {name: Mixture([part.whole(name) for part in parts], counts) for name in ("train", "validation")}
    return MixedDataset(first.folder, first.manifest, splits, tuple(parts), tuple(counts))
