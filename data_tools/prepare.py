"""Text → token shards: encoded in parallel, spooled, and written; the same bytes for any number of workers."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

from data_tools import encode as worker
from data_tools.files import naming
from data_tools.folder import building, checked, new_folder
from data_tools.ids import TokenPiece, TokenReading, TokenSource, open_ids
from data_tools.packing import BestFit
from data_tools.parts import Part, PartEntry, files_of, plan
from data_tools.shards import Progress, Writing, check_training, joined, write
from data_tools.sources import Piece, Reading, Source, open_source
from data_tools.spool import Documents, Ids, Spool
from data_tools.tokenizer import MARK, PIECE, Tokenizer, cuts_safely, keeps_mark, load_tokenizer
from lasptrain.data.manifest import FILE, SPLITS, Manifest, SourceEntry, TokenizerEntry
from lasptrain.errors import DataError, ResourceError, SetupError
from lasptrain.files import FULL

UNIT = 1 << 20  # characters a worker encodes at a time
FOUND = 1 << 28  # bytes of text whose digest is made in a moment, to find what was prepared of it
PROBED = 64  # pieces at whose good places it is tried whether a cut changes ids
MILLION = 1_000_000
ANY_LENGTH = (0, 1 << 62)  # tokens of a document

P = TypeVar("P", Piece, TokenPiece)


@dataclass(frozen=True)
class Preparation:
    """Sources and options of a dataset to be prepared, and the number of processes.

    `validation_ppm` documents in a million are held out, chosen by their content. Documents whose tokens are not within
    `lengths`, both included, are left out. Without `packing` documents stand one after another, wherever windows will
    cut them. With `tokens` the sources hold ids that the tokenizer has made of text, not text. A `part` reads some of
    the files, and leaves packing to `merge`, which joins the datasets of all parts. A dataset of the Hub is read at
    `revision`, or else at its newest.
    """

    sources: Sequence[str]
    tokenizer_path: str | Path
    reading: Reading = field(default_factory=Reading)
    validation_ppm: int = 20_000
    seed: int = 0
    lengths: tuple[int, int] = ANY_LENGTH
    packing: BestFit | None = None
    workers: int | None = None
    progress: Progress | None = None
    tokens: TokenReading | None = None
    part: Part | None = None
    revision: str | None = None

    @property
    def opened(self) -> list[Source]:
        """The sources, as far as they are in this part, opened once. Raises DataError for one that cannot be read."""
        return [source for _, source in self.numbered]

    @cached_property
    def numbered(self) -> list[tuple[int, Source]]:
        """The sources that are in this part, with their numbers among all."""
        return self.part.of_sources(self.all_opened) if self.part else list(enumerate(self.all_opened))

    @cached_property
    def all_opened(self) -> list[Source]:
        """The sources of all parts."""
        if self.tokens:
            return [open_ids(source, self.tokens, self.tokenizer) for source in self.sources]
        return [open_source(source, revision=self.revision) for source in self.sources]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded once. Raises DataError for a file that is none."""
        return load_tokenizer(self.tokenizer_path, self.tokens.bos if self.tokens else None)

    def report(self, stage: str, done: int, total: int) -> None:
        """Call `progress`, if there is one."""
        if self.progress:
            self.progress(stage, done, total)


def is_dataset(source: str) -> bool:
    """True if a recipe's source is a prepared folder, not text."""
    with naming(Path(source)):
        return (Path(source) / FILE).is_file()


def ensure_dataset(preparation: Preparation, cache: Path) -> Path:
    """Find or prepare the dataset of one source: the source itself if it is one, else prepared once under `cache`.

    Any number of processes on any number of machines may call it at once: one prepares, the others wait for it.
    Raises DataError when the dataset was made with another tokenizer, or is not packed where `packing` is asked.
    """
    (source,) = preparation.sources
    if is_dataset(source):
        return _as_asked(Path(source), preparation)
    final = _kept(preparation, cache)
    if not (final / FILE).exists():
        _make(final.parent)
        with building(final, wait=True) as hidden:
            if hidden is not None:
                _build(hidden, preparation)
    return final


def _make(folder: Path) -> None:
    """Make the folder of the cache. Raises SetupError that names its key where it cannot be made, or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    except OSError as error:
        if error.errno in FULL:
            raise
        raise SetupError(
            f"data.cache: {error.filename}: {error.strerror}; expected a folder that can be written, as it, "
            "XDG_CACHE_HOME or HOME names one"
        ) from None


def find_dataset(preparation: Preparation, cache: Path) -> Path | None:
    """Find the folder that `ensure_dataset` would; None if it would prepare one, or read more than FOUND of text.

    Raises DataError where there is no such source, or it cannot be read, or is a dataset that does not fit.
    """
    (source,) = preparation.sources
    if is_dataset(source):
        return _as_asked(Path(source), preparation)
    if preparation.opened[0].revision is None and preparation.opened[0].bytes > FOUND:
        return None
    final = _kept(preparation, cache)
    return final if (final / FILE).exists() else None


def _as_asked(folder: Path, preparation: Preparation) -> Path:
    """Return a dataset's folder. Raises DataError where it was made with another tokenizer, or packed otherwise."""
    manifest, tokenizer, packing = Manifest.load(folder), preparation.tokenizer, preparation.packing
    made_with = manifest.tokenizer
    if made_with.sha256 != tokenizer.sha256:
        raise DataError(
            f"{folder}: made with tokenizer {made_with.name} (SHA-256 {made_with.sha256[:16]}), "
            f"the recipe has {tokenizer.name} (SHA-256 {tokenizer.sha256[:16]}); expected the first in data.tokenizer"
        )
    if packing and (manifest.order.packing, manifest.order.align) != ("best_fit", packing.window):
        raise DataError(
            f"{folder}: packed by {manifest.order.packing} for windows of any multiple of {manifest.order.align}, "
            f"the recipe has data.packing: best_fit with data.window: {packing.window}"
        )
    return folder


def _kept(preparation: Preparation, cache: Path) -> Path:
    """Path of a source's dataset in the cache, whose name is a hash of all that its content follows from."""
    (source,) = preparation.opened
    tokenizer, packing = preparation.tokenizer, preparation.packing
    arguments: list[int | str] = [1, source.name, source.sha256, tokenizer.sha256]
    arguments += [preparation.validation_ppm, preparation.seed]
    if preparation.reading.field != "text":  # so that what was prepared before there was a choice is found
        arguments.append(f"field {preparation.reading.field}")
    if packing:
        arguments += [packing.window, packing.long_documents]
    key = hashlib.sha256(json.dumps(arguments).encode()).hexdigest()[:16]
    return cache / "datasets" / f"{re.sub('[^A-Za-z0-9.]+', '-', source.name)}-{key}"


def prepare(preparation: Preparation, out: Path) -> Path:
    """Write a dataset to the folder `out`, which appears when it is complete.

    Raises SetupError when `out` is not empty or being written, DataError for text that `reading` does not tolerate.
    """
    out = checked(out)
    _ = preparation.opened, preparation.tokenizer  # what cannot be read is refused before anything is written
    with new_folder(out) as hidden:
        _build(hidden, preparation)
    return out


def _build(folder: Path, preparation: Preparation) -> None:
    """Encode the sources and write what they hold; nothing else is left in the folder."""
    tokenizer = preparation.tokenizer
    names = [source.name for source in preparation.opened]
    dropped: Counter[str] = Counter()
    with Spool(folder, tokenizer.vocab_size, f"1 {tokenizer.sha256} {UNIT}") as spool:
        splits = _documents(preparation, spool, dropped)
        if not preparation.part:
            check_training(joined(names), splits, dropped)
        made_with = TokenizerEntry(
            name=tokenizer.name,
            sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            bos=tokenizer.bos,
            token_bytes=tuple(tokenizer.token_bytes),
        )
        entries = (
            SourceEntry(
                name=source.name,
                files=len(source.files),
                bytes=source.bytes,
                sha256=source.sha256,
                revision=source.revision,
            )
            for source in preparation.opened
        )
        writing = Writing(names, made_with, entries, preparation.seed, preparation.packing, preparation.report)
        manifest = write(folder, writing, spool, splits, dropped)
    for path in folder.iterdir():
        if path.name != FILE and path.suffix != ".ltok":
            path.unlink()
    if preparation.part:
        _part_entry(preparation, preparation.part, manifest.computed_fingerprint()).save(folder)


def _part_entry(preparation: Preparation, part: Part, fingerprint: str) -> PartEntry:
    reading, sources = preparation.reading, preparation.all_opened
    options = [preparation.tokenizer.sha256, preparation.validation_ppm, preparation.seed, *preparation.lengths]
    options += [reading.errors, reading.field, *(astuple(preparation.tokens) if preparation.tokens else ())]
    return PartEntry(
        number=part.number,
        of=part.of,
        plan=plan(sources, part, options),
        fingerprint=fingerprint,
        sources=tuple(source.name for source in sources),
        files=files_of(preparation.numbered),
    )


def _documents(preparation: Preparation, spool: Spool, dropped: Counter[str]) -> dict[str, Documents]:
    """Encode everything into the spool and sort documents into splits.

    Content alone decides the split: adding documents moves none, and equal ones fall on one side.
    """
    splits = {split: Documents() for split in SPLITS}
    start, end = 0, 0
    content, replaced = _content_hash(), 0
    lost = b"" if preparation.tokens or keeps_mark(preparation.tokenizer) else MARK.encode()
    for piece, count in _encoded(preparation, spool, dropped):
        part = piece.content
        content.update(part)
        replaced += part.count(lost) if lost else 0
        end += count
        if not piece.last:
            continue
        length = end - start + 1
        shortest, longest = preparation.lengths
        if piece.kept and shortest <= length <= longest:
            digest = int.from_bytes(content.digest(), "little")
            split = "validation" if digest % MILLION < preparation.validation_ppm else "train"
            splits[split].add(start, length, digest)
            dropped["replaced ▁"] += replaced
        elif piece.kept:
            dropped["shorter" if length < shortest else "longer"] += 1
        start, content, replaced = end, _content_hash(), 0
    return splits


def _content_hash() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=8, usedforsecurity=False)


def _encoded(preparation: Preparation, spool: Spool, dropped: Counter[str]) -> Iterator[tuple[Piece | TokenPiece, int]]:
    """Bring the ids of every piece, in the order of the sources, into the spool; yields (piece, number of its ids)."""
    total, done = sum(source.bytes for source in preparation.opened), 0
    for source in preparation.opened:
        for unit, counts in _spooled(preparation, source, spool, dropped, total):
            yield from zip(unit, counts, strict=True)
            preparation.report("read" if preparation.tokens else "encode", done + unit[-1].done, total)
        done += source.bytes


Spooled = tuple[Sequence[Piece | TokenPiece], list[int]]  # a unit, number of ids in each piece


def _spooled(
    preparation: Preparation, source: Source, spool: Spool, dropped: Counter[str], total: int
) -> Iterator[Spooled]:
    """Read or encode a source, of `total` bytes of all, unit by unit."""
    if isinstance(source, TokenSource):
        return _in_order(_ids, _units(source.token_pieces(dropped)), spool, workers=1)
    pieces = source.pieces(preparation.reading, dropped)
    first = _probe(pieces)
    pieces = chain(first, pieces)
    if not cuts_safely(preparation.tokenizer, (piece.text for piece in first)):
        pieces = _whole(pieces)
    encode = partial(worker.encode, preparation.tokenizer_path)
    return _in_order(encode, _units(pieces), spool, _workers(preparation.workers, total))


def _ids(unit: list[TokenPiece]) -> list[Ids]:
    return [piece.ids for piece in unit]


def _probe(pieces: Iterator[Piece]) -> list[Piece]:
    """Take the first pieces, fewer where they are long for want of good places to cut."""
    taken: list[Piece] = []
    for piece in islice(pieces, PROBED):
        taken.append(piece)
        if sum(len(one.text) for one in taken) > PROBED * PIECE:
            break
    return taken


def _whole(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """Join the pieces of each document, for a tokenizer whose ids change where a text is cut."""
    texts: list[str] = []
    for piece in pieces:
        texts.append(piece.text)
        if piece.last:
            yield replace(piece, text="".join(texts))
            texts = []


def _units(pieces: Iterator[P]) -> Iterator[list[P]]:
    """Group pieces into units of about UNIT characters, or ids."""
    unit: list[P] = []
    size = 0
    for piece in pieces:
        unit.append(piece)
        size += piece.size
        if size >= UNIT:
            yield unit
            unit, size = [], 0
    if unit:
        yield unit


def _digest(unit: list[P]) -> str:
    """SHA-256 of the contents and their lengths."""
    digest = hashlib.sha256()
    for piece in unit:
        content = piece.content
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def _workers(asked: int | None, source_bytes: int) -> int:
    """Number of workers: as asked, else one for each CPU that has enough to do; one where no process can be started."""
    if multiprocessing.current_process().daemon:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return asked or max(1, min(cores, source_bytes >> 22))


def _in_order(
    encode: Callable[[list[P]], list[Ids]], units: Iterable[list[P]], spool: Spool, workers: int
) -> Iterator[tuple[list[P], list[int]]]:
    """Encode units here or in `workers` processes; yields (unit, number of ids in each piece), in order.

    What an earlier run has spooled is not encoded again.
    """
    found: Iterator[tuple[list[P], str, list[int] | None]]
    found = ((unit, digest, spool.recall(digest)) for unit in units for digest in [_digest(unit)])
    if workers == 1:
        for unit, digest, counts in found:
            yield unit, spool.add(digest, encode(unit)) if counts is None else counts
        return
    for unit, digest, counts in found:
        if counts is None:  # all that follows is new
            found = chain([(unit, digest, None)], found)
            break
        yield unit, counts
    else:
        return
    pending: deque[tuple[list[P], str, Future[list[Ids]]]] = deque()
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(workers, mp_context=worker.server(), initializer=worker.end_with_parent) as pool:
        try:
            while True:
                for unit, digest, _ in islice(found, 2 * workers - len(pending)):
                    with worker.undisturbed():
                        pending.append((unit, digest, pool.submit(encode, unit)))
                if not pending:
                    return
                unit, digest, future = pending.popleft()
                yield unit, spool.add(digest, future.result())
        except BrokenProcessPool as error:
            for process in multiprocessing.active_children():
                if process not in others:
                    process.kill()  # the pool waits for workers, which hear no other signal
            raise ResourceError("a process that encoded text was killed, probably for its memory") from error
