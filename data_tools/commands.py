"""The commands of `lasptrain data`: each function returns a result that prints itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_tools import synthetic, tokenizer
from data_tools.files import counted
from data_tools.merge import merge as merge_folders
from data_tools.packing import BestFit
from data_tools.prepare import Preparation
from data_tools.prepare import prepare as prepare_folder
from data_tools.shards import Progress
from data_tools.sources import Reading, left_out, open_source
from data_tools.synthetic import Kind
from lasptrain.console.tables import figures
from lasptrain.console.words import times
from lasptrain.data.manifest import Manifest
from lasptrain.errors import DataError, SetupError
from lasptrain.files import whole


@dataclass(frozen=True)
class TrainedTokenizer:
    """A tokenizer that was trained and written."""

    path: Path
    vocab: int
    sha256: str
    bytes_per_token: float
    left_out: Mapping[str, int]
    dropped: Mapping[str, int]

    def __str__(self) -> str:
        told = f"{self.path}: {self.vocab} pieces, {self.bytes_per_token:.2f} bytes per token, SHA-256 {self.sha256}"
        return told + told_left_out(self.left_out, self.dropped)


@dataclass(frozen=True)
class Inspection:
    """Contents of a dataset; with a `window`, the number that fit; of a new one, the files `left_out` by kind."""

    folder: Path
    manifest: Manifest
    window: int | None = None
    left_out: Mapping[str, int] | None = None

    def rate(self, seconds: float) -> str:
        """Speed of preparation, in MB/s of text and tokens/s, after so many seconds."""
        splits = self.manifest.splits.values()
        tokens, size = sum(split.tokens for split in splits), sum(split.bytes for split in splits)
        return f"{seconds:.1f} s: {size / seconds / 1e6:.2f} MB/s, {tokens / seconds:,.0f} tokens/s"

    def __str__(self) -> str:
        manifest = self.manifest
        lines = [
            f"{self.folder}",
            f"  source       {' + '.join(source.name for source in manifest.sources)}",
            f"  tokenizer    {manifest.tokenizer.name}, {manifest.tokenizer.vocab_size} pieces",
            f"  fingerprint  {manifest.fingerprint}",
            f"  packing      {manifest.order.packing}, {_cut(manifest)}",
            f"  entropy      {manifest.unigram_entropy:.4f} nats per token (unigram)",
        ]
        packed = manifest.order.packing == "best_fit"  # documents were counted before, also those that were left out
        for name, split in manifest.splits.items():
            twice = f"{times(split.duplicates, 'document')} twice before" if packed else f"{split.duplicates:,} twice"
            rate = split.bytes / max(1, split.tokens)
            fits = f", {times(split.tokens // self.window, 'window')} of {self.window:,}" if self.window else ""
            lines.append(
                f"  {name:<12} {split.tokens:,} tokens, {times(split.documents, 'piece' if packed else 'document')} "
                f"({twice}), {rate:.2f} bytes per token{fits}"
            )
        lines.append(f"  dropped      {', '.join(f'{n:,} {why}' for why, n in manifest.dropped.items()) or 'nothing'}")
        if self.left_out is not None:
            lines.append(f"  left out     {counted(self.left_out) or 'nothing'}")
        lines += [
            f"  {1 << i:>10,} tokens or more: {times(documents, 'document')} with {tokens:,} tokens"
            for i, (documents, tokens) in enumerate(
                zip(manifest.lengths.documents, manifest.lengths.tokens, strict=True)
            )
            if documents
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Verification:
    """One line for each shard; `failures` counts those that are damaged."""

    lines: tuple[str, ...]
    failures: int

    def __str__(self) -> str:
        return "\n".join(self.lines)


def _cut(manifest: Manifest) -> str:
    """Format the share of documents that windows of some lengths cut."""
    shares = {int(window): share for window, share in manifest.lengths.cut.items()}
    if manifest.order.packing == "best_fit":
        shares = {window: share for window, share in shares.items() if window % manifest.order.align == 0}
    found = ", ".join(f"{figures(100 * share, 2)} % at {window >> 10}K" for window, share in list(shares.items())[::2])
    align = manifest.order.align
    return (f"windows of a multiple of {align:,}; " if align > 1 else "") + f"documents cut: {found or 'not counted'}"


def told_left_out(found: Mapping[str, int], dropped: Mapping[str, int]) -> str:
    """Format lines that count the documents dropped and the files left out of sources, by kind, if there are any."""
    lines = {"dropped": ", ".join(f"{n:,} {why}" for why, n in dropped.items()), "left out": counted(found)}
    return "".join(f"\n{name}: {told}" for name, told in lines.items() if told)


def train_tokenizer(sources: list[str], vocab: int, out: Path, reading: Reading | None = None) -> TrainedTokenizer:
    """Train a sentencepiece model on `sources` and write it to `out`, which must not exist."""
    if out.exists() or out.is_symlink():
        raise SetupError(f"{out}: it exists; a tokenizer is written to a new file")
    dropped = Counter[str]()
    texts = _texts(sources, reading or Reading(), dropped)
    if not texts:
        raise DataError(f"0 documents in {' + '.join(sources)} to train a tokenizer on")
    model = tokenizer.train(texts, vocab)
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole(out) as new:
        new.write_bytes(model)
    trained = tokenizer.load_tokenizer(out)
    sample = texts[:: max(1, len(texts) // 100)]
    tokens = sum(len(trained.encode(piece)) for text in sample for piece in tokenizer.cut(text))
    rate = sum(len(text.encode()) for text in sample) / max(1, tokens)
    return TrainedTokenizer(out, trained.vocab_size, trained.sha256, rate, left_out(sources), dropped)


def prepare(preparation: Preparation, out: Path) -> Inspection:
    """Write a dataset and show what is in it."""
    found = dict(sum((Counter(source.left_out) for source in preparation.opened), Counter[str]()))
    return replace(inspect(prepare_folder(preparation, out)), left_out=found)


def merge(folders: Sequence[Path], out: Path, packing: BestFit | None, progress: Progress | None) -> Inspection:
    """Join datasets and show what is in the new one."""
    return inspect(merge_folders(folders, out, packing, progress))


def inspect(folder: Path, window: int | None = None) -> Inspection:
    """Read `dataset.json`."""
    return Inspection(folder, Manifest.load(folder), window)


def _texts(sources: list[str], reading: Reading, dropped: Counter[str]) -> list[str]:
    return [document.text for source in sources for document in open_source(source).documents(reading, dropped)]


def synthesize(
    kind: Kind,
    sources: list[str],
    lengths: tuple[int, int],
    count: int,
    seed: int,
    prompts: bool,
    out: Path,
    reading: Reading | None = None,
) -> str:
    """Write documents of a synthetic kind over the text of `sources`, or prompts without the answer."""
    dropped = Counter[str]()
    made = synthetic.documents(kind, _texts(sources, reading or Reading(), dropped), lengths, count, seed)
    written = synthetic.write(out, (one.prompt if prompts else one.row for one in made))
    about = " to ".join(f"{length:,}" for length in sorted(set(lengths)))
    told = f"{out}: {written:,} {'prompts' if prompts else 'documents'} of about {about} characters"
    return told + told_left_out(left_out(sources), dropped)


def verify(folder: Path) -> Verification:
    """Read every byte of a dataset and check it: checksums, ids, document starts and SHA-256 of each shard."""
    lines, failures = [], 0
    manifest = Manifest.load(folder)
    for entry in manifest.shards:
        try:
            manifest.verified(folder, entry)
            lines.append(f"shard {entry.name}: {entry.tokens:,} tokens, good")
        except DataError as error:
            lines.append(str(error))
            failures += 1
    return Verification(tuple(lines), failures)
