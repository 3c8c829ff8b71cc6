"""Stages of a run read sources one after the other: each goes on in a source where the stages before it stopped."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lasptrain.data.dataset import Split, TokenDataset
from lasptrain.data.mixture import Mixture
from lasptrain.data.order import Stretch, behind


def in_turn(stages: Iterable[tuple[TokenDataset, int, int]], seed: int) -> list[TokenDataset]:
    """Return the datasets of stages, of which each has tokens per window and a number of samples, read in turn.

    A source is told by its fingerprint. Its tokens are read once before any is read again, but for less than a window
    at the end of an epoch.
    """
    found, ended = [], dict[str, tuple[int, int]]()
    for dataset, window, samples in stages:
        split, stretches = dataset.split("train"), []
        assert isinstance(split, Split | Mixture)
        for part, count in zip(dataset.members, split.counted(seed, samples), strict=True):
            stretches.append(Stretch(*ended.get(part.fingerprint, (0, 0)), count))
            if count and (tokens := part.whole("train").tokens):
                ended[part.fingerprint] = behind(tokens, window, stretches[-1])
        found.append(replace(dataset, splits={**dataset.splits, "train": split.reading(stretches)}))
    return found
