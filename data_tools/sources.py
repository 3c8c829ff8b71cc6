"""Sources of text: the running Python's library, files and folders of text, folders of repositories, datasets."""

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
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from data_tools import csv_rows, hub, tables
from data_tools.fields import as_text, names, told, under
from data_tools.files import (
    CSV,
    FIT,
    TABLES,
    TEXT,
    at_once,
    below,
    check_unpacked,
    choose,
    counted,
    ending,
    endings,
    naming,
    one_line,
)
from data_tools.hub import HUB, HubDataset
from data_tools.json_rows import rows
from data_tools.tokenizer import Cutter
from lasptrain.errors import DataError, SetupError
from lasptrain.files import sha256, utf8

PYTHON_SOURCE = "python:source"
REPOSITORIES = "repositories:"  # before a folder: each folder in it is one document
LARGEST_CODE = 1 << 20  # bytes; a longer file of a repository is data
READ = 1 << 20  # bytes of a text file that are read at once
LONGEST_LINE = 1 << 30  # bytes of a line of JSON, which is in memory as a whole
NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}
HIDDEN = {".git", ".hg", ".svn", "__pycache__", "node_modules"}
TESTS = {"test", "tests", "idle_test"}

Errors = Literal["fail", "replace", "skip"]


@dataclass(frozen=True)
class Reading:
    """Options of reading: the policy for text that is not Unicode, the field of rows, and the bad rows tolerated;
    `command` is the one of `lasptrain data` that has them.
    """

    errors: Errors = "fail"
    field: str = "text"
    max_bad: int = 0
    command: str = "prepare"


@dataclass(frozen=True)
class Document:
    """A text, its place (file or file:line), and the bytes of the source read up to its end."""

    place: str
    text: str
    done: int


@dataclass(frozen=True)
class Piece:
    """A piece of a document, in order; a document whose `last` piece is not `kept` has been counted as dropped."""

    place: str
    text: str
    done: int
    last: bool
    kept: bool = True

    @property
    def content(self) -> bytes:
        """Bytes by which a document is told from others."""
        return self.text.encode()

    @property
    def size(self) -> int:
        """Number of characters."""
        return len(self.text)


# Part of a document: (place, text, bytes read, whether it is the last part); None for the text drops the document.
Part = tuple[str, str | None, int, bool]


Name = bytes  # of a file, as the file system has it


@dataclass(frozen=True)
class Source:
    """A named list of files in the order they are read; their names are relative to `root`.

    `repositories`: the files of each folder right below `root` are one document. `left_out`: number of files beside
    them that are not read, by kind. `dataset`: its rows are read, not its files.
    """

    name: str
    root: Path
    files: tuple[Path, ...]
    repositories: bool = False
    left_out: Mapping[str, int] = field(default_factory=dict)
    dataset: HubDataset | None = None

    @property
    def revision(self) -> str | None:
        """Commit of a dataset of the Hub."""
        return self.dataset.revision if self.dataset else None

    @property
    def bytes(self) -> int:
        """Size of all files as they lie on disk; of a dataset of the Hub, which it downloads, that of all columns."""
        return self.dataset.size if self.dataset and self.revision else sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """Size of each file, in bytes."""
        return [_size(path) for path in self.files]

    @property
    def units(self) -> list[tuple[Path, ...]]:
        """The files in groups that are read together: those of a repository, else each alone."""
        if not self.repositories:
            return [(path,) for path in self.files]
        return [tuple(files) for _, files in groupby(self.files, lambda path: path.relative_to(self.root).parts[0])]

    @property
    def names(self) -> list[Name]:
        """Names of the files, below the root."""
        return [os.fsencode(path.relative_to(self.root).as_posix()) for path in self.files]

    @cached_property
    def contents(self) -> list[str]:
        """SHA-256 of the content of each file."""
        return [_sha256(path) for path in self.files]

    @property
    def sha256(self) -> str:
        """SHA-256 over the names and contents of the files; of a dataset also over what is read of it."""
        found = digest(zip(self.names, self.contents, strict=True))
        if not self.dataset:
            return found
        return hashlib.sha256(f"{self.dataset.identity}\0{self.revision}\0{found}".encode()).hexdigest()

    def named(self, name: str) -> str:
        """SHA-256 as `sha256`, of a single file if it had that name."""
        return digest(zip([os.fsencode(name)], self.contents, strict=True))

    def documents(self, reading: Reading, dropped: Counter[str]) -> Iterator[Document]:
        """Read every document that has text; count the others in `dropped`.

        Raises DataError with file and line for what `reading` does not tolerate.
        """
        texts: list[str] = []
        for piece in self.pieces(reading, dropped):
            texts.append(piece.text)
            if piece.last:
                if piece.kept:
                    yield Document(piece.place, "".join(texts), piece.done)
                texts = []

    def pieces(self, reading: Reading, dropped: Counter[str]) -> Iterator[Piece]:
        """Read every document piece by piece: of a text file of any size only a few MiB are in memory."""
        cutter, blank = Cutter(), True
        for place, text, done, last in self._parts(reading, dropped):
            held = ""
            for piece in cutter.add(text or "", last):
                if held:
                    yield Piece(place, held, done, last=False)
                blank = blank and not piece.strip()
                held = piece
            if not last:
                if held:
                    yield Piece(place, held, done, last=False)
                continue
            if text is not None and blank:
                dropped["empty"] += 1
            kept = text is not None and not blank
            yield Piece(place, held if kept else "", done, True, kept)
            blank = True

    def _parts(self, reading: Reading, dropped: Counter[str]) -> Iterator[Part]:
        if self.repositories:
            return self._repositories(dropped)
        if self.dataset:
            return _table(self.name, self.dataset.rows(reading.field), self.bytes, reading, dropped)
        return self._files(reading, dropped)

    def _files(self, reading: Reading, dropped: Counter[str]) -> Iterator[Part]:
        done = 0
        for path in self.files:
            with naming(path), path.open("rb") as raw:
                size = os.fstat(raw.fileno()).st_size
                for place, text, position, last in _texts(path, raw, reading, dropped):
                    yield place, text, done + position, last
                done += size

    def _repositories(self, dropped: Counter[str]) -> Iterator[Part]:
        """Read the text files of each repository one after another, each under its name."""
        done = 0
        for name, files in groupby(self.files, key=lambda path: path.relative_to(self.root).parts[0]):
            between = ""
            for path in files:
                with naming(path), path.open("rb") as raw:
                    content = raw.read(LARGEST_CODE + 1)
                    done += os.fstat(raw.fileno()).st_size
                text = _code(content)
                if text is None:
                    dropped["not code"] += 1
                else:
                    head = f"{between}# {utf8(path.relative_to(self.root / name).as_posix())}"
                    yield str(self.root / name), f"{head}\n{text.rstrip()}\n", done, False
                    between = "\n"
            yield str(self.root / name), "", done, True


def digest(files: Iterable[tuple[bytes, str]]) -> str:
    """SHA-256 over the names of files and the SHA-256 of their contents."""
    found = hashlib.sha256()
    for name, content in files:
        found.update(name + f"\0{content}\n".encode())
    return found.hexdigest()


def open_source(spec: str, tests: bool = False, revision: str | None = None) -> Source:
    """Open a source by name: `python:source` (`tests` adds the library's tests), a file, or a folder with all below;
    `repositories:FOLDER` takes each folder in it as one document, `hf:NAME` is a dataset (of the Hub at `revision`).

    Links are followed; a file that they lead to twice is read once. Raises DataError when there is nothing to read, or
    something that cannot be read.
    """
    if spec.startswith(HUB):
        dataset = hub.open_dataset(spec, revision)
        return Source(dataset.name, dataset.folder, dataset.files, dataset=dataset)
    left_out = Counter[str]()
    if spec == PYTHON_SOURCE:
        root = Path(sysconfig.get_path("stdlib"))
        found = below(root, NOT_LIBRARY if tests else NOT_LIBRARY | TESTS, Counter())
        files = choose((one for one in found if one[1].suffix == ".py"), lambda path: True, Counter())
        name = f"{PYTHON_SOURCE} {platform.python_version()}"
    elif spec.startswith(REPOSITORIES):
        return _open_repositories(Path(spec.removeprefix(REPOSITORIES)))
    else:
        root = Path(spec)
        with naming(root):
            is_folder, exists = root.is_dir(), os.path.lexists(root)
        if not spec or not exists:
            raise DataError(
                f"{spec or 'an empty name'}: no such source; "
                f"{PYTHON_SOURCE}, {HUB}NAME, or a file or folder of {FIT} fits"
            )
        if any((root / name).is_file() for name in hub.SAVED):
            raise DataError(f"{root}: was written by save_to_disk of the package datasets; {HUB}{root} fits")
        files = choose(below(root, (), left_out), lambda path: endings(path.name) is not None, left_out)
        name, root = utf8(root.resolve().name), root if is_folder else root.parent
    if not files:
        raise DataError(f"{spec}: 0 files to read; {FIT} fit; left out: {counted(left_out) or 'nothing'}")
    files.sort(key=lambda path: path.relative_to(root).as_posix())
    return Source(name, root, tuple(files), left_out=left_out)


def left_out(specs: Iterable[str]) -> dict[str, int]:
    """Count the files of all these sources that are not read, by kind."""
    read = (spec for spec in specs if not spec.startswith(HUB))
    return dict(sum((Counter(open_source(spec).left_out) for spec in read), Counter[str]()))


def _open_repositories(root: Path) -> Source:
    with naming(root):
        is_folder = root.is_dir()
    if not is_folder:
        raise DataError(f"{root}: no such folder; {REPOSITORIES}FOLDER takes each folder in it as one document")
    left_out, found = Counter[str](), []
    for real, path in below(root, HIDDEN, left_out):
        with naming(path):
            exists = path.exists()
        if not exists:  # a repository may hold a link that leads somewhere on the machine of who wrote it
            left_out["dangling link"] += 1
        elif path.parent == root:
            left_out[ending(path)] += 1
        else:
            found.append((real, path))
    files = choose(found, lambda path: True, left_out)
    if not files:
        fits = f"{REPOSITORIES}FOLDER takes each folder in it as one document"
        raise DataError(f"{root}: 0 files in folders; {fits}; left out: {counted(left_out) or 'nothing'}")
    files.sort(key=lambda path: path.relative_to(root).parts)
    return Source(utf8(root.resolve().name), root, tuple(files), True, left_out)


def _sha256(path: Path) -> str:
    with naming(path):
        return sha256(path)


def _size(path: Path) -> int:
    with naming(path):
        return path.stat().st_size


def _code(content: bytes) -> str | None:
    """Decode a file of a repository; None if it is no text, or so long that nobody wrote it."""
    if len(content) > LARGEST_CODE or b"\0" in content:
        return None
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def _texts(path: Path, raw: BinaryIO, reading: Reading, dropped: Counter[str]) -> Iterator[Part]:
    """Read each text of a file."""
    if path.suffix == ".py":
        text = _python(raw.read())
        if text is None:
            dropped["invalid"] += 1
        else:
            yield str(path), text, raw.tell(), True
        return
    held, packed = endings(path.name) or (TEXT, "")
    size = os.fstat(raw.fileno()).st_size
    if held in TABLES:
        yield from _table(str(path), tables.rows(path, reading.field), size, reading, dropped)
        return
    stream = raw
    if packed:
        stream = io.BufferedReader(_Unpacked(path, _unpacked(path, packed, raw), size), READ >> 3)
    longest = min(LONGEST_LINE, at_once(size)) if packed else LONGEST_LINE
    if held == TEXT:
        yield from ((str(path), text, raw.tell(), last) for text, last in _plain(path, stream, reading, dropped))
        return
    if held == CSV:
        values = _csv(path, stream, longest, reading, dropped)
        yield from ((place, text, raw.tell(), True) for place, text in values)
        return
    is_value = held == ".json"
    for number, begin in enumerate(iter(lambda: stream.readline(READ), b""), start=1):
        begin = begin.removeprefix(codecs.BOM_UTF8)  # of the file, or of one that was put behind another
        if is_value and _is_no_line(begin):
            rest = chain((begin,), iter(lambda: stream.read(READ), b""))
            values = _json_value(path, rest, longest, reading, dropped)
            yield from ((place, text, raw.tell(), True) for place, text in values)
            return
        place = f"{path}:{number}"
        line = _whole_line(begin, stream, place, longest)
        if line.strip():
            is_value = False
            text = _json_text(line, place, reading, dropped)
            if text is not None:
                yield place, text, raw.tell(), True


def _table(
    name: str, rows: Iterable[tuple[bytes | None, float]], size: int, reading: Reading, dropped: Counter[str]
) -> Iterator[Part]:
    """Read the text of each row of a table of `size` bytes."""
    for number, (content, part) in enumerate(rows, start=1):
        text = _decode(content or b"", f"{name}:{number}", reading, dropped)
        if text is not None:
            yield f"{name}:{number}", text, int(size * part), True


def _csv(
    path: Path, stream: BinaryIO, longest: int, reading: Reading, dropped: Counter[str]
) -> Iterator[tuple[str, str]]:
    """Read (place, text) of each row. Raises DataError where it is no CSV."""
    try:
        for line, row in csv_rows.rows(stream, reading.field, longest):
            place = f"{path}:{line}"
            if isinstance(row, str):
                _malformed(f"{place}: {row}", reading, dropped)
            elif (text := _row_text(row, place, reading, dropped)) is not None:
                yield place, text
    except ValueError as error:
        fits = 'lines of comma-separated values, with "quotes" where they hold commas, fit'
        raise DataError(f"{path}: {one_line(error)}; {fits}") from error


def _is_no_line(line: bytes) -> bool:
    """True if a file that begins with this line is a list, or holds objects that take several lines each."""
    line = line.strip()
    return line.startswith(b"[") or line == b"{"


def _json_value(
    path: Path, content: Iterable[bytes], longest: int, reading: Reading, dropped: Counter[str]
) -> Iterator[tuple[str, str]]:
    """Read (place, text) of each row of JSON that is not in lines. Raises DataError where it is no such JSON."""
    number = 0
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")  # what is not UTF-8 is found in its row
    try:
        for row in rows((decoder.decode(part, final=not part) for part in chain(content, (b"",))), longest):
            number += 1
            text = _row_text(row, f"{path}:{number}", reading, dropped)
            if text is not None:
                yield f"{path}:{number}", text
    except ValueError as error:
        raise DataError(f"{path}: row {number + 1}: {error}; JSON lines, or one list of rows, fit") from error


def _plain(path: Path, stream: BinaryIO, reading: Reading, dropped: Counter[str]) -> Iterator[tuple[str | None, bool]]:
    """Read a file that is one document, READ bytes at a time: yields (text, True at the end)."""
    first = True
    for text in _decoded(f"{path}", iter(lambda: stream.read(READ), b""), reading, dropped):
        if text is None:
            yield None, True
            return
        yield text.removeprefix("\ufeff") if first else text, False
        first = first and not text
    yield "", True


def _decoded(place: str, content: Iterator[bytes], reading: Reading, dropped: Counter[str]) -> Iterator[str | None]:
    """Decode bytes part by part; yields None, and nothing more, where the policy drops text that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    before = 0
    for part in chain(content, (b"",)):
        try:
            text = decoder.decode(part, final=not part)
        except UnicodeDecodeError as error:
            at = before + len(part) - len(error.object) + error.start
            if _invalid(f"{place}: byte {at} is not UTF-8", "", reading, dropped) is None:
                yield None
                return
            decoder.errors = "replace"  # from here on; the decoder has kept what it held
            text = decoder.decode(part, final=not part)
        before += len(part)
        yield text


def _whole_line(begin: bytes, stream: BinaryIO, place: str, longest: int) -> bytes:
    """Read the rest of a line. Raises DataError above `longest` bytes, before it reads more."""
    rest = 0 if begin.endswith(b"\n") else max(0, longest + 1 - len(begin))
    line = begin + stream.readline(rest)
    if len(line) > longest:
        raise DataError(f"{place}: more than {longest:,} bytes in a line of JSON; write it as {TEXT}, or split it")
    return line


class _Unpacked(io.RawIOBase):
    """Bytes that a packed file of `size` bytes holds. Reading raises DataError for more than text shrinks to that."""

    def __init__(self, path: Path, stream: BinaryIO, size: int) -> None:
        super().__init__()
        self._path, self._stream, self._size, self._read = path, stream, size, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._stream.read(len(buffer))
        except OSError as error:
            if "too much memory" in str(error):  # of a frame of zstd
                found = f"{self._path}: looks back over more than 128 MiB of text, as zstd --long=31 makes it"
                raise DataError(f"{found}; expected less: zstd -dc --long=31 OLD.zst | zstd -o NEW.zst") from None
            raise
        buffer[: len(content)] = content
        self._read += len(content)
        check_unpacked(self._path, self._size, self._read)
        return len(content)


def _unpacked(path: Path, packed: str, raw: BinaryIO) -> BinaryIO:
    """Decompress a file as its ending says. Raises SetupError where the library for it is missing."""
    match packed:
        case ".gz":
            return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
        case ".zst" | ".zstd":
            try:
                from pyarrow import CompressedInputStream, PythonFile
            except ImportError:
                raise SetupError(f"{path}: needs pyarrow: pip install 'lasptrain[data]'") from None
            return cast(BinaryIO, CompressedInputStream(PythonFile(raw, mode="r"), "zstd"))
        case ".bz2" | ".xz":
            try:
                import bz2
                import lzma
            except ImportError:
                raise SetupError(f"{path}: needs a Python with bz2 and lzma; .gz and .zst fit this one") from None
            return cast(BinaryIO, bz2.BZ2File(raw) if packed == ".bz2" else lzma.LZMAFile(raw))
    return raw


def _malformed(problem: str, reading: Reading, dropped: Counter[str]) -> None:
    """Count a line that holds no text. Raises DataError when there are too many."""
    dropped["malformed"] += 1
    if dropped["malformed"] > reading.max_bad:
        raise DataError(f"{problem}; {reading.max_bad} such lines are tolerated, see {reading.command} --max-bad")


def _python(content: bytes) -> str | None:
    """Decode a Python file in its declared encoding; None if it is not in it."""
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
        row = json.loads(decoded)
    except ValueError as error:
        _malformed(f"{place}: {error}", reading, dropped)
        return None
    except RecursionError:
        row = None
    return _row_text(row, place, reading, dropped)


def _row_text(row: Any, place: str, reading: Reading, dropped: Counter[str]) -> str | None:
    try:
        value = under(row, reading.field)
    except KeyError:
        there = told(names(row)) if isinstance(row, dict) else f"expected an object, found {type(row).__name__}"
        _malformed(f"{place}: no text under {reading.field!r}; {there}", reading, dropped)
        return None
    text = as_text(value)
    if text is None:
        _malformed(f"{place}: found {type(value).__name__} under {reading.field!r}; expected text", reading, dropped)
        return None
    if problem := _surrogate(text):
        return _invalid(f"{place}: {problem}", _without_surrogates(text), reading, dropped)
    return text


def _surrogate(text: str) -> str | None:
    """Describe the first lone surrogate of a text; None if there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"character {error.start} is a lone surrogate"
    return None


def _without_surrogates(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _invalid(problem: str, repaired: str, reading: Reading, dropped: Counter[str]) -> str | None:
    """Apply the policy to text that is not Unicode: `repaired`, None to leave it out, or DataError."""
    match reading.errors:
        case "fail":
            raise DataError(f"{problem}; {reading.command} --errors replace, or skip, takes it")
        case "replace":
            dropped["repaired"] += 1
            return repaired
        case "skip":
            dropped["invalid"] += 1
            return None
