"""Data order: the window of a sample is a pure function of (seed, sample), computed in constant time, never stored.

A split of `total` tokens is a ring: its end joins its start at a document edge. Each epoch cuts it into
W = total // window windows from a shifted start and visits them in the order of a Feistel permutation, so every window
is used once an epoch, no token twice, and only total mod window tokens sit out, others in the next epoch.

Stages of a run have windows of several lengths. They divide an epoch into stretches, one behind the other, each of as
many tokens as its stage reads, and visited in an order of its own: no token twice in an epoch of several stages either.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

ROUNDS = 6
AT_ONCE = 1 << 16  # indices that are permuted together
MASK = (1 << 64) - 1


def splitmix64(value: int) -> int:
    """Mix 64 bits (SplitMix64)."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


@lru_cache(maxsize=64)
def keys(seed: int, epoch: int, size: int) -> tuple[int, ...]:
    """Derive seven keys of 64 bits: one for each round, and one for the shift of the epoch."""
    digest = hashlib.blake2b(
        f"{seed} {epoch} {size}".encode(), digest_size=8 * (ROUNDS + 1), usedforsecurity=False
    ).digest()
    return tuple(int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8))


def permute(size: int, index: int, seed: int, epoch: int = 0) -> int:
    """Apply a pseudorandom bijection of range(size) to `index`.

    A Feistel network on the next even number of bits; values outside of the range walk their cycle until they are in.
    Fewer rounds leave patterns in successive differences.
    """
    if not 0 <= index < size:
        raise ValueError(f"index {index} is not in range({size})")
    bits = ((size - 1).bit_length() + 1) // 2
    low = (1 << bits) - 1
    rounds = keys(seed, epoch, size)[:ROUNDS]
    while True:
        left, right = index >> bits, index & low
        for key in rounds:
            left, right = right, left ^ (splitmix64(right ^ key) & low)
        index = left << bits | right
        if index < size:
            return index


def permuted(size: int, seed: int, epoch: int = 0) -> Iterator[int]:
    """Apply `permute` to every index of range(size), in order: many at a time, and far faster."""
    bits = np.uint64(((size - 1).bit_length() + 1) // 2)
    rounds = [np.uint64(key) for key in keys(seed, epoch, size)[:ROUNDS]]
    for start in range(0, size, AT_ONCE):
        found = np.arange(start, min(start + AT_ONCE, size), dtype=np.uint64)
        walking = np.arange(len(found))
        while len(walking):
            found[walking] = _feistel(found[walking], bits, rounds)
            walking = walking[found[walking] >= size]
        yield from found.tolist()


def _feistel(index: npt.NDArray[np.uint64], bits: np.uint64, rounds: list[np.uint64]) -> npt.NDArray[np.uint64]:
    low = (np.uint64(1) << bits) - np.uint64(1)
    left, right = index >> bits, index & low
    for key in rounds:
        value = (right ^ key) + np.uint64(0x9E3779B97F4A7C15)  # splitmix64, whose sums and products wrap
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ ((value ^ (value >> np.uint64(31))) & low)
    return left << bits | right


def epochs(total: int, window: int, samples: Fraction | int) -> Fraction:
    """Number of epochs in so many samples; a window longer than the ring is several."""
    return samples * (Fraction(window, total) if window > total else Fraction(1, total // window))


class Stretch(NamedTuple):
    """The part of a ring's epochs that a stage reads: `windows`, behind the `offset` first tokens of an epoch."""

    epoch: int
    offset: int
    windows: int


class Place(NamedTuple):
    """The place of a sample: visit `visit` of the `windows` that begin behind the `offset` first tokens of an epoch."""

    epoch: int
    offset: int
    windows: int
    visit: int


def locate(total: int, window: int, sample: int, stretch: Stretch | None = None) -> Place:
    """Return the place of a sample of a stage in its stretch, or in the epochs of a run without stages."""
    whole = max(total // window, 1)
    if stretch is None:
        epoch, visit = divmod(sample, whole)
        return Place(epoch, 0, whole, visit)
    begun = min((total - stretch.offset) // window, stretch.windows)
    if sample < begun:
        return Place(stretch.epoch, stretch.offset, begun, sample)
    epoch, visit = divmod(sample - begun, whole)
    return Place(stretch.epoch + 1 + epoch, 0, min(whole, stretch.windows - begun - epoch * whole), visit)


def behind(total: int, window: int, stretch: Stretch) -> tuple[int, int]:
    """Return the epoch, and the offset in it, at which the stretch behind a stretch begins."""
    if window > total:
        return epoch_of(total, window, stretch.windows - 1, stretch), 0
    last = locate(total, window, stretch.windows - 1, stretch)
    return last.epoch, last.offset + last.windows * window


def epoch_of(total: int, window: int, sample: int, stretch: Stretch | None = None) -> int:
    """Return the number of the epoch in which a sample ends, from 1 on; of sample -1, in which it begins."""
    before = 0 if stretch is None else stretch.epoch + (stretch.offset > 0)
    if sample < 0 or stretch is None or window > total:
        return max(1, before + math.ceil(epochs(total, window, sample + 1)))
    return locate(total, window, sample, stretch).epoch + 1


def window_start(total: int, window: int, align: int, seed: int, sample: int, stretch: Stretch | None = None) -> int:
    """Token of the ring at which the window of `sample` starts.

    `total` and `window` are tokens and multiples of `align`. Sample s·G + g is window g of step s for G windows a step;
    of a stage with its `stretch`, both are counted from its first. A window longer than the ring goes round it more
    than once.
    """
    if total == 0 or total % align or window % align:
        raise ValueError(f"{total} tokens hold no window of {window} tokens on a grid of {align}")
    epoch, offset, windows, visit = locate(total, window, sample, stretch)
    turn = keys(seed, epoch, windows if stretch is None else 0)[ROUNDS]  # the same in all stretches of an epoch
    shift = turn % (total // align) * align
    return (shift + offset + permute(windows, visit, seed, epoch) * window) % total
