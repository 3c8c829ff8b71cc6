"""Which changes a run goes on with, which it refuses and with what way out; and that it needs its text no more."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lasptrain import train
from lasptrain.checkpoint.single import CheckpointReader
from lasptrain.checkpoint.steps import committed
from lasptrain.convert import card
from lasptrain.convert.export import export
from lasptrain.errors import CheckpointError, DataError, NumericalError
from lasptrain.eval.main import evaluate
from lasptrain.eval.runner import EvalConfig
from lasptrain.process import location
from lasptrain.process.location import RunLocation
from lasptrain.recipe.loading import load
from lasptrain.recipe.schema import SECTIONS
from lasptrain.run import folder as runs
from lasptrain.run import origin as origins
from lasptrain.run.metrics import read_metrics
from tests.process.test_faults import poisoned
from tests.support import program

RECIPE = """
model: {arch: tnl, dim: 16, layers: 2, heads: 2, mlp: 24}
data: {source: text, tokenizer: bytes, window: 64, cache: cache, validation: 300000}
optim: {lr: 1e-2, schedule: constant}
train: {steps: 4, batch: 2, precision: fp32, micro_batch: 2}
checkpoint: {every: 2, keep: 3}
eval: {every: 0, windows: 2, sample: 0}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in, with a recipe and its text."""
    (tmp_path / "text").mkdir()
    for i in range(40):
        words = " ".join(str(i * j) for j in range(i * 5))
        (tmp_path / "text" / f"{i}.txt").write_text(f"Document {i} counts: {words}")
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def pretrain(*overrides: str, place: RunLocation = location.DEFAULT) -> Path:
    """Train as the launcher and one rank do, in this process, which has a group; the run."""
    recipe = load("tiny.yaml", list(overrides))
    run = location.choose(recipe, place)
    prepared = location.resolve(recipe.named(run.name), 1, run)
    with location.open_run(prepared, run, place):
        train.train(prepared.recipe, run)
    return run


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The model of the newest step."""
    step = CheckpointReader(run)
    return {name: step.read(name) for name in step.shapes}


# What may change


@pytest.mark.parametrize(
    ("loss", "norm", "policy", "advice"),
    [(float("nan"), 1.0, (), "guard.nonfinite=skip"), (1.0, 1e3, ("guard.spike=stop",), "guard.spike=skip")],
)
def test_the_advice_of_the_guard_is_taken(
    group: None, folder: Path, loss: float, norm: float, policy: tuple[str, ...], advice: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = ("train.steps=20", *policy)
    with poisoned((17,), loss, norm), pytest.raises(NumericalError) as stopped:
        pretrain(*given)
    told = re.findall(r"--set ([\w.]+=[^\s.]+(?:\.\d+)?)", str(stopped.value))
    assert told == [advice, "optim.lr=0.005"] and stopped.value.code == 6
    capsys.readouterr()
    with poisoned((17,), loss, norm):
        run = pretrain(*given, *told)
    assert committed(run)[0] == 20
    (changed,) = read_metrics(run, "changed")
    there = {advice.partition("=")[0]: [policy[0].partition("=")[2] if policy else "stop", "skip"]}
    assert (changed["step"], changed["keys"]) == (17, {"optim.lr": [0.01, 0.005], **there})
    assert "optim.lr: 0.01 up to step 17, 0.005 from there\n" in capsys.readouterr().out
    rates = [record["lr"] for record in read_metrics(run)]
    assert rates == [0.01] * 17 + [0.005] * 3


FREE = {
    "mesh", "parallel", "guard", "optim", "eval", "checkpoint", "track", "launch", "train.steps", "train.profile",
    "train.segment", "train.compile", "train.kernel", "train.micro_batch", "train.loss_chunk", "train.z_loss",
    "data.cache", "data.tokenizer",
}  # fmt: skip


def test_every_key_is_free_or_fixed(folder: Path) -> None:
    """A key that is added is fixed until somebody says otherwise, of the optimizer too."""
    recipe = load("tiny.yaml")
    keys = [f"{name}.{key}" for name in SECTIONS for key in type(getattr(recipe, name)).model_fields]
    free = [key for key in keys if runs._FREE.fullmatch(key)]
    mended = [key for key in keys if key in FREE or key.partition(".")[0] in FREE]
    assert [key for key in mended if key != "optim.kind"] == free


def test_another_model_is_refused_with_a_way_out_that_works(group: None, folder: Path) -> None:
    run = pretrain()
    before = (run / "recipe.yaml").read_text()
    with pytest.raises(CheckpointError, match=r"data.window: 64 there, 32 here; use --fresh .*, or --from (\S+) ") as e:
        pretrain("data.window=32")
    assert (run / "recipe.yaml").read_text() == before
    (named,) = re.findall(r"--from (\S+)", str(e.value))
    new = pretrain("data.window=32", place=RunLocation(origin=origins.parse(named)))
    assert new.name == "tiny-2" and committed(run) == [4, 2] and committed(new) == [4, 2]


def test_a_run_with_muon_goes_on_to_the_bit_and_with_no_other_optimizer(group: None, folder: Path) -> None:
    muon = ("optim.kind=muon", "train.z_loss=1e-3")
    whole, half = pretrain(*muon), RunLocation(Path("half"))
    pretrain(*muon, "train.steps=2", place=half)
    assert losses(pretrain(*muon, place=half)) == losses(whole)
    assert all(0.01 < record["z_loss"] < 0.1 for record in read_metrics(whole))  # log² 320 is 33
    assert "z_loss" not in read_metrics(pretrain("train.steps=1", place=RunLocation(Path("adamw"))))[0]
    with pytest.raises(CheckpointError, match=r"optim.kind: muon there, adamw here; use --fresh"):
        pretrain("train.z_loss=1e-3", place=half)
    both = RunLocation(Path("new"), origin=origins.parse("half@2", optimizer=True))
    with pytest.raises(CheckpointError, match=r"gate.weight.exp_avg: checkpoint has none, model \[24, 16\] float32"):
        pretrain("train.steps=2", place=both)


# A new run from the weights of another


def test_a_run_begins_with_the_weights_of_another_and_goes_on_as_itself(group: None, folder: Path) -> None:
    old = pretrain()
    kept = weights(old)
    still = "optim.lr=1e-30"  # weights stay what they were
    plain = RunLocation(origin=origins.parse(str(old)))
    new = pretrain(still, "train.steps=1", "train.seed=5", "optim.weight_decay=0", place=plain)
    assert new.name == "tiny-2" and all(torch.equal(kept[name], one) for name, one in weights(new).items())
    (begun,) = read_metrics(new, "origin")
    assert (begun["run"], begun["from_step"], begun["optimizer"]) == ("tiny", 4, False)
    again = pretrain(still, "train.steps=3", "train.seed=5", "optim.weight_decay=0", place=plain)
    assert again == new and len(losses(new)) == 3  # the same command goes on
    with pytest.raises(CheckpointError, match=r"tiny: has saved steps and did not begin with the weights of .*tiny@2"):
        pretrain(place=RunLocation(old, origin=origins.parse(f"{old}@2")))
    shutil.rmtree(old / "checkpoints" / "step-4")
    assert pretrain(still, "train.steps=3", "train.seed=5", "optim.weight_decay=0") == new  # needs its origin no more


@pytest.mark.parametrize(("arch", "kept"), [("tnl", False), ("gdn", True)])
def test_decays_of_another_window_come_with_the_weights_if_they_are_learned(
    group: None, folder: Path, caplog: pytest.LogCaptureFixture, arch: str, kept: bool
) -> None:
    model = (f"model.arch={arch}", "model.decay=window")
    old = pretrain(*model, "optim.lr=1", "train.steps=2")  # decays that are learned move
    still = ("data.window=32", "optim.lr=1e-30", "optim.weight_decay=0", "train.steps=1")
    new = pretrain(*model, *still, place=RunLocation(Path("new"), origin=origins.parse(str(old))))
    kinds = [name for name in weights(old) if name.endswith("slope")]
    assert kinds and all(torch.equal(weights(old)[name], weights(new)[name]) is kept for name in kinds)
    assert ("has other decays than the recipe" in caplog.text) is not kept


def test_keys_that_make_another_model_of_the_same_weights_are_named(
    group: None, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = RunLocation(Path("new"), origin=origins.parse(str(pretrain("model.arch=gdn", "train.steps=1"))))
    other = ("model.arch=gdn", "model.gate=sigmoid", "model.negative_eigenvalues=true", "train.steps=1")
    pretrain(*other, place=old)
    (said,) = [line for line in caplog.messages if "another model" in line]
    assert said.endswith(
        "step-1 is of another model: model.gate: silu there, sigmoid here; "
        "model.negative_eigenvalues: False there, True here"
    )


def test_weights_of_another_tokenizer_are_told(group: None, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(program.ROOT / "tokenizers" / "python-4k.model", "a.model")
    other = ("data.tokenizer=a.model", "data.window=16", "model.vocab=4096", "train.steps=1")
    old = pretrain(*other)
    origin = origins.parse(str(old))
    pretrain(*other, place=RunLocation(Path("same"), origin=origin))
    assert "data.tokenizer: " not in capsys.readouterr().out
    pretrain(*other[1:], place=RunLocation(Path("new"), origin=origin))
    said = f"data.tokenizer: bytes is not the one that {old} was trained with; its ids mean other text"
    assert said in capsys.readouterr().out.splitlines()


def test_with_the_optimizer_the_new_run_is_the_old_one_continued(group: None, folder: Path) -> None:
    """On the same windows: one step more of the old run, and the first of a new one whose order begins there."""
    whole = pretrain("train.steps=4", "train.batch=2")
    half = RunLocation(Path("half"))
    pretrain("train.steps=2", place=half)
    found = {}
    for optimizer in (True, False):
        place = RunLocation(Path(f"new-{optimizer}"), origin=origins.parse("half@2", optimizer))
        with pytest.MonkeyPatch.context() as patch:
            from lasptrain.data.loader import SliceLoader

            step = SliceLoader.step
            patch.setattr(SliceLoader, "step", lambda self, number, step=step: step(self, number + 2))
            found[optimizer] = losses(pretrain("train.steps=2", place=place))
    assert found[True] == losses(whole)[2:]
    assert found[False][0] == found[True][0] and found[False][1] != found[True][1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nothing", r"--from nothing: nothing holds no recipe.yaml; expected a run"),
        ("tiny@3", r"--from tiny@3: .*tiny has saved steps 4, 2; expected one of them"),
    ],
)
def test_what_is_no_step_of_a_run_is_refused(folder: Path, given: str, message: str) -> None:
    for step in (4, 2):
        (folder / "tiny" / "checkpoints" / f"step-{step}").mkdir(parents=True)
    (folder / "tiny" / "recipe.yaml").touch()
    with pytest.raises(CheckpointError, match=message):
        origins.parse(given)
    (folder / "tiny@4").mkdir()
    (folder / "tiny@4" / "recipe.yaml").touch()
    with pytest.raises(CheckpointError, match="tiny@4 has saved none"):
        origins.parse("tiny@4")


def test_other_tensors_and_a_damaged_origin_are_refused(group: None, folder: Path) -> None:
    old = pretrain("train.steps=2")
    place = RunLocation(Path("new"), origin=origins.parse(str(old)))
    with pytest.raises(CheckpointError, match=r" tensors differ:\n.*embed.weight: checkpoint \[320, 16\]"):
        pretrain("model.dim=32", place=place)
    for file in (old / "checkpoints" / "step-2").glob("*.distcp"):
        file.write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"step-2, with which .*new begins: __0_0.distcp has 1 bytes"):
        pretrain(place=place)


# Text


def test_a_run_goes_on_without_its_text(
    group: None, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = pretrain("train.steps=2")
    undisturbed = losses(pretrain(place=RunLocation(Path("undisturbed"))))
    shutil.rmtree("text")
    capsys.readouterr()
    assert pretrain() == run and losses(run) == undisturbed
    said = capsys.readouterr().err
    assert re.match(
        r"data.source: text is gone; the run goes on with .*/datasets/text-\w+, which was made of it\n", said
    )
    with pytest.raises(DataError, match="text: no such source"):
        pretrain(place=RunLocation(fresh=True))
    shutil.rmtree("cache")
    with pytest.raises(DataError, match=r"data.source: text is gone, and so is .*cache/datasets/text-"):
        pretrain("train.steps=6")


def test_text_that_moved_is_the_same_and_text_that_changed_is_told(
    group: None, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pretrain("train.steps=2")
    undisturbed = losses(pretrain("train.steps=6", place=RunLocation(Path("undisturbed"))))
    Path("elsewhere").mkdir()
    Path("text").rename("elsewhere/corpus")
    moved = "data.source=elsewhere/corpus"
    shutil.rmtree("cache")  # prepared again, under another name
    assert pretrain(moved, "train.steps=4") == run and capsys.readouterr().err == ""
    more = Path("elsewhere/corpus/more.txt")
    more.write_text("One more.")
    assert pretrain(moved, "train.steps=6") == run and losses(run) == undisturbed
    said = capsys.readouterr().err
    assert re.match(
        r"data.source: the text in elsewhere/corpus has changed since this run began \(41 files of [\d,]+ "
        r"bytes, then 40 files of [\d,]+ bytes\); the run goes on with .*, which was made of it then",
        said,
    )
    more.unlink()
    first = Path("elsewhere/corpus/1.txt")
    first.write_text(first.read_text().upper())
    pretrain(moved, "train.steps=6")
    assert "(other content in 40 files" in capsys.readouterr().err
    Path("elsewhere").rename("third")
    with pytest.raises(CheckpointError, match=r"third/corpus is not what this run was trained on: other cont.*--from"):
        pretrain("data.source=third/corpus", "train.steps=8")


def test_a_run_that_remembers_no_data_says_that_its_text_has_changed(group: None, folder: Path) -> None:
    run = pretrain("train.steps=2")
    (run / "data.json").unlink()
    assert pretrain("train.steps=3") == run and (run / "data.json").is_file()
    (run / "data.json").unlink()
    Path("text/more.txt").write_text("One more.")
    with pytest.raises(
        CheckpointError, match=r"content: '\w+', now '\w+'\n  so the text of data\.source, or .* changed"
    ):
        pretrain()


def test_a_file_of_another_name_is_known_by_its_content(group: None, folder: Path) -> None:
    Path("one.jsonl").write_text("".join(json.dumps({"text": f"Word {i} after word. " * 20}) + "\n" for i in range(40)))
    run = pretrain("data.source=one.jsonl", "train.steps=2")
    Path("one.jsonl").rename("another.jsonl")
    assert pretrain("data.source=another.jsonl") == run
    Path("another.jsonl").write_text(Path("another.jsonl").read_text().replace("after", "AFTER"))
    with pytest.raises(CheckpointError, match=r"third.jsonl is not what this run was trained on: other content"):
        pretrain("data.source=" + str(Path("another.jsonl").rename("third.jsonl")))


def test_sources_that_are_mixed_are_known_by_their_content(group: None, folder: Path) -> None:
    Path("two").mkdir()
    for i in range(30):
        Path("two", f"{i}.txt").write_text(f"Word {i} after word. " * 20)
    parts = "data.source=[{path: text, weight: 2}, {path: two, weight: 1}]"
    run = pretrain(parts, "data.mix_block=8", "train.steps=2")
    Path("two").rename("three")
    assert pretrain(parts.replace("two", "three"), "data.mix_block=8") == run
    with pytest.raises(CheckpointError, match=r"data\.source"):
        pretrain(parts.replace("two", "three").replace("weight: 1", "weight: 3"), "data.mix_block=8")


def test_another_tokenizer_is_refused_and_the_same_may_move(group: None, folder: Path) -> None:
    shutil.copy(program.ROOT / "tokenizers" / "python-4k.model", "a.model")
    run = pretrain("data.tokenizer=a.model", "data.window=16", "train.steps=2")
    Path("a.model").rename("b.model")
    assert pretrain("data.tokenizer=b.model", "data.window=16") == run
    with pytest.raises(CheckpointError, match=r"data\.tokenizer: bytes is not the one"):
        pretrain("data.window=16")


# The name of a run


def test_exports_cards_and_reports_carry_the_name_of_the_run_and_no_path(
    group: None, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also of a run that --fresh has put beside the one asked for; its name is said first and last."""
    for _ in range(2):
        capsys.readouterr()
        run = pretrain(f"data.source={folder / 'text'}", "train.steps=2", place=RunLocation(Path("dir"), fresh=True))
    said = capsys.readouterr().out.splitlines()
    assert run == folder / "dir-2" and said[0] == f"run        {run}"
    assert said[-1] == f"run        {run}; --run {run} without --fresh goes on with it"
    assert f"continue   lasptrain pretrain {run}/recipe.yaml --run {run} --set train.steps=4" in said
    pretrain(f"data.source={folder / 'text'}", "train.steps=1", place=RunLocation(Path("dir-2")))
    fewer = capsys.readouterr().out.splitlines()
    assert f"continue   lasptrain pretrain {run}/recipe.yaml --run {run} --set train.steps=4" in fewer
    export(Path("dir-2"), Path("out"), "safetensors", check=False)
    shown = Path("out/README.md").read_text()
    assert "\n# dir-2\n" in shown and "\n  source: text\n" in shown and str(folder) not in shown
    asked = EvalConfig(tasks=("copy",), lengths=(64,), samples=1)
    for place in (Path("dir-2"), Path("out")):
        assert evaluate(place, asked, folder / f"eval-{place}", 64, 1)["name"] == "dir-2"
        assert "<h1>dir-2 after 2 steps</h1>" in (folder / f"eval-{place}" / "report.html").read_text()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/home/me/text", "text"),
        ("repositories:/home/me/code/", "repositories:code"),
        ("python:source", "python:source"),
    ],
)
def test_names_instead_of_paths(path: str, name: str) -> None:
    assert card._name(path) == name
