"""Datasets of the Hugging Face Hub, and folders of that kind: what is read, at which commit, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from data_tools.hub import without_folder
from data_tools.sources import Reading, open_source
from lasptrain.data.dataset import TokenDataset
from lasptrain.data.manifest import Manifest
from lasptrain.errors import DataError, LaspError, SetupError
from tests.fake_hub import NAME, FakeHub, serving
from tests.test_cli import Done, lasptrain, refused

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
    for source, out in (("hf:set:a", "one"), ("set/a/train.jsonl", "two")):
        options = ("--tokenizer", "bytes", "--validation", "200000", "--out", out)
        done = lasptrain("data", "prepare", source, *options, cwd=folder, **home)
        assert done.returncode == 0 and "example" not in done.stderr, done.stderr  # no bars where it is no terminal
        made = lasptrain(
            "data", "tokenizer", "train", source, "--vocab", "320", "--out", f"{out}.model", cwd=folder, **home
        )
        assert made.returncode == 0, made.stderr
    for split in ("train", "validation"):
        assert tokens(folder / "one", split) == tokens(folder / "two", split) != []
    assert Path("one.model").read_bytes() == Path("two.model").read_bytes()
    assert [source.name for source in Manifest.load(folder / "one").sources] == ["hf:set:a@train"]
    why = re.escape("hf:set:c: no configuration 'c'; expected one of a, b: hf:NAME:a")
    refused(3, why, "data", "prepare", "hf:set:c", "--tokenizer", "bytes", "--out", "three", cwd=folder, **home)
    Path("mixed.yaml").write_text(
        RECIPE.replace("SOURCE", '[{path: "hf:set:a", weight: 3}, {path: set/b.jsonl, weight: 1}]') + "\n"
    )
    mixed = lasptrain("data", "mix", "mixed.yaml", "--set", "data.window=16", cwd=folder, **home)
    assert mixed.returncode == 0 and "hf-set-a-train-" in mixed.stdout and "768 of 1,024 windows" in mixed.stdout


def test_the_extra_is_named_where_it_is_missing(folder: Path) -> None:
    Path("datasets.py").write_text("raise ImportError")
    message = re.escape("hf:me/set: needs the package datasets: pip install 'lasptrain[hf]'")
    refused(5, message, "data", "prepare", "hf:me/set", "--tokenizer", "bytes", "--out", "x", cwd=folder)
    Path("one.yaml").write_text(RECIPE.replace("SOURCE", "hf:me/set"))
    refused(5, message, "check", "one.yaml", cwd=folder)


# The Hub


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serving() as found:
        yield found


def committed(hub: FakeHub, first: str) -> str:
    """A commit of the Hub's dataset whose rows begin with a word."""
    content = "".join(json.dumps({"text": f"{first} has row {number}. " * 20}) + "\n" for number in range(20))
    return hub.commit({"train.jsonl": content.encode(), "README.md": b"---\nlicense: mit\n---\n"})


class Session:
    """Commands of one user of a hub, who has a home."""

    def __init__(self, folder: Path, hub: FakeHub) -> None:
        self.folder = folder
        self.variables = {"HF_HOME": str(folder.parent / "home"), "HF_ENDPOINT": hub.url}

    def __call__(self, *arguments: str, **more: str) -> Done:
        return lasptrain(*arguments, cwd=self.folder, **self.variables, **more)

    def prepare(self, source: str, out: str, **more: str) -> Done:
        return self("data", "prepare", source, "--tokenizer", "bytes", "--validation", "0", "--out", out, **more)


def revision(folder: Path) -> str | None:
    (source,) = Manifest.load(folder).sources
    return source.revision


def test_a_dataset_of_the_hub_is_read_at_one_commit(folder: Path, hub: FakeHub) -> None:
    """It is in the manifest; a newer one is read when it is there, an older one by its name, and offline the caches."""
    user = Session(folder, hub)
    old = committed(hub, "old")
    done = user.prepare(f"hf:{NAME}", "one")
    assert done.returncode == 0 and re.match(rf"hf:{NAME}: is read into .*/{old}\n", done.stderr), done.stderr
    new = committed(hub, "new")
    for source, out in ((f"hf:{NAME}", "two"), (f"hf:{NAME}@train#{old}", "three")):
        done = user.prepare(source, out)
        assert done.returncode == 0, done.stderr
    assert [revision(folder / out) for out in ("one", "two", "three")] == [old, new, old]
    assert tokens(folder / "one", "train") == tokens(folder / "three", "train") != tokens(folder / "two", "train")
    asked = len(hub.asked)
    for switch, source, out, want in (
        ("HF_DATASETS_OFFLINE", f"hf:{NAME}", "four", new),
        ("HF_HUB_OFFLINE", f"hf:{NAME}#{old}", "five", old),
    ):
        done = user.prepare(source, out, **{switch: "1"})
        assert done.returncode == 0 and revision(folder / out) == want, done.stderr
    for source, why in (
        (f"hf:{NAME}#v1", "the Hub knows which commit v1 is, and cannot be reached"),
        (f"hf:{NAME}#{'0' * 40}", f"the Hub cannot be reached, and the caches have no revision {'0' * 40}"),
        ("hf:me/none", "the Hub cannot be reached: "),
    ):
        done = user.prepare(source, "six", HF_HUB_OFFLINE="1")
        assert done.returncode == SetupError.code and f"error: {source}: {why}" in done.stderr, done.stderr
    assert len(hub.asked) == asked
    for source, why in (
        ("hf:me/none", "it cannot be read: Dataset 'me/none' doesn't exist on the Hub or cannot be accessed"),
        (f"hf:{NAME}#v1", "it cannot be read: Revision 'v1' doesn't exist for dataset 'me/set' on the Hub"),
        (f"hf:{NAME}@dev", "no split 'dev'; it has train: hf:NAME@SPLIT"),
    ):
        done = user.prepare(source, "six")
        assert done.returncode == DataError.code and done.stderr.startswith(f"error: {source}: {why}"), done.stderr


def fingerprints(run: Path) -> list[str]:
    return [one["fingerprint"] for one in json.loads((run / "data.json").read_text())]


def test_a_run_goes_on_at_the_commit_that_it_began_with(folder: Path, hub: FakeHub) -> None:
    """Also after the Hub has moved on and what was prepared is gone."""
    user = Session(folder, hub)
    Path("one.yaml").write_text(RECIPE.replace("SOURCE", f"hf:{NAME}"))
    old = committed(hub, "old")
    begun = user("pretrain", "one.yaml", "--run", "run")
    assert begun.returncode == 0, begun.stderr
    made = fingerprints(folder / "run")
    new = committed(hub, "new")
    asked = len(hub.asked)
    Path("datasets.py").write_text("raise ImportError")
    assert user("pretrain", "one.yaml", "--run", "run", "--set", "train.steps=3").returncode == 0
    assert len(hub.asked) == asked  # what was prepared is there, so there is nothing to ask, and nothing to ask with
    Path("datasets.py").unlink()
    shutil.rmtree("cache")
    done = user("pretrain", "one.yaml", "--run", "run", "--set", "train.steps=4")
    assert done.returncode == 0 and "has changed" not in done.stderr, done.stderr
    assert fingerprints(folder / "run") == made
    (kept,) = json.loads((folder / "run" / "data.json").read_text())
    assert [text["revision"] for text in kept["text"]] == [old] and old in str(hub.asked[asked:])
    refused(4, f"data.source: hf:{NAME}#{new} is not what this run was trained on: revision {new}, then {old}; .*",
            "pretrain", "one.yaml", "--run", "run", "--set", f"data.source=hf:{NAME}#{new}", "--set", "train.steps=5",
            cwd=folder, **user.variables)  # fmt: skip


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
