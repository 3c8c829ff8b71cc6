"""The `.ltok` file: tokens with document starts and a checksum for every 64 KiB. Reader and writer of the format.

| offset                | content                                                                        |
|-----------------------|--------------------------------------------------------------------------------|
| 0                     | magic, u32 header length, UTF-8 JSON header, u32 CRC-32 of these, zeros to 4096 |
| 4096                  | tokens, little-endian u16 or u32; every document starts with BOS               |
| next multiple of 4096 | starts: u64 for each document, strictly increasing, the first is 0             |
| next multiple of 64   | u32 CRC-32 for each 64 KiB block of the tokens, then of the starts             |
| last 64 bytes         | offset and length of the three parts, CRC-32 of the table, CRC-32 of the above, magic |

Files are read with `preadv`, never mapped: a mapped file that shrinks kills the process, a short read is an error
with a name. They are opened for each read, so a shard that vanishes is noticed, and a thousand shards hold no
descriptors.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from lasptrain.console.stdio import printable
from lasptrain.errors import DataError

MAGIC = b"LASPTOK1"
PAGE = 4096
BLOCK = 65536  # bytes under one CRC: small enough that a slice of 4,096 tokens is read and checked in 0.1 ms
FOOTER = struct.Struct("<6QII8s")
STARTS_PER_BLOCK = BLOCK // 8

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
Int64s = npt.NDArray[np.int64]


Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Size = Annotated[int, Field(ge=1, le=1 << 32)]


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class ShardHeader:
    """Header of a shard. `tokenizer` is the model's SHA-256; windows start at multiples of `align`.

    Raises pydantic.ValidationError for values of other types, or out of their range.
    """

    vocab_size: Size
    bos: Count
    tokenizer: str
    source: str
    split: str
    created_by: str
    align: Annotated[int, Field(ge=1, lt=1 << 53)] = 1
    n_tokens: Count = 0
    n_documents: Count = 0
    dtype: Literal["u16", "u32"] = "u16"
    format: Literal[1] = 1


def misfit(error: ValidationError) -> str:
    """Describe the first value that does not fit: its key, the reason, and what was found, in one short line."""
    first = error.errors(include_url=False)[0]
    key, value = ".".join(map(str, first["loc"])) or "content", first["input"]
    if first["type"] == "missing":
        return printable(f"{key}: missing"[:400])
    is_short = isinstance(value, str | float | bool | None) or (isinstance(value, int) and abs(value) < 1 << 64)
    found = repr(value if not isinstance(value, str) else value[:80]) if is_short else type(value).__name__
    return printable(f"{key}: {first['msg']}, found {found}"[:400])


def token_dtype(vocab_size: int) -> Literal["u16", "u32"]:
    """Smallest type of ids: `u16` for a vocabulary of up to 65,536, else `u32`."""
    return "u16" if vocab_size <= 1 << 16 else "u32"


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """Little-endian numpy type of `u16` or `u32`."""
    return np.dtype({"u16": "<u2", "u32": "<u4"}[dtype])


class ShardWriter:
    """Writer of one shard, document by document; leaving the context writes index, checksums and, last, the header.

    Memory: one block of tokens and a number for each document.
    """

    def __init__(self, path: Path, header: ShardHeader) -> None:
        self.path = path
        self.header = header
        self.n_tokens = 0
        self._dtype = numpy_dtype(token_dtype(header.vocab_size))
        self._starts: list[int] = []
        self._crcs: list[int] = []
        self._block = bytearray()
        self._file = path.open("xb")
        self._file.write(bytes(PAGE))

    def add(self, document: npt.NDArray[Any]) -> None:
        """Append one document, BOS included: integers [T]."""
        self._starts.append(self.n_tokens)
        self.extend(document)

    def extend(self, tokens: npt.NDArray[Any]) -> None:
        """Append more tokens of the last document: integers [T]."""
        self.n_tokens += len(tokens)
        self._block += tokens.astype(self._dtype).tobytes()
        full = len(self._block) // BLOCK * BLOCK
        if full:
            self._write(bytes(self._block[:full]))
            del self._block[:full]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish the file and flush it to disk, unless an error has left it half done."""
        with self._file:
            if kind is None:
                self._finish()

    def _finish(self) -> None:
        self._write(bytes(self._block))
        token_bytes = self.n_tokens * self._dtype.itemsize
        starts_at = self._pad(PAGE)
        starts = np.asarray(self._starts, "<u8").tobytes()
        self._write(starts)
        table_at = self._pad(64)
        table = np.asarray(self._crcs, "<u4").tobytes()
        self._file.write(table)
        parts = (PAGE, token_bytes, starts_at, len(starts), table_at, len(table), zlib.crc32(table))
        crc = zlib.crc32(FOOTER.pack(*parts, 0, MAGIC)[:52])
        self._file.write(FOOTER.pack(*parts, crc, MAGIC))
        self._file.seek(0)
        self._file.write(self._head())
        self._file.flush()
        os.fsync(self._file.fileno())

    def _head(self) -> bytes:
        counts = {
            "n_tokens": self.n_tokens,
            "n_documents": len(self._starts),
            "dtype": token_dtype(self.header.vocab_size),
        }
        text = json.dumps(asdict(self.header) | counts, sort_keys=True).encode()
        head = MAGIC + struct.pack("<I", len(text)) + text
        head += struct.pack("<I", zlib.crc32(head))
        if len(head) > PAGE:
            raise DataError(
                f"{self.path.name}: header takes {len(head)} bytes, {PAGE} fit; shorten the name of the source"
            )
        return head

    def _write(self, data: bytes) -> None:
        self._crcs += [zlib.crc32(data[i : i + BLOCK]) for i in range(0, len(data), BLOCK)]
        self._file.write(data)

    def _pad(self, multiple: int) -> int:
        self._file.write(bytes(-self._file.tell() % multiple))
        return self._file.tell()


class Shard:
    """A shard opened for reading: header, footer and table of checksums are verified here, each block when it is read.

    `identity` is the SHA-256 of header, table and footer: it follows every byte of the content at the price of a
    few kilobytes, so a swapped or foreign shard is noticed when it is opened.
    """

    def __init__(self, path: Path) -> None:
        """Open and verify `path`. Raises DataError for a file that is missing, a link, or damaged."""
        self.path = path
        self.name = path.name
        with self._file() as fd:
            self.bytes = os.fstat(fd).st_size
            if self.bytes < PAGE + FOOTER.size:
                raise DataError(f"shard {self.name}: {self.bytes} bytes, a shard has at least {PAGE + FOOTER.size}")
            head = self._pread(fd, 0, PAGE, "header")
            foot = self._pread(fd, self.bytes - FOOTER.size, FOOTER.size, "footer")
            self.header = self._parse_head(head)
            self._dtype = numpy_dtype(self.header.dtype)
            table = self._parse_foot(fd, foot)
        self._table = np.frombuffer(table, "<u4")
        self.identity = hashlib.sha256(head + table + foot).hexdigest()

    def read(self, start: int, count: int) -> Tokens:
        """Read tokens [start, start + count), every touched block verified: u16 or u32 [count]."""
        size = self._dtype.itemsize
        if not 0 <= start <= start + count <= self.header.n_tokens:
            raise DataError(f"shard {self.name}: tokens {start}..{start + count} asked, it has {self.header.n_tokens}")
        tokens: Tokens = np.frombuffer(self._part("tokens", start * size, count * size), self._dtype)
        return tokens

    def reread(self, start: int, count: int) -> Tokens:
        """Read tokens [start, start + count) of a shard that was verified just before: no more than these, and without
        their checksums: u16 or u32 [count].
        """
        size = self._dtype.itemsize
        with self._file() as fd:
            data = self._pread(fd, PAGE + start * size, count * size, "tokens")
        tokens: Tokens = np.frombuffer(data, self._dtype)
        return tokens

    def starts(self, first: int, count: int) -> Int64s:
        """Read the starts of documents [first, first + count), in tokens: int64 [count]."""
        return np.frombuffer(self._part("starts", first * 8, count * 8), "<u8").astype(np.int64)

    def documents_before(self, token: int) -> int:
        """Count documents that start before `token`: a binary search over blocks of the index, then inside one."""
        low, high = 0, -(-self.header.n_documents // STARTS_PER_BLOCK)
        while high - low > 1:  # the document before `token`, if any, starts in a block of [low, high)
            middle = (low + high) // 2
            if self.starts(middle * STARTS_PER_BLOCK, 1)[0] < token:
                low = middle
            else:
                high = middle
        first = low * STARTS_PER_BLOCK
        block = self.starts(first, min(STARTS_PER_BLOCK, self.header.n_documents - first))
        return first + int(np.searchsorted(block, token))

    def check_tokens(self, start: int, tokens: Tokens) -> None:
        """Verify what was read at `start`: every id is in the vocabulary, and there is one BOS for each document start.

        Raises DataError with the place of the first token that does not fit.
        """
        if tokens.size and int(tokens.max()) >= self.header.vocab_size:
            at = int(np.argmax(tokens >= self.header.vocab_size))
            vocab = self.header.vocab_size
            raise DataError(f"shard {self.name}: token {tokens[at]} at offset {start + at}, the vocabulary has {vocab}")
        found = int(np.count_nonzero(tokens == self.header.bos))
        end = start + len(tokens)
        expected = self.documents_before(end) - self.documents_before(start)
        if found != expected:
            raise DataError(
                f"shard {self.name}: tokens {start}..{end} hold {found} BOS, the index has {expected} starts"
            )

    def verify(self) -> None:
        """Read everything: checksums, vocabulary, BOS exactly at the starts. Raises DataError at the first fault."""
        n_tokens, n_documents = self.header.n_tokens, self.header.n_documents
        starts = self.starts(0, n_documents)
        if n_documents and (starts[0] != 0 or starts[-1] >= n_tokens or (np.diff(starts) <= 0).any()):
            raise DataError(f"shard {self.name}: the starts of its documents do not increase from 0 to {n_tokens}")
        span = 1 << 24
        for start in range(0, n_tokens, span):
            tokens = self.read(start, min(span, n_tokens - start))
            self.check_tokens(start, tokens)
            low, high = np.searchsorted(starts, (start, start + len(tokens)))
            if not np.array_equal(np.flatnonzero(tokens == self.header.bos) + start, starts[low:high]):
                raise DataError(
                    f"shard {self.name}: tokens {start}..{start + len(tokens)} have BOS away from the starts"
                )

    def _parse_head(self, page: bytearray) -> ShardHeader:
        if page[:8] != MAGIC:
            raise DataError(f"shard {self.name}: bytes 0..8 are {page[:8]!r}, a shard starts with {MAGIC!r}")
        end = 12 + struct.unpack_from("<I", page, 8)[0]
        whole = end + 4 <= PAGE and zlib.crc32(page[:end]) == struct.unpack_from("<I", page, end)[0]
        if not whole or any(page[end + 4 :]):
            raise DataError(f"shard {self.name}: header, bytes 0..{PAGE}, does not match its CRC-32")
        try:
            values = json.loads(page[12:end])
            if not isinstance(values, dict) or values.keys() != {field.name for field in fields(ShardHeader)}:
                raise DataError(f"shard {self.name}: header with other keys than those of format 1, which this reads")
            header = ShardHeader(**values)
        except ValidationError as error:
            raise DataError(f"shard {self.name}: header: {misfit(error)}") from None
        except (ValueError, RecursionError):
            raise DataError(f"shard {self.name}: header, bytes 12..{end}, is no JSON") from None
        if header.bos >= header.vocab_size or header.dtype != token_dtype(header.vocab_size):
            found = f"BOS {header.bos} and {header.dtype} with a vocabulary of {header.vocab_size}"
            raise DataError(f"shard {self.name}: header: found {found}, which do not fit each other")
        return header

    def _parse_foot(self, fd: int, foot: bytearray) -> bytearray:
        """Read the table of checksums and set the places of the three parts."""
        *parts, table_crc, crc, magic = FOOTER.unpack(foot)
        span = f"bytes {self.bytes - FOOTER.size}..{self.bytes}"
        if magic != MAGIC or crc != zlib.crc32(FOOTER.pack(*parts, table_crc, 0, MAGIC)[:52]):
            raise DataError(
                f"shard {self.name}: footer, {span}, does not match its CRC-32: damaged, or the file is cut"
            )
        tokens_at, tokens_len, starts_at, starts_len, table_at, table_len = parts
        self._parts = {"tokens": (tokens_at, tokens_len), "starts": (starts_at, starts_len)}
        if table_at + table_len + FOOTER.size != self.bytes:
            raise DataError(
                f"shard {self.name}: {self.bytes} bytes, its footer says {table_at + table_len + FOOTER.size}"
            )
        self._check_layout(table_at, table_len)
        table = self._pread(fd, table_at, table_len, "table")
        if zlib.crc32(table) != table_crc:
            raise DataError(
                f"shard {self.name}: table, bytes {table_at}..{table_at + table_len}, does not match its CRC-32"
            )
        return table

    def _check_layout(self, table_at: int, table_len: int) -> None:
        """Check that the parts lie one behind another and are as long as the header says: so none exceeds the file."""
        tokens, starts = self.header.n_tokens * self._dtype.itemsize, self.header.n_documents * 8
        starts_at = -(-(PAGE + tokens) // PAGE) * PAGE
        blocks = -(-tokens // BLOCK) - (-starts // BLOCK)
        expected = {
            "tokens": (PAGE, tokens),
            "starts": (starts_at, starts),
            "table": (-(-(starts_at + starts) // 64) * 64, 4 * blocks),
        }
        for part, place in expected.items():
            if (found := (self._parts | {"table": (table_at, table_len)})[part]) != place:
                said = f"{found[1]} bytes at {found[0]}, expected {place[1]} at {place[0]} by its header"
                raise DataError(f"shard {self.name}: {part} take {said}")

    def _part(self, part: str, offset: int, length: int) -> memoryview:
        """Read bytes [offset, offset + length) of a part: whole blocks, each checked against the table."""
        base, total = self._parts[part]
        first = offset // BLOCK
        low, high = first * BLOCK, min(-(-(offset + length) // BLOCK) * BLOCK, total)
        with self._file() as fd:
            data = memoryview(self._pread(fd, base + low, high - low, part))
        row = first if part == "tokens" else first - (-self._parts["tokens"][1] // BLOCK)
        for block, at in enumerate(range(0, high - low, BLOCK)):
            if zlib.crc32(data[at : at + BLOCK]) != self._table[row + block]:
                begin = base + low + at
                end = min(begin + BLOCK, base + total)
                raise DataError(
                    f"shard {self.name}: {part}, block {first + block}, bytes {begin}..{end}, does not match its CRC-32"
                )
        return data[offset - low : offset - low + length]

    @contextmanager
    def _file(self) -> Iterator[int]:
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"shard {self.name}: cannot be opened as a plain file: {error.strerror}") from error
        try:
            yield fd
        finally:
            os.close(fd)

    def _pread(self, fd: int, offset: int, length: int, part: str) -> bytearray:
        """Read exactly `length` bytes at `offset`; a short read means that the file has shrunk."""
        data = bytearray(length)
        view, done = memoryview(data), 0
        while done < length:
            try:
                got = os.preadv(fd, [view[done:]], offset + done)
            except OSError as error:
                raise DataError(f"shard {self.name}: {part}, byte {offset + done}: {error.strerror}") from error
            if got == 0:
                size = os.fstat(fd).st_size
                raise DataError(
                    f"shard {self.name}: {part}, bytes {offset}..{offset + length} asked, the file has {size} bytes"
                )
            done += got
        return data
