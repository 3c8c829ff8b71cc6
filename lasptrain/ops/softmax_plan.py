"""Index arithmetic of softmax attention: which rows of queries meet which rows of keys, in which calls of a kernel.

A document is a run of queries that sees a run of keys. As far as the queries stand among the block's keys that is a
causal `Piece`, aligned at its last corner: as many more keys as queries as the document has before them. As far as they
stand behind the keys it is a rectangle, whose lower left corner a window cuts off. No piece needs a mask.

Rows are counted in [B · T] queries and [B · J] keys: a batch is more documents. A large piece goes to a dense kernel as
squares and rectangles whose sides are powers of two, because that kernel is planned anew for each shape; the others,
and what is left of the large, go side by side into calls of a kernel of variable lengths.

Letters as in `lasptrain.ops`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

Runs = list[list[tuple[int, int]]]  # of each row of a batch: its documents' first queries and the positions they start

SHORTEST = 4096  # side of a dense piece: shorter ones do not fill a GPU
LONGEST = 1 << 17  # rows or keys of a call, but for a window's: up to 2¹⁴ channels their offsets fit into 31 bits
LEAST = 128  # of the longest sequence: a kernel's tile; of one query at most, flash attention swaps queries for heads


class Piece(NamedTuple):
    """Consecutive rows of queries that see consecutive rows of keys.

    Query i of n sees the keys up to i + m − n of m if causal, else all; those from i + m − n − left if `left` ≥ 0.
    """

    row: int
    rows: int
    key: int
    keys: int
    causal: int  # 0 or 1
    left: int = -1


class Call(NamedTuple):
    """Pieces that one launch of a kernel does, `sequences` side by side; of the dense kernel, all of one size.

    It reads `rows` queries from `row` on, `keys` keys from `key` on; the longest piece has `most_rows` × `most_keys`.
    """

    row: int
    rows: int
    key: int
    keys: int
    causal: int
    left: int
    dense: int  # 0 or 1
    sequences: int
    most_rows: int
    most_keys: int


def read(numbers: list[int]) -> list[Call]:
    """Return calls that are written out one after another."""
    size = len(Call._fields)
    return [Call(*numbers[start : start + size]) for start in range(0, len(numbers), size)]


def pieces(runs: Runs, t: int, query_start: int, j: int, key_start: int, window: int | None) -> Iterator[Piece]:
    """Yield what t queries from position `query_start` on see of j keys from `key_start` on, in the order of rows."""
    for row, documents in enumerate(runs):
        ends = [first for first, _ in documents[1:]] + [t]
        for (first, start), last in zip(documents, ends, strict=True):
            if start >= key_start + j:
                break  # nor do later ones see any of these keys
            for piece in _document(query_start + first, query_start + last, start, key_start, key_start + j, window):
                yield piece._replace(row=piece.row - query_start + row * t, key=piece.key - key_start + row * j)


def _document(first: int, stop: int, start: int, key_start: int, key_stop: int, window: int | None) -> Iterator[Piece]:
    """Yield the pieces of one document's queries, positions `first` to `stop`, with rows and keys as positions."""
    lowest = max(start, key_start)
    row, end = max(first, key_start), min(stop, key_stop)
    if row < end:  # among the keys
        low = lowest if window is None else max(lowest, row - window + 1)
        cut = window is not None and window < end - low
        yield Piece(row, end - row, low, end - low, 1, window - 1 if window is not None and cut else -1)
    row, end = max(first, key_stop), stop if window is None else min(stop, key_stop + window - 1)
    if lowest >= key_stop or row >= end:
        return
    whole = end if window is None else min(end, lowest + window)  # of the queries that see all keys
    if row < whole:
        yield Piece(row, whole - row, lowest, key_stop - lowest, 0)
    row = max(row, whole)
    if window is not None and row < end:
        low = max(lowest, row - window + 1)
        yield Piece(row, end - row, low, key_stop - low, 0, window - 1 - (end - key_stop))


def calls(found: Iterable[Piece], dense: bool) -> tuple[list[Call], list[int]]:
    """Return the calls that do these pieces, with a dense kernel or without one, and the edges of their sequences.

    Edges: for each call of the kernel that takes lengths, the first row of each sequence and the end of the last, then
    the same of its keys, all counted from the call's first.
    """
    large: list[Piece] = []
    groups: list[list[Piece]] = []
    for piece in found:
        for part in _split(piece) if dense else (piece,):
            if dense and _large(part):
                large.append(part)
                continue
            for short in _short(part):
                _append(groups, short)
    made, edges = list(_batches(large)), []
    for group in groups:
        row, key, last = group[0].row, group[0].key, group[-1]
        most = max(LEAST, *(piece.rows for piece in group)), max(LEAST, *(piece.keys for piece in group))
        rows, keys = zip(*_edges(group, *most), strict=True)
        made.append(Call(row, rows[-1], key, keys[-1], last.causal, last.left, 0, len(rows) - 1, *most))
        edges += [*rows, *keys]
    return made, edges


def _large(piece: Piece) -> bool:
    return piece.left < 0 and min(piece.rows, piece.keys) >= SHORTEST


def _split(piece: Piece) -> Iterator[Piece]:
    """Yield a piece that is large in squares and rectangles whose sides are powers of two, and rests that are not."""
    row, rows, key, keys, causal, _ = piece
    if not _large(piece):
        yield piece
        return
    side = min(LONGEST, 1 << rows.bit_length() - 1)
    before = keys - rows if causal else keys  # keys that all of the queries see
    if causal:
        yield Piece(row, side, key + before, side, 1)
    for start, length in _lengths(before):
        yield Piece(row, side, key + start, length, 0)
    if side < rows:
        yield from _split(Piece(row + side, rows - side, key, keys, causal))


def _short(piece: Piece) -> Iterator[Piece]:
    """Yield a piece in parts of at most LONGEST rows, and keys unless a window cuts them off."""
    row, rows, key, keys, causal, left = piece
    for first in range(0, rows, LONGEST):
        stop = min(first + LONGEST, rows)
        count, corner = stop - first, keys - rows  # of the key that the first query sees last if causal
        low = max(0, first + corner - left) if left >= 0 else 0
        high = stop + corner if causal else keys
        if left >= 0:
            more = 0 if causal else rows - stop
            yield Piece(row + first, count, key + low, high - low, causal, left + more)
            continue
        square = min(count, high) if causal else 0
        for start in range(0, high - square, LONGEST):
            yield Piece(row + first, count, key + start, min(LONGEST, high - square - start), 0)
        if causal:
            yield Piece(row + first, count, key + high - square, square, 1)


def _batches(found: list[Piece]) -> Iterator[Call]:
    """Yield calls of the dense kernel, of pieces that follow each other a power of two together."""
    runs: list[list[Piece]] = []
    for piece in sorted(found, key=lambda piece: (piece.rows, piece.keys, piece.causal, piece.row)):
        last = runs[-1][-1] if runs else None
        if last is not None and last._replace(row=last.row + last.rows, key=last.key + last.keys) == piece:
            runs[-1].append(piece)
        else:
            runs.append([piece])
    for run in runs:
        _, rows, _, keys, causal, left = run[0]
        most = max(1, LONGEST // max(rows, keys))
        while run:
            count = min(most, 1 << len(run).bit_length() - 1)
            yield Call(run[0].row, count * rows, run[0].key, count * keys, causal, left, 1, count, rows, keys)
            run = run[count:]


def _lengths(total: int) -> Iterator[tuple[int, int]]:
    """Yield starts and lengths that make up a total: powers of two, and a rest shorter than SHORTEST."""
    start = 0
    while start < total:
        length = total - start
        if length >= SHORTEST:
            length = min(LONGEST, 1 << length.bit_length() - 1)
        yield start, length
        start += length


def _append(groups: list[list[Piece]], piece: Piece) -> None:
    """Put a piece behind those of its kind that end before it, where there are such."""
    for group in groups:
        last = group[-1]
        alike = (last.causal, last.left) == (piece.causal, piece.left)
        span = max(piece.row + piece.rows - group[0].row, piece.key + piece.keys - group[0].key)
        if alike and span <= LONGEST and last.row + last.rows <= piece.row and last.key + last.keys <= piece.key:
            group.append(piece)
            return
    groups.append([piece])


def _edges(group: list[Piece], most_rows: int, most_keys: int) -> Iterator[tuple[int, int]]:
    """Yield the edges of sequences, in queries and in keys, counted from the first piece's.

    What lies between two pieces is in sequences of only queries or only keys, and none is longer than the longest
    piece, because what is beyond its length a kernel does not write.
    """
    row = key = 0
    yield row, key
    for piece in group:
        first = piece.row - group[0].row, piece.key - group[0].key
        while row < first[0]:
            row = min(row + most_rows, first[0])
            yield row, key
        while key < first[1]:
            key = min(key + most_keys, first[1])
            yield row, key
        row, key = first[0] + piece.rows, first[1] + piece.keys
        yield row, key
