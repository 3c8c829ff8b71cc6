"""Reports of a run in training: RUN/metrics.jsonl, trackers, status.json, and a line on the terminal.

metrics.jsonl is only ever appended to, one object a line: `{"step": 7, "loss": …}` for an update,
`{"step": 10, "event": "eval", …}`, `{"step": 50, "event": "health", …}`, `{"step": 9, "event": "epoch", "epochs":
{"SOURCE": 2}}` where a step begins to read tokens again, `{"step": 9, "event": "stage", "stage": 1, …}` where one
begins a stage, whose number its updates have too, and `{"step": 4, "event": "resumed"}`, which cancels all earlier
records of later steps; behind it `{"step": 4, "event": "changed", "keys": {"optim.lr": [0.01, 0.005]}}` where the
recipe has changed since step 4 was saved. A run made with `--from` begins with `{"step": 0, "event": "origin", …}`.
Steps count finished updates. Read it with `read_metrics`.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from lasptrain import files
from lasptrain.run.outlets import Lines, Outlet
from lasptrain.run.tracker import Rows
from lasptrain.run.trackers import Trackers, made

FILE, STATUS = "metrics.jsonl", "status.json"
QUIET = 2.0  # seconds between lines where there is no terminal to redraw
RENEWED = 1.0  # seconds between renewals of status.json
TAIL = 1 << 18  # bytes at the end of metrics.jsonl in which its last update is looked for first

Value = float | int | None
Record = dict[str, Any]


class Metrics:
    """Writes the metrics of one run from step `start` on, as a context manager; silent unless it `is_main`.

    `trackers` outlive it; without any there is TensorBoard, which does not.
    """

    def __init__(
        self,
        run: Path,
        *,
        steps: int,
        start: int = 0,
        is_main: bool = True,
        console: Console | None = None,
        trackers: Trackers | None = None,
    ) -> None:
        self._run, self._steps, self._is_main = run, steps, is_main
        self._status: Record = {"state": "running", "step": start, "steps": steps, "committed": start or None}
        self._renewed = -math.inf
        if not is_main:
            return
        self._display = _Display(console or Console(soft_wrap=True, highlight=False), steps, start)
        self._lines, self._lent = Lines(run / FILE), trackers is not None
        self._trackers = trackers or Trackers({"tensorboard": made("tensorboard", run, start)})
        paths = {"terminal": Path("the terminal"), "lines": run / FILE, "status": run / STATUS}
        self._outlets = {name: Outlet(path) for name, path in paths.items()}
        if self._lines.begun:
            self._write({"step": start, "event": "resumed"})
        self._renew()

    def log(self, step: int, **values: Value) -> None:
        """Report update number `step` (1 is the first): loss, lr, grad_norm, tokens_per_s, step_time, …"""
        if not self._is_main:
            return
        self._write({"step": step, **values})
        self._plot("train", step, values)
        self._outlets["terminal"](lambda: self._display.show(step, values))
        self._status |= {"step": step, "tokens_per_s": values.get("tokens_per_s")}
        if step == self._steps or time.monotonic() - self._renewed > RENEWED:
            self._renew()

    def log_eval(self, step: int, **values: Value) -> None:
        """Report a loss on held-out windows after update `step`, and what came with it."""
        if not self._is_main:
            return
        self._write({"step": step, "event": "eval", **values})
        self._plot("eval", step, values)
        if "loss" in values:
            self._say(f"step {step}/{self._steps}  held-out loss {_number(values['loss'], '.4f')}")

    def log_health(self, step: int, **values: Value) -> None:
        """Report signals of health that were taken with update `step`."""
        if self._is_main:
            self._write({"step": step, "event": "health", **values})
            self._plot("health", step, values)

    def table(self, step: int, name: str, rows: Rows) -> None:
        """Show a table in the trackers, if it has rows."""
        if self._is_main and rows:
            self._trackers.table(step, name, rows)

    def epochs(self, step: int, begun: dict[str, int]) -> None:
        """Report that update `step` begins to read tokens of these sources again, and which epoch of each it is."""
        if not self._is_main or not begun:
            return
        self._write({"step": step, "event": "epoch", "epochs": begun})
        for source, number in begun.items():
            self._say(f"epoch {number} begins at step {step}: {source}")

    def stage(self, step: int, number: int, what: str) -> None:
        """Report that a stage begins at update `step`, and what it is."""
        if self._is_main:
            self._write({"step": step, "event": "stage", "stage": number, "what": what})
            self._say(f"stages[{number}] begins at step {step}: {what}")

    def begun(self, step: int, event: str, **values: Any) -> None:
        """Record an event at the start, after `step`: `changed` keys of the recipe, or the `origin` of the weights."""
        if self._is_main:
            self._write({"step": step, "event": event, **values})

    def log_bad_step(self, step: int, verdict: str, reason: str, windows: list[int], **values: Value) -> None:
        """Report the guard's verdict on update `step`, whose `windows` start at these tokens."""
        if not self._is_main:
            return
        self._write({"step": step, "event": verdict, "reason": reason, "windows": windows, **values})
        self._status["last_error"] = f"step {step}: {verdict}: {reason}"
        self._renew()
        self._say(f"step {step}: {verdict}: {reason}; its windows start at tokens {windows}")

    def straggler(self, step: int, what: str | None) -> None:
        """Report the rank that slows the others down after update `step`, or that none does any more."""
        if not self._is_main or (what is None) == ("straggler" not in self._status):
            return
        if what is None:
            del self._status["straggler"]
        else:
            self._status["straggler"] = what
            self._write({"step": step, "event": "straggler", "what": what})
            self._say(f"step {step}: {what}")
        self._renew()

    def committed(self, step: int | None) -> None:
        """Report `step` as the newest on disk, unless it is None or has been reported."""
        if not self._is_main or step is None or self._status["committed"] == step:
            return
        self._status["committed"] = step
        self._renew()
        self._say(f"committed step {step}")

    def close(self, state: str = "finished", *, failing: bool = False) -> None:
        """Close the display and the files; `state` goes to status.json.

        Raises ResourceError or SetupError where what has happened still cannot be written, unless training is `failing`
        with an error of its own.
        """
        if not self._is_main:
            return
        self._is_main = False
        self._status["state"] = state
        last = {"terminal": self._display.close, "lines": self._lines.flush, "status": self._renew_now}
        for name, act in last.items():
            self._outlets[name](act, last=not failing)
        self._lines.close()
        if not self._lent:
            self._trackers.close(failed=failing)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("finished" if kind is None else f"ended by {kind.__name__}", failing=kind is not None)

    def _write(self, record: Record) -> None:
        """Write and flush one line: a killed run leaves at most a torn last line. NaN and infinity are null in JSON."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._lines.add(json.dumps(finite | {"time": round(time.time(), 3)}))
        self._outlets["lines"](self._lines.flush)

    def _plot(self, group: str, step: int, values: dict[str, Value]) -> None:
        found = {f"{group}/{key}": float(value) for key, value in values.items() if value is not None}
        self._trackers.scalars(step, found)

    def _say(self, text: str) -> None:
        self._outlets["terminal"](lambda: self._display.say(text))

    def _renew(self) -> None:
        self._renewed = time.monotonic()
        self._outlets["status"](self._renew_now)

    def _renew_now(self) -> None:
        status = self._status | {"time": round(time.time(), 3)}
        files.replace(self._run / STATUS, json.dumps(status), lasting=False)


class _Display:
    """A bar and the latest numbers, redrawn on a terminal; elsewhere a line for the first, the last and some steps."""

    def __init__(self, console: Console, steps: int, start: int) -> None:
        self.console, self.steps = console, steps
        self.began, self.first = time.monotonic(), start
        self.printed = -math.inf
        steps_done = TextColumn("step {task.completed:.0f}/{task.total:.0f}")
        self.bar = Progress(steps_done, BarColumn(None), TextColumn("{task.fields[eta]}"), console=console, expand=True)
        self.task = self.bar.add_task("", total=steps, completed=start, eta="")
        self.live = Live(self.bar, console=console) if console.is_terminal else None
        if self.live:
            self.live.start()

    def show(self, step: int, values: dict[str, Value]) -> None:
        now = time.monotonic()
        eta = f"ETA {duration((now - self.began) / max(step - self.first, 1) * (self.steps - step))}"
        if self.live:
            self.bar.update(self.task, completed=step, eta=eta)
            self.live.update(Group(self.bar, Text(_describe(values), no_wrap=True, overflow="ellipsis")))
        elif step in (self.first + 1, self.steps) or now - self.printed >= QUIET:
            self.printed = now
            self.console.print(f"step {step}/{self.steps}  {_describe(values)}  {eta}", markup=False)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def close(self) -> None:
        if self.live:
            self.live.stop()


def _describe(values: dict[str, Value]) -> str:
    parts = [f"stages[{values['stage']}]"] if "stage" in values else []
    parts += [
        f"loss {_number(values.get('loss'), '.4f')}",
        f"lr {_number(values.get('lr'), '.2e')}",
        f"norm {_number(values.get('grad_norm'), '.3f')}",
        f"{_number(values.get('tokens_per_s'), ',.0f')} tokens/s",
    ]
    if values.get("mfu") is not None:
        parts.append(f"MFU {_number(values['mfu'], '.1%')}")
    return "  ".join(parts)


def _number(value: Value, form: str) -> str:
    return "-" if value is None else format(value, form)


def duration(seconds: float) -> str:
    """Seconds as m:ss, h:mm:ss or d d hh:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def mfu(tokens_per_s_per_gpu: float, flops_per_token: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation in [0, 1]: FLOP/s that the model needs ÷ the data sheet's peak; None without a peak."""
    return None if peak is None else tokens_per_s_per_gpu * flops_per_token / peak


def read_metrics(run: Path, event: str | None = None) -> list[Record]:
    """Return the records of RUN/metrics.jsonl by step: of updates, or of an `event` (`eval`); [] if there is no file.

    The last record of a step that was trained more than once counts, and none after the step a run resumed from.
    Lines torn by a kill are skipped.
    """
    return _records(run, event)


def last_loss(run: Path) -> float | None:
    """Return the loss of the newest update, None where there is none, or it was not finite. Raises OSError."""
    records = _records(run, None, TAIL) or _records(run, None)
    loss = records[-1].get("loss") if records else None
    return loss if isinstance(loss, float) else None


def _records(run: Path, event: str | None, most: int | None = None) -> list[Record]:
    """Return the records that count, of the last `most` bytes if given."""
    if not (run / FILE).exists():
        return []
    kept: dict[int, Record] = {}
    with files.regular(run / FILE, own=True) as stream:
        if most is not None:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - most))
        lines = stream.read().splitlines()
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(record, dict):
            continue
        if record.get("event") == "resumed":
            kept = {step: other for step, other in kept.items() if step <= record["step"]}
        elif record.get("event") == event:
            kept[record["step"]] = record
    return [kept[step] for step in sorted(kept)]
