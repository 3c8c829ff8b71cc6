"""Trackers show the whole of a run, go on where it goes on, and never end it."""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import os
import struct
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from lasptrain import train
from lasptrain.cli import main
from lasptrain.errors import RecipeError, SetupError
from lasptrain.recipe.loading import load
from lasptrain.recipe.schema import Recipe
from lasptrain.run import trackers
from lasptrain.run.metrics import Metrics, read_metrics
from lasptrain.run.outlets import PATIENCE, Outlet
from lasptrain.run.tracker import Rows
from lasptrain.run.trackers import Trackers
from tests.support.clock import Clock

RECIPE = """
model: {arch: gdn, dim: 16, layers: 2, heads: 2, key_dim: 8, value_dim: 8, mlp: 24}
data: {source: SOURCE, tokenizer: bytes, window: 128, cache: CACHE, validation: 300000}
optim: {lr: 1e-2, schedule: constant}
train: {steps: 2, batch: 2, precision: fp32}
checkpoint: {every: 2}
eval: {every: 2, windows: 1, sample: 4, tasks: [copy], samples: 1}
track: {trackers: [tensorboard, wandb], project: ours, health_every: 2}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    for i in range(30):
        (tmp_path / "text" / f"{i}.txt").write_text(f"Document {i} counts: " + " ".join(map(str, range(i * 5))))
    file = tmp_path / "tiny.yaml"
    file.write_text(RECIPE.replace("SOURCE", str(tmp_path / "text")).replace("CACHE", str(tmp_path / "cache")))
    return file


def of_wandb(file: Path) -> tuple[dict[str, Any], dict[str, list[tuple[int, Any]]]]:
    """The configuration in a file of wandb, and the values of each name with their steps.

    Its records are framed as LevelDB frames its log.
    """
    from wandb.proto import wandb_internal_pb2

    data, at, whole = file.read_bytes(), 7, b""
    config: dict[str, Any] = {}
    values = defaultdict[str, list[tuple[int, Any]]](list)
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a record, or its last part
            record = wandb_internal_pb2.Record.FromString(whole)
            whole = b""
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            items = {"/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for name, value in items.items():
                values[name].append((items["step"], value))
    return config, values


def test_a_run_is_in_both_trackers_and_goes_on_there(
    group: None, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    run.mkdir()
    try:
        for steps in (2, 4):
            recipe = load(recipe_file, [f"train.steps={steps}"])
            train.train(recipe, run)
    finally:
        wandb.teardown()

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    shown = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    tables = {
        tag.removesuffix("/text_summary"): [(e.step, list(e.tensor_proto.string_val)) for e in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }
    sent = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    assert len(sent) == 2 and {file.name for file in sent} == {f"run-{identity(run)}.wandb"}
    (config, first), (_, second) = map(of_wandb, sent)
    curves = {name: first[name] + second[name] for name in (*first, *second) if name in shown}

    losses = [(record["step"], record["loss"]) for record in read_metrics(run)]
    assert [step for step, _ in losses] == [1, 2, 3, 4]
    for event, group_ in ((None, "train"), ("eval", "eval"), ("health", "health")):
        for record in read_metrics(run, event):
            for key, value in record.items():
                if key not in ("step", "event", "time") and value is not None:
                    assert (record["step"], pytest.approx(value)) in curves[f"{group_}/{key}"], key
                    assert (record["step"], pytest.approx(value, rel=1e-6)) in shown[f"{group_}/{key}"], key
    assert [step for step, _ in curves["train/loss"]] == [1, 2, 3, 4]
    assert len(curves["health/memory/0"]) == len(curves["eval/loss"]) == 2
    health, last = read_metrics(run, "health")[-1], read_metrics(run)[-1]
    squares = [value**2 for key, value in health.items() if key.startswith("grad_norm/")]
    assert math.sqrt(sum(squares)) == pytest.approx(last["grad_norm"], rel=1e-5)

    assert config["model"]["arch"] == "gdn" and config["track"]["project"] == "ours"
    assert {name: [step for step, _ in found] for name, found in tables.items()} == {
        "recipe": [0, 2], "eval/tasks": [2, 4], "losses": [2, 4], "sample": [2, 4]
    }  # fmt: skip
    assert b"arch: gdn" in tables["recipe"][0][1][1]
    for name, columns in (("eval/tasks", ["task", "128"]), ("losses", None), ("sample", ["prompt", "continued"])):
        for file, at in zip(sent, (0, 1), strict=True):
            (table,) = (file.parent / "files" / "media" / "table" / Path(name).parent).glob(f"{Path(name).name}_*.json")
            data = json.loads(table.read_text())
            assert columns in (None, data["columns"])
            cells = [cell for row in data["data"] for cell in row]
            assert len(tables[name][at][1]) == len(cells) + len(data["columns"])
            texts = [line.strip() for cell in cells if isinstance(cell, str) for line in cell.splitlines()]
            there = b"\n".join(tables[name][at][1]).decode()
            assert all(text in there for text in texts) and cells


def identity(run: Path) -> str:
    found: str = json.loads((run / "wandb.json").read_text())["id"]
    return found


class Fake:
    """A tracker that keeps what it is given, and raises an error at a method."""

    def __init__(self, broken: str = "", error: Exception | None = None) -> None:
        self.broken, self.error, self.got = broken, error, list[Any]()

    def _take(self, method: str, what: Any) -> None:
        self.got.append(what)
        if method == self.broken and self.error is not None:
            raise self.error

    def start(self, recipe: Recipe, run: Path) -> None:
        self._take("start", "start")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._take("scalars", step)

    def table(self, step: int, name: str, rows: Rows) -> None:
        self._take("table", name)

    def close(self, *, failed: bool = False) -> None:
        self._take("close", failed)


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.fault("a tracker that fails", times=4)
@pytest.mark.parametrize(
    ("broken", "error", "missed"),
    [
        ("start", RuntimeError("no network\nand more"), 9),
        ("scalars", KeyError("x"), 7),
        ("table", ValueError("gone"), 8),
        ("close", TimeoutError("still sending"), 0),
    ],
)
def test_a_tracker_that_fails_is_told_once_counted_and_left_off(
    recipe_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str, error: Exception, missed: int
) -> None:
    bad, good = Fake(broken, error), Fake()
    both = Trackers({"bad": (bad, tmp_path), "good": (good, tmp_path)})
    both.start(load(recipe_file), tmp_path)
    with Metrics(tmp_path, steps=7, trackers=both) as metrics:
        metrics.table(0, "sample", [{"text": "x"}])
        for step in range(1, 8):
            metrics.log(step, loss=1.0)
    both.close(failed=True)
    assert good.got == ["start", "sample", *range(1, 8), True]
    told = [message for message in caplog.messages if "missed" not in message]
    assert len(told) == 1 and str(error).splitlines()[0] in told[0]
    counted = [message for message in caplog.messages if "missed" in message]
    assert counted == ([f"bad: writes that it has missed: {missed}; metrics.jsonl holds its curves"] if missed else [])
    assert len(read_metrics(tmp_path)) == 7


def test_a_disk_that_stays_full_ends_the_tracker_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock, tracker = Clock(), Fake("scalars", full())
    careful = trackers._Careful("tensorboard", tracker, Outlet(tmp_path, clock))
    for step in range(1, 5):
        careful(f"at step {step}", lambda tracker: tracker.scalars(0, {}))
        clock.seconds += PATIENCE / 2 + 1
    careful.close(failed=False)
    assert len(tracker.got) == 3 and len(caplog.messages) == 3
    for word, message in zip(("tries again", "left off", "missed: 4"), caplog.messages, strict=True):
        assert word in message


@pytest.mark.parametrize("command", ["check", "pretrain"])
def test_a_tracker_that_is_not_installed_is_named_with_its_extra(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "wandb" else find(name))
    result = CliRunner().invoke(main.app, [command, str(recipe_file)])
    assert isinstance(result.exception, SetupError)
    assert "track.trackers: wandb is not installed" in str(result.exception)
    assert "pip install 'lasptrain[wandb]'" in str(result.exception)


def test_a_tracker_named_twice_or_unknown_is_refused(recipe_file: Path) -> None:
    for value in ("[wandb, wandb]", "mlflow", "[tensorboard, comet]"):
        with pytest.raises(RecipeError, match=r"track\.trackers"):
            load(recipe_file, [f"track.trackers={value}"])
    assert load(recipe_file, ["track.trackers=[]"]).track.trackers == ()


def test_signals_of_health_change_nothing_in_training(group: None, recipe_file: Path, tmp_path: Path) -> None:
    losses = []
    for every in (0, 1):
        run = tmp_path / f"every-{every}"
        run.mkdir()
        options = [f"track.health_every={every}", "track.trackers=[]", "train.steps=4", "eval.tasks=[]"]
        train.train(load(recipe_file, [*options, "train.segment=64"]), run)
        losses.append([(record["loss"], record["grad_norm"]) for record in read_metrics(run)])
        assert len(read_metrics(run, "health")) == 4 * every
        assert not (run / "tensorboard").exists()
    assert losses[0] == losses[1]
