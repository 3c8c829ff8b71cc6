"""Ids that other programs have made of text: imported, they are the same documents, and bad ones are named."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from data_tools import commands
from data_tools import prepare as preparing
from data_tools.ids import TokenPiece, TokenReading, find_tokenizer
from data_tools.prepare import Preparation, prepare
from data_tools.sources import Reading
from data_tools.spool import Ids as Array
from data_tools.tokenizer import load_tokenizer
from lasptrain.data.dataset import TokenDataset
from lasptrain.data.loader import SliceLoader
from lasptrain.data.manifest import Manifest
from lasptrain.data.shard import Shard
from lasptrain.errors import DataError, LaspError, RecipeError
from tests.data.test_hostile_data import tried
from tests.support.byte_level import byte_level
from tests.support.foreign import BOS, MARK, WRITERS, Ids, megatron, table
from tests.support.program import ROOT, start

MODEL = ROOT / "tokenizers" / "python-4k.model"
VOCAB = 4096


def made(count: int, seed: int = 0) -> Ids:
    """Documents of ids of the shipped tokenizer, none of them BOS or MARK."""
    random = np.random.default_rng(seed)
    return [random.integers(4, VOCAB, int(random.integers(3, 200))).tolist() for _ in range(count)]


def imported(source: Path, reading: TokenReading, out: Path, validation: int = 100_000) -> Path:
    return prepare(Preparation([str(source)], MODEL, validation_ppm=validation, tokens=reading), out)


def held(folder: Path) -> Counter[tuple[int, ...]]:
    """Documents of a dataset, without BOS, of both splits."""
    found = Counter[tuple[int, ...]]()
    for entry in Manifest.load(folder).shards:
        shard = Shard(folder / entry.name)
        tokens, starts = shard.read(0, entry.tokens), shard.starts(0, entry.documents)
        found.update(tuple(part[1:].tolist()) for part in np.split(tokens, starts[1:]))
    return found


def expected(documents: Ids) -> Counter[tuple[int, ...]]:
    return Counter(map(tuple, documents))


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_is_read_as_the_same_documents(tmp_path: Path, kind: str) -> None:
    """And training reads them: windows of the loader hold only what was imported."""
    documents = made(120)
    (tmp_path / "in").mkdir()
    reading = WRITERS[kind](tmp_path / "in", documents)
    out = imported(tmp_path / "in", reading, tmp_path / "out")
    assert held(out) == expected(documents)
    assert not commands.verify(out).failures
    dataset = TokenDataset.open(out)
    assert dataset.manifest.splits["validation"].documents > 0
    loader = SliceLoader(
        dataset.whole("train"), window=512, batch=2, micro_batch=1, dp=1, dp_rank=0, sp=1, sp_rank=0, segment=256,
        seed=0, bos=BOS, reset=True, repeat=True,
    )  # fmt: skip
    known = {i for document in documents for i in document} | {BOS}
    for step in range(3):
        for micro in loader.step(step):
            for piece in micro:
                assert set(piece.tokens.flatten().tolist()) <= known
    loader.close()


def test_ids_are_the_dataset_that_text_is(tmp_path: Path) -> None:
    """The same documents with the same ids, but for their order and for which are held out."""
    texts = [f"def f_{i}(x):\n    return x + {i}\n" * (i % 9 + 1) for i in range(80)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = load_tokenizer(MODEL)
    parquet.write_table(table([tokenizer.encode(text) for text in texts]), tmp_path / "a.parquet")
    ours = prepare(Preparation([str(tmp_path / "a.jsonl")], MODEL, workers=1), tmp_path / "ours")
    theirs = imported(tmp_path / "a.parquet", TokenReading(), tmp_path / "theirs")
    assert held(theirs) == held(ours)
    bytes_of = [sum(split.bytes for split in Manifest.load(one).splits.values()) for one in (ours, theirs)]
    assert bytes_of == [sum(map(len, texts))] * 2


def test_a_saved_dataset_is_imported_and_trained_on(tmp_path: Path) -> None:
    """By the program, with the tokenizer that lies with it."""
    documents = made(60)
    WRITERS["datasets"](tmp_path / "theirs", documents)
    (tmp_path / "theirs" / "tokenizer.model").write_bytes(MODEL.read_bytes())

    def run(*arguments: str) -> str:
        code, printed, said = start("lasptrain", *arguments, folder=tmp_path, logs=tmp_path / "logs").end()
        assert code == 0, said
        return printed

    told = run("data", "import", "theirs", "--out", "ours", "--validation", "100000")
    padding = len(documents) * max(map(len, documents)) - sum(map(len, documents))
    assert f"dropped      {padding:,} padding tokens" in told and "1 .arrow" in told and "tokens/s" in told
    assert "good" in run("data", "verify", "ours")
    small = ["model.dim=16", "model.layers=1", "model.heads=2", "model.mlp=16", "train.steps=3", "train.batch=1"]
    sizes = [*small, "data.window=128", "optim.warmup=1", "eval.windows=1", "eval.sample=0"]
    paths = ["data.source=ours", "data.tokenizer=theirs/tokenizer.model"]
    options = [part for one in [*sizes, *paths] for part in ("--set", one)]
    run("pretrain", str(ROOT / "recipes" / "quickstart.yaml"), "--run", "run", *options)
    told_of = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {row["step"] for row in told_of if row.get("loss")} == {1, 2, 3}


def test_import_goes_on_from_what_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after some units: the rest alone is read into the spool, and the shards have the same bytes."""
    monkeypatch.setattr(preparing, "UNIT", 500)
    (tmp_path / "in").mkdir()
    reading = WRITERS["parquet"](tmp_path / "in", made(60))
    whole = imported(tmp_path / "in", reading, tmp_path / "whole")
    stages: list[str] = []

    def stop(stage: str, *_: int) -> None:
        stages.append(stage)
        if len(stages) == 5:
            raise KeyboardInterrupt

    ids = Preparation([str(tmp_path / "in")], MODEL, validation_ppm=100_000, tokens=reading, progress=stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(ids, tmp_path / "out")
    assert stages == ["read"] * 5 and not (tmp_path / "out").exists()
    read: list[int] = []
    of_unit = preparing._ids

    def count(unit: list[TokenPiece]) -> list[Array]:
        read.append(len(unit))
        return of_unit(unit)

    monkeypatch.setattr(preparing, "_ids", count)
    out = imported(tmp_path / "in", reading, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}
    again = len(read)
    imported(tmp_path / "in", reading, tmp_path / "again")
    assert len(read) - again == again + 5


def test_large_rows_and_runs_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents longer than what is in memory at once, of sequences that lie in any order, and of none."""
    for module in ("arrays", "megatron", "columns"):
        monkeypatch.setattr(f"data_tools.{module}.READ", 16)
    documents = [*made(5), [], [7] * 16, [8] * 17, [], [9], [10] * 31, []]
    kept = expected([ids for ids in documents if ids])
    for kind in ("parquet", "arrow", "uint16", "numpy", "packed rows"):
        (tmp_path / kind).mkdir()
        reading = WRITERS[kind](tmp_path / kind, documents)
        out = imported(tmp_path / kind, reading, tmp_path / f"{kind}.set", validation=0)
        assert held(out) == kept, kind
        dropped = Manifest.load(out).dropped
        assert dropped == ({"empty": 3} if kind in ("parquet", "arrow") else {}), kind
    megatron(tmp_path / "order", documents, range(1, len(documents) + 1))
    index = (tmp_path / "order.idx").read_bytes()
    size, count = np.array([len(ids) for ids in documents]), len(documents)
    backwards = np.concatenate((np.cumsum(size[::-1])[::-1][1:], [0])) * 2
    end = 34 + 4 * count
    index = index[:end] + backwards.astype("<i8").tobytes() + index[end + 8 * count :] + bytes(count)  # and modes
    (tmp_path / "order.idx").write_bytes(index)
    (tmp_path / "order.bin").write_bytes(np.array([i for ids in documents[::-1] for i in ids], "<u2").tobytes())
    for name in ("order", "order.bin", "order.idx"):  # all of them name the pair
        out = imported(tmp_path / name, TokenReading(), tmp_path / f"{name}.set", validation=0)
        assert held(out) == kept and Manifest.load(out).dropped == {"empty": 3}


def test_several_documents_of_a_row_are_told_apart(tmp_path: Path) -> None:
    parquet.write_table(table([[BOS, 5, 6, BOS, 7], [8, 9], [], [BOS], [BOS, BOS, 4, MARK]]), tmp_path / "a.parquet")
    out = imported(tmp_path / "a.parquet", TokenReading(), tmp_path / "out", validation=0)
    assert held(out) == expected([[5, 6], [7], [8, 9], [4, MARK]])
    assert Manifest.load(out).dropped == {"empty": 2}


# What is written into a folder, how it is read, and what is said of it.
Bad = tuple[Callable[[Path], object], TokenReading, str]
ROWS = TokenReading()
FLAT, WIDE = TokenReading(mark=MARK, dtype="uint16"), TokenReading(mark=MARK, dtype="uint32")


def cut(name: str, size: int) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        megatron(folder / "a", [[5, 6], [7]], [1, 2])
        path = folder / name
        path.write_bytes(path.read_bytes()[:size])

    return write


def index_with(at: int, kind: str, value: int) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        megatron(folder / "a", [[5, 6], [7]], [1, 2])
        content = bytearray((folder / "a.idx").read_bytes())
        struct.pack_into(kind, content, at, value)
        (folder / "a.idx").write_bytes(content)

    return write


def rows(documents: object, kind: pyarrow.DataType | None = None) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        ids = pyarrow.array(documents, kind or pyarrow.list_(pyarrow.int64()))
        parquet.write_table(pyarrow.table({"input_ids": ids}), folder / "a.parquet")

    return write


def saved(state: object) -> Callable[[Path], object]:
    return lambda folder: (folder / "state.json").write_text(json.dumps(state))


def written(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def array(values: object) -> Callable[[Path], object]:
    return lambda folder: np.save(folder / "a.npy", np.asarray(values))


def without_ids(folder: Path) -> None:
    megatron(folder / "a", [[5]], [1])
    (folder / "a.bin").unlink()


HEAD = 34
BAD: dict[str, Bad] = {
    "index cut": (cut("a.idx", 60), ROWS, r"a\.idx: 60 bytes; 2 sequences and 3 .* take 82: it is cut"),
    "head cut": (cut("a.idx", 20), ROWS, r"a\.idx: begins with .*; expected b'MMIDIDX"),
    "ids cut": (cut("a.bin", 4), ROWS, r"a\.bin: 4 bytes, a\.idx has sequence 1 in bytes 4 to 6"),
    "no ids": (without_ids, ROWS, r"a\.bin: it cannot be read: No such"),
    "magic": (index_with(0, "<B", 1), ROWS, r"begins with b'\\x01MIDIDX"),
    "version": (index_with(9, "<Q", 2), ROWS, "version 2, type 8; expected version 1"),
    "fractions": (index_with(17, "<B", 7), ROWS, r"type 7; expected version 1, type \[1, 2, 3, 4, 5, 8\]"),
    "many sequences": (index_with(18, "<Q", 1 << 63), ROWS, "9,223,372,036,854,775,808 sequences"),
    "length": (index_with(HEAD, "<i", -1), ROWS, "sequence 0 has -1 tokens"),
    "long": (index_with(HEAD, "<i", 1 << 30), ROWS, r"sequence 0 in bytes 0 to 2,147,483,648; expected it"),
    "pointer": (index_with(HEAD + 8, "<q", -2), ROWS, "sequence 0 in bytes -2 to 2"),
    "documents": (index_with(HEAD + 24, "<q", 1), ROWS, "numbers that increase from 0 to 2"),
    "documents back": (index_with(HEAD + 32, "<q", 5), ROWS, "numbers that increase from 0 to 2"),
    "beyond": (rows([[5], [6, 4096]]), ROWS, r"a\.parquet: row 2: id 4096, the vocabulary has 4,096; expected 0 "),
    "far beyond": (rows([[5], [1 << 62]]), ROWS, "row 2: id 4611686018427387904"),
    "negative": (rows([[5], [], [6, -100]]), ROWS, "row 3: id -100"),
    "null": (rows([[5, 6], None, [7, None]]), ROWS, "row 3: null among its ids"),
    "fractional": (rows([[0.5]], pyarrow.list_(pyarrow.float32())), ROWS, "float>; expected lists of integers"),
    "text": (rows(["a"], pyarrow.string()), ROWS, "'input_ids' holds string; expected lists of integers"),
    "one a row": (rows([5, 6], pyarrow.int32()), ROWS, "'input_ids' holds int32; expected lists of integers"),
    "column": (rows([[5]]), TokenReading("tokens"), "no column 'tokens'; it has input_ids; name one with --column"),
    "no rows": (rows([]), ROWS, "0 documents in in to train on: 0 held out, dropped: none"),
    "empty rows": (rows([[], [0], None]), ROWS, "0 documents in in to train on: .* dropped: 3 empty"),
    "no parquet": (written("a.parquet", b"PAR1"), ROWS, r"a\.parquet: it cannot be read"),
    "no arrow": (written("a.arrow", b"ARROW1\0\0"), ROWS, r"a\.arrow: it cannot be read"),
    "empty arrow": (written("a.arrow", b""), ROWS, r"a\.arrow: 0 bytes; expected Arrow"),
    "half an id": (written("a.bin", b"abc"), FLAT, "3 bytes; expected a multiple of 2"),
    "type": (written("a.bin", b"ab"), TokenReading(mark=MARK), "the type of its ids with --dtype"),
    "other type": (written("a.bin", b"\5\0\6\0"), WIDE, "row 1: id 393221, the vocabulary has 4,096"),
    "mark": (written("a.bin", b""), TokenReading(dtype="uint16"), "between documents with --document-mark"),
    "no id": (written("a.bin", b""), TokenReading(mark=4096, dtype="uint16"), "--document-mark: found 4096"),
    "nothing": (written("a.bin", b""), FLAT, "0 documents in in to train on"),
    "run": (array([5, 6]), ROWS, "one run of ids; name the id between"),
    "cube": (array([[[5]]]), FLAT, r"an array \[1, 1, 1\]; expected"),
    "fortran": (array(np.ones((2, 3), int).T), FLAT, "in the order of Fortran"),
    "float": (array([0.5]), FLAT, "holds <f8; expected integers"),
    "objects": (array([{}, {}]), FLAT, r"holds \|O; expected integers"),
    "no numpy": (written("a.npy", b"abc"), FLAT, "begins with b'abc'; expected a .npy"),
    "code": (written("a.npy", b"\x93NUMPY\1\0\x10\0__import__('os')"), FLAT, "header cannot be read"),
    "splits": (written("dataset_dict.json", b'{"splits": ["a", "b"]}'), ROWS, "splits a, b; expected .* as .*in/a$"),
    "elsewhere": (saved({"_data_files": [{"filename": "../a.arrow"}]}), ROWS, "names no files; expected those"),
    "odd name": (saved({"_data_files": [{"filename": "\n.arrow"}]}), ROWS, "names no files; expected those"),
    "missing": (saved({"_data_files": [{"filename": "b.arrow"}]}), ROWS, r"b\.arrow: it cannot be read: No such"),
    "chosen": (saved({"_indices_data_files": [1]}), ROWS, "flatten_indices"),
    "no state": (saved([]), ROWS, r"state\.json: no JSON object"),
    "nothing to read": (written("a.txt", b"a"), ROWS, "0 files to read; .* left out: 1 .txt"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_ids_are_named(tmp_path: Path, name: str) -> None:
    write, reading, message = BAD[name]
    (tmp_path / "in").mkdir()
    write(tmp_path / "in")
    with pytest.raises(LaspError, match=message) as error:
        imported(tmp_path / "in", reading, tmp_path / "out")
    assert error.value.code == (2 if message.startswith("--") else 3) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_small_files_of_very_many_ids_are_refused(tmp_path: Path) -> None:
    ids = pyarrow.ListArray.from_arrays([0, 8_000_000], pyarrow.repeat(pyarrow.scalar(5, pyarrow.int8()), 8_000_000))
    parquet.write_table(pyarrow.table({"input_ids": ids}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: .* bytes unpack to 8,000,000 ids; expected fewer"):
        imported(tmp_path / "a.parquet", ROWS, tmp_path / "out")


def test_ids_where_text_is_expected(tmp_path: Path) -> None:
    """It is said how they are read."""
    rows([[5, 6]])(tmp_path)
    with pytest.raises(
        DataError, match=r"holds list<element: int64>; expected text.*; lasptrain data import reads ids$"
    ):
        prepare(Preparation([str(tmp_path / "a.parquet")], "bytes", Reading(field="input_ids")), tmp_path / "out")


@pytest.mark.parametrize("kind", ["parquet", "arrow", "megatron", "numpy", "datasets"])
def test_damaged_ids_are_read_or_refused(tmp_path: Path, kind: str) -> None:
    """Bytes that are changed at random places, and files that are cut."""
    (tmp_path / "in").mkdir()
    reading = WRITERS[kind](tmp_path / "in", made(12))
    files = [path for path in sorted((tmp_path / "in").iterdir()) if path.is_file() and path.suffix != ".bin"]
    random = np.random.default_rng(0)
    refused = 0
    for trial in range(25):
        path = files[trial % len(files)]
        content = path.read_bytes()
        damaged = bytearray(content)
        for at in random.integers(0, len(content) if trial % 2 else min(len(content), 400), 2):
            damaged[int(at)] = int(random.integers(256))
        path.write_bytes(damaged if trial % 3 else content[: int(random.integers(len(content)))])
        refused += bool(tried(lambda n=trial: imported(tmp_path / "in", reading, tmp_path / f"{n}.set")))  # type: ignore[misc]
        path.write_bytes(content)
    assert refused


def test_the_tokenizer_is_found_beside_the_ids(tmp_path: Path) -> None:
    for name in ("a", "b/c"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(DataError, match=r"a: no tokenizer\.json or tokenizer\.model beside the ids"):
        find_tokenizer([str(tmp_path / "a")])
    for name in ("a", "b"):
        (tmp_path / name / "tokenizer.model").write_bytes(MODEL.read_bytes())
    assert find_tokenizer([str(tmp_path / "a"), str(tmp_path / "b" / "c")]) == tmp_path / "a" / "tokenizer.model"
    (tmp_path / "b" / "tokenizer.model").write_bytes(b"other")
    with pytest.raises(DataError, match=r"a/tokenizer\.model and .*b/tokenizer\.model differ; name one"):
        find_tokenizer([str(tmp_path / "a"), str(tmp_path / "b" / "c" / "x.parquet"), str(tmp_path / "b" / "y.bin")])


def test_bos_is_named_for_a_tokenizer_that_names_none(tmp_path: Path) -> None:
    byte_level(tmp_path)
    path = tmp_path / "tokenizer.json"
    named = load_tokenizer(path).bos
    assert load_tokenizer(path, named).bos == named
    with pytest.raises(RecipeError, match=f"--bos: found 5; tokenizer.json names {named}, expected that or none"):
        load_tokenizer(path, 5)
    (tmp_path / "tokenizer_config.json").unlink(missing_ok=True)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    with pytest.raises(DataError, match="names no BOS"):
        load_tokenizer(path)
    tokenizer = load_tokenizer(path, 5)
    assert tokenizer.bos == 5
    with pytest.raises(RecipeError, match="--bos: found 100000; expected an id of the vocabulary"):
        load_tokenizer(path, 100_000)
    parquet.write_table(table([[5, 7, 8, 5, 9]]), tmp_path / "a.parquet")
    ids = Preparation([str(tmp_path / "a.parquet")], path, validation_ppm=0, tokens=TokenReading(bos=5))
    out = prepare(ids, tmp_path / "out")
    assert TokenDataset.open(out).bos == 5 and held(out) == expected([[7, 8], [9]])
