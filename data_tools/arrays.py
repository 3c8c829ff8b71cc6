"""Arrays of ids in files, bare ones and numpy's: a part of them at a time, and where their rows end."""

from __future__ import annotations

import ast
import math
import os
import struct
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_tools.files import naming, one_line
from lasptrain.console.stdio import printable
from lasptrain.data.shard import Int64s
from lasptrain.errors import DataError
from lasptrain.files import regular

READ = 1 << 20  # ids that are in memory at once
NUMPY = b"\x93NUMPY"
LONGEST_HEAD = 1 << 16  # bytes of a .npy file before its array


class Rows(NamedTuple):
    """Ids that follow one another in a file: integers [T]. Rows end before the places `ends`: int64 [rows], in order;
    the last row may go on. `done` bytes of the file are read; `padding` ids have been left out. A file that is one run
    of ids, without rows, is `endless`.
    """

    ids: npt.NDArray[Any]
    ends: Int64s
    done: int
    padding: int = 0
    endless: bool = False


def flat(path: Path, dtype: str) -> Iterator[Rows]:
    """Read a file of nothing but ids, `uint16` or `uint32`, little-endian, as a row without an end.

    Raises DataError for half an id at its end.
    """
    kind = np.dtype(dtype).newbyteorder("<")
    with naming(path), regular(path) as raw:
        size = os.fstat(raw.fileno()).st_size
        if size % kind.itemsize:
            raise DataError(f"{path}: {size:,} bytes; expected a multiple of {kind.itemsize}, which {dtype} takes")
        yield from spans(path, raw, kind, 0, size // kind.itemsize)


def numpy_rows(path: Path) -> Iterator[Rows]:
    """Read a .npy array [rows, T] of integers, or [T], which is a row without an end.

    Raises DataError for any other, and for half a file.
    """
    with naming(path), regular(path) as raw:
        kind, shape, offset = _npy_head(path, raw)
        count = math.prod(shape)
        size, expected = os.fstat(raw.fileno()).st_size, offset + count * kind.itemsize
        if size != expected:
            raise DataError(f"{path}: {size:,} bytes; its header says {expected:,}")
        if len(shape) == 1:
            yield from spans(path, raw, kind, offset, count)
            return
        ends = np.arange(1, shape[0] + 1 if count else 0) * shape[1]
        yield from spans(path, raw, kind, offset, count, ends)


def spans(
    path: Path, raw: BufferedReader, kind: np.dtype[Any], offset: int, count: int, ends: Int64s | None = None
) -> Iterator[Rows]:
    """Read `count` numbers from a byte on, READ at a time; `ends` are those of the rows in all of them, if any has."""
    endless = ends is None
    ends = np.empty(0, np.int64) if ends is None else ends
    for start in range(0, max(1, count), READ):
        length = min(READ, count - start)
        at = offset + start * kind.itemsize
        data = os.pread(raw.fileno(), length * kind.itemsize, at)
        if len(data) < length * kind.itemsize:
            raise DataError(f"{path}: it ends at byte {at + len(data):,}, while it is read; expected more")
        first = np.searchsorted(ends, start, "right") if start else 0
        last = np.searchsorted(ends, start + length, "right")
        yield Rows(np.frombuffer(data, kind), ends[first:last] - start, at + len(data), endless=endless)


def _npy_head(path: Path, raw: BufferedReader) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """Parse the header of a .npy file (numpy.lib.format): type, shape, and the offset of the array."""
    head = raw.read(12)
    if len(head) < 12 or head[:6] != NUMPY or head[6] not in (1, 2, 3):
        raise DataError(f"{path}: begins with {head[:8]!r}; expected a .npy file, of version 1 to 3")
    size_type = "<H" if head[6] == 1 else "<I"
    offset = 8 + struct.calcsize(size_type)
    (size,) = struct.unpack_from(size_type, head, 8)
    if size > LONGEST_HEAD:
        raise DataError(f"{path}: a header of {size:,} bytes; expected at most {LONGEST_HEAD:,}")
    raw.seek(offset)
    try:
        found = ast.literal_eval(raw.read(size).decode())
        text, fortran, shape = found["descr"], found["fortran_order"], found["shape"]
        kind = np.dtype(text if isinstance(text, str) else "V")
        shape = tuple(int(length) for length in shape)
    except (ValueError, SyntaxError, TypeError, KeyError, AttributeError, RecursionError, MemoryError) as error:
        raise DataError(f"{path}: its header cannot be read: {one_line(error)}") from None
    if kind.kind not in "iu":
        raise DataError(f"{path}: holds {printable(str(text)[:60])}; expected integers")
    if len(shape) not in (1, 2) or min(shape) < 0 or (fortran and len(shape) == 2):
        order = ", in the order of Fortran" if fortran else ""
        raise DataError(f"{path}: an array {list(shape)[:8]}{order}; expected [ids] or [rows, ids], row after row")
    return kind, shape, offset + size
