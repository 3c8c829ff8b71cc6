"""The windows that checks read: the recipe's own, with documents planted where a layout has its edges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lasptrain.data.loader import SliceLoader

STRIDE = 1 << 40  # places from one window held to the next


class Held:
    """A split of windows [windows, N + 1] in memory, for a `SliceLoader`: sample w reads window w."""

    name, align = "held", 1

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows
        self.tokens = windows.numel()

    def window_start(self, window: int, seed: int, sample: int) -> int:
        """Place of a sample's window."""
        return sample % len(self.windows) * STRIDE

    def begins(self, window: int, seed: int, sample: int) -> None:
        """None: nothing is read again."""

    def validation_starts(self, window: int) -> Sequence[int]:
        """Places of all windows."""
        return [number * STRIDE for number in range(len(self.windows))]

    def read(self, start: int, count: int) -> Tensor:
        """Read tokens from a place on."""
        number, token = divmod(start, STRIDE)
        return self.windows[number, token : token + count]


class Edge(NamedTuple):
    """The first token of a document, and what lies there."""

    kind: str
    token: int


def edges(window: int, sp: int, segments: int) -> list[Edge]:
    """Return the edges to plant: inside a slice, on a slice's, on a segment's, and one that ends a long document."""
    length = window // (sp * segments)
    found = [Edge("inside a slice", length // 2)]
    if sp > 1:
        found.append(Edge("slice edge", length))
    if segments > 1:
        found.append(Edge("segment edge", sp * length))
    if sp * segments > 1:
        found.append(Edge("spanning slices", window - length + length // 2))
    return [edge for edge in found if edge.token > 0]


def windows_of(loader: SliceLoader, step: int) -> Tensor:
    """Read the windows of a step whole, [windows, N + 1], as the data has them."""
    return torch.stack([loader.split.read(start, loader.window + 1) for start in loader.window_starts(step)])


def planted(windows: Tensor, bos: int, vocab: int, places: Sequence[Edge]) -> Tensor:
    """Return windows whose documents start exactly at `places`."""
    windows = windows.clone()
    windows[windows == bos] = another(torch.tensor(bos), bos, vocab)
    windows[:, [edge.token for edge in places]] = bos
    return windows


def another(tokens: Tensor, bos: int, vocab: int) -> Tensor:
    """Return tokens that are others than these, and start no document."""
    moved = (tokens + 1) % vocab
    return torch.where(moved == bos, (moved + 1) % vocab, moved)


def documents(windows: Tensor, bos: int) -> Tensor:
    """Number the documents of windows [windows, N + 1], from 0 in each; 0 goes on from before the window."""
    return (windows == bos).cumsum(1)


def with_documents(windows: Tensor, bos: int, vocab: int, places: Sequence[Edge]) -> Tensor:
    """Return the windows with documents planted into every second one; the others are as the data has them."""
    windows = windows.clone()
    windows[1::2] = planted(windows[1::2], bos, vocab, places)
    return windows
