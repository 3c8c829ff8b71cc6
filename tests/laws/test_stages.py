"""Stages: a run whose windows, batches, sources and learning rate change is the chain of its parts, on every mesh."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from data_tools import windows
from lasptrain import train
from lasptrain.certify import proof
from lasptrain.checkpoint import order as checkpoint_order
from lasptrain.checkpoint.single import CheckpointReader
from lasptrain.checkpoint.steps import committed
from lasptrain.cli.main import app
from lasptrain.convert.export import export
from lasptrain.convert.restore import restore
from lasptrain.data import order
from lasptrain.data.mixture import Mixture
from lasptrain.data.order import Stretch
from lasptrain.errors import CheckpointError, RecipeError, SetupError
from lasptrain.eval.load import load_model
from lasptrain.ops.cross_entropy import IGNORED
from lasptrain.process import location
from lasptrain.process.location import RunLocation
from lasptrain.recipe.loading import load
from lasptrain.recipe.resolve import resolve_meshes, with_meshes
from lasptrain.recipe.yaml12 import dump
from lasptrain.run import auto
from lasptrain.run import folder as runs
from lasptrain.run import origin as origins
from lasptrain.run.metrics import read_metrics
from lasptrain.training.job import Job, build
from lasptrain.training.optimizer import build_optimizer
from tests.process.test_faults import bytes_of
from tests.recipe.test_recipe import RECIPES
from tests.support.gloo import spawn
from tests.support.tables import cells, printed

FIRST = "{steps: 3, window: 48, batch: 8, micro_batch: 2}"
SECOND = "{steps: 2, window: 96, batch: 2, source: [{path: a, weight: 2}, {path: b, weight: 1}], lr: 5e-3}"
THIRD = "{steps: 3, window: 192, batch: 1, segment: 96}"
RECIPE = f"""
model: {{arch: tnl, dim: 16, layers: 2, heads: 2, mlp: 24, decay: window}}
data: {{source: a, tokenizer: bytes, window: 192, cache: cache, validation: 300000, mix_block: 30}}
optim: {{lr: 1e-2, warmup: 2}}
train: {{steps: 8, precision: fp32}}
checkpoint: {{every: 1, keep: 9}}
eval: {{every: 4, windows: 2, window: 96, sample: 0}}
stages:
  - {FIRST}
  - {SECOND}
  - {THIRD}
"""
WINDOWS, BATCHES, STEPS = (48, 96, 192), (8, 2, 1), (3, 2, 3)
STAGE = [number for number, steps in enumerate(STEPS) for _ in range(steps)]  # of each step


def make_folder(folder: Path) -> None:
    """Write a recipe with three stages, and two texts."""
    for name, word in (("a", "counts"), ("b", "tells")):
        (folder / name).mkdir()
        for i in range(40):
            text = f"Document {i} {word}: " + " ".join(str(i * j) for j in range(i * 5))
            (folder / name / f"{i}.txt").write_text(text)
    (folder / "tiny.yaml").write_text(RECIPE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    make_folder(folder)
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(folder)
    yield folder


@pytest.fixture(scope="module")
def whole(folder: Path, group: None) -> Path:
    """The run that nothing disturbs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return pretrain("whole")


def pretrain(run: str, *overrides: str, origin: str | None = None) -> Path:
    """Train as the launcher and one rank do, in this process, which has a group; the run."""
    recipe = load("tiny.yaml", list(overrides))
    place = RunLocation(Path(run).absolute(), origin=None if origin is None else origins.parse(origin, True))
    found = location.choose(recipe, place)
    prepared = location.resolve(recipe.named(found.name), 1, found)
    with location.open_run(prepared, found, place):
        train.train(prepared.recipe, found)
    return found


def after(run: Path, step: int, name: str) -> str:
    """A copy of a run as it was on disk when a step had just been saved, and the next was in training."""
    copy = run.with_name(f"{name}-{step}")
    shutil.copytree(run, copy)
    for other in committed(copy):
        if other > step:
            shutil.rmtree(copy / "checkpoints" / f"step-{other}")
    return copy.name


def course(run: Path) -> list[tuple[float, float, float]]:
    return [(record["loss"], record["grad_norm"], record["lr"]) for record in read_metrics(run)]


# What a stage reads


@settings(max_examples=200)
@given(
    st.integers(20, 300),
    st.lists(st.tuples(st.integers(2, 20), st.integers(1, 60)), min_size=1, max_size=5),
    st.integers(0, 5),
)
def test_no_token_is_read_twice_in_an_epoch_nor_left_out(total: int, stages: list[tuple[int, int]], seed: int) -> None:
    """Whatever the windows of the stages that share the epoch; but for less than a window where one could begin."""
    seen = dict[int, Counter[int]]()
    epoch, offset = 0, 0
    for window, count in stages:
        stretch = Stretch(epoch, offset, count)
        numbers = []
        for sample in range(count):
            numbers.append(order.locate(total, window, sample, stretch).epoch)
            start = order.window_start(total, window, 1, seed, sample, stretch)
            seen.setdefault(numbers[-1], Counter()).update((start + i) % total for i in range(window))
            assert order.epoch_of(total, window, sample, stretch) == numbers[-1] + 1
        assert numbers == sorted(numbers) and numbers[0] in (epoch, epoch + 1)
        epoch, offset = order.behind(total, window, stretch)
        assert epoch == numbers[-1]
    assert all(set(tokens.values()) == {1} for tokens in seen.values())
    most = max(window for window, _ in stages)
    for number in range(epoch):
        assert total - len(seen[number]) < most
    assert len(seen[epoch]) == offset  # so the next stage begins where this one ended


def test_windows_longer_than_a_source_go_round_it_and_end_behind_what_they_read() -> None:
    assert order.behind(100, 30, Stretch(0, 0, 2)) == (0, 60)
    assert order.behind(100, 250, Stretch(0, 60, 3)) == (9, 0)  # 7.5 times round from the next epoch on
    assert [order.epoch_of(100, 250, sample, Stretch(0, 60, 3)) for sample in (-1, 0, 1, 2)] == [1, 4, 6, 9]
    assert order.locate(100, 30, 0, Stretch(9, 0, 5)).epoch == 9


def test_a_source_goes_on_where_the_stages_before_have_left_it(here: Path, whole: Path) -> None:
    """Of mixtures too, whose last block is not full: no byte of a text is read by two stages in an epoch."""
    job = build(load("tiny.yaml"), run=whole)
    read = {name: Counter[int]() for name in "ab"}
    for stage in job.stages:
        split, span = stage.dataset.split("train"), stage.span
        for sample in range(span.samples):
            number, start = divmod(split.window_start(span.recipe.data.window, 0, sample), 1 << 48)
            ring = split.splits[number] if isinstance(split, Mixture) else split
            read["ab"[number]].update((start + i) % ring.tokens for i in range(span.recipe.data.window))
    job.close()
    assert {name: set(found.values()) for name, found in read.items()} == {"a": {1}, "b": {1}}
    mixed = job.stages[1].dataset.split("train")
    assert isinstance(mixed, Mixture)
    own = [mixed.sample(0, sample) for sample in range(4)]
    for number, count in enumerate(mixed.counted(0, 4)):
        assert count and sorted(n for other, n in own if other == number) == list(range(count))
    assert sum(read["a"].values()) + sum(read["b"].values()) == 24 * 48 + 4 * 96 + 3 * 192


# A run


def by_hand(job: Job) -> Iterator[tuple[float, float, float]]:
    """Train one window after another, each as a whole, with nothing of the loop: loss, norm and rate of each step."""
    optimizer = build_optimizer(job.model, job.recipe.optim)
    bos = job.dataset.bos
    firsts = [0, *accumulate(STEPS)]
    for step, number in enumerate(STAGE):
        split, window, batch = job.stages[number].dataset.split("train"), WINDOWS[number], BATCHES[number]
        total = torch.zeros(())
        for i in range(batch):
            start = split.window_start(window, 0, (step - firsts[number]) * batch + i)
            row = split.read(start, window + 1)[None]
            doc_ids = (row[:, :-1] == bos).cumsum(1, dtype=torch.int32)
            assert not (row == IGNORED).any()
            loss = job.model(row[:, :-1].contiguous(), row[:, 1:].contiguous(), doc_ids).loss / (batch * window)
            loss.backward()
            total += loss.detach()
        norm = float(torch.nn.utils.clip_grad_norm_(job.model.parameters(), 1.0))
        fall = (1 - math.cos(math.pi * max(0, step - 2) / 6)) / 2
        lr = (1e-2, 5e-3, 1e-2)[number] * min(1, (step + 1) / 2) * (1 - fall)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        yield float(total), norm, lr


def test_a_run_is_its_windows_one_by_one(here: Path, whole: Path) -> None:
    job = build(load("tiny.yaml"))
    wanted = list(by_hand(job))
    job.close()
    for found, want in zip(course(whole), wanted, strict=True):
        assert found == pytest.approx(want, rel=1e-5)
    records = read_metrics(whole)
    assert [record["stage"] for record in records] == STAGE
    read = [WINDOWS[number] * BATCHES[number] for number in STAGE]
    assert [record["tokens"] for record in records] == list(accumulate(read))
    for record, tokens in zip(records, read, strict=True):
        assert record["tokens_per_s"] == pytest.approx(tokens / record["step_time"])
    begun = read_metrics(whole, "stage")
    assert [(event["step"], event["stage"]) for event in begun] == [(1, 0), (4, 1), (6, 2)]
    assert begun[1]["what"] == "2 windows of 96 tokens a step, learning rate 0.005 by its schedule"
    assert torch.equal(job.model.decays(), build(load("tiny.yaml", ["stages=[]"])).model.decays())


def test_a_run_goes_on_from_any_step_bitwise(here: Path, whole: Path) -> None:
    """In a stage, and at its beginning and its end."""
    for step in range(1, 8):
        run = pretrain(after(whole, step, "again"))
        assert course(run) == course(whole), step
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if "resumed" in line]


def move(rank: int, world: int, folder: Path) -> list[tuple[int, int]]:
    """Train on `world` ranks: a whole run, and what is left of another; the meshes of its stages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        recipe = load("tiny.yaml", ["checkpoint.every=6"])
        for run in ("mesh-4", "moved-3"):
            train.train(recipe, folder / run)
        return resolve_meshes(recipe, world)


def test_every_mesh_is_one_device_and_continues_every_other(here: Path, whole: Path) -> None:
    """Each stage has its own: four windows side by side, two halves of two, one in four."""
    (here / "mesh-4").mkdir()
    after(whole, 3, "moved")
    assert spawn(4, move, here)[3] == [(4, 1), (2, 2), (1, 4)]
    train.train(load("tiny.yaml"), here / after(here / "mesh-4", 6, "back"))
    for run in ("mesh-4", "moved-3", "back-6"):
        found, wanted = course(here / run), course(whole)
        assert [rate for *_, rate in found] == [rate for *_, rate in wanted]
        for one, want in zip(found, wanted, strict=True):
            assert one == pytest.approx(want, rel=2e-5), run
        held_out = [[record["loss"] for record in read_metrics(place, "eval")] for place in (here / run, whole)]
        assert held_out[0] == pytest.approx(held_out[1], rel=2e-5) and len(held_out[0]) == 2


def test_a_run_is_the_chain_of_its_stages(here: Path, whole: Path) -> None:
    """Of one run to which stages are added, and of runs that begin with the weights of the one before."""
    constant = ("optim.schedule=constant", "optim.warmup=0")
    want = pretrain("constant", *constant)
    longest = f"{FIRST}, {THIRD.replace('steps: 3', 'steps: 1')}"  # what is ahead may change: it has not begun
    chain = pretrain("chain", *constant, f"stages=[{longest}]", "train.steps=4")
    run = pretrain(after(chain, 3, "chain"), *constant)
    assert course(run) == course(want)
    own = ("model.decay=tnl", "optim.lr=5e-3", *constant)
    second = SECOND.replace("{path: a, weight: 2}, ", "")
    both = pretrain("both", *own, f"stages=[{FIRST}, {second}]", "train.steps=5", "data.window=96")
    pretrain("one", *own, f"stages=[{FIRST}]", "train.steps=3", "data.window=48")
    two = pretrain("two", *own, f"stages=[{second}]", "train.steps=2", "data.window=96", origin=str(here / "one"))
    assert course(here / "one") + course(two) == course(both)


def test_a_run_with_stages_leaves_comes_back_and_goes_on(here: Path, whole: Path) -> None:
    run = whole.with_name(after(whole, 4, "leaves"))  # in the second of three
    out = export(run, here / "out", "safetensors", check=False).folder
    read = 3 * 8 * 48 + 1 * 2 * 96
    assert f"| tokens seen | {read:,}, in windows of 48, 96 |" in (out / "README.md").read_text()
    assert load_model(out).model.window == load_model(run).model.window == 192
    back = restore(out, here / "back")
    left, came = CheckpointReader(run), CheckpointReader(back)
    assert (came.step, came.meta) == (4, left.meta)
    assert all(torch.equal(left.read(name), came.read(name)) for name in left.shapes)
    assert committed(pretrain("back"))[0] == 8


def test_a_card_counts_the_tokens_of_the_runs_before(here: Path, whole: Path) -> None:
    """Also of a run that has gone on, or left and come back, and without what it began with."""
    own = (f"stages=[{FIRST}]", "train.steps=3", "data.window=48")

    def seen(run: Path) -> str:
        out = export(run, here / "seen", "safetensors", check=False, force=True).folder
        (found,) = re.findall(r"\| tokens seen \| (.*) \|", (out / "README.md").read_text())
        return str(found)

    pretrain("later", *own, origin=str(whole))
    pretrain(after(here / "later", 2, "seen"), *own)
    last = pretrain("latest", *own, origin=str(here / "seen-2"))
    shutil.rmtree(here / "seen-2")
    read = 3 * 8 * 48
    before = read + 2 * 2 * 96 + 3 * 192 + read
    assert seen(last) == f"{read:,}, in windows of 48; {before:,} before, by the runs that it began with"
    assert seen(restore(here / "seen", here / "came")) == seen(last)
    of_old = [checkpoint_order.before(run, {}) for run in (last, whole)]
    assert of_old == [None, 0]


def test_what_a_stage_that_has_begun_reads_may_not_change(here: Path, whole: Path) -> None:
    run = after(whole, 4, "kept")  # in the second of three
    ahead = THIRD.replace("batch: 1", "batch: 2")

    def told(*stages: str, steps: int = 8, **_: Any) -> str:
        with pytest.raises(CheckpointError) as caught:
            pretrain(run, f"stages=[{', '.join(stages)}]", f"train.steps={steps}")
        return str(caught.value)

    assert "stages[0].window: 48 there, 96 here; use --fresh" in told(FIRST.replace("48", "96"), SECOND, ahead)
    assert "stages[1].steps: 2 there, 3 here; use" in told(
        FIRST, SECOND.replace("steps: 2", "steps: 3"), ahead, steps=9
    )
    assert "stages[1].source: " in told(FIRST, SECOND.replace("weight: 2", "weight: 3"), ahead)
    assert "stages[0].steps: 3 there, None here" in told()
    files = {file: file.read_bytes() for file in (whole.with_name(run)).rglob("*.json")}
    assert files == {file: file.read_bytes() for file in files}
    recipe = whole.with_name(run) / "recipe.yaml"
    recipe.write_text(
        recipe.read_text().replace("steps: 3, window: 48", "steps: 2, window: 48").replace(": 8\n", ": 7\n")
    )
    with pytest.raises(CheckpointError, match=r"order\.stages\.0\.steps: 3, now 2"):  # by the checkpoint, too
        train.train(load(recipe), whole.with_name(run))
    recipe.write_text((whole / "recipe.yaml").read_text())
    free = (FIRST.replace("micro_batch: 2", "micro_batch: 4"), SECOND.replace("5e-3", "2e-3"), ahead)
    changed = pretrain(run, f"stages=[{', '.join(free)}]")
    assert [record["lr"] for record in read_metrics(changed)][4] == pytest.approx(course(whole)[4][2] * 0.4)
    (event,) = read_metrics(changed, "changed")
    assert event["keys"]["stages[1].lr"] == [5e-3, 2e-3] and event["keys"]["stages[2].batch"] == [1, 2]


def test_the_windows_of_a_step_are_shown(here: Path, whole: Path) -> None:
    job = build(load("tiny.yaml"), run=whole)
    for step, number in enumerate(STAGE):
        read = job.at(step).loader.read_step(step)
        rows = [row for micro in read for row in torch.cat([piece.tokens for piece in micro], 1)]
        shown = windows.show_windows(whole, step + 1)
        assert len(shown) == BATCHES[number] == len(rows)
        assert ["".join(text for *_, text in one.documents) for one in shown] == [bytes_of(row) for row in rows]
        assert all(one.documents[-1][1] == WINDOWS[number] for one in shown)
    place = job.at(4).loader.window_starts(4)[1]
    job.close()
    assert windows.show_windows(whole, 5, place) == windows.show_windows(whole, 5)[1:]
    with pytest.raises(RecipeError, match=r"--at: found with .*, which has stages; expected --step too"):
        windows.show_windows(whole, at=place)
    assert "stages[1]: 4 windows of 96 tokens in 2 steps, mixed 30 at a time" in str(windows.preview(load("tiny.yaml")))


def test_what_auto_came_to_is_kept_by_stage(here: Path) -> None:
    recipe = load("tiny.yaml")
    auto.store(
        recipe, here, "1 × 1 × CPU", {"segment": [24, 48, 96], "reduce": "step", "scan": "ring", "prefix": "host"}
    )
    found = auto.load(recipe, here, "1 × 1 × CPU")
    assert [span.recipe.train.segment for span in found.spans()] == [24, 48, 96]
    other = load("tiny.yaml", [f"stages=[{FIRST}, {THIRD}]", "train.steps=6"])
    assert auto.load(other, here, "1 × 1 × CPU").stages == other.stages
    assert load("tiny.yaml", [f"stages={json.dumps([stage.model_dump() for stage in found.stages])}"]) == found.replace(
        parallel={"reduce": "auto", "prefix": "auto"}, mesh={"scan": "auto"}
    )


# The recipe


def refused(*overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load("tiny.yaml", list(overrides))
    return str(caught.value)


def test_stages_that_do_not_fit_are_refused_by_their_keys(here: Path) -> None:
    assert "stages: 3 + 3 = 6 steps, but train.steps = 8; expected the same number" in refused(
        f"stages=[{FIRST}, {THIRD}]"
    )
    odd = refused(f"stages=[{FIRST}, {{steps: 5, window: 99, segment: 44}}]", "mesh.sp=2")
    assert "stages[1].segment: 44 tokens do not divide stages[1].window = 99; nearest: 33, 99" in odd
    assert "data.window: found 192; expected 99, the window of stages[1], the longest" in odd
    assert "stages[0].window: 49 tokens do not split into mesh.sp = 2 equal slices; nearest: 48, 50" in refused(
        f"stages=[{FIRST.replace('48', '49')}, {SECOND}, {THIRD}]", "mesh.sp=2"
    )
    assert "train.batch: 1 windows do not split into micro-batches of 2; nearest: 2 (stages[1])" in refused(
        "stages=[{steps: 4, batch: 2}, {steps: 4, micro_batch: 2}]"
    )
    assert "stages[0].seq_len: no such key; did you mean window?" in refused("stages=[{steps: 8, seq_len: 4}]")
    assert "stages[0].steps: missing; expected the number of optimizer steps" in refused("stages=[{window: 192}]")
    assert "stages[1].source.0.weight: found 0; expected more than 0" in refused(
        "stages=[{steps: 4}, {steps: 4, source: [{path: a, weight: 0}]}]"
    )
    assert "stages: found 5; expected a list, such as [{steps: 1000" in refused("stages=5")
    assert "data.packing: found 'best_fit', which packs for one window" in refused("data.packing=best_fit")
    with pytest.raises(SetupError, match=r"stages\[1\]: mesh: 4 processes do not make dp = auto × sp = 1 with 2 micro"):
        resolve_meshes(load("tiny.yaml", ["mesh.sp=1"]), 4)
    with pytest.raises(RecipeError, match=r"found 'hsdp', which shards over sp, with stages of sp = 1 and 2 and 4;"):
        resolve_meshes(load("tiny.yaml", ["parallel.data_parallel=hsdp"]), 4)


def test_a_recipe_with_stages_is_written_and_read_back(here: Path) -> None:
    recipe = load("tiny.yaml")
    (here / "copy.yaml").write_text(dump(with_meshes(recipe, 4)))
    copy = load("copy.yaml")
    assert [(span.recipe.mesh.dp, span.recipe.mesh.sp) for span in copy.spans()] == [(4, 1), (2, 2), (1, 4)]
    (here / "copy.yaml").write_text(dump(with_meshes(recipe, 1)))
    assert load("copy.yaml").stages == recipe.stages
    assert "stages" not in dump(load("tiny.yaml", ["stages=[]"]))
    assert runs.digest(recipe) != runs.digest(
        load("tiny.yaml", [f"stages=[{FIRST}, {SECOND}, {THIRD[:-1]}, lr: 1e-3}}]"])
    )


# Commands


def told(*command: str) -> str:
    done = CliRunner().invoke(app, list(command), env={"COLUMNS": "300"})
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def test_the_shipped_recipe_is_checked_and_planned_by_stage() -> None:
    file = str(RECIPES / "gdn_0.4b_stages_4k_to_1m.yaml")
    checked = told("check", file, "--nproc", "8")
    assert "stages[0] steps 1 to 9,000: 256 windows of 4,096 tokens on dp 8 × sp 1," in checked
    assert "stages[2] steps 9,451 to 9,650: 1 window of 1,048,576 tokens on dp 1 × sp 8," in checked
    assert "209,715,200 tokens, 2.1%" in checked and "training 9,650 steps, 10,118,758,400 tokens" in checked
    with printed() as tables:
        told("plan", file, "--gpus", "8", "--gpu", "h200")
    (stages,) = (table for table in tables if table.columns[0].header == "stage")
    rows = cells(stages)
    assert [row[:3] for row in rows] == [
        ["stages[0]", "9,000", "8 × 1"],
        ["stages[1]", "450", "8 × 1"],
        ["stages[2]", "200", "1 × 8"],
    ]
    peak = max((row[5] for row in rows), key=lambda cell: float(cell.split()[0]))
    footer = [str(column.footer) for column in stages.columns]
    assert footer[:-1] == ["in all", "9,650", "", "", "", peak, "", "", "10,118,758,400"]


def test_certify_takes_the_longest_stage_or_the_one_that_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def prove(recipe: Any, *_: object) -> SimpleNamespace:
        taken.append(recipe)
        return SimpleNamespace(write=lambda file: None, table=lambda: "", lines=list, holds=True)

    monkeypatch.setattr(proof, "prove", prove)
    assert "of stages[2], windows of 192 tokens" in told("certify", "tiny.yaml")
    assert "of stages[0], windows of 48 tokens" in told("certify", "tiny.yaml", "--stage", "0")
    spans = load("tiny.yaml").spans()
    assert taken == [spans[2].recipe, spans[0].recipe] and not taken[0].stages
    assert CliRunner().invoke(app, ["certify", "tiny.yaml", "--stage", "3"]).exception is not None
