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
import threading
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from data_tools.sources import Document, Reading, Source, open_source
from data_tools.tokenizer import Tokenizer, cut, cuts_safely, load_tokenizer
from lasptrain import __version__
from lasptrain.data.manifest import (
    FILE,
    LengthsEntry,
    Manifest,
    OrderEntry,
    ShardEntry,
    SourceEntry,
    SplitEntry,
    TokenizerEntry,
)
from lasptrain.data.order import permute
from lasptrain.data.shard import Shard, ShardHeader, ShardWriter, file_sha256, numpy_dtype, token_dtype
from lasptrain.errors import DataError, ResourceError, SetupError

UNIT = 1 << 20  # characters a worker encodes at a time
SHARD_TOKENS = 1 << 28  # a shard closes with the document that reaches this
SPLITS = ("train", "validation")
MILLION = 1_000_000
ANY_LENGTH = (0, 1 << 62)  # tokens of a document

Progress = Callable[[str, int, int], None]  # (stage, done, total): "encode" in bytes of source, "write" in tokens
Ids = npt.NDArray[np.uint32]


def ensure_dataset(
    source: str,
    tokenizer_path: str | Path,
    cache: Path,
    validation_ppm: int,
    seed: int,
    progress: Progress | None = None,
    workers: int | None = None,
) -> Path:
    """The folder of the dataset a recipe names: `source` itself if it is one, else prepared once under `cache`.

    Any number of processes on any number of machines may call it at once: one prepares, the others wait for it.
    Raises DataError when the dataset was made with another tokenizer.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    folder = Path(source)
    if (folder / FILE).exists():
        made_with = Manifest.load(folder).tokenizer
        if made_with.sha256 != tokenizer.sha256:
            raise DataError(
                f"{folder}: made with tokenizer {made_with.name} (SHA-256 {made_with.sha256[:16]}), "
                f"the recipe has {tokenizer.name} (SHA-256 {tokenizer.sha256[:16]})"
            )
        return folder
    opened = open_source(source)
    arguments = [1, opened.name, opened.sha256, tokenizer.sha256, validation_ppm, seed]
    key = hashlib.sha256(json.dumps(arguments).encode()).hexdigest()[:16]
    final = cache / "datasets" / f"{re.sub('[^A-Za-z0-9.]+', '-', opened.name)}-{key}"
    if not (final / FILE).exists():
        with _building(final, wait=True) as hidden:
            if hidden is not None:
                _build(hidden, _Task([opened], tokenizer_path, Reading(), validation_ppm, seed, workers, progress))
    return final


def prepare(
    sources: Sequence[str],
    tokenizer_path: str | Path,
    out: Path,
    *,
    reading: Reading = Reading(),  # noqa: B008  (frozen)
    validation_ppm: int = 20_000,
    seed: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
    lengths: tuple[int, int] = ANY_LENGTH,
) -> Path:
    """Write the dataset of `sources` to the folder `out`, which appears when it is complete.

    `validation_ppm` documents in a million are held out, chosen by their content. Documents whose tokens are not within
    `lengths`, both included, are left out. Raises SetupError when `out` is not
    empty or being written, DataError for text that `reading` does not tolerate.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SetupError(f"{out}: it is not empty; a dataset is written to a new folder")
    opened = [open_source(source) for source in sources]
    with _building(out, wait=False) as hidden:
        if hidden is None:
            raise SetupError(f"{out}: another process has just written it")
        _build(hidden, _Task(opened, tokenizer_path, reading, validation_ppm, seed, workers, progress, lengths))
    return out


@contextmanager
def _building(final: Path, wait: bool) -> Iterator[Path | None]:
    """A hidden folder that becomes `final` if all goes well, or None if `final` was made while waiting for the lock.

    What a killed process left in the hidden folder is removed.
    """
    hidden, lock = final.with_name(f".{final.name}.partial"), final.with_name(f".{final.name}.lock")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError as error:
                raise SetupError(f"{final}: another process is writing it") from error
            if (final / FILE).exists():
                yield None
                return
            shutil.rmtree(hidden, ignore_errors=True)
            hidden.mkdir()
            try:
                yield hidden
                hidden.rename(final)
            except BaseException:
                shutil.rmtree(hidden, ignore_errors=True)
                raise
            lock.unlink()  # whoever still waits for this lock finds `final`
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"{final}: the disk is full") from error
        raise SetupError(f"{final}: {error.strerror or error}") from error


@dataclass(frozen=True)
class _Task:
    """Everything that says what a dataset will hold, and by how many processes it is made."""

    sources: list[Source]
    tokenizer_path: str | Path
    reading: Reading
    validation_ppm: int
    seed: int
    workers: int | None
    progress: Progress | None
    lengths: tuple[int, int] = ANY_LENGTH

    def report(self, stage: str, done: int, total: int) -> None:
        if self.progress:
            self.progress(stage, done, total)


def _build(folder: Path, task: _Task) -> None:
    """Write the shards and, last, `dataset.json`."""
    tokenizer = load_tokenizer(task.tokenizer_path)
    name = " + ".join(source.name for source in task.sources)
    dropped: Counter[str] = Counter()
    with ExitStack() as stack:
        spools = {
            split: stack.enter_context(_Spool(folder / f"{split}.spool", tokenizer.vocab_size)) for split in SPLITS
        }
        for document, ids in _encoded(task, tokenizer, dropped):
            shortest, longest = task.lengths
            if shortest <= len(ids) <= longest:
                _assign(document, ids, spools, task.validation_ppm)
                dropped["replaced ▁"] += document.text.count("▁")
            else:
                dropped["shorter" if len(ids) < shortest else "longer"] += 1
        if spools["train"].tokens == 0:
            held = len(spools["validation"].lengths)
            raise DataError(f"0 documents in {name} to train on: {held} held out, dropped: {dict(+dropped)}")
        shards: list[ShardEntry] = []
        for split, spool in spools.items():
            header = ShardHeader(
                tokenizer.vocab_size, tokenizer.bos, tokenizer.sha256, name, split, f"lasptrain {__version__}"
            )
            shards += _write_shards(folder, header, spool.shuffled(task.seed))
            task.report("write", sum(shard.tokens for shard in shards), sum(s.tokens for s in spools.values()))
    _manifest(task, tokenizer, spools, dropped, shards).save(folder)


def _assign(document: Document, ids: Ids, spools: dict[str, _Spool], validation_ppm: int) -> None:
    """Content alone decides the split: adding documents moves none, and equal ones fall on one side."""
    content = document.text.encode()
    digest = int.from_bytes(hashlib.blake2b(content, digest_size=8, usedforsecurity=False).digest(), "little")
    split = "validation" if digest % MILLION < validation_ppm else "train"
    spools[split].add(ids, len(content), digest)


def _manifest(
    task: _Task, tokenizer: Tokenizer, spools: dict[str, _Spool], dropped: Counter[str], shards: list[ShardEntry]
) -> Manifest:
    return Manifest(
        tokenizer=TokenizerEntry(
            name=tokenizer.name,
            sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            bos=tokenizer.bos,
            token_bytes=tuple(tokenizer.token_bytes),
        ),
        order=OrderEntry(seed=task.seed),
        splits={split: spool.totals() for split, spool in spools.items()},
        unigram_entropy=spools["train"].entropy(),
        dropped=dict(+dropped),
        lengths=spools["train"].histogram(task.seed),
        sources=tuple(
            SourceEntry(name=source.name, files=len(source.files), bytes=source.bytes, sha256=source.sha256)
            for source in task.sources
        ),
        shards=tuple(shards),
    )


class _Spool:
    """The documents of one split in the order they came: ids in a file, lengths and digests in memory."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        self.path = path
        self.dtype = numpy_dtype(token_dtype(vocab_size))
        self.lengths = array("q")
        self.bytes = 0
        self._digests = array("Q")
        self._counts = np.zeros(vocab_size, np.int64)
        self._file = path.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def add(self, ids: Ids, text_bytes: int, digest: int) -> None:
        self._file.write(ids.astype(self.dtype).tobytes())
        np.add.at(self._counts, ids, 1)
        self.lengths.append(len(ids))
        self._digests.append(digest)
        self.bytes += text_bytes

    def shuffled(self, seed: int) -> Iterator[Ids]:
        """Every document once, in the order of `seed`."""
        self._file.flush()
        ends = np.cumsum(self.lengths) * self.dtype.itemsize
        with self.path.open("rb") as file:
            for document in self._order(seed):
                size = self.lengths[document] * self.dtype.itemsize
                yield np.frombuffer(os.pread(file.fileno(), size, int(ends[document]) - size), self.dtype)

    def totals(self) -> SplitEntry:
        documents = len(self.lengths)
        duplicates = documents - len(np.unique(np.asarray(self._digests)))
        return SplitEntry(tokens=self.tokens, documents=documents, bytes=self.bytes, duplicates=duplicates)

    def entropy(self) -> float:
        share = self._counts[self._counts > 0] / self._counts.sum()
        return float(-(share * np.log(share)).sum())

    def histogram(self, seed: int) -> LengthsEntry:
        lengths = np.asarray(self.lengths)
        bins = np.log2(lengths).astype(np.int64)
        ends = np.cumsum(lengths[list(self._order(seed))])
        starts = np.concatenate(([0], ends[:-1]))
        windows = [1 << bits for bits in range(11, 23)]
        return LengthsEntry(
            documents=tuple(np.bincount(bins).tolist()),
            tokens=tuple(np.bincount(bins, lengths).astype(np.int64).tolist()),
            cut={str(window): float(np.mean(starts // window != (ends - 1) // window)) for window in windows},
        )

    def _order(self, seed: int) -> Iterator[int]:
        """The shuffle of documents is the permutation before the first epoch's."""
        return (permute(len(self.lengths), i, seed, epoch=-1) for i in range(len(self.lengths)))


def _write_shards(folder: Path, header: ShardHeader, documents: Iterator[Ids]) -> list[ShardEntry]:
    entries: list[ShardEntry] = []
    for first in documents:
        path = folder / f"{header.split}-{len(entries):05}.ltok"
        with ShardWriter(path, header) as writer:
            writer.add(first)
            while writer.n_tokens < SHARD_TOKENS and (following := next(documents, None)) is not None:
                writer.add(following)
        shard = Shard(path)
        entries.append(
            ShardEntry(
                name=path.name,
                split=header.split,
                tokens=shard.header.n_tokens,
                documents=shard.header.n_documents,
                bytes=shard.bytes,
                sha256=file_sha256(path),
                identity=shard.identity,
            )
        )
    return entries


def _encoded(task: _Task, tokenizer: Tokenizer, dropped: Counter[str]) -> Iterator[tuple[Document, Ids]]:
    """Every document with its ids, BOS first: uint32 [tokens], in the order of the sources."""
    total, done = sum(source.bytes for source in task.sources), 0
    for source in task.sources:
        units = _units(source.documents(task.reading, dropped))
        first = next(units, [])
        may_cut = cuts_safely(tokenizer, (document.text for document in first))
        encode = partial(_encode, task.tokenizer_path, may_cut)
        for unit, documents in _in_order(encode, chain([first], units), _workers(task.workers, total)):
            yield from zip(unit, documents, strict=True)
            task.report("encode", done + (unit[-1].done if unit else 0), total)
        done += source.bytes


def _units(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Runs of documents with about UNIT characters."""
    unit: list[Document] = []
    size = 0
    for document in documents:
        unit.append(document)
        size += len(document.text)
        if size >= UNIT:
            yield unit
            unit, size = [], 0
    if unit:
        yield unit


def _workers(asked: int | None, source_bytes: int) -> int:
    """As many as asked for, else one for each CPU that has enough to do; one where no process can be started."""
    if multiprocessing.current_process().daemon:
        return 1
    return asked or max(1, min(len(os.sched_getaffinity(0)), source_bytes >> 22))


def _in_order(
    encode: Callable[[list[Document]], list[Ids]], units: Iterable[list[Document]], workers: int
) -> Iterator[tuple[list[Document], list[Ids]]]:
    """(unit, its ids) in the order of the units, encoded here or in `workers` processes."""
    if workers == 1:
        yield from ((unit, encode(unit)) for unit in units)
        return
    pending: deque[tuple[list[Document], Future[list[Ids]]]] = deque()
    todo = iter(units)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_end_with_parent) as pool:
        try:
            while True:
                pending.extend((unit, pool.submit(encode, unit)) for unit in islice(todo, 2 * workers - len(pending)))
                if not pending:
                    return
                unit, future = pending.popleft()
                yield unit, future.result()
        except BrokenProcessPool as error:
            raise ResourceError("a process that encoded text was killed, probably for its memory") from error


def _end_with_parent() -> None:
    """A worker whose parent is killed would wait for its next unit for ever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@lru_cache(maxsize=1)
def _tokenizer(spec: str | Path) -> Tokenizer:
    return load_tokenizer(spec)


def _encode(tokenizer_path: str | Path, may_cut: bool, unit: list[Document]) -> list[Ids]:
    """The ids of each document, BOS first. Raises DataError for an id that cannot be."""
    tokenizer = _tokenizer(tokenizer_path)
    encoded = []
    for document in unit:
        pieces = cut(document.text) if may_cut else [document.text]
        ids = np.concatenate(
            [np.array([tokenizer.bos], np.uint32), *(np.asarray(tokenizer.encode(p), np.uint32) for p in pieces)]
        )
        wrong = np.flatnonzero((ids[1:] == tokenizer.bos) | (ids[1:] >= tokenizer.vocab_size))
        if wrong.size:
            raise DataError(
                f"{document.place}: token {ids[wrong[0] + 1]} at {wrong[0]}: BOS inside of a document, or outside of "
                f"the vocabulary of {tokenizer.vocab_size}"
            )
        encoded.append(ids)
    return encoded
