"""Sources of ids that another program has made of text: their files, their documents, and their tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from data_tools import arrays, columns, megatron
from data_tools.arrays import Rows
from data_tools.files import below, choose, counted, naming
from data_tools.sources import Source
from data_tools.tokenizer import Tokenizer
from lasptrain.errors import DataError, RecipeError
from lasptrain.files import sha256, utf8

TABLES, INDEX, FLAT, NUMPY = (".parquet", ".arrow"), ".idx", ".bin", ".npy"
FIT = f"{', '.join(TABLES)}, {FLAT} with {INDEX} of Megatron-LM, bare {FLAT}, and {NUMPY}"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")  # names under which one lies beside what was made with it

Dtype = Literal["uint16", "uint32"]


@dataclass(frozen=True)
class TokenReading:
    """Options of reading ids: the column of tables, the id that ends or begins documents, the type in bare files, and
    BOS of a tokenizer that names none.

    With a `mark` documents are what stands between marks, over rows of tables and arrays; without, each row is a
    document, or several that begin with BOS. Documents of Megatron-LM end where their index says, too.
    """

    column: str = "input_ids"
    mark: int | None = None
    dtype: Dtype | None = None
    bos: int | None = None


@dataclass(frozen=True)
class TokenPiece:
    """Ids of a document, in order and without BOS: uint32 [T]. `done` bytes of the source are read with them."""

    ids: npt.NDArray[np.uint32]
    done: int
    last: bool
    kept: bool = True

    @property
    def content(self) -> bytes:
        """Bytes by which a document is told from others."""
        return self.ids.astype("<u4").tobytes()

    @property
    def size(self) -> int:
        """Number of ids."""
        return len(self.ids)


@dataclass(frozen=True)
class TokenSource(Source):
    """Files of ids, of a vocabulary in which one is BOS."""

    reading: TokenReading = TokenReading()
    vocab_size: int = 0
    bos: int = 0

    def token_pieces(self, dropped: Counter[str]) -> Iterator[TokenPiece]:
        """Read every document; those without ids are dropped and counted, and so is padding.

        Raises DataError with file, row and id for one that is not in the vocabulary.
        """
        done = 0
        for unit in self.units:
            for piece in _Documents(self, unit[-1], dropped).pieces(self._rows(unit[-1])):
                yield TokenPiece(piece.ids, done + piece.done, piece.last)
            done += replace(self, files=unit).bytes

    @property
    def units(self) -> list[tuple[Path, ...]]:
        """The files, each alone, but the ids of Megatron-LM with their index, which comes last."""
        return [_unit(path) for path in self.files if not _is_indexed(path)]

    def _rows(self, path: Path) -> Iterator[Rows]:
        match path.suffix.lower():
            case ".parquet" | ".arrow":
                return columns.rows(path, self.reading.column)
            case ".idx":
                return megatron.indexed(path)
            case ".npy":
                return arrays.numpy_rows(path)
        assert self.reading.dtype, "open_ids has asked for it"
        return arrays.flat(path, self.reading.dtype)

    @property
    def marks(self) -> set[int]:
        """Ids that stand between documents, and are no part of them."""
        return {self.bos} if self.reading.mark is None else {self.bos, self.reading.mark}


class _Documents:
    """Documents of a file, cut out of its rows."""

    def __init__(self, source: TokenSource, path: Path, dropped: Counter[str]) -> None:
        self._source, self._path, self._dropped = source, path, dropped
        self._joins_rows = source.reading.mark is not None and path.suffix.lower() != INDEX
        self._row = 0  # rows that have ended
        self._open = False  # a document has begun, and may go on
        self._found = False  # a document in this row

    def pieces(self, rows: Iterable[Rows]) -> Iterator[TokenPiece]:
        """Cut rows at marks and, unless a mark was named, where they end; the last document ends with the file."""
        done = 0
        for batch in rows:
            done = batch.done
            self._check(batch)
            self._dropped["padding tokens"] += batch.padding
            ids = batch.ids.astype(np.uint32)
            start = 0
            for end, is_mark in self._cuts(ids, batch):
                if end > start or self._open:
                    yield TokenPiece(ids[start:end], done, last=True)
                    self._open, self._found = False, True
                if not is_mark:
                    self._dropped["empty"] += not self._found
                    self._found = False
                start = end + is_mark
            self._row += len(batch.ends)
            if start < len(ids):
                self._open = True
                yield TokenPiece(ids[start:], done, last=False)
        if self._open:
            yield TokenPiece(np.empty(0, np.uint32), done, last=True)

    def _cuts(self, ids: npt.NDArray[np.uint32], batch: Rows) -> list[tuple[int, bool]]:
        """Places at which documents end, in order, and whether a mark stands there, which is no part of any."""
        is_mark = np.zeros(len(ids), bool)
        for mark in self._source.marks:
            is_mark |= ids == mark
        marks = np.flatnonzero(is_mark)
        if self._joins_rows:
            return [(at, True) for at in marks.tolist()]
        both = np.sort(np.concatenate((2 * marks + 1, 2 * batch.ends)))  # a row's end before a mark in the same place
        return [(at >> 1, bool(at & 1)) for at in both.tolist()]

    def _check(self, batch: Rows) -> None:
        """Raise DataError for an id outside of the vocabulary, and where nothing tells documents of one run apart."""
        if batch.endless and self._source.reading.mark is None:
            raise DataError(_ask(self._path, "one run of ids", "the id between documents", "--document-mark"))
        ids, vocab = batch.ids, self._source.vocab_size
        if not len(ids) or (ids.min() >= 0 and ids.max() < vocab):
            return
        at = int(np.argmax((ids < 0) | (ids >= vocab)))
        row = self._row + int(np.searchsorted(batch.ends, at, "right")) + 1
        raise DataError(
            f"{self._path}: row {row}: id {ids[at]}, the vocabulary has {vocab:,}; expected 0 to {vocab - 1:,}, as the "
            "tokenizer that made them gives"
        )


def open_ids(spec: str, reading: TokenReading, tokenizer: Tokenizer) -> TokenSource:
    """Open a source of ids: a file, NAME of NAME.bin and NAME.idx, or a folder with all below.

    Raises DataError where there is nothing to read or an option that it needs is missing, RecipeError for one that does
    not fit.
    """
    root, left_out = Path(spec), Counter[str]()
    with naming(root):
        exists, is_folder = root.exists(), root.is_dir()
    if not exists and (index := root.with_name(f"{root.name}{INDEX}")).exists():
        root, exists = index, True
    if not spec or not exists:
        raise DataError(f"{spec or 'an empty name'}: no such source; a file or folder of {FIT} fits")
    base = root if is_folder else root.parent
    found = _of_folder(root, left_out) if is_folder else [root.with_suffix(INDEX) if _is_indexed(root) else root]
    found = sorted((path for path in found if _is_read(path)), key=lambda path: path.relative_to(base).as_posix())
    if not found:
        raise DataError(f"{spec}: 0 files to read; {FIT} fit; left out: {counted(left_out) or 'nothing'}")
    files = tuple(part for path in found if not _is_indexed(path) for part in _unit(path))
    name = utf8(root.resolve().name)
    source = TokenSource(name, base, files, False, left_out, None, reading, tokenizer.vocab_size, tokenizer.bos)
    _check_options(source)
    return source


def _of_folder(root: Path, left_out: Counter[str]) -> list[Path]:
    found = list(below(root, (), left_out))
    named = columns.saved(root)
    if named is None:
        files = choose(found, _is_read, left_out)
        for folder in {path.parent for path in files if path.suffix.lower() == ".arrow"}:
            if columns.saved(folder) is not None:
                raise DataError(f"{root}: {folder} was written by save_to_disk; expected it as a source of its own")
        return files
    for path in named:
        with naming(path):
            path.stat()
    return choose(found, lambda path: path in named, left_out)


def _is_read(path: Path) -> bool:
    return path.suffix.lower() in (*TABLES, INDEX, FLAT, NUMPY)


def _unit(path: Path) -> tuple[Path, ...]:
    """Files that are read together: ids and their index, or a file alone."""
    return (path.with_suffix(FLAT), path) if path.suffix.lower() == INDEX else (path,)


def _is_indexed(path: Path) -> bool:
    return path.suffix.lower() == FLAT and path.with_suffix(INDEX).is_file()


def _check_options(source: TokenSource) -> None:
    """Raise RecipeError for a mark that is no id, DataError where bare files need what is not named."""
    mark, dtype = source.reading.mark, source.reading.dtype
    if mark is not None and not 0 <= mark < source.vocab_size:
        raise RecipeError(f"--document-mark: found {mark}; expected an id of the vocabulary of {source.vocab_size:,}")
    bare = [path for path in source.files if path.suffix.lower() == FLAT and not _is_indexed(path)]
    if bare and dtype is None:
        raise DataError(_ask(bare[0], f"a bare {FLAT}, without {INDEX}", "the type of its ids", "--dtype"))
    if bare and mark is None:
        raise DataError(_ask(bare[0], "one run of ids", "the id between documents", "--document-mark"))


def _ask(path: Path, found: str, what: str, option: str) -> str:
    return f"{path}: {found}; name {what} with {option}"


def find_tokenizer(specs: Sequence[str]) -> Path:
    """Find the tokenizer that lies with the ids of all sources, or in the folder above.

    Raises DataError where there is none, or another one elsewhere.
    """
    found: dict[str, Path] = {}
    for spec in specs:
        root = Path(spec)
        folder = root if root.is_dir() else root.parent
        here = [one / name for one in (folder, folder.parent) for name in TOKENIZERS if (one / name).is_file()]
        if not here:
            raise DataError(f"{spec}: no {' or '.join(TOKENIZERS)} beside the ids; name the tokenizer with --tokenizer")
        with naming(here[0]):
            found.setdefault(sha256(here[0]), here[0])
    if len(found) > 1:
        raise DataError(f"{' and '.join(map(str, found.values()))} differ; name one with --tokenizer")
    return next(iter(found.values()))
