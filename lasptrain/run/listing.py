"""The runs in a folder: where each stands, from what it has left there. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from lasptrain import files
from lasptrain.errors import LaspError
from lasptrain.run import folder as runs
from lasptrain.run.metrics import STATUS, last_loss

SILENT = "ended without a word"


class Listed(NamedTuple):
    """A run: `state` is running, finished, stopped or failed, or broken where its files cannot be read.

    `step` of `steps`, `loss`, `tokens_per_s`, and `checkpoint`, the newest on disk, are None where there is none yet.
    """

    name: str
    state: str
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    checkpoint: int | None = None
    remark: str = ""


def listing(folder: Path) -> tuple[list[Listed], list[str]]:
    """Return the runs in a folder, or that it is, by name, and the names of what else is there. Raises OSError."""
    if (folder / runs.RECIPE).is_file():
        return [_looked_at(folder)], []
    entries = sorted(folder.iterdir())
    found = [path for path in entries if (path / runs.RECIPE).exists() or (path / STATUS).exists()]
    return [_looked_at(path) for path in found], [path.name for path in entries if path not in found]


def _looked_at(run: Path) -> Listed:
    try:
        return _listed(run)
    except LaspError as error:
        return Listed(run.name, "broken", remark=str(error).splitlines()[0])
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        where = getattr(error, "filename", None) or run
        return Listed(run.name, "broken", remark=f"{where}: {getattr(error, 'strerror', None) or error}")


def _listed(run: Path) -> Listed:
    recipe, status = runs.recipe_of(run), _status(run)
    state, remark = _state(status, runs.in_use(run))
    steps = runs.committed(run)
    return Listed(
        run.name,
        state,
        _number(status, "step"),
        recipe.train.steps,
        last_loss(run),
        _number(status, "tokens_per_s"),
        steps[0] if steps else None,
        remark,
    )


def _status(run: Path) -> dict[str, Any]:
    """Return the contents of status.json, {} where a run has not begun to train. Raises ValueError, OSError."""
    try:
        status = json.loads(files.read(run / STATUS, own=True))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        status = None
    if not isinstance(status, dict):
        raise ValueError(f"{STATUS} is damaged; the next start writes it anew")
    return status


def _state(status: dict[str, Any], in_use: bool) -> tuple[str, str]:
    """Return the state of a run and a remark on it: what is recorded, but whoever writes it may have been killed."""
    recorded, remark = str(status.get("state", "")), str(status.get("last_error", ""))
    if in_use:
        return "running", str(status.get("straggler", ""))
    if recorded in ("finished", "stopped", "failed"):
        return recorded, "" if recorded == "finished" else remark.splitlines()[-1] if remark else ""
    if recorded == "ended by Stopped" or not status:
        return "stopped", "" if status else f"has no {STATUS}"
    return "failed", recorded if recorded.startswith("ended by") else SILENT


def _number(status: dict[str, Any], key: str) -> Any:
    """Return a number in status.json. Raises ValueError where it is something else."""
    value = status.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ValueError(f"{STATUS}: {key}: found {value!r}; expected a number")
    return value
