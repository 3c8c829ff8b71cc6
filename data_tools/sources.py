"""Where text comes from: the standard library of the running Python, or files and folders of .txt and .jsonl."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import json
import os
import platform
import sysconfig
import tokenize
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Literal

from lasptrain.data.shard import file_sha256
from lasptrain.errors import DataError

PYTHON_SOURCE = "python:source"
SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}
TESTS = {"test", "tests", "idle_test"}

Errors = Literal["fail", "replace", "skip"]


@dataclass(frozen=True)
class Reading:
    """How text is read: what happens to text that is not Unicode, which JSON key holds it, how many bad lines pass."""

    errors: Errors = "fail"
    field: str = "text"
    max_bad: int = 0


@dataclass(frozen=True)
class Document:
    """One text, where it stands, and how many bytes of the source have been read with it."""

    place: str
    text: str
    done: int


@dataclass(frozen=True)
class Source:
    """A named list of files in the order they are read. `root` is what their names are relative to."""

    name: str
    root: Path
    files: tuple[Path, ...]

    @property
    def bytes(self) -> int:
        """Size of all files as they lie on disk."""
        return sum(path.stat().st_size for path in self.files)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over the names and contents of the files."""
        digest = hashlib.sha256()
        for path in self.files:
            digest.update(f"{path.relative_to(self.root).as_posix()}\0{file_sha256(path)}\n".encode())
        return digest.hexdigest()

    def documents(self, reading: Reading, dropped: Counter[str]) -> Iterator[Document]:
        """Every document that has text; the others are counted in `dropped`.

        Raises DataError with file and line for what `reading` does not tolerate.
        """
        done = 0
        for path in self.files:
            with _naming(path), path.open("rb") as raw:
                for place, text, position in _texts(path, raw, reading, dropped):
                    if text.strip():
                        yield Document(place, text, done + position)
                    else:
                        dropped["empty"] += 1
                done += raw.seek(0, io.SEEK_END)


def open_source(spec: str, tests: bool = False) -> Source:
    """The source of that name: `python:source` (`tests` adds the library's tests), a file, or a folder with all below.

    Raises DataError when there is nothing to read.
    """
    if spec == PYTHON_SOURCE:
        root = Path(sysconfig.get_path("stdlib"))
        without = NOT_LIBRARY if tests else NOT_LIBRARY | TESTS
        files = [path for path in _below(root, without) if path.suffix == ".py"]
        name = f"{PYTHON_SOURCE} {platform.python_version()}"
    else:
        root = Path(spec)
        if not spec or not root.exists():
            fits = f"{PYTHON_SOURCE}, or a file or folder of {', '.join(SUFFIXES)} fits"
            raise DataError(f"{spec or 'an empty name'}: no such source; {fits}")
        files = [path for path in (_below(root) if root.is_dir() else [root]) if path.name.endswith(SUFFIXES)]
        name, root = root.resolve().name, root if root.is_dir() else root.parent
    if not files:
        raise DataError(f"{spec}: 0 files to read; {', '.join(SUFFIXES)} fit")
    return Source(name, root, tuple(sorted(files, key=lambda path: path.relative_to(root).as_posix())))


def _below(root: Path, without: Collection[str] = ()) -> Iterator[Path]:
    """Every file below a folder, except in folders of these names."""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in without]
        yield from (Path(folder, name) for name in files)


def _texts(path: Path, raw: BinaryIO, reading: Reading, dropped: Counter[str]) -> Iterator[tuple[str, str, int]]:
    """(place, text, bytes of the file read) for each text of a file."""
    if path.suffix == ".py":
        text = _python(raw.read())
        if text is None:
            dropped["invalid"] += 1
        else:
            yield str(path), text, raw.tell()
        return
    stream = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
    if path.name.removesuffix(".gz").endswith(".txt"):
        texts = iter([(str(path), stream.read().removeprefix(codecs.BOM_UTF8))])
        decode: Callable[[bytes, str, Reading, Counter[str]], str | None] = _decode
    else:
        texts = ((f"{path}:{number}", line) for number, line in enumerate(stream, 1) if line.strip())
        decode = _json_text
    for place, content in texts:
        text = decode(content, place, reading, dropped)
        if text is not None:
            yield place, text, raw.tell()


def _python(content: bytes) -> str | None:
    """The text of a Python file in its declared encoding, or None if it is not in it."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        return content.decode(encoding)
    except (SyntaxError, UnicodeDecodeError, LookupError):
        return None


def _decode(content: bytes, place: str, reading: Reading, dropped: Counter[str]) -> str | None:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        return _invalid(f"{place}: byte {error.start} is not UTF-8", content.decode(errors="replace"), reading, dropped)


def _json_text(line: bytes, place: str, reading: Reading, dropped: Counter[str]) -> str | None:
    decoded = _decode(line, place, reading, dropped)
    if decoded is None:
        return None
    try:
        text = json.loads(decoded)[reading.field]
        if not isinstance(text, str):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        dropped["malformed"] += 1
        if dropped["malformed"] > reading.max_bad:
            reason = error if isinstance(error, ValueError) else f"no text under {reading.field!r}"
            raise DataError(f"{place}: {reason}; {reading.max_bad} such lines are tolerated") from error
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        repaired = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return _invalid(f"{place}: character {error.start} is a lone surrogate", repaired, reading, dropped)
    return text


def _invalid(problem: str, repaired: str, reading: Reading, dropped: Counter[str]) -> str | None:
    """What the policy makes of text that is not Unicode."""
    match reading.errors:
        case "fail":
            raise DataError(f"{problem}; replace and skip are other policies")
        case "replace":
            dropped["repaired"] += 1
            return repaired
        case "skip":
            dropped["invalid"] += 1
            return None


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of the file system and of gzip, with the name of the file."""
    try:
        yield
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: {error}") from error
