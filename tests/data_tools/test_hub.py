"""Datasets of the Hugging Face Hub, and folders of that kind: what is read, at which commit, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from data_tools import commands
from data_tools.hub import without_folder
from data_tools.merge import merge
from data_tools.parts import Part
from data_tools.prepare import Preparation, prepare
from data_tools.sources import Reading, open_source
from lasptrain.data.dataset import TokenDataset
from lasptrain.data.manifest import Manifest
from lasptrain.errors import CheckpointError, DataError, LaspError, RecipeError
from lasptrain.process.location import resolve
from lasptrain.recipe.loading import load
from tests.console.test_cli import lasptrain, refused
from tests.support.fake_hub import NAME, FakeHub, serving
from tests.support.program import ROOT

CARD = """---
configs:
- config_name: a
  data_files:
  - split: train
    path: a/train.jsonl
  - split: test
    path: a/test.jsonl
- config_name: b
  data_files: b.jsonl
---
"""
ROWS = {"a/train.jsonl": 40, "a/test.jsonl": 4, "b.jsonl": 3}
RECIPE = """
model: {arch: tnl, dim: 16, layers: 1, heads: 1, mlp: 16}
data: {source: SOURCE, tokenizer: bytes, window: 64, validation: 0, cache: cache}
mesh: {dp: 1, sp: 1}
optim: {lr: 1e-3}
train: {steps: 2, precision: fp32}
checkpoint: {every: 1}
eval: {windows: 0}
"""


def row(file: str, number: int) -> dict[str, object]:
    return {"text": f"{file} has row {number}, in Ünïcödé.\n", "meta": {"body": f"body {number}"}, "n": number}


def lines(file: str, count: int) -> str:
    return "".join(json.dumps(row(file, number)) + "\n" for number in range(count))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds `set`, a dataset of two configurations, and is the working directory."""
    for file, count in ROWS.items():
        path = tmp_path / "work" / "set" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lines(file, count))
    (tmp_path / "work" / "set" / "README.md").write_text(CARD)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def texts(source: str, field: str = "text") -> list[str]:
    found = open_source(source).documents(Reading(field=field), Counter())
    return [document.text for document in found]


def expected(file: str, *, start: int = 0, stop: int | None = None) -> list[str]:
    return [str(row(file, number)["text"]) for number in range(ROWS[file])][start:stop]


@pytest.mark.parametrize(
    ("source", "files", "cut"),
    [
        ("hf:set:a", ["a/train.jsonl"], slice(None)),
        ("hf:./set:a@test", ["a/test.jsonl"], slice(None)),
        ("hf:set:b", ["b.jsonl"], slice(None)),
        ("hf:set:a@train[:3]", ["a/train.jsonl"], slice(3)),
        ("hf:set:a@test+train", ["a/test.jsonl", "a/train.jsonl"], slice(None)),
    ],
)
def test_rows_are_those_of_the_files(folder: Path, source: str, files: list[str], cut: slice) -> None:
    want = [text for file in files for text in expected(file)][cut]
    assert texts(source) == want
    assert texts(source, "meta.body")[0] == "body 0"
    opened = open_source(source)
    done = [document.done for document in opened.documents(Reading(), Counter())]
    assert done == sorted(done) and done[-1] == opened.bytes
    assert opened.revision is None and opened.name == source.replace("./", "") + ("" if "@" in source else "@train")


def test_saved_folders_are_read_as_they_were_shuffled(folder: Path) -> None:
    whole = datasets.load_dataset(str(folder / "set"), "a")
    whole["train"].shuffle(seed=1).save_to_disk("saved", num_shards=3)
    whole.save_to_disk("several")
    found = texts("hf:saved")
    assert found != expected("a/train.jsonl") and sorted(found) == sorted(expected("a/train.jsonl"))
    assert texts("hf:saved@train") == found
    assert texts("hf:several@test") == expected("a/test.jsonl")
    assert texts("hf:several") == expected("a/train.jsonl")
    for name in ("saved", "several"):
        with pytest.raises(
            DataError, match=f"{name}: was written by save_to_disk of the package datasets; hf:{name} fits"
        ):
            open_source(name)


def test_what_a_source_is_follows_from_its_content_not_its_place(folder: Path) -> None:
    before = {part: open_source(f"hf:set:{part}").sha256 for part in ("a", "b", "a@test", "a@train[:3]", "a@train[:4]")}
    assert len(set(before.values())) == len(before)
    Path("elsewhere").mkdir()
    Path("set").rename("elsewhere/set")
    assert before == {part: open_source(f"hf:elsewhere/set:{part}").sha256 for part in before}
    blob = Path("blob")  # the caches of the Hub's own client hold links to such files
    blob.write_text(Path("elsewhere/set/b.jsonl").read_text())
    Path("elsewhere/set/b.jsonl").unlink()
    Path("elsewhere/set/b.jsonl").symlink_to(blob.resolve())
    assert open_source("hf:elsewhere/set:b").sha256 == before["b"]
    blob.write_text(lines("b.jsonl", 4))
    assert open_source("hf:elsewhere/set:b").sha256 != before["b"] and len(texts("hf:elsewhere/set:b")) == 4
    assert open_source("hf:elsewhere/set:a").sha256 == before["a"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:set", "hf:set: it has several configurations; expected one of a, b: hf:NAME:a"),
        ("hf:set:c", "hf:set:c: no configuration 'c'; expected one of a, b: hf:NAME:a"),
        ("hf:set:a@dev", "hf:set:a@dev: no split 'dev'; it has train, test: hf:NAME@SPLIT"),
        ("hf:set:a@train+dev", "hf:set:a@train+dev: no split 'dev'; it has train, test: hf:NAME@SPLIT"),
        ("hf:set:a@train[:x]", "it cannot be read: Unrecognized instruction format: train[:x]"),
        ("hf:set:a#main", "hf:set:a#main: a folder has no revisions; expected none"),
        ("hf:bad", "hf:bad@train: it cannot be read: "),
        ("hf:set/b.jsonl/c", "no such folder, and no name of the Hub; hf:NAME[:CONFIG][@SPLIT][#REVISION]"),
        ("hf:", "hf:: no such folder, and no name of the Hub"),
        ("hf:csv", "hf:csv: names a format of the package datasets; expected a dataset, or a folder"),
        ("hf:far", "/work/set/b.jsonl: is read; expected files in the folder alone"),
    ],
)
def test_what_is_not_there_is_named(folder: Path, source: str, message: str) -> None:
    for name in ("bad", "far"):
        Path(name).mkdir()
    Path("bad/a.jsonl").write_text('{"text": "a"}\n{"text"')
    Path("far/README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: ../set/b.jsonl\n---\n")
    with pytest.raises(DataError, match=re.escape(message)):
        texts(source)


def test_a_field_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"hf:set:b@train: no column 'body'; it has text, meta\.body, n; name one with"):
        texts("hf:set:b", "body")
    with pytest.raises(DataError, match="hf:set:b@train: column 'n' holds int64; expected text"):
        texts("hf:set:b", "n")


def test_names_elsewhere_hold_no_folders(folder: Path) -> None:
    assert without_folder(f"hf:{folder}/set:a@test") == "hf:set:a@test"
    assert without_folder("hf:me/set:a@test#1") == "hf:me/set:a@test#1"
    assert without_folder(f"hf:{folder}/gone/set:a") == "hf:set:a"


def tokens(out: Path, split: str) -> list[int]:
    found = TokenDataset.open(out).whole(split)
    return [int(token) for token in found.read(0, found.tokens)]


def test_the_commands_take_them_as_they_take_files(folder: Path, tmp_path: Path) -> None:
    """The same shards but for the name in them, and the same tokenizer, as of the file that the dataset is made of."""
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    options = ("--tokenizer", "bytes", "--validation", "200000", "--out", "one")
    done = lasptrain("data", "prepare", "hf:set:a", *options, cwd=folder, **home)
    assert done.returncode == 0 and "example" not in done.stderr, done.stderr  # no bars where it is no terminal
    train = ("data", "tokenizer", "train", "hf:set:a", "--vocab", "320", "--out", "one.model")
    done = lasptrain(*train, cwd=folder, **home)
    assert done.returncode == 0, done.stderr
    prepare(Preparation(["set/a/train.jsonl"], "bytes", validation_ppm=200_000), folder / "two")
    commands.train_tokenizer(["set/a/train.jsonl"], 320, folder / "two.model")
    for split in ("train", "validation"):
        assert tokens(folder / "one", split) == tokens(folder / "two", split) != []
    assert Path("one.model").read_bytes() == Path("two.model").read_bytes()
    assert [source.name for source in Manifest.load(folder / "one").sources] == ["hf:set:a@train"]
    parts = '[{path: "hf:set:a", weight: 3}, {path: set/b.jsonl, weight: 1}]'
    Path("mixed.yaml").write_text(RECIPE.replace("SOURCE", parts))
    mixed = lasptrain("data", "mix", "mixed.yaml", "--set", "data.window=16", cwd=folder, **home)
    assert mixed.returncode == 0 and "hf-set-a-train-" in mixed.stdout and "768 of 1,024 windows" in mixed.stdout
    why = re.escape("hf:set:c: no configuration 'c'; expected one of a, b: hf:NAME:a")
    refused(3, why, "check", "mixed.yaml", "--set", "data.source=hf:set:c", cwd=folder, **home)


def test_the_extra_is_named_where_it_is_missing(folder: Path) -> None:
    Path("datasets.py").write_text("raise ImportError")
    message = re.escape("hf:me/set: needs the package datasets: pip install 'lasptrain[hf]'")
    refused(5, message, "data", "prepare", "hf:me/set", "--tokenizer", "bytes", "--out", "x", cwd=folder)


# The Hub


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serving() as found:
        yield found


def committed(hub: FakeHub, first: str) -> str:
    """A commit of the Hub's dataset whose rows begin with a word."""
    content = "".join(json.dumps({"text": f"{first} has row {number}. " * 20}) + "\n" for number in range(20))
    return hub.commit({"train.jsonl": content.encode(), "README.md": b"---\nlicense: mit\n---\n"})


READ = """
import sys
from collections import Counter
from data_tools.sources import Reading, open_source
from lasptrain.errors import LaspError

for name in sys.argv[1:]:
    try:
        source = open_source(name)
        print(source.revision, next(source.documents(Reading(), Counter())).text.split()[0])
    except LaspError as error:
        print(error.code, error)
"""


def home(folder: Path, hub: FakeHub) -> dict[str, str]:
    """Variables of a user of the Hub."""
    return {"HF_HOME": str(folder.parent / "home"), "HF_ENDPOINT": hub.url}


def read(folder: Path, hub: FakeHub, wanted: dict[str, str], **more: str) -> None:
    """Asserts revision and first word of datasets, or code and beginning of the error, for a user of the Hub."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **home(folder, hub), **more}
    command = [sys.executable, "-c", READ, *wanted]
    done = subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, check=True)
    for found, want in zip(done.stdout.splitlines(), wanted.values(), strict=True):
        assert found.startswith(want), found


def test_a_dataset_of_the_hub_is_read_at_one_commit(folder: Path, hub: FakeHub) -> None:
    """Its newest, or the one that is named; offline what the caches hold."""
    name = f"hf:{NAME}"
    old = committed(hub, "Old")
    read(folder, hub, {name: f"{old} Old"})
    new = committed(hub, "New")
    online = {
        name: f"{new} New",
        f"{name}@train#{old}": f"{old} Old",
        f"{name}#main": f"{new} New",
        f"{name}@dev": f"3 {name}@dev: no split 'dev'; it has train: hf:NAME@SPLIT",
        f"{name}#v1": f"3 {name}#v1: it cannot be read: Revision 'v1' doesn't exist for dataset 'me/set' on the Hub",
        "hf:me/no": "3 hf:me/no: it cannot be read: Dataset 'me/no' doesn't exist on the Hub or cannot be accessed",
    }
    read(folder, hub, online)
    asked = len(hub.asked)
    none = "0" * 40
    offline = {
        name: f"{new} New",
        f"{name}#{old}": f"{old} Old",
        f"{name}@dev": f"3 {name}@dev: no split 'dev'; it has train: hf:NAME@SPLIT",
        f"{name}#v1": f"5 {name}#v1: the Hub knows which commit v1 is, and cannot be reached",
        f"{name}#{none}": f"5 {name}#{none}: the Hub cannot be reached, and the caches have no revision {none}",
        "hf:me/no": "5 hf:me/no: the Hub cannot be reached: ",
    }
    read(folder, hub, offline, HF_HUB_OFFLINE="1")
    read(folder, hub, {name: f"{new} New"}, HF_DATASETS_OFFLINE="1")
    assert len(hub.asked) == asked


def fingerprints(run: Path) -> list[str]:
    return [one["fingerprint"] for one in json.loads((run / "data.json").read_text())]


def test_a_run_goes_on_at_the_commit_that_it_began_with(
    folder: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after the Hub has moved on and what was prepared is gone."""
    old = committed(hub, "Old")
    Path("one.yaml").write_text(RECIPE.replace("SOURCE", f"hf:{NAME}"))

    def pretrain(steps: int) -> str:
        options = ("--run", "run", "--set", f"train.steps={steps}")
        done = lasptrain("pretrain", "one.yaml", *options, cwd=folder, **home(folder, hub))
        assert done.returncode == 0 and "has changed" not in done.stderr, done.stderr
        return done.stderr

    assert re.search(rf"hf:{NAME}: is read into .*/{old}\n", pretrain(2))
    made, new, asked = fingerprints(folder / "run"), committed(hub, "New"), len(hub.asked)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "datasets", None)  # not installed; what was prepared is there
        assert resolve(load("one.yaml"), 1, folder / "run").parts[0].fingerprint == made[0] and len(hub.asked) == asked
    shutil.rmtree("cache")
    pretrain(3)
    assert fingerprints(folder / "run") == made and old in str(hub.asked[asked:])
    (kept,) = json.loads(Path("run/data.json").read_text())
    (dataset,) = Path("cache/datasets").glob("*/dataset.json")
    for text in (*kept["text"], *json.loads(dataset.read_text())["sources"]):
        assert text["name"] == f"hf:{NAME}" and text["revision"] == old
    recipe = load("one.yaml", [f"data.source=hf:{NAME}#{new}"])
    with pytest.raises(
        CheckpointError, match=f"#{new} is not what this run .*: revision {new}, then {old}; use --fresh"
    ):
        resolve(recipe, 1, folder / "run")


def test_every_error_is_one_of_ours(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the package raises, a full disk too."""

    def fail(*_: object, **__: object) -> None:
        raise datasets.exceptions.DatasetGenerationError("while writing") from OSError(28, "No space left on device")

    monkeypatch.setattr(datasets.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(
        LaspError, match="hf:set:a@train: the disk is full, where the package datasets keeps it"
    ) as found:
        texts("hf:set:a")
    assert found.value.code == 8


def test_parts_of_a_preparation_share_datasets_by_splits(folder: Path) -> None:
    preparation = Preparation(["hf:set:a"], "bytes", part=Part(1, 2))
    with pytest.raises(RecipeError, match=r"--part: found 1/2 with hf:set:a@train, which is not read by files; .*50%"):
        prepare(preparation, folder / "out")
    for number, cut in enumerate(("[:50%]", "[50%:]")):
        prepare(Preparation([f"hf:set:a@train{cut}"], "bytes", validation_ppm=0), folder / f"{number}")
    merge([folder / "0", folder / "1"], folder / "all")
    made = prepare(
        Preparation(["hf:set:a@train[:50%]", "hf:set:a@train[50%:]"], "bytes", validation_ppm=0), folder / "x"
    )
    assert Manifest.load(folder / "all").fingerprint == Manifest.load(made).fingerprint
