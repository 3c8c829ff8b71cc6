"""Metrics survive kills and resumes: readers see one record a step, of the timeline that counts."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from lasptrain.run.metrics import Metrics, duration, mfu, read_metrics


def _console(terminal: bool = False) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=terminal, width=120, soft_wrap=True, highlight=False), text


def _values(loss: float) -> dict[str, float | None]:
    return {"loss": loss, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_s": 12345.6, "mfu": None}


def test_records_are_what_was_logged(tmp_path: Path) -> None:
    with Metrics(tmp_path, steps=3, console=_console()[0]) as metrics:
        metrics.log(1, **_values(3.0))
        metrics.log_eval(1, loss=2.5)
        metrics.log(2, **_values(math.nan))
    lines = [
        json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    for record in lines:
        assert record.pop("time") > 1e9
    assert lines == [
        {"step": 1, **_values(3.0)},
        {"step": 1, "event": "eval", "loss": 2.5},
        {"step": 2, **_values(3.0), "loss": None},
    ]


def test_a_resumed_run_takes_back_later_steps(tmp_path: Path) -> None:
    def losses(event: str | None = None) -> list[tuple[int, float]]:
        return [(record["step"], record["loss"]) for record in read_metrics(tmp_path, event)]

    assert losses() == []
    with Metrics(tmp_path, steps=9, console=_console()[0]) as metrics:
        for step in range(1, 6):
            metrics.log(step, **_values(step))
        metrics.log_eval(2, loss=20)
        metrics.log_eval(4, loss=40)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    with Metrics(tmp_path, steps=9, start=3, console=_console()[0]) as metrics:
        assert losses() == [(1, 1), (2, 2), (3, 3)]
        assert losses("eval") == [(2, 20)]
        metrics.log(4, **_values(44))
        metrics.log(4, **_values(45))
        metrics.log_eval(4, loss=50)
    assert losses() == [(1, 1), (2, 2), (3, 3), (4, 45)]
    assert losses("eval") == [(2, 20), (4, 50)]
    with Metrics(tmp_path, steps=9, console=_console()[0]):  # killed before its first checkpoint
        assert losses() == []


def test_tensorboard_shows_the_same_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Files of one second are read in the order of the numbers that a process gives them, as text: 10 would precede 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    for start, factor in ((0, 1), (2, 10)):
        with Metrics(tmp_path, steps=4, start=start, console=_console()[0]) as metrics:
            for step in range(start + 1, 5):
                metrics.log(step, **_values(step * factor))
            metrics.log_eval(4, loss=7 * factor)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 30), (4, 40)]
    assert [(e.step, e.value) for e in events.Scalars("eval/loss")] == [(4, 70)]
    assert "train/mfu" not in events.Tags()["scalars"]


def test_status_says_where_the_run_is(tmp_path: Path) -> None:
    def status() -> dict[str, object]:
        record: dict[str, object] = json.loads((tmp_path / "status.json").read_text())
        del record["time"]
        return record

    with pytest.raises(ZeroDivisionError), Metrics(tmp_path, steps=9, start=4, console=_console()[0]) as metrics:
        assert status() == {"state": "running", "step": 4, "steps": 9, "committed": 4}
        metrics.log(5, **_values(1.0))
        metrics.committed(5)
        running = {"state": "running", "step": 5, "steps": 9, "committed": 5, "tokens_per_s": 12345.6}
        assert status() == running
        raise ZeroDivisionError
    assert status() == running | {"state": "ended by ZeroDivisionError"}
    Metrics(tmp_path, steps=9, start=5, console=_console()[0]).close()
    assert status()["state"] == "finished"


def test_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    console, text = _console()
    with Metrics(tmp_path, steps=100, console=console) as metrics:
        for step in range(1, 101):
            metrics.log(step, **_values(2.0))
        metrics.log_eval(100, loss=1.5)
        metrics.committed(100)
        metrics.straggler(100, "[not markup]")
    lines = text.getvalue().splitlines()
    assert lines[0].startswith("step 1/100  loss 2.0000  lr 1.00e-03  norm 0.500  12,346 tokens/s  ETA ")
    assert lines[-4].startswith("step 100/100  loss 2.0000")
    assert lines[-4].endswith("ETA 0:00")
    assert lines[-3:] == ["step 100/100  held-out loss 1.5000", "committed step 100", "step 100: [not markup]"]
    assert len(lines) < 20  # not one a step


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    console, text = _console(terminal=True)
    with Metrics(tmp_path, steps=2, console=console) as metrics:
        metrics.log(1, **_values(2.0))
        metrics.straggler(1, "above the bar")
        metrics.log(2, **_values(1.0) | {"mfu": 0.413})
    shown = text.getvalue()
    assert "above the bar" in shown
    assert "step 2/2" in shown
    assert "loss 1.0000  lr 1.00e-03  norm 0.500  12,346 tokens/s" in shown
    assert "MFU 41.3%" in shown
    assert "ETA 0:00" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor comes back


def test_other_ranks_are_silent(tmp_path: Path) -> None:
    console, text = _console()
    with Metrics(tmp_path, steps=2, is_main=False, console=console) as metrics:
        metrics.log(1, **_values(2.0))
        metrics.log_eval(1, loss=1.0)
        metrics.committed(1)
        metrics.straggler(1, "something")
    assert text.getvalue() == ""
    assert not list(tmp_path.iterdir())


def test_utilisation() -> None:
    assert mfu(50_000, 6e9, 6e14) == pytest.approx(0.5)
    assert mfu(50_000, 6e9, None) is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (90061, "1 d 01:01:01")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
