"""Text → token shards: encode in parallel, shuffle documents once, write; the same bytes for any number of workers."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path

import numpy as np

from data_tools import encode as worker
from data_tools.files import naming
from data_tools.packing import BestFit, Layout, best_fit, concat
from data_tools.sources import Piece, Reading, Source, open_source
from data_tools.spool import Documents, Ids, Spool
from data_tools.tokenizer import MARK, PIECE, Tokenizer, cuts_safely, keeps_mark, load_tokenizer
from lasptrain import __version__
from lasptrain.data.manifest import (
    FILE,
    SPLITS,
    LengthsEntry,
    Manifest,
    OrderEntry,
    ShardEntry,
    SourceEntry,
    SplitEntry,
    TokenizerEntry,
)
from lasptrain.data.order import permute
from lasptrain.data.shard import Int64s, Shard, ShardHeader, ShardWriter
from lasptrain.errors import DataError, ResourceError, SetupError
from lasptrain.files import sha256

UNIT = 1 << 20  # characters a worker encodes at a time
FOUND = 1 << 28  # bytes of text whose digest is made in a moment, to find what was prepared of it
SHARD_TOKENS = 1 << 28  # a shard closes with the document that reaches this
PROBED = 64  # pieces at whose good places it is tried whether a cut changes ids
MILLION = 1_000_000
ANY_LENGTH = (0, 1 << 62)  # tokens of a document
LONGEST_NAME = 240  # characters of the sources' names in a shard: each may take 12 bytes there

Progress = Callable[[str, int, int], None]  # (stage, done, total): "encode" in bytes of source, "write" in tokens


@dataclass(frozen=True)
class Preparation:
    """Sources and options of a dataset to be prepared, and the number of processes.

    `validation_ppm` documents in a million are held out, chosen by their content. Documents whose tokens are not within
    `lengths`, both included, are left out. Without `packing` documents stand one after another, wherever windows will
    cut them.
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

    @cached_property
    def opened(self) -> list[Source]:
        """The sources, opened once. Raises DataError for one that cannot be read."""
        return [open_source(source) for source in self.sources]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded once. Raises DataError for a file that is none."""
        return load_tokenizer(self.tokenizer_path)

    @property
    def align(self) -> int:
        """Grid of tokens on which windows start."""
        return self.packing.window if self.packing else 1

    def layout(self, documents: Documents) -> Layout:
        """Lay out the shuffled documents of a split."""
        order = _order(documents, self.seed)
        if self.packing:
            return best_fit(documents.starts, documents.lengths, order, self.packing)
        return concat(documents.starts, documents.lengths, order)

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
    tokenizer, packing = preparation.tokenizer, preparation.packing
    (source,) = preparation.sources
    folder = Path(source)
    if is_dataset(source):
        manifest = Manifest.load(folder)
        made_with = manifest.tokenizer
        if made_with.sha256 != tokenizer.sha256:
            raise DataError(
                f"{folder}: made with tokenizer {made_with.name} (SHA-256 {made_with.sha256[:16]}), "
                f"the recipe has {tokenizer.name} (SHA-256 {tokenizer.sha256[:16]})"
            )
        if packing and (manifest.order.packing, manifest.order.align) != ("best_fit", packing.window):
            raise DataError(
                f"{folder}: packed by {manifest.order.packing} for windows of any multiple of {manifest.order.align}, "
                f"the recipe has data.packing: best_fit with data.window: {packing.window}"
            )
        return folder
    final = _kept(preparation, cache)
    if not (final / FILE).exists():
        with _building(final, wait=True) as hidden:
            if hidden is not None:
                _build(hidden, preparation)
    return final


def find_dataset(preparation: Preparation, cache: Path) -> Path | None:
    """Find the folder that `ensure_dataset` would; None if it would prepare one, or read more than FOUND of text.

    Raises DataError where there is no such source, or it cannot be read.
    """
    (source,) = preparation.sources
    if is_dataset(source):
        return Path(source)
    if preparation.opened[0].bytes > FOUND:
        return None
    final = _kept(preparation, cache)
    return final if (final / FILE).exists() else None


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
    if out.is_symlink():
        raise SetupError(f"{out} -> {out.readlink()}: is a symbolic link; expected a new folder")
    out = out if out.name not in ("", "..") else out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SetupError(f"{out}: it is not empty; a dataset is written to a new folder")
    _ = preparation.opened, preparation.tokenizer  # what cannot be read is refused before anything is written
    with _building(out, wait=False) as hidden:
        if hidden is None:
            raise SetupError(f"{out}: another process has just written it")
        _build(hidden, preparation)
    return out


@contextmanager
def _building(final: Path, wait: bool) -> Iterator[Path | None]:
    """Lock and yield a hidden folder that becomes `final` if all goes well; None if `final` was made meanwhile.

    Of a process that was killed the finished units are used (see `Spool`), not the shards.
    """
    hidden, lock = final.with_name(f".{final.name}.partial"), final.with_name(f".{final.name}.lock")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with _locked(lock, final, wait):
            if (final / FILE).exists():
                yield None
                return
            hidden.mkdir(exist_ok=True)
            for path in hidden.glob("*.ltok"):
                path.unlink()
            try:
                yield hidden
                hidden.rename(final)
            except DataError:  # units that were finished are of use once the text is mended
                ids = hidden / "ids"
                if wait or not ids.exists() or not ids.stat().st_size:
                    shutil.rmtree(hidden, ignore_errors=True)
                raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"{final}: the disk is full") from error
        raise SetupError(f"{error.filename or final}: {error.strerror or error}") from error


@contextmanager
def _locked(lock: Path, final: Path, wait: bool) -> Iterator[None]:
    """Hold a lock whose file is there only as long. SetupError where another process holds it, unless told to wait."""
    while True:
        with lock.open("w") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError as error:
                raise SetupError(f"{final}: another process is writing it") from error
            if not _is_there(lock, held.fileno()):
                continue  # whoever held it has removed it, and the next one makes another
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _is_there(path: Path, descriptor: int) -> bool:
    """Return True if an open file still has this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _build(folder: Path, preparation: Preparation) -> None:
    """Write the shards and, last, `dataset.json`."""
    tokenizer = preparation.tokenizer
    name = _name(preparation.opened)
    dropped: Counter[str] = Counter()
    what = f"1 {tokenizer.sha256} {UNIT}"
    with Spool(folder, tokenizer.vocab_size, what) as spool:
        splits = _documents(preparation, spool, dropped)
        if splits["train"].tokens == 0:
            held = len(splits["validation"].lengths)
            told = ", ".join(f"{count:,} {why}" for why, count in (+dropped).items()) or "none"
            raise DataError(f"0 documents in {name} to train on: {held} held out, dropped: {told}")
        layouts = {split: preparation.layout(documents) for split, documents in splits.items()}
        if layouts["train"].tokens == 0:
            raise DataError(
                f"{name}: {splits['train'].tokens:,} tokens to train on, no window of {preparation.align:,}"
            )
        shards: list[ShardEntry] = []
        counts = dict.fromkeys(SPLITS, np.zeros(tokenizer.vocab_size, np.int64))
        for split, layout in layouts.items():
            header = ShardHeader(
                tokenizer.vocab_size,
                tokenizer.bos,
                tokenizer.sha256,
                name,
                split,
                f"lasptrain {__version__}",
                preparation.align,
            )
            written = _write_shards(folder, header, spool, layout)
            counts[split] = counts[split] + sum(_counts(folder / shard.name) for shard in written)
            shards += written
            preparation.report("write", sum(shard.tokens for shard in shards), sum(d.tokens for d in layouts.values()))
            dropped["tokens beyond their window"] += layout.cut
            dropped["tokens short of a window"] += layout.left
    _manifest(preparation, splits, layouts, counts, dropped, shards).save(folder)
    for path in folder.iterdir():
        if path.name != FILE and path.suffix != ".ltok":
            path.unlink()


def _name(sources: Sequence[Source]) -> str:
    """Join the names of the sources, as far as they fit into the header of a shard."""
    name = " + ".join(source.name for source in sources)
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…"


def _documents(preparation: Preparation, spool: Spool, dropped: Counter[str]) -> dict[str, Documents]:
    """Encode everything into the spool and sort documents into splits.

    Content alone decides the split: adding documents moves none, and equal ones fall on one side.
    """
    splits = {split: Documents() for split in SPLITS}
    start, end = 0, 0
    content, text_bytes, replaced = _content_hash(), 0, 0
    lost = "" if keeps_mark(preparation.tokenizer) else MARK
    for piece, count in _encoded(preparation, spool, dropped):
        text = piece.text.encode()
        content.update(text)
        text_bytes += len(text)
        replaced += piece.text.count(lost) if lost else 0
        end += count
        if not piece.last:
            continue
        length = end - start + 1
        shortest, longest = preparation.lengths
        if piece.kept and shortest <= length <= longest:
            digest = int.from_bytes(content.digest(), "little")
            split = "validation" if digest % MILLION < preparation.validation_ppm else "train"
            splits[split].add(start, length, text_bytes, digest)
            dropped["replaced ▁"] += replaced
        elif piece.kept:
            dropped["shorter" if length < shortest else "longer"] += 1
        start, content, text_bytes, replaced = end, _content_hash(), 0, 0
    return splits


def _content_hash() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=8, usedforsecurity=False)


def _manifest(
    preparation: Preparation,
    splits: dict[str, Documents],
    layouts: dict[str, Layout],
    counts: dict[str, Int64s],
    dropped: Counter[str],
    shards: list[ShardEntry],
) -> Manifest:
    tokenizer = preparation.tokenizer
    token_bytes = np.asarray(tokenizer.token_bytes)
    return Manifest(
        tokenizer=TokenizerEntry(
            name=tokenizer.name,
            sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            bos=tokenizer.bos,
            token_bytes=tuple(tokenizer.token_bytes),
        ),
        order=OrderEntry(
            seed=preparation.seed, align=preparation.align, packing="best_fit" if preparation.packing else "concat"
        ),
        splits={
            split: _totals(documents, layouts[split], int(counts[split] @ token_bytes))
            for split, documents in splits.items()
        },
        unigram_entropy=_entropy(counts["train"]),
        dropped=dict(+dropped),
        lengths=_histogram(splits["train"], layouts["train"]),
        sources=tuple(
            SourceEntry(name=source.name, files=len(source.files), bytes=source.bytes, sha256=source.sha256)
            for source in preparation.opened
        ),
        shards=tuple(shards),
    )


def _totals(documents: Documents, layout: Layout, text_bytes: int) -> SplitEntry:
    duplicates = len(documents.digests) - len(np.unique(np.asarray(documents.digests)))
    return SplitEntry(tokens=layout.tokens, documents=len(layout.lengths), bytes=text_bytes, duplicates=duplicates)


def _entropy(counts: Int64s) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def _histogram(documents: Documents, layout: Layout) -> LengthsEntry:
    lengths = np.asarray(documents.lengths)
    bins = np.log2(lengths).astype(np.int64)
    ends = np.cumsum(layout.lengths)
    starts = np.concatenate(([0], ends[:-1]))
    windows = [1 << bits for bits in range(11, 23)]
    return LengthsEntry(
        documents=tuple(np.bincount(bins).tolist()),
        tokens=tuple(np.bincount(bins, lengths).astype(np.int64).tolist()),
        cut={str(window): float(np.mean(starts // window != (ends - 1) // window)) for window in windows},
    )


def _order(documents: Documents, seed: int) -> Iterator[int]:
    """Shuffle documents: by the permutation before the first epoch's."""
    return (permute(len(documents.lengths), i, seed, epoch=-1) for i in range(len(documents.lengths)))


def _write_shards(folder: Path, header: ShardHeader, spool: Spool, layout: Layout) -> list[ShardEntry]:
    entries: list[ShardEntry] = []
    pieces = zip(layout.starts, layout.lengths, strict=True)
    for first in pieces:
        path = folder / f"{header.split}-{len(entries):05}.ltok"
        with ShardWriter(path, header) as writer:
            piece: tuple[int, int] | None = first
            while piece is not None:
                start, length = piece
                writer.add(np.array([header.bos]))
                for ids in spool.read(start, length - 1):
                    writer.extend(ids)
                piece = next(pieces, None) if writer.n_tokens < SHARD_TOKENS else None
        shard = Shard(path)
        entries.append(
            ShardEntry(
                name=path.name,
                split=header.split,
                tokens=shard.header.n_tokens,
                documents=shard.header.n_documents,
                bytes=shard.bytes,
                sha256=sha256(path),
                identity=shard.identity,
            )
        )
    return entries


def _counts(path: Path) -> Int64s:
    """Count each id in a shard, which is read back for it: int64 [vocab_size]."""
    shard, span = Shard(path), 1 << 22
    counts = np.zeros(shard.header.vocab_size, np.int64)
    for start in range(0, shard.header.n_tokens, span):
        tokens = shard.read(start, min(span, shard.header.n_tokens - start))
        counts += np.bincount(tokens, minlength=len(counts))
    return counts


def _encoded(preparation: Preparation, spool: Spool, dropped: Counter[str]) -> Iterator[tuple[Piece, int]]:
    """Encode every piece, in the order of the sources, into the spool; yields (piece, number of its ids)."""
    total, done = sum(source.bytes for source in preparation.opened), 0
    for source in preparation.opened:
        pieces = source.pieces(preparation.reading, dropped)
        first = _probe(pieces)
        pieces = chain(first, pieces)
        if not cuts_safely(preparation.tokenizer, (piece.text for piece in first)):
            pieces = _whole(pieces)
        encode = partial(worker.encode, preparation.tokenizer_path)
        for unit, counts in _in_order(encode, _units(pieces), spool, _workers(preparation.workers, total)):
            yield from zip(unit, counts, strict=True)
            preparation.report("encode", done + unit[-1].done, total)
        done += source.bytes


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


def _units(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Group pieces into units of about UNIT characters."""
    unit: list[Piece] = []
    size = 0
    for piece in pieces:
        unit.append(piece)
        size += len(piece.text)
        if size >= UNIT:
            yield unit
            unit, size = [], 0
    if unit:
        yield unit


def _digest(unit: list[Piece]) -> str:
    """SHA-256 of the texts and their lengths."""
    digest = hashlib.sha256()
    for piece in unit:
        text = piece.text.encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()


def _workers(asked: int | None, source_bytes: int) -> int:
    """Number of workers: as asked, else one for each CPU that has enough to do; one where no process can be started."""
    if multiprocessing.current_process().daemon:
        return 1
    return asked or max(1, min(len(os.sched_getaffinity(0)), source_bytes >> 22))


Found = tuple[list[Piece], str, list[int] | None]  # unit, its digest, ids in each piece if the spool knows it


def _in_order(
    encode: Callable[[list[Piece]], list[Ids]], units: Iterable[list[Piece]], spool: Spool, workers: int
) -> Iterator[tuple[list[Piece], list[int]]]:
    """Encode units here or in `workers` processes; yields (unit, number of ids in each piece), in order."""
    found: Iterator[Found] = ((unit, digest, spool.recall(digest)) for unit in units for digest in [_digest(unit)])
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
    pending: deque[tuple[list[Piece], str, Future[list[Ids]]]] = deque()
    server = multiprocessing.get_context("forkserver")  # imports once, whatever this process has done; then forks
    server.set_forkserver_preload(["__main__", "data_tools.encode"])
    with ProcessPoolExecutor(workers, mp_context=server, initializer=worker.end_with_parent) as pool:
        try:
            while True:
                pending.extend(
                    (unit, digest, pool.submit(encode, unit))
                    for unit, digest, _ in islice(found, 2 * workers - len(pending))
                )
                if not pending:
                    return
                unit, digest, future = pending.popleft()
                yield unit, spool.add(digest, future.result())
        except BrokenProcessPool as error:
            raise ResourceError("a process that encoded text was killed, probably for its memory") from error
