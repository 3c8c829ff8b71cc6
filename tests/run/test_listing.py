"""`lasptrain runs` says where each run stands, and names what it cannot read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lasptrain.cli.main import app
from lasptrain.errors import NumericalError, RecipeError, Stopped
from lasptrain.process.failure import failure_of, write_final_status
from lasptrain.recipe.loading import load
from lasptrain.run import folder as runs
from lasptrain.run.listing import SILENT, Listed, listing
from lasptrain.run.metrics import Metrics, last_loss

RECIPE = """
model: {arch: tnl, dim: 8, layers: 1, heads: 1, mlp: 8, vocab: 320}
data: {source: text, tokenizer: bytes, window: 64}
optim: {lr: 1e-3}
train: {steps: 9, batch: 2}
"""
ENDS = {"finished": None, "stopped": Stopped("saved", 75), "failed": NumericalError("loss nan\nexpected less")}


def make(root: Path, name: str, steps: int = 5, padding: int = 0) -> Path:
    """A run of some steps, of which the last but one is saved."""
    (root / "tiny.yaml").write_text(RECIPE)
    run = root / "runs" / name
    with runs.lock(run):
        runs.adopt(run, load(root / "tiny.yaml"))
        with Metrics(run, steps=9) as metrics:
            for step in range(1, steps + 1):
                metrics.log(step, loss=10.0 - step, tokens_per_s=1000.0 * step, **{"x" * padding: None})
            metrics.log_eval(steps, loss=99.0)
            metrics.committed(steps - 1)
    for step in (1, steps - 1):
        (run / "checkpoints" / f"step-{step}").mkdir(parents=True, exist_ok=True)
    return run


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run in each state, one that is no run, and four that are broken."""
    monkeypatch.setattr("lasptrain.run.metrics.RENEWED", -1.0)
    for state, error in ENDS.items():
        write_final_status(make(tmp_path, state), None if error is None else failure_of(0, error))
    for name in ("running", "killed"):
        file = make(tmp_path, name) / "status.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"state": "running"}))
    for name, damaged, text in (
        ("torn", "status.json", '{"state": "fin'),
        ("odd", "status.json", '{"step": "five"}'),
        ("later", "recipe.yaml", "format: 1000"),
    ):
        (make(tmp_path, name) / damaged).write_text(text)
    linked = make(tmp_path, "linked")
    (linked / "metrics.jsonl").replace(tmp_path / "elsewhere")
    (linked / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    (make(tmp_path, "unbegun", 2) / "status.json").unlink()
    (tmp_path / "runs" / "notes").mkdir()
    (tmp_path / "runs" / "x\x1b[31m.txt").touch()
    return tmp_path


def test_each_run_is_listed_with_its_state(root: Path) -> None:
    with runs.lock(root / "runs" / "running"):
        found, others = listing(root / "runs")
    assert [run.name for run in found] == sorted(run.name for run in found)
    by_name = {run.name: run for run in found}
    for state in ENDS:
        remark = {"finished": "", "stopped": "saved", "failed": "expected less"}[state]
        assert by_name[state] == Listed(state, state, 5, 9, 5.0, 5000.0, 4, remark)
    assert by_name["running"] == Listed("running", "running", 5, 9, 5.0, 5000.0, 4)
    assert by_name["killed"] == Listed("killed", "failed", 5, 9, 5.0, 5000.0, 4, SILENT)
    assert by_name["unbegun"] == Listed("unbegun", "stopped", None, 9, 8.0, None, 1, "has no status.json")
    broken = {run.name: run.remark for run in found if run.state == "broken"}
    assert broken.keys() == {"torn", "odd", "later", "linked"}
    for name, word in (("torn", "damaged"), ("odd", "step: found 'five'"), ("later", "newer"), ("linked", "metrics")):
        assert word in broken[name]
    assert others == ["notes", "x\x1b[31m.txt"]


def test_the_table_is_good_in_a_file_and_on_a_narrow_terminal(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    for environment in ({}, {"COLUMNS": "60", "FORCE_COLOR": "1", "TERM": "xterm"}):
        result = CliRunner().invoke(app, ["runs", "--json", "found.json"], env=environment)
        assert result.exit_code == 0, result.output
        lines = result.output.splitlines()
        assert sum(line.split()[:1] == ["finished"] for line in lines) == 1
        row = next(line.split() for line in lines if line.startswith("stopped"))
        assert row == ["stopped", "stopped", "5/9", "5.0000", "5,000", "4"]
        assert "no runs, 2: notes, x\\x1b[31m.txt" in lines
        assert any(line.startswith("torn: ") and "damaged" in line for line in lines)
    content = json.loads((root / "found.json").read_text())
    assert len(content["runs"]) == 10 and content["no_runs"][0] == "notes"


def test_a_folder_without_runs_and_one_that_is_a_run(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    assert "runs/notes: holds no run" in CliRunner().invoke(app, ["runs", "runs/notes"]).output
    assert "finished" in CliRunner().invoke(app, ["runs", "runs/finished"]).output
    result = CliRunner().invoke(app, ["runs", "nowhere"])
    assert isinstance(result.exception, RecipeError) and "expected a folder of runs" in str(result.exception)


def test_the_last_loss_is_found_in_a_long_file_and_after_a_resumption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lasptrain.run.metrics.TAIL", 1000)
    run = make(tmp_path, "long", 9, padding=200)
    assert (run / "metrics.jsonl").stat().st_size > 2000 and last_loss(run) == 1.0
    with Metrics(run, steps=9, start=3):
        assert last_loss(run) == 7.0  # what came later counts no more
