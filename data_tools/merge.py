"""Several datasets → one: parts of a preparation, or an older dataset and what has been added since.

What is made is what one `prepare` of all their sources would have made, shard for shard: documents are put back into
the order of their sources, and shuffled anew.
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

from data_tools import parts
from data_tools.folder import checked, new_folder
from data_tools.packing import BestFit
from data_tools.parts import PartEntry
from data_tools.shards import Progress, Writing, check_training, joined, write
from data_tools.spool import READ, Documents, Ids
from lasptrain.data.manifest import SPLITS, Manifest, SourceEntry, TokenizerEntry
from lasptrain.data.order import permuted
from lasptrain.data.shard import Shard
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
        shards = _verified(ordered, report)
        store = Shelf([shard for opened in shards for shard in opened])
        splits = _documents(ordered, shards, store)
        dropped = sum((Counter(member.manifest.dropped) for member in ordered), Counter[str]())
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
    """Raise DataError for a source that two datasets have."""
    seen: dict[str, Path] = {}
    for group in groups:
        for entry in _sources(group):
            other = seen.setdefault(entry.sha256, group[0].folder)
            if other != group[0].folder:
                raise DataError(f"{group[0].folder}: its source {entry.name} is in {other} too; expected it once")


def _verified(members: Sequence[Member], report: Progress) -> list[list[Shard]]:
    """Open the shards of each member, after all of their bytes have been checked."""
    total = sum(entry.tokens for member in members for entry in member.manifest.shards)
    done = 0
    opened: list[list[Shard]] = []
    for member in members:
        opened.append([])
        for entry in member.manifest.shards:
            try:
                opened[-1].append(member.manifest.verified(member.folder, entry))
            except DataError as error:
                raise DataError(f"{member.folder}: {error}") from error
            done += entry.tokens
            report("check", done, total)
    return opened


def _documents(members: Sequence[Member], shards: Sequence[Sequence[Shard]], store: Shelf) -> dict[str, Documents]:
    """List the documents of each split in the order in which their sources hold them."""
    splits = {split: Documents() for split in SPLITS}
    base = 0
    for member, opened in zip(members, shards, strict=True):
        places: dict[str, list[tuple[int, int]]] = {split: [] for split in SPLITS}
        for shard in opened:
            starts = shard.starts(0, shard.header.n_documents)
            lengths = np.diff(starts, append=shard.header.n_tokens)
            places[shard.header.split] += zip((starts + base).tolist(), lengths.tolist(), strict=True)
            base += shard.header.n_tokens
        for split, documents in splits.items():
            found = places[split]
            shuffled = np.fromiter(permuted(len(found), member.manifest.order.seed, epoch=-1), np.int64, len(found))
            for place in np.argsort(shuffled).tolist():
                start, length = found[place]
                _add(documents, start, length, store)
    return splits


def _add(documents: Documents, start: int, length: int, store: Shelf) -> None:
    """Append a document; `length` counts its BOS, at `start`."""
    content = hashlib.blake2b(digest_size=8, usedforsecurity=False)
    for ids in store.read(start + 1, length - 1):
        content.update(ids.tobytes())
    documents.add(start + 1, length, int.from_bytes(content.digest(), "little"))
