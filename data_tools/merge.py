"""Several datasets → one: parts of a preparation, or an older dataset and what has been added since.

What is made is what one `prepare` of all their sources would have made, shard for shard: documents are put back into
the order of their sources, and shuffled anew. Datasets may have held out other shares, by text or by ids: a document
that one of them holds out is left out of the training text of all.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_tools import parts
from data_tools.folder import checked, new_folder
from data_tools.packing import BestFit
from data_tools.parts import PartEntry
from data_tools.shards import Progress, Writing, check_training, joined, write
from data_tools.spool import READ, Documents, Ids
from lasptrain.data.manifest import SPLITS, Manifest, ShardEntry, SourceEntry, TokenizerEntry
from lasptrain.data.order import permuted
from lasptrain.data.shard import Int64s, Shard
from lasptrain.errors import DataError


@dataclass(frozen=True)
class Member:
    """One of the datasets that are joined."""

    folder: Path
    manifest: Manifest
    part: PartEntry | None

    @classmethod
    def open(cls, folder: Path) -> Member:
        """Read what a dataset says of itself. Raises DataError for a folder that is none, or that does not fit."""
        manifest = Manifest.load(folder)
        return cls(folder, manifest, PartEntry.load(folder, manifest))

    def __str__(self) -> str:
        return f"{self.folder}, part {self.part}" if self.part else f"{self.folder}"


class Shelf:
    """Tokens of shards, one shard behind another, in which documents are read at any place."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        self._ends = list(accumulate(shard.header.n_tokens for shard in shards))

    def read(self, start: int, count: int) -> Iterator[Ids]:
        """Read tokens [start, start + count) of one shard, READ at a time."""
        if not count:
            return
        number = bisect_right(self._ends, start)
        shard = self._shards[number]
        begin = start - self._ends[number] + shard.header.n_tokens
        for at in range(begin, begin + count, READ):
            yield shard.reread(at, min(READ, begin + count - at))


def merge(folders: Sequence[Path], out: Path, packing: BestFit | None = None, progress: Progress | None = None) -> Path:
    """Join datasets to a new one, `out`, which appears when it is complete. All parts of a preparation belong together.

    Raises SetupError when `out` is not empty or being written; DataError for datasets of other tokenizers, seeds or
    packing, for parts that are missing, there twice or of something else, for a source that two have, and for damage.
    """
    out = checked(out)
    members = [Member.open(folder) for folder in folders]
    for member in members:
        _check_alike(members[0], member)
    groups = _groups(members)
    entries = [entry for group in groups for entry in _sources(group)]
    _check_sources(groups)
    first = members[0].manifest
    report = progress or (lambda *_: None)
    with new_folder(out) as hidden:
        ordered = [member for group in groups for member in group]
        splits, store = _documents(ordered, report)
        dropped = sum((Counter(member.manifest.dropped) for member in ordered), Counter[str]())
        if len(groups) > 1:
            splits["train"], there = _without(splits["train"], splits["validation"])
            dropped["held out elsewhere"] += there
        names = [entry.name for entry in entries]
        check_training(joined(names), splits, dropped)
        writing = Writing(names, first.tokenizer, entries, first.order.seed, packing, report)
        write(hidden, writing, store, splits, dropped)
    return out


def _check_alike(first: Member, other: Member) -> None:
    """Raise DataError where the ids of two datasets do not mean the same, or documents were packed."""
    ours, theirs = first.manifest, other.manifest
    order, made, expected = theirs.order, theirs.tokenizer, ours.tokenizer
    if (order.packing, order.align) != ("concat", 1):
        found = f"packed by {order.packing} for windows of {order.align:,}, which cuts documents"
        raise DataError(f"{other.folder}: {found}; expected datasets without packing; --packing of merge packs them")
    if (made.sha256, made.vocab_size, made.bos) != (expected.sha256, expected.vocab_size, expected.bos):
        raise DataError(f"{other.folder}: made with tokenizer {_told(made)}; {first.folder} with {_told(expected)}")
    if order.seed != ours.order.seed:
        raise DataError(f"{other.folder}: shuffled with seed {order.seed}; {first.folder} with {ours.order.seed}")
    if strange := sorted(set(theirs.splits) - set(SPLITS)):
        raise DataError(f"{other.folder}: has a split {strange[0]}; expected {' and '.join(SPLITS)}")


def _told(tokenizer: TokenizerEntry) -> str:
    return f"{tokenizer.name} (SHA-256 {tokenizer.sha256[:16]}, BOS {tokenizer.bos})"


def _groups(members: Sequence[Member]) -> list[list[Member]]:
    """Put members into order: datasets as they were given, and all parts, by number, where the first of them was.

    Raises DataError for parts that do not belong together, that are there twice, or that are missing.
    """
    found = [(member.part, member) for member in members if member.part]
    if not found:
        return [[member] for member in members]
    plan, first = found[0][0].plan, found[0][1]
    by_number: dict[int, Member] = {}
    for part, member in found:
        if part.plan != plan:
            raise DataError(
                f"{member}: of other sources or options than {first}; expected the parts of one preparation"
            )
        if part.number in by_number:
            raise DataError(
                f"{by_number[part.number].folder} and {member.folder} are both part {part}; expected it once"
            )
        by_number[part.number] = member
    of = found[0][0].of
    if missing := [f"{i}/{of}" for i in range(1, of + 1) if i not in by_number]:
        raise DataError(f"{first}: expected all {of} parts; missing: {', '.join(missing[:20])}")
    group = [by_number[number] for number in sorted(by_number)]
    return [group if member is first else [member] for member in members if member is first or not member.part]


def _sources(group: Sequence[Member]) -> Sequence[SourceEntry]:
    """Describe the sources of a dataset, or of all parts of one."""
    found = [member.part for member in group if member.part]
    return parts.merged(found) if found else group[0].manifest.sources


def _check_sources(groups: Sequence[Sequence[Member]]) -> None:
    """Raise DataError for a source that two datasets have, and for a dataset that is there twice."""
    seen: dict[str, int] = {}
    for i, group in enumerate(groups):
        for entry in _sources(group):
            other = seen.setdefault(entry.sha256, i)
            if other != i:
                there = groups[other][0].folder
                raise DataError(f"{group[0].folder}: its source {entry.name} is in {there} too; expected it once")


def _documents(members: Sequence[Member], report: Progress) -> tuple[dict[str, Documents], Shelf]:
    """Check every byte, and list the documents of each split in the order in which their sources hold them."""
    splits = {split: Documents() for split in SPLITS}
    shards: list[Shard] = []
    total, base = sum(entry.tokens for member in members for entry in member.manifest.shards), 0
    for member in members:
        found: dict[str, list[Shuffled]] = {split: [] for split in SPLITS}
        for entry in member.manifest.shards:
            shards.append(_verified(member, entry))
            found[entry.split].append(_shuffled(shards[-1], base))
            base += entry.tokens
            report("check", base, total)
        for split, documents in splits.items():
            if found[split]:
                starts, lengths, digests = (np.concatenate(arrays) for arrays in zip(*found[split], strict=True))
                shuffle = np.fromiter(
                    permuted(len(starts), member.manifest.order.seed, epoch=-1), np.int64, len(starts)
                )
                back = np.argsort(shuffle)
                documents.extend(starts[back], lengths[back], digests[back])
    return splits, Shelf(shards)


def _without(documents: Documents, others: Documents) -> tuple[Documents, int]:
    """Return the documents that are not among others, and how many are."""
    there = np.isin(np.asarray(documents.digests), np.asarray(others.digests))
    kept = Documents()
    kept.extend(*(np.asarray(found)[~there] for found in (documents.starts, documents.lengths, documents.digests)))
    return kept, int(there.sum())


def _verified(member: Member, entry: ShardEntry) -> Shard:
    try:
        return member.manifest.verified(member.folder, entry)
    except DataError as error:
        raise DataError(f"{member.folder}: {error}") from error


Shuffled = tuple[Int64s, Int64s, npt.NDArray[np.uint64]]  # of each document: first token after BOS, tokens, digest


def _shuffled(shard: Shard, base: int) -> Shuffled:
    """List the documents of a shard in their order; its first token is number `base` of all."""
    starts = shard.starts(0, shard.header.n_documents)
    lengths = np.diff(starts, append=shard.header.n_tokens)
    places = zip(starts.tolist(), lengths.tolist(), strict=True)
    digests = np.fromiter((_digest(shard, start, length) for start, length in places), np.uint64, len(starts))
    return starts + base + 1, lengths, digests


def _digest(shard: Shard, start: int, length: int) -> int:
    """64 bits by which a document is told from others: of its ids, for its text is not there."""
    content = hashlib.blake2b(digest_size=8, usedforsecurity=False)
    for at in range(start, start + length, READ):
        content.update(shard.reread(at, min(READ, start + length - at)).tobytes())
    return int.from_bytes(content.digest(), "little")
