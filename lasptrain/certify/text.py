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


Edges = Sequence[Sequence[Edge]]  # of windows in turn
CHUNK = 64  # tokens of the smallest chunk of a kernel


def edges(window: int, sp: int, segments: int) -> list[list[Edge]]:
    """Return the edges to plant, for windows in turn.

    The first has one inside a slice, which is inside a chunk too, on a slice's edge, on a segment's, and one that ends
    a long document. The second has one on the last token of a slice, two in one later slice, and one on a chunk's edge.
    No document but the last is its first token alone, which never changes.
    """
    length = window // (sp * segments)
    middle = length // 2 | 1 if length > 2 else length // 2  # odd
    first = [Edge("inside a slice", middle)]
    if sp > 1:
        first.append(Edge("slice edge", length))
    if segments > 1:
        first.append(Edge("segment edge", sp * length))
    second = [Edge("chunk edge", CHUNK)] if length > 2 * CHUNK else []
    if sp * segments > 1:
        first.append(Edge("spanning slices", window - length + middle))
        second.append(Edge("last token of a slice", length - 1))
    if sp * segments > 2 and middle + 2 < length:
        second += [Edge("spanning slices", 2 * length + middle), Edge("twice in a slice", 2 * length + middle + 2)]
    return [[edge for edge in found if edge.token > 0] for found in (first, second)]


def windows_of(loader: SliceLoader, step: int) -> Tensor:
    """Read the windows of a step whole, [windows, N + 1], as the data has them."""
    return torch.stack([loader.split.read(start, loader.window + 1) for start in loader.window_starts(step)])


def planted(windows: Tensor, bos: int, vocab: int, places: Edges) -> Tensor:
    """Return windows whose documents start exactly at `places`."""
    windows = windows.clone()
    windows[windows == bos] = another(torch.tensor(bos), bos, vocab)
    for number, found in enumerate(windows):
        found[[edge.token for edge in places[number % len(places)]]] = bos
    return windows


def another(tokens: Tensor, bos: int, vocab: int) -> Tensor:
    """Return tokens that are others than these, and start no document."""
    moved = (tokens + 1) % vocab
    return torch.where(moved == bos, (moved + 1) % vocab, moved)


def documents(windows: Tensor, bos: int) -> Tensor:
    """Number the documents of windows [windows, N + 1], from 0 in each; 0 goes on from before the window."""
    return (windows == bos).cumsum(1)


def with_documents(windows: Tensor, bos: int, vocab: int, places: Edges) -> Tensor:
    """Return the windows with documents planted into every second one; the others are as the data has them."""
    windows = windows.clone()
    windows[1::2] = planted(windows[1::2], bos, vocab, places)
    return windows
