"""Documents → shards and `dataset.json`: shuffled once, laid out, and written; the same bytes every time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from data_tools.packing import BestFit, Layout, best_fit, concat
from data_tools.spool import Documents, Ids
from lasptrain import __version__
from lasptrain.data.manifest import (
    SPLITS,
    LengthsEntry,
    Manifest,
    OrderEntry,
    ShardEntry,
    SourceEntry,
    SplitEntry,
    TokenizerEntry,
)
from lasptrain.data.order import permuted
from lasptrain.data.shard import Int64s, Shard, ShardHeader, ShardWriter
from lasptrain.errors import DataError
from lasptrain.files import sha256

SHARD_TOKENS = 1 << 28  # a shard closes with the document that reaches this
LONGEST_NAME = 240  # characters of the sources' names in a shard: each may take 12 bytes there
WINDOWS = [1 << bits for bits in range(11, 23)]  # tokens; how many documents they cut is counted

Progress = Callable[[str, int, int], None]  # (stage, done, total), in bytes of source or in tokens


class Store(Protocol):
    """Place of ids that documents point into."""

    def read(self, start: int, count: int) -> Iterator[Ids]:
        """Read ids [start, start + count), part by part."""


@dataclass(frozen=True)
class Writing:
    """Facts and options of a dataset that is written of documents. `sources` are asked for last."""

    names: Sequence[str]
    tokenizer: TokenizerEntry
    sources: Iterable[SourceEntry]
    seed: int
    packing: BestFit | None
    report: Progress

    @property
    def align(self) -> int:
        """Grid of tokens on which windows start."""
        return self.packing.window if self.packing else 1

    @property
    def name(self) -> str:
        """Names of the sources, as far as they fit into the header of a shard."""
        return joined(self.names)

    def layout(self, documents: Documents) -> Layout:
        """Lay out the documents of a split, shuffled by the permutation before the first epoch's."""
        order = permuted(len(documents.lengths), self.seed, epoch=-1)
        if self.packing:
            return best_fit(documents.starts, documents.lengths, order, self.packing)
        return concat(documents.starts, documents.lengths, order)

    def header(self, split: str) -> ShardHeader:
        """Header of the shards of a split."""
        made = self.tokenizer
        by = f"lasptrain {__version__}"
        return ShardHeader(made.vocab_size, made.bos, made.sha256, self.name, split, by, self.align)


def joined(names: Sequence[str]) -> str:
    """Join names of sources, at most LONGEST_NAME characters."""
    name = " + ".join(names)
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…"


def check_training(name: str, splits: Mapping[str, Documents], dropped: Counter[str]) -> None:
    """Raise DataError where there is no document to train on."""
    if not splits["train"].tokens:
        held = len(splits["validation"].lengths)
        told = ", ".join(f"{count:,} {why}" for why, count in (+dropped).items()) or "none"
        raise DataError(f"0 documents in {name} to train on: {held} held out, dropped: {told}")


def write(
    folder: Path, writing: Writing, store: Store, splits: Mapping[str, Documents], dropped: Counter[str]
) -> Manifest:
    """Write the shards and, last, `dataset.json`. Raises DataError where no window of a packing can be filled."""
    layouts = {split: writing.layout(documents) for split, documents in splits.items()}
    if splits["train"].tokens and not layouts["train"].tokens:
        raise DataError(
            f"{writing.name}: {splits['train'].tokens:,} tokens to train on, no window of {writing.align:,}"
        )
    shards: list[ShardEntry] = []
    counts = dict.fromkeys(SPLITS, np.zeros(writing.tokenizer.vocab_size, np.int64))
    total, done = sum(layout.tokens for layout in layouts.values()), 0
    for split, layout in layouts.items():
        for shard in _write_shards(folder, writing.header(split), store, layout):
            shards.append(shard)
            counts[split] = counts[split] + _counts(folder / shard.name)
            done += shard.tokens
            writing.report("write", done, total)
        dropped["tokens beyond their window"] += layout.cut
        dropped["tokens short of a window"] += layout.left
    manifest = _manifest(writing, splits, layouts, counts, dropped, shards)
    manifest.save(folder)
    return manifest


def _write_shards(folder: Path, header: ShardHeader, store: Store, layout: Layout) -> Iterator[ShardEntry]:
    pieces = zip(layout.starts, layout.lengths, strict=True)
    for number, first in enumerate(pieces):
        path = folder / f"{header.split}-{number:05}.ltok"
        with ShardWriter(path, header) as writer:
            piece: tuple[int, int] | None = first
            while piece is not None:
                start, length = piece
                writer.add(np.array([header.bos]))
                for ids in store.read(start, length - 1):
                    writer.extend(ids)
                piece = next(pieces, None) if writer.n_tokens < SHARD_TOKENS else None
        shard = Shard(path)
        yield ShardEntry(
            name=path.name,
            split=header.split,
            tokens=shard.header.n_tokens,
            documents=shard.header.n_documents,
            bytes=shard.bytes,
            sha256=sha256(path),
            identity=shard.identity,
        )


def _counts(path: Path) -> Int64s:
    """Count each id in a shard, which is read back for it: int64 [vocab_size]."""
    shard, span = Shard(path), 1 << 22
    counts = np.zeros(shard.header.vocab_size, np.int64)
    for start in range(0, shard.header.n_tokens, span):
        tokens = shard.read(start, min(span, shard.header.n_tokens - start))
        counts += np.bincount(tokens, minlength=len(counts))
    return counts


def _manifest(
    writing: Writing,
    splits: Mapping[str, Documents],
    layouts: Mapping[str, Layout],
    counts: Mapping[str, Int64s],
    dropped: Counter[str],
    shards: list[ShardEntry],
) -> Manifest:
    token_bytes = np.asarray(writing.tokenizer.token_bytes)
    return Manifest(
        tokenizer=writing.tokenizer,
        order=OrderEntry(seed=writing.seed, align=writing.align, packing="best_fit" if writing.packing else "concat"),
        splits={
            split: _totals(documents, layouts[split], int(counts[split] @ token_bytes))
            for split, documents in splits.items()
        },
        unigram_entropy=_entropy(counts["train"]),
        dropped=dict(+dropped),
        lengths=_histogram(splits["train"], layouts["train"]),
        sources=tuple(writing.sources),
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
    ends = np.cumsum(layout.lengths, dtype=np.int64)
    starts = np.concatenate(([0], ends[:-1]))
    return LengthsEntry(
        documents=tuple(np.bincount(bins).tolist()),
        tokens=tuple(np.bincount(bins, lengths).astype(np.int64).tolist()),
        cut={str(window): float(np.mean(starts // window != (ends - 1) // window)) for window in WINDOWS if len(ends)},
    )
