"""Datasets that are joined: the bytes of one `prepare` of all their sources, or a refusal that names what is wrong."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from data_tools.ids import TokenReading
from data_tools.merge import merge
from data_tools.packing import BestFit
from data_tools.parts import FILE, Part
from data_tools.prepare import Preparation, prepare
from data_tools.sources import Source
from lasptrain.data.manifest import Manifest
from lasptrain.data.shard import Shard
from lasptrain.errors import DataError, RecipeError, SetupError
from lasptrain.files import sha256
from tests.data_tools.test_import import made
from tests.support.foreign import MARK, WRITERS, megatron, table
from tests.support.program import ROOT, start

MODEL = ROOT / "tokenizers" / "python-4k.model"


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    """Text files, rows and repositories, with documents that are there twice, and in several splits."""
    of = random.Random(0)
    words = ["spin", "glass", "of ", "\n", "été ", "x = 1\n", " "]
    text, code, more = tmp_path / "text", tmp_path / "code", tmp_path / "more.jsonl"
    text.mkdir()
    for i in range(9):
        (text / f"{i}.txt").write_text("".join(of.choices(words, k=of.randrange(1, 900))))
    rows = ["".join(of.choices(words, k=of.randrange(1, 40))) for _ in range(120)]
    (text / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in [*rows, " ", *rows[:7]]))
    more.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows[5:50:3]))
    for i in range(4):
        (code / f"repo{i}").mkdir(parents=True)
        for name in ("a.py", "b.py"):
            (code / f"repo{i}" / name).write_text("".join(of.choices(words, k=of.randrange(1, 300))))
    return [str(text), f"repositories:{code}", str(more)]


def preparation(sources: list[str]) -> Preparation:
    return Preparation(sources, "bytes", validation_ppm=200_000, seed=5, workers=1)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same(made: Path, whole: Path) -> bool:
    """True for datasets of the same shards, byte by byte, that say the same of themselves."""
    left, right = files(made), files(whole)
    del left["dataset.json"], right["dataset.json"]
    return left == right and Manifest.load(made) == Manifest.load(whole)


@pytest.mark.parametrize("packing", [None, BestFit(64), BestFit(256, "cut")])
@pytest.mark.parametrize("of", [1, 2, 5])
def test_parts_are_joined_to_what_one_prepare_makes(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: int, packing: BestFit | None
) -> None:
    monkeypatch.setattr("data_tools.shards.SHARD_TOKENS", 3000)
    whole = prepare(replace(preparation(sources), packing=packing), tmp_path / "whole")
    parts = [
        prepare(replace(preparation(sources), part=Part(i, of)), tmp_path / f"{i}-of-{of}") for i in range(1, of + 1)
    ]
    assert len(Manifest.load(whole).shards) > 2 and Manifest.load(whole).splits["train"].duplicates > 5
    assert same(merge(parts[::-1], tmp_path / "merged", packing), whole)


def test_what_is_added_later_is_prepared_alone(sources: list[str], tmp_path: Path) -> None:
    """Old and new are joined without a look at the old text; and again, and with parts among them."""
    old, code, more = (prepare(preparation([source]), tmp_path / str(i)) for i, source in enumerate(sources))
    whole = prepare(preparation(sources), tmp_path / "whole")
    (tmp_path / "text" / "rows.jsonl").unlink()
    assert same(merge([old, code, more], tmp_path / "at once"), whole)
    two = merge([old, code], tmp_path / "two")
    assert same(merge([two, more], tmp_path / "one by one"), whole)
    parts = [prepare(replace(preparation([sources[1]]), part=Part(i, 2)), tmp_path / f"part{i}") for i in (1, 2)]
    assert same(merge([old, parts[1], more, parts[0]], tmp_path / "with parts"), whole)


def test_imported_ids_are_joined_to_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    parquet.write_table(table([[100, 101], [102]]), tmp_path / "b.parquet")
    text = prepare(Preparation([str(tmp_path / "a.txt")], "bytes", validation_ppm=0), tmp_path / "text")
    ids = Preparation([str(tmp_path / "b.parquet")], "bytes", validation_ppm=0, tokens=TokenReading())
    merged = Manifest.load(merge([text, prepare(ids, tmp_path / "ids")], tmp_path / "out"))
    assert merged.splits["train"].documents == 3 and merged.splits["train"].tokens == 4 + 3 + 2
    assert [source.name for source in merged.sources] == ["a.txt", "b.parquet"]


def test_parts_of_ids_are_joined_to_what_one_import_makes(tmp_path: Path) -> None:
    """An index goes with its ids, whatever stands between their names."""
    documents = made(60)
    (tmp_path / "in").mkdir()
    for number, kind in enumerate(("megatron", "parquet")):
        (tmp_path / "in" / str(number)).mkdir()
        WRITERS[kind](tmp_path / "in" / str(number), documents[20 * number : 20 * number + 20])
    megatron(tmp_path / "in" / "0" / "a.b.text", documents[:9], range(1, 10))
    parquet.write_table(table(documents[40:]), tmp_path / "in" / "0" / "a.c.parquet")
    ids = Preparation([str(tmp_path / "in")], MODEL, validation_ppm=100_000, tokens=TokenReading())
    whole = prepare(ids, tmp_path / "whole")
    parts = [prepare(replace(ids, part=Part(i, 4)), tmp_path / str(i)) for i in range(1, 5)]
    assert all(Manifest.load(part).splits["train"].documents for part in parts)
    assert same(merge(parts, tmp_path / "merged"), whole)
    with pytest.raises(RecipeError, match="6 files, so at most that many parts"):
        prepare(replace(ids, part=Part(1, 7)), tmp_path / "x")
    other = prepare(replace(ids, part=Part(4, 4), tokens=TokenReading(mark=MARK)), tmp_path / "other")
    with pytest.raises(DataError, match="other, part 4/4: of other sources or options"):
        merge([*parts[:3], other], tmp_path / "y")


@pytest.mark.parametrize("seed", range(30))
def test_every_file_is_in_one_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """The files of a part follow one another, and its bytes are the mean's, to within a file or so."""
    of = random.Random(seed)
    sizes = [of.choice([0, 1, of.randrange(100), of.randrange(10_000)]) for _ in range(of.randrange(2, 40))]
    names = [tmp_path / f"{i:03}" for i in range(len(sizes))]
    monkeypatch.setattr("data_tools.sources._size", lambda path: sizes[int(path.name)])
    cut = of.randrange(1, len(names))
    sources = [Source("a", tmp_path, tuple(names[:cut])), Source("b", tmp_path, tuple(names[cut:]))]
    n = of.randrange(1, len(names) + 1)
    parts = [Part(i, n).of_sources(sources) for i in range(1, n + 1)]
    assert [path for part in parts for _, source in part for path in source.files] == names
    assert all(sources[i].name == source.name and source.files for part in parts for i, source in part)
    if n <= 3:
        held = [sum(source.bytes for _, source in part) for part in parts]
        assert max(held) <= sum(sizes) / n + 2 * max(sizes)
    with pytest.raises(RecipeError, match=f"{len(names)} files, so at most that many parts"):
        Part(1, len(names) + 1).of_sources(sources)


def test_a_part_is_named_by_two_numbers() -> None:
    assert Part.parse("2/8") == Part(2, 8) and str(Part(2, 8)) == "2/8"
    for text in ("", "2", "0/2", "3/2", "1/0", "-1/2", "1/2/3", "a/b", "1/9999999", "١/٢"):
        with pytest.raises(RecipeError, match=f"--part: found {re.escape(repr(text))}; expected a number"):
            Part.parse(text)


Spoil = Callable[[list[Path], list[str]], list[Path]]  # the parts, and the sources; what is joined instead


def again(folder: Path, sources: list[str], **options: object) -> Path:
    """Part 2 of 3, prepared otherwise."""
    return prepare(replace(preparation(sources), **{"part": Part(2, 3), **options}), folder)  # type: ignore[arg-type]


def rewritten(folder: Path, name: str, edit: Callable[[bytes], bytes]) -> None:
    (folder / name).write_bytes(edit((folder / name).read_bytes()))


def changed(parts: list[Path], key: str, value: object) -> list[Path]:
    rewritten(parts[1], FILE, lambda content: json.dumps(json.loads(content) | {key: value}).encode())
    return parts


def damaged(parts: list[Path]) -> list[Path]:
    rewritten(parts[2], "train-00000.ltok", lambda content: content[:5000] + b"?" + content[5001:])
    return parts


def cut(parts: list[Path]) -> list[Path]:
    rewritten(parts[1], FILE, lambda content: content[:100])
    return parts


def with_a_file(parts: list[Path], sources: list[str]) -> list[Path]:
    """Part 2 of another machine, whose folder has one more file."""
    (Path(sources[0]) / "9.txt").write_text("later")
    return [parts[0], again(parts[0].parent / "other", sources), parts[2]]


def other(**options: object) -> Spoil:
    return lambda parts, sources: [parts[0], again(parts[0].parent / "other", sources, **options), parts[2]]


def alone(source: int, **options: object) -> Spoil:
    """All parts, and a dataset of its own."""
    return lambda parts, sources: [*parts, again(parts[0].parent / "own", [sources[source]], part=None, **options)]


BAD: dict[str, tuple[Spoil, str]] = {
    "missing": (lambda parts, _: [parts[2], parts[0]], r"3-of-3, part 3/3: expected all 3 parts; missing: 2/3$"),
    "twice": (
        lambda parts, sources: [*parts, again(parts[0].parent / "other", sources)],
        r"2-of-3 and .*other are both part 2/3; expected it once",
    ),
    "of others": (other(part=Part(2, 4)), r"other, part 2/4: of other sources or options than .*1-of-3, part 1/3"),
    "other share": (other(validation_ppm=1), r"other, part 2/3: of other sources or options"),
    "other lengths": (other(lengths=(3, 9)), r"other, part 2/3: of other sources or options"),
    "other files": (with_a_file, r"other, part 2/3: of other sources or options"),
    "other seed": (other(seed=6), r"other: shuffled with seed 6; .*1-of-3 with 5$"),
    "other tokenizer": (other(tokenizer_path=MODEL), r"other: made with tokenizer python-4k.* with bytes \("),
    "packed": (alone(2, packing=BestFit(64)), r"own: packed by best_fit for windows of 64, .*packs them"),
    "source twice": (alone(2), r"own: its source more\.jsonl is in .*1-of-3 too; expected it once"),
    "dataset twice": (
        lambda parts, sources: [again(parts[0].parent / "own", sources, part=None)] * 2,
        r"own: its source text is in .*own too",
    ),
    "same twice": (lambda parts, _: [*parts, parts[0]], "are both part 1/3"),
    "damaged": (lambda parts, _: damaged(parts), r"3-of-3: shard train-00000\.ltok: tokens, block 0, bytes 4096"),
    "other part": (lambda parts, _: changed(parts, "fingerprint", "0" * 64), r"part\.json: is of another dataset"),
    "odd number": (lambda parts, _: changed(parts, "number", 0), r"part\.json: is part 0/3 of 3 sources"),
    "odd source": (lambda parts, _: changed(parts, "files", [[9, "a", 1, "0" * 64]]), "is part 2/3 of 3 sources"),
    "odd key": (lambda parts, _: changed(parts, "count", 1), r"part\.json: count: Extra inputs are not permitted"),
    "no part": (lambda parts, _: cut(parts), r"part\.json: content: Invalid JSON"),
    "no dataset": (lambda parts, _: [*parts, parts[0].parent], "No such file or directory; a dataset is a folder that"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_joined_is_named(sources: list[str], tmp_path: Path, name: str) -> None:
    parts = [prepare(replace(preparation(sources), part=Part(i, 3)), tmp_path / f"{i}-of-3") for i in (1, 2, 3)]
    spoil, message = BAD[name]
    folders = spoil(parts, sources)
    with pytest.raises(DataError, match=message) as error:
        merge(folders, tmp_path / "merged")
    assert "\n" not in str(error.value) and not list(tmp_path.glob("*merged*"))


def test_a_part_may_have_nothing_to_train_on(tmp_path: Path) -> None:
    for name, text in [("a", "abc"), ("b", " "), ("c", "def")]:
        (tmp_path / f"{name}.txt").write_text(text)
    texts = Preparation([str(tmp_path / f"{name}.txt") for name in "abc"], "bytes", validation_ppm=0, workers=1)
    parts = [prepare(replace(texts, part=Part(i, 3)), tmp_path / str(i)) for i in (1, 2, 3)]
    assert Manifest.load(parts[1]).splits["train"].documents == 0
    assert same(merge(parts, tmp_path / "merged"), prepare(texts, tmp_path / "whole"))
    blank = prepare(replace(texts, sources=texts.sources[1:2], part=Part(1, 1)), tmp_path / "blank")
    with pytest.raises(DataError, match=r"0 documents in b\.txt to train on: 0 held out, dropped: 1 empty"):
        merge([blank], tmp_path / "nothing")


KILLED = """
import os, pathlib, signal, sys
from data_tools import merge, shards
shards.SHARD_TOKENS = 1000
def kill(stage, done, total):
    if stage == "write" and done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
merge.merge([pathlib.Path(name) for name in sys.argv[2:]], pathlib.Path(sys.argv[1]), progress=kill)
"""


def test_a_killed_merge_is_done_again(sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that it reads has changed, and nothing is visible of what it wrote."""
    monkeypatch.setattr("data_tools.shards.SHARD_TOKENS", 1000)
    parts = [prepare(replace(preparation(sources), part=Part(i, 2)), tmp_path / str(i)) for i in (1, 2)]
    before = [sha256(path) for part in parts for path in sorted(part.iterdir())]
    command = [sys.executable, "-c", KILLED, str(tmp_path / "merged"), *map(str, parts)]
    code = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False).returncode
    assert code == -signal.SIGKILL and not (tmp_path / "merged").exists()
    assert len(list((tmp_path / ".merged.partial").iterdir())) > 3
    whole = prepare(preparation(sources), tmp_path / "whole")
    assert same(merge(parts, tmp_path / "merged"), whole)
    assert before == [sha256(path) for part in parts for path in sorted(part.iterdir())]
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(SetupError, match="merged: it is not empty"):
        merge(parts, tmp_path / "merged")


def test_parts_on_the_command_line(sources: list[str], tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        return start("lasptrain", "data", *arguments, folder=tmp_path, logs=tmp_path / "logs").end()

    options = ["--tokenizer", "bytes", "--seed", "5", "--validation", "200000"]
    for i in (1, 2):
        assert run("prepare", *sources, *options, "--out", f"p{i}", "--part", f"{i}/2")[0] == 0
    code, printed, _ = run("merge", "p1", "p2", "--out", "merged")
    assert code == 0 and "tokens/s" in printed and "documents (" in printed
    assert same(tmp_path / "merged", prepare(preparation(sources), tmp_path / "whole"))
    code, _, said = run("merge", "p2", "--out", "half")
    assert code == 3 and said == "error: p2, part 2/2: expected all 2 parts; missing: 1/2\n"
    code, _, said = run(
        "prepare", *sources, *options, "--out", "x", "--part", "1/2", "--packing", "best_fit", "--window", "64"
    )
    assert code == 2 and "expected --packing of lasptrain data merge" in said


def test_what_one_dataset_holds_out_is_no_training_text_of_another(sources: list[str], tmp_path: Path) -> None:
    rows = tmp_path / "again.jsonl"
    rows.write_text("".join((tmp_path / "text" / "rows.jsonl").read_text().splitlines(keepends=True)[:60]))
    old = prepare(replace(preparation(sources), validation_ppm=20_000), tmp_path / "old")
    new = prepare(replace(preparation([str(rows)]), validation_ppm=700_000), tmp_path / "new")
    found = Manifest.load(merge([old, new], tmp_path / "merged"))
    held, trained = (documents(tmp_path / "merged", split) for split in ("validation", "train"))
    lost = [one for one in documents(old, "train") + documents(new, "train") if one in held]
    assert len(lost) > 20 and found.dropped["held out elsewhere"] == len(lost)
    assert not set(trained) & set(held)
    assert Counter(trained) == Counter(documents(old, "train") + documents(new, "train")) - Counter(lost)
    assert Counter(held) == Counter(documents(old, "validation") + documents(new, "validation"))


def documents(folder: Path, split: str) -> list[tuple[int, ...]]:
    """The ids of each document of a split."""
    found = []
    for entry in Manifest.load(folder).shards:
        if entry.split == split:
            shard = Shard(folder / entry.name)
            ids, starts = shard.read(0, entry.tokens), shard.starts(0, entry.documents)
            found += [tuple(part.tolist()) for part in np.split(ids, starts[1:])]
    return found
