"""`dataset.json`, the manifest of a folder of shards. Written last; a folder without it is not a dataset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from lasptrain.console.stdio import printable
from lasptrain.data.shard import Count, Shard, Size, misfit
from lasptrain.errors import DataError
from lasptrain.files import read, sha256

FILE = "dataset.json"
LARGEST = 1 << 23  # bytes: the lines of 20,000 shards
MOST_KEYS = 64  # of an object: each that is wrong has an error of its own

SPLITS = ("train", "validation")
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class ShardEntry(_Entry):
    """One shard. `identity` must equal `Shard.identity`; `sha256` is that of the whole file. Names are plain."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.ltok$")
    split: str
    tokens: Count
    documents: Count
    bytes: Count
    sha256: Sha256
    identity: Sha256


class TokenizerEntry(_Entry):
    """The tokenizer the shards were made with; `token_bytes` is the number of bytes of text of each id."""

    name: str
    sha256: Sha256
    vocab_size: Size
    bos: Count
    token_bytes: Annotated[tuple[Count, ...], FailFast()]


class OrderEntry(_Entry):
    """Layout of documents: shuffled once with `seed`, then one after another, windows starting anywhere; or by best
    fit, windows starting at multiples of `align`, which documents fill to the last token.
    """

    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)]
    align: Annotated[int, Field(ge=1, lt=1 << 53)] = 1
    packing: Literal["concat", "best_fit"] = "concat"


class SplitEntry(_Entry):
    """Totals of one split; `bytes` is the size of its text, `duplicates` the documents that had been there before. A
    document counts as often as it has pieces.
    """

    tokens: Count
    documents: Count
    bytes: Count
    duplicates: Count


class LengthsEntry(_Entry):
    """Lengths of the training documents: element i of a histogram is for 2^i <= tokens < 2^(i+1).

    `cut` is, for each window length, the share of documents that a window's edge cuts if windows start at its
    multiples.
    """

    documents: Annotated[tuple[Count, ...], Field(max_length=64)]
    tokens: Annotated[tuple[Count, ...], Field(max_length=64)]
    cut: dict[Annotated[str, Field(pattern=r"^[1-9][0-9]{0,15}$")], Annotated[float, Field(ge=0, le=1)]]


class SourceEntry(_Entry):
    """Source of the text; `sha256` covers the names and contents of its files, or the `revision` of a dataset."""

    name: str
    files: Count
    bytes: Count
    sha256: Sha256
    revision: str | None = None


def _few(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(pairs) > MOST_KEYS:
        raise ValueError(f"an object of {len(pairs):,} keys; expected at most {MOST_KEYS}")
    return dict(pairs)


def _tuples(content: Any, depth: int = 6) -> Any:
    """Return parsed JSON with tuples for lists, as entries have. ValueError where it is nested deeper."""
    if isinstance(content, dict | list) and not depth:
        raise ValueError("nested too deep")
    if isinstance(content, str):
        content.encode()  # ValueError for a lone surrogate, which cannot be shown
    if isinstance(content, dict):
        return {key: _tuples(value, depth - 1) for key, value in content.items()}
    return tuple(_tuples(value, depth - 1) for value in content) if isinstance(content, list) else content


def _told(totals: Mapping[str, int]) -> str:
    return printable(", ".join(f"{name[:20]} {tokens}" for name, tokens in list(totals.items())[:4]))


class Manifest(_Entry):
    """The whole of `dataset.json`. `unigram_entropy` is in nats per token of the training split."""

    format: Literal[1] = 1
    fingerprint: str = ""
    tokenizer: TokenizerEntry
    order: OrderEntry
    splits: dict[str, SplitEntry]
    unigram_entropy: Annotated[float, Field(ge=0)]
    dropped: dict[str, Count]
    lengths: LengthsEntry
    sources: Annotated[tuple[SourceEntry, ...], FailFast()]
    shards: Annotated[tuple[ShardEntry, ...], FailFast()]

    def computed_fingerprint(self) -> str:
        """SHA-256 of all that determines the tokens of a run: shards, tokenizer, order; not folder, time or names."""
        shards = [[shard.sha256, shard.tokens, shard.split] for shard in self.shards]
        content = [shards, self.tokenizer.model_dump(exclude={"name"}), self.order.model_dump()]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def content(self) -> str:
        """SHA-256 of what went into the dataset: text, tokenizer, order; not the names of folders, nor our version."""
        order, texts = self.order.model_dump(), [source.sha256 for source in self.sources]
        splits = {name: split.model_dump() for name, split in self.splits.items()}
        content = [texts, self.tokenizer.sha256, order, splits, [shard.tokens for shard in self.shards]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def open(self, folder: Path, entry: ShardEntry) -> Shard:
        """Open a shard of `folder` and compare it with its line. Raises DataError where they differ."""
        shard = Shard(folder / entry.name)
        header = shard.header
        expected: list[tuple[str, object, object]] = [
            ("bytes", shard.bytes, entry.bytes),
            ("tokenizer", header.tokenizer, self.tokenizer.sha256),
            ("vocab_size", header.vocab_size, self.tokenizer.vocab_size),
            ("bos", header.bos, self.tokenizer.bos),
            ("split", header.split, entry.split),
            ("align", header.align, self.order.align),
            ("tokens", header.n_tokens, entry.tokens),
            ("documents", header.n_documents, entry.documents),
            ("identity", shard.identity, entry.identity),
        ]
        for key, found, listed in expected:
            if found != listed:
                raise DataError(
                    f"shard {entry.name}: {key} is {found}, {FILE} says {listed}: swapped, foreign or rewritten"
                )
        return shard

    def verified(self, folder: Path, entry: ShardEntry) -> Shard:
        """Open a shard and read all of it: checksums, ids, document starts and SHA-256. Raises DataError for damage."""
        shard = self.open(folder, entry)
        shard.verify()
        found = sha256(shard.path)
        if found != entry.sha256:
            raise DataError(f"shard {entry.name}: SHA-256 {found[:16]}, {FILE} says {entry.sha256[:16]}")
        return shard

    def save(self, folder: Path) -> None:
        """Write `dataset.json` with its fingerprint: one line for each key and each shard."""
        values = self.model_dump(mode="json", exclude_none=True) | {"fingerprint": self.computed_fingerprint()}
        shards = ",\n".join("  " + json.dumps(shard) for shard in values.pop("shards"))
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()]
        text = "{" + ",\n".join([*lines, f'"shards": [\n{shards}\n]']) + "}\n"
        (folder / FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read and check `dataset.json`. Raises DataError with the file and the key that does not fit."""
        path = folder / FILE
        try:
            text = read(path, LARGEST)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; a dataset is a folder that holds {FILE}") from error
        try:
            content = _tuples(json.loads(text, object_pairs_hook=_few))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: content: Invalid JSON: {str(error)[:200]}") from None
        try:
            manifest = cls.model_validate(content)
        except ValidationError as error:
            raise DataError(f"{path}: {misfit(error)}") from error
        computed = manifest.computed_fingerprint()
        if manifest.fingerprint != computed:
            raise DataError(
                f"{path}: fingerprint {manifest.fingerprint[:16]}, its content has {computed[:16]}: it was changed"
            )
        if len(manifest.tokenizer.token_bytes) != manifest.tokenizer.vocab_size:
            raise DataError(
                f"{path}: token_bytes has {len(manifest.tokenizer.token_bytes)} entries for a vocabulary of "
                f"{manifest.tokenizer.vocab_size}"
            )
        manifest._check(path)
        return manifest

    def _check(self, path: Path) -> None:
        """Raise DataError where parts do not fit each other."""
        if self.tokenizer.bos >= self.tokenizer.vocab_size:
            raise DataError(
                f"{path}: tokenizer.bos: {self.tokenizer.bos} of a vocabulary of {self.tokenizer.vocab_size}"
            )
        if len(self.lengths.documents) != len(self.lengths.tokens):
            raise DataError(f"{path}: lengths: documents and tokens have different numbers of entries")
        totals = dict.fromkeys(SPLITS, 0)
        for shard in self.shards:
            totals[shard.split] = totals.get(shard.split, 0) + shard.tokens
        found = {name: split.tokens for name, split in self.splits.items()}
        if found != totals:
            raise DataError(f"{path}: splits: found {_told(found)} tokens, its shards have {_told(totals)}")
