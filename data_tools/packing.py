"""Packing: the order and the pieces in which documents are written, so that windows cut few of them."""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

BLOCK = 1 << 16  # pieces among which one that fits is looked for

Piece = tuple[int, int]  # where its ids lie in the spool, without BOS; tokens, with BOS
LongDocuments = Literal["continue", "cut"]


@dataclass(frozen=True)
class BestFit:
    """Windows of `window` tokens, each filled with whole documents.

    The rest of a longer document heads another window, after a BOS (`continue`), or is left out (`cut`).
    """

    window: int
    long_documents: LongDocuments = "continue"


@dataclass
class Layout:
    """Pieces of documents in the order in which they are written, and the number of tokens left out."""

    starts: array[int] = field(default_factory=lambda: array("q"))
    lengths: array[int] = field(default_factory=lambda: array("q"))
    cut: int = 0  # beyond the window of their document
    left: int = 0  # at the end, less than a window

    @property
    def tokens(self) -> int:
        """Tokens of all pieces, with a BOS for each."""
        return sum(self.lengths)

    def extend(self, pieces: Iterable[Piece]) -> None:
        for start, length in pieces:
            self.starts.append(start)
            self.lengths.append(length)


def concat(starts: Sequence[int], lengths: Sequence[int], order: Iterable[int]) -> Layout:
    """Lay documents one after another; a window's edge cuts them wherever it falls."""
    layout = Layout()
    layout.extend((starts[i], lengths[i]) for i in order)
    return layout


def best_fit(starts: Sequence[int], lengths: Sequence[int], order: Iterable[int], packing: BestFit) -> Layout:
    """Fill windows with documents to the last token, without padding: the total is a multiple of the window.

    Longest first, each into the fullest window that takes it (arXiv:2404.10830), among BLOCK pieces at a time. Pieces
    that did not fill a window try again with the next block; the rest at the end is laid out one after another, and
    less than a window of it is left out.
    """
    layout = Layout()
    if packing.long_documents == "cut":
        layout.cut = sum(length - packing.window for length in lengths if length > packing.window)
    pieces = _pieces(starts, lengths, order, packing)
    rest: list[Piece] = []
    carried: list[Piece] = []
    while block := list(islice(pieces, BLOCK)):
        full, carried = _fill(carried + block, packing.window)
        layout.extend(full)
        rest += carried[BLOCK:]  # where next to nothing fits, the search stays short
        del carried[BLOCK:]
    rest = carried + rest
    whole = sum(length for _, length in rest) // packing.window * packing.window
    for start, length in rest:
        kept = min(length, whole)
        layout.extend([(start, kept)] if kept else [])
        layout.left += length - kept
        whole -= kept
    return layout


def _pieces(starts: Sequence[int], lengths: Sequence[int], order: Iterable[int], packing: BestFit) -> Iterator[Piece]:
    """Cut documents into pieces of at most a window, each with a BOS of its own."""
    for i in order:
        start, length = starts[i], lengths[i]
        yield start, min(length, packing.window)
        while length > packing.window and packing.long_documents == "continue":
            start, length = start + packing.window - 1, length - packing.window + 1
            yield start, min(length, packing.window)


def _fill(pieces: list[Piece], window: int) -> tuple[list[Piece], list[Piece]]:
    """Best fit of pieces into windows: the pieces of full windows, window by window, and the others.

    The place of a window follows from its longest piece, and within it pieces keep their order: as random as theirs.
    """
    open_windows: dict[int, list[list[int]]] = {}  # by the room they have
    rooms: list[int] = []  # sorted
    full: list[list[int]] = []
    for i in sorted(range(len(pieces)), key=lambda i: -pieces[i][1]):
        length = pieces[i][1]
        at = bisect_left(rooms, length)
        room, members = window, list[int]()
        if at < len(rooms):
            room = rooms[at]
            members = open_windows[room].pop()
            if not open_windows[room]:
                del open_windows[room], rooms[at]
        members.append(i)
        room -= length
        if room == 0:
            full.append(members)
            continue
        if room not in open_windows:
            insort(rooms, room)
        open_windows.setdefault(room, []).append(members)
    full.sort()  # by the longest, which came first
    others = sorted(i for group in open_windows.values() for members in group for i in members)
    return [pieces[i] for members in full for i in sorted(members)], [pieces[i] for i in others]
