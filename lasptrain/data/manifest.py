"""`dataset.json`, the manifest of a folder of shards. Written last; a folder without it is not a dataset."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lasptrain.errors import DataError

FILE = "dataset.json"

Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


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
    vocab_size: Count
    bos: Count
    token_bytes: tuple[Count, ...]


class OrderEntry(_Entry):
    """Layout of documents: shuffled once with `seed`, then one after another, windows starting anywhere; or by best
    fit, windows starting at multiples of `align`, which documents fill to the last token.
    """

    seed: int
    align: Count = 1
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

    documents: tuple[Count, ...]
    tokens: tuple[Count, ...]
    cut: dict[str, float]


class SourceEntry(_Entry):
    """Source of the text; `sha256` covers the names and contents of its files."""

    name: str
    files: Count
    bytes: Count
    sha256: Sha256


class Manifest(_Entry):
    """The whole of `dataset.json`. `unigram_entropy` is in nats per token of the training split."""

    format: Literal[1] = 1
    fingerprint: str = ""
    tokenizer: TokenizerEntry
    order: OrderEntry
    splits: dict[str, SplitEntry]
    unigram_entropy: float
    dropped: dict[str, Count]
    lengths: LengthsEntry
    sources: tuple[SourceEntry, ...]
    shards: tuple[ShardEntry, ...]

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

    def save(self, folder: Path) -> None:
        """Write `dataset.json` with its fingerprint: one line for each key and each shard."""
        values = self.model_dump(mode="json") | {"fingerprint": self.computed_fingerprint()}
        shards = ",\n".join("  " + json.dumps(shard) for shard in values.pop("shards"))
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()]
        text = "{" + ",\n".join([*lines, f'"shards": [\n{shards}\n]']) + "}\n"
        (folder / FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read and check `dataset.json`. Raises DataError with the file and the key that does not fit."""
        path = folder / FILE
        try:
            text = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; a dataset is a folder that holds {FILE}") from error
        try:
            manifest = cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))
            raise DataError(
                f"{path}: {key or 'content'}: {first['msg']}, found {str(first['input'])[:80]!r}"
            ) from error
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
        return manifest
