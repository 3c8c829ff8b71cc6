"""Encoded ids between text and shards, unit by unit; a run that goes on after a kill reuses finished units."""

from __future__ import annotations

import json
import os
import zlib
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from lasptrain.data.shard import Int64s, numpy_dtype, token_dtype

Ids = npt.NDArray[Any]
READ = 1 << 22  # ids of a document that are in memory at once


class Spool:
    """The ids of every piece, without BOS, one after another in a file, and a journal with a line for each unit.

    A later run that meets the same units, in the same order, finds their ids; at the first that differs the rest is
    forgotten. `what` names all that ids depend on besides text.
    """

    def __init__(self, folder: Path, vocab_size: int, what: str) -> None:
        self.dtype = numpy_dtype(token_dtype(vocab_size))
        self.bytes = 0
        head = json.dumps(what).encode() + b"\n"
        journal = folder / "units"
        lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
        self._known = deque(lines[1:] if lines[:1] == [head] else [])
        self._ids = (folder / "ids").open("a+b")
        self._journal = journal.open("a+b")
        if not self._known:
            self._journal.truncate(0)
            self._journal.write(head)
            self._ids.truncate(0)
        self._journal_bytes = len(head)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ids.close()
        self._journal.close()

    def recall(self, digest: str) -> list[int] | None:
        """Number of ids in each piece of the next unit, None if no earlier run has encoded it; before any `add`."""
        if not self._known:
            return None
        line = self._known.popleft()
        counts = self._counts(line, digest)
        if counts is None:
            self._known.clear()
            return None
        self.bytes += sum(counts) * self.dtype.itemsize
        self._journal_bytes += len(line)
        return counts

    def _counts(self, line: bytes, digest: str) -> list[int] | None:
        try:
            found, crc, counts = json.loads(line)
        except (ValueError, TypeError):  # the line that was being written
            return None
        if found != digest or not line.endswith(b"\n"):
            return None
        size = sum(counts) * self.dtype.itemsize
        data = os.pread(self._ids.fileno(), size, self.bytes)
        return list(counts) if len(data) == size and zlib.crc32(data) == crc else None

    def add(self, digest: str, pieces: Sequence[Ids]) -> list[int]:
        """Append a unit: integers [tokens] for each piece. Returns the number of ids in each."""
        self._known.clear()
        self._ids.truncate(self.bytes)  # what an earlier run wrote last may be half a unit
        self._journal.truncate(self._journal_bytes)
        data = b"".join(ids.astype(self.dtype).tobytes() for ids in pieces)
        counts = [len(ids) for ids in pieces]
        self._ids.write(data)
        self._ids.flush()
        line = json.dumps([digest, zlib.crc32(data), counts]).encode() + b"\n"
        self._journal.write(line)
        self._journal.flush()
        self.bytes += len(data)
        self._journal_bytes += len(line)
        return counts

    def read(self, start: int, count: int) -> Iterator[Ids]:
        """Read ids [start, start + count), READ at a time."""
        size = self.dtype.itemsize
        for at in range(start, start + count, READ):
            length = min(READ, start + count - at) * size
            yield np.frombuffer(os.pread(self._ids.fileno(), length, at * size), self.dtype)


class Documents:
    """Documents of one split: their starts in the spool, tokens with BOS, and digests."""

    def __init__(self) -> None:
        self.starts = array("q")
        self.lengths = array("q")
        self.digests = array("Q")

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return sum(self.lengths)

    def add(self, start: int, length: int, digest: int) -> None:
        """Append a document whose ids lie at `start`."""
        self.starts.append(start)
        self.lengths.append(length)
        self.digests.append(digest)

    def extend(self, starts: Int64s, lengths: Int64s, digests: npt.NDArray[np.uint64]) -> None:
        """Append documents: one number of each in every array [documents]."""
        self.starts.frombytes(starts.tobytes())
        self.lengths.frombytes(lengths.tobytes())
        self.digests.frombytes(digests.tobytes())
