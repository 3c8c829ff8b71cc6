"""Indexed datasets of Megatron-LM: `NAME.bin` holds ids, `NAME.idx` says where sequences lie and documents end.

| bytes of NAME.idx     | content                                                                    |
|-----------------------|----------------------------------------------------------------------------|
| 9, 8, 1               | magic; version 1, u64; code of the type of ids, u8                         |
| 8, 8                  | number of sequences, S; number of document indices, D: one more than documents |
| 4·S, 8·S              | tokens of each sequence, i32; byte of NAME.bin at which it begins, i64     |
| 8·D                   | i64: document i is the sequences [index i, index i + 1)                    |
| nothing, or S         | mode of each sequence, i8, which is not read                               |

(NVIDIA/Megatron-LM, megatron/core/datasets/indexed_dataset.py)
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_tools.arrays import READ, Rows, spans
from data_tools.files import naming
from lasptrain.data.shard import Int64s
from lasptrain.errors import DataError
from lasptrain.files import regular

MAGIC = b"MMIDIDX\0\0"
HEAD = struct.Struct("<9sQBQQ")
TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are fractions


class Index(NamedTuple):
    """Sequences of a dataset: tokens [S] and first byte [S] of each; the numbers before which documents end [D - 1]."""

    kind: np.dtype[Any]
    lengths: Int64s
    pointers: Int64s
    documents: Int64s


def indexed(path: Path) -> Iterator[Rows]:
    """Read NAME.bin as `path`, NAME.idx, says; each document is a row. DataError where they do not fit each other."""
    index = read_index(path)
    ids = path.with_suffix(".bin")
    with naming(ids), regular(ids) as raw:
        size = os.fstat(raw.fileno()).st_size
        last = index.pointers + index.lengths * index.kind.itemsize
        outside = np.flatnonzero((index.pointers < 0) | (last > size))
        if outside.size:
            i = int(outside[0])
            said = f"sequence {i} in bytes {index.pointers[i]:,} to {last[i]:,}"
            raise DataError(f"{ids}: {size:,} bytes, {path.name} has {said}; expected it within them")
        yield from _runs(ids, raw, index)


def read_index(path: Path) -> Index:
    """Read NAME.idx. Raises DataError where it is damaged, cut, or of ids that are no integers."""
    with naming(path), regular(path) as raw:
        head = raw.read(HEAD.size)
        if len(head) < HEAD.size or head[:9] != MAGIC:
            raise DataError(f"{path}: begins with {head[:9]!r}; expected {MAGIC!r}, of an index of Megatron-LM")
        _, version, code, sequences, documents = HEAD.unpack(head)
        if version != 1 or code not in TYPES:
            raise DataError(f"{path}: version {version}, type {code}; expected version 1, type {[*TYPES]}, integers")
        size = os.fstat(raw.fileno()).st_size
        expected = HEAD.size + 12 * sequences + 8 * documents
        if size not in (expected, expected + sequences):
            counts = f"{sequences:,} sequences and {documents:,} document indices"
            raise DataError(f"{path}: {size:,} bytes; {counts} take {expected:,}: it is cut, or damaged")
        lengths, pointers, bounds = (
            _numbers(raw, kind, count) for kind, count in (("<i4", sequences), ("<i8", sequences), ("<i8", documents))
        )
    if (lengths < 0).any():
        i = int(np.argmax(lengths < 0))
        raise DataError(f"{path}: sequence {i} has {lengths[i]} tokens")
    if not documents or bounds[0] != 0 or bounds[-1] != sequences or (np.diff(bounds) < 0).any():
        raise DataError(
            f"{path}: document indices; expected numbers that increase from 0 to {sequences}, the sequences"
        )
    return Index(np.dtype(TYPES[code]), lengths, pointers, bounds[1:])


def _numbers(raw: BufferedReader, kind: str, count: int) -> Int64s:
    found: npt.NDArray[Any] = np.frombuffer(raw.read(np.dtype(kind).itemsize * count), kind)
    return found.astype(np.int64)


def _runs(ids: Path, raw: BufferedReader, index: Index) -> Iterator[Rows]:
    """Read sequences in their order, those that lie one behind another together, about READ ids at a time."""
    kind, lengths, pointers, documents = index
    before = np.concatenate(([0], np.cumsum(lengths)))  # ids of the sequences before each, and of all
    ends = before[documents]
    breaks = np.flatnonzero(pointers[1:] != pointers[:-1] + lengths[:-1] * kind.itemsize) + 1
    first = row = 0
    while first < len(lengths) or row < len(ends):
        last = max(first + 1, int(np.searchsorted(before, before[first] + READ, "right")) - 1)
        after = np.searchsorted(breaks, first, "right")
        last = min([last, len(lengths), *breaks[after : after + 1].tolist()])
        next_row = int(np.searchsorted(documents, last, "right"))
        start, count = (int(pointers[first]) if first < last else 0), int(before[last] - before[first])
        yield from spans(ids, raw, kind, start, count, ends[row:next_row] - before[first])
        first, row = last, next_row
