"""The `.ltok` format and `dataset.json`: a round trip is exact, and every kind of damage is named."""

import hashlib
import json
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from data_tools import commands
from data_tools.prepare import Preparation, prepare
from lasptrain.data.dataset import TokenDataset
from lasptrain.data.loader import SliceLoader
from lasptrain.data.manifest import Manifest
from lasptrain.data.shard import BLOCK, FOOTER, PAGE, Shard, ShardHeader, ShardWriter
from lasptrain.errors import DataError, LaspError

BOS = 1


def documents(vocab: int, lengths: list[int]) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [np.concatenate(([BOS], random.integers(2, vocab, length - 1))) for length in lengths]


def write(path: Path, vocab: int, texts: list[np.ndarray]) -> Shard:
    with ShardWriter(path, ShardHeader(vocab, BOS, "0" * 64, "test", "train", "test")) as writer:
        for text in texts:
            writer.add(text)
    return Shard(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of two splits whose training shard has several blocks."""
    base = tmp_path_factory.mktemp("dataset")
    random = np.random.default_rng(1)
    text = base / "text"
    text.mkdir()
    for i in range(60):
        words = random.integers(97, 122, int(random.integers(1, 5000))).astype(np.uint8).tobytes()
        (text / f"{i:02}.txt").write_bytes(words)
    return prepare(Preparation([str(text)], "bytes", validation_ppm=300_000), base / "out")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    target = tmp_path / "copy"
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("vocab", [300, 65_536, 65_537])
@pytest.mark.parametrize("lengths", [[1], [1, 1, 2], [5, 70_000, 1, 33_000], [BLOCK // 2, BLOCK // 2]])
def test_shard_round_trip(tmp_path: Path, vocab: int, lengths: list[int]) -> None:
    texts = documents(vocab, lengths)
    shard = write(tmp_path / "a.ltok", vocab, texts)
    tokens = np.concatenate(texts)
    starts = np.cumsum([0, *lengths[:-1]])
    assert shard.header.dtype == ("u32" if vocab > 65_536 else "u16")
    assert np.array_equal(shard.read(0, len(tokens)), tokens)
    assert np.array_equal(shard.starts(0, len(starts)), starts)
    for start, end in [(0, 0), (0, 1), (len(tokens) - 1, len(tokens)), (len(tokens) // 3, len(tokens) // 2)]:
        assert np.array_equal(shard.read(start, end - start), tokens[start:end])
    for token in {0, 1, *starts.tolist(), *(starts + 1).tolist(), len(tokens)}:
        assert shard.documents_before(token) == np.searchsorted(starts, token)
    shard.verify()


def test_index_of_several_blocks(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(1, 6, 30_000).tolist()
    shard = write(tmp_path / "a.ltok", 300, documents(300, lengths))
    starts = np.cumsum([0, *lengths[:-1]])
    for token in np.random.default_rng(1).integers(0, sum(lengths), 200).tolist():
        assert shard.documents_before(token) == np.searchsorted(starts, token)


def test_a_slice_reads_only_its_blocks(tmp_path: Path) -> None:
    """Damage elsewhere does not matter to it."""
    shard = write(tmp_path / "a.ltok", 300, documents(300, [200_000]))
    tokens = shard.read(0, 1000).copy()
    flip(shard.path, PAGE + 3 * BLOCK)
    assert np.array_equal(Shard(shard.path).read(0, 1000), tokens)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def parts(path: Path) -> dict[str, int]:
    """Where each part of a shard begins."""
    tokens, _, starts, _, table, *_ = FOOTER.unpack(path.read_bytes()[-FOOTER.size :])
    return {"magic": 0, "header": 20, "tokens": tokens, "starts": starts, "table": table, "footer": -40}


@pytest.mark.fault("a damaged, exchanged or missing token shard")
@pytest.mark.parametrize("part", ["magic", "header", "tokens", "starts", "table", "footer"])
def test_a_flipped_bit_is_named(copy: Path, part: str) -> None:
    path = copy / "train-00000.ltok"
    flip(path, parts(path)[part])
    named = {"magic": "bytes 0..8", "tokens": r"tokens, block 0, bytes 4096\.\.69632", "starts": "starts, block 0"}
    with pytest.raises(DataError, match=f"shard train-00000.ltok: .*{named.get(part, part)}"):
        read_all(copy)
    report = commands.verify(copy)
    assert report.failures == 1 and "train-00000.ltok" in str(report)


def read_all(folder: Path) -> torch.Tensor:
    split = TokenDataset.open(folder).split("train")
    return split.read(0, split.tokens)


@pytest.mark.fault("a damaged, exchanged or missing token shard")
def test_every_byte_counts(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """A flip of any byte stops the reader, but for the zeros between parts, which nothing reads."""
    shard = write(tmp_path / "a.ltok", 300, documents(300, [40, 40]))
    content, flips = shard.path.read_bytes(), 0
    for at in [*range(0, PAGE, 97), *range(PAGE, len(content))]:
        changed = bytearray(content)
        changed[at] ^= 1
        shard.path.write_bytes(changed)
        padding = any(low <= at < high for low, high in [(PAGE + 160, 2 * PAGE), (2 * PAGE + 16, 2 * PAGE + 64)])
        if not padding:
            with pytest.raises(DataError, match=r"shard a\.ltok"):
                Shard(shard.path).verify()
            flips += 1
    record_property("times", flips)


@pytest.mark.fault("a damaged, exchanged or missing token shard")
@pytest.mark.parametrize("size", [0, 10, PAGE, PAGE + 100, -1])
def test_a_truncated_shard_is_named(copy: Path, size: int) -> None:
    path = copy / "train-00000.ltok"
    content = path.read_bytes()
    path.write_bytes(content[:size])
    with pytest.raises(DataError, match=r"shard train-00000\.ltok: "):
        TokenDataset.open(copy)


@pytest.mark.fault("a damaged, exchanged or missing token shard", times=2)
def test_a_shard_that_shrinks_or_vanishes_while_read(copy: Path) -> None:
    split = TokenDataset.open(copy).split("train")
    path = copy / "train-00000.ltok"
    with path.open("r+b") as file:
        file.truncate(PAGE + 1000)
    with pytest.raises(DataError, match=r"shard train-00000\.ltok: tokens, bytes .* asked, the file has 5096 bytes"):
        split.read(0, split.tokens)
    path.unlink()
    with pytest.raises(DataError, match=r"shard train-00000\.ltok: cannot be opened"):
        split.read(0, 10)


def test_missing_swapped_extra_and_linked_shards(copy: Path, tmp_path: Path) -> None:
    train, other = copy / "train-00000.ltok", copy / "validation-00000.ltok"
    content = train.read_bytes()
    train.unlink()
    with pytest.raises(DataError, match=r"train-00000\.ltok: cannot be opened"):
        TokenDataset.open(copy)
    train.write_bytes(other.read_bytes())
    with pytest.raises(DataError, match=r"train-00000\.ltok: bytes is .*swapped"):
        TokenDataset.open(copy)
    train.unlink()
    (tmp_path / "elsewhere").write_bytes(content)
    train.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"train-00000\.ltok: cannot be opened as a plain file"):
        TokenDataset.open(copy)
    train.unlink()
    train.write_bytes(content)
    (copy / "train-00001.ltok").write_bytes(content)
    with pytest.raises(DataError, match=r"does not list the shard train-00001\.ltok"):
        TokenDataset.open(copy)


def test_a_shard_of_equal_size_and_header_is_not_taken(copy: Path) -> None:
    path = copy / "train-00000.ltok"
    shard = Shard(path)
    tokens = shard.read(0, shard.header.n_tokens).copy()
    tokens[1] ^= 1
    starts = shard.starts(0, shard.header.n_documents)
    path.unlink()
    with ShardWriter(path, shard.header) as writer:
        for text in np.split(tokens, starts[1:]):
            writer.add(text)
    with pytest.raises(DataError, match=r"train-00000\.ltok: identity"):
        TokenDataset.open(copy)


@pytest.mark.parametrize("name", ["../train-00000.ltok", "/etc/passwd.ltok", ".ltok", "a/b.ltok"])
def test_only_plain_names(copy: Path, name: str) -> None:
    change(copy, lambda values: values["shards"][0].update(name=name))
    with pytest.raises(DataError, match=r"dataset\.json: shards\.0\.name"):
        TokenDataset.open(copy)


def change(folder: Path, edit: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    path = folder / "dataset.json"
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def test_a_changed_dataset_json_is_named(copy: Path) -> None:
    change(copy, lambda values: values["shards"][0].update(tokens=5))
    with pytest.raises(DataError, match=r"dataset\.json: fingerprint"):
        TokenDataset.open(copy)
    (copy / "dataset.json").write_text('{"format": 1,')
    with pytest.raises(DataError, match=r"dataset\.json: content: Invalid JSON"):
        TokenDataset.open(copy)
    (copy / "dataset.json").unlink()
    with pytest.raises(DataError, match=r"a dataset is a folder that holds dataset\.json"):
        TokenDataset.open(copy)


def test_a_token_outside_of_the_vocabulary_is_named(tmp_path: Path) -> None:
    tokens = np.array([BOS, 5, 6, 300, 7])
    shard = write(tmp_path / "a.ltok", 300, [tokens])
    with pytest.raises(DataError, match=r"shard a\.ltok: token 300 at offset 3, the vocabulary has 300"):
        shard.check_tokens(2, shard.read(2, 3))
    with pytest.raises(DataError, match="token 300 at offset 3"):
        shard.verify()


def test_bos_away_from_the_starts_is_named(tmp_path: Path) -> None:
    shard = write(tmp_path / "a.ltok", 300, [np.array([BOS, 5, 6, BOS, 7])])
    with pytest.raises(DataError, match=r"tokens 2\.\.5 hold 1 BOS, the index has 0 starts"):
        shard.check_tokens(2, shard.read(2, 3))
    shifted = write(tmp_path / "b.ltok", 300, [np.array([BOS, 5, BOS]), np.array([6, 7])])
    with pytest.raises(DataError, match="BOS away from the starts"):
        shifted.verify()


def test_errors_are_one_line(copy: Path) -> None:
    (copy / "dataset.json").write_text('{"format": 2}')
    with pytest.raises(LaspError) as caught:
        TokenDataset.open(copy)
    assert "\n" not in str(caught.value) and caught.value.code == 3


def by_the_page(folder: Path, documents: list[list[int]], vocab: int, bos: int) -> None:
    """A dataset of one shard by what lasptrain/data/README.md says alone: nothing of the program is used."""

    def crc(data: bytes) -> bytes:
        return struct.pack("<I", zlib.crc32(data))

    def crcs(data: bytes) -> bytes:
        return b"".join(crc(data[i : i + 65_536]) for i in range(0, len(data), 65_536))

    def padded(data: bytes, multiple: int) -> bytes:
        return data + bytes(-len(data) % multiple)

    kind = "u16" if vocab <= 65_536 else "u32"
    lengths = np.array([1 + len(document) for document in documents])
    ids = [i for document in documents for i in [bos, *document]]
    tokens = np.array(ids, {"u16": "<u2", "u32": "<u4"}[kind]).tobytes()
    starts = np.cumsum([0, *lengths[:-1]]).astype("<u8").tobytes()
    sizes = [int(i != bos) for i in range(vocab)]
    tokenizer = {"sha256": "5" * 64, "vocab_size": vocab, "bos": bos, "token_bytes": sizes}
    header = {
        "format": 1, "dtype": kind, "n_tokens": int(lengths.sum()), "n_documents": len(documents), "vocab_size": vocab,
        "bos": bos, "tokenizer": "5" * 64, "split": "train", "align": 1, "source": "…", "created_by": "another program",
    }  # fmt: skip
    text = json.dumps(header).encode()
    head = b"LASPTOK1" + struct.pack("<I", len(text)) + text
    head = padded(head + crc(head), 4096)
    content = padded(head + tokens, 4096)
    at = len(content)
    content = padded(content + starts, 64)
    table = crcs(tokens) + crcs(starts)
    footer = struct.pack("<6Q", 4096, len(tokens), at, len(starts), len(content), len(table)) + crc(table)
    footer += crc(footer) + b"LASPTOK1"
    content += table + footer
    (folder / "theirs.ltok").write_bytes(content)
    shard = {
        "name": "theirs.ltok", "split": "train", "tokens": int(lengths.sum()), "documents": len(documents),
        "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(),
        "identity": hashlib.sha256(head + table + footer).hexdigest(),
    }  # fmt: skip
    order = {"seed": 0, "align": 1, "packing": "concat"}
    bits = np.log2(lengths).astype(int)
    share = np.unique(ids, return_counts=True)[1] / lengths.sum()
    counts = {"documents": np.bincount(bits).tolist(), "tokens": np.bincount(bits, lengths).astype(int).tolist()}
    said = [[[shard["sha256"], shard["tokens"], "train"]], tokenizer, order]
    manifest = {
        "format": 1, "fingerprint": hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest(),
        "tokenizer": {"name": "their tokenizer", **tokenizer}, "order": order,
        "splits": {
            "train": {"tokens": int(lengths.sum()), "documents": len(documents), "bytes": 0, "duplicates": 0},
            "validation": {"tokens": 0, "documents": 0, "bytes": 0, "duplicates": 0},
        },
        "unigram_entropy": float(-(share * np.log(share)).sum()), "dropped": {},
        "lengths": counts | {"cut": {}},
        "sources": [{"name": "theirs", "files": 1, "bytes": 1, "sha256": "7" * 64}], "shards": [shard],
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("vocab", [300, 65_536, 65_537])
@pytest.mark.parametrize("lengths", [[1], [0, 3, 70_000, 5], [65_536 // 2 - 1], [3] * 9000])
def test_a_shard_written_by_the_page_is_read(tmp_path: Path, vocab: int, lengths: list[int]) -> None:
    random = np.random.default_rng(0)
    documents = [random.integers(0, vocab - 1, length).tolist() for length in lengths]
    by_the_page(tmp_path, documents, vocab, bos=vocab - 1)
    assert not commands.verify(tmp_path).failures
    dataset = TokenDataset.open(tmp_path)
    split = dataset.whole("train")
    assert split.read(0, split.tokens).tolist() == [i for document in documents for i in [vocab - 1, *document]]
    loader = SliceLoader(
        split, window=2, batch=1, micro_batch=1, dp=1, dp_rank=0, sp=1, sp_rank=0, segment=2, seed=0,
        bos=dataset.bos, reset=True, repeat=True,
    )  # fmt: skip
    assert loader.step(0)[0][0].tokens.shape == (1, 2)
    loader.close()
    assert str(commands.inspect(tmp_path)).startswith(f"{tmp_path}\n")
    assert set(ShardHeader.__dataclass_fields__) == set(keys_of("The keys of the header"))
    assert set(Manifest.model_fields) == set(keys_of("## dataset.json"))


def keys_of(heading: str) -> list[str]:
    """Keys in the first column of the table that follows a place in the page."""
    page = (Path(__file__).parents[2] / "lasptrain" / "data" / "README.md").read_text(encoding="utf-8")
    rows = page.split(heading)[1].split("|---|---|\n")[1].split("\n\n")[0].splitlines()
    return [key for row in rows for key in re.findall("`(.+?)`", row.split("|")[1])]
