"""Answers to RULER's rows in TASK.jsonl, as its `pred/call_api.py` writes them for its `eval/evaluate.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lasptrain.errors import RecipeError, SetupError
from lasptrain.eval.tasks.files import File, rows, task_name
from lasptrain.files import whole

Record = dict[str, Any]


def begin(folder: Path, files: Sequence[File]) -> None:
    """Make the folder. Raises RecipeError where that fails, a file is not RULER's, or two are of one task."""
    if not files:
        raise RecipeError("--ruler-predictions: found no --file; expected files of RULER's rows")
    taken: dict[Path, File] = {}
    for file in files:
        if not file.is_ruler:
            raise RecipeError(f"--ruler-predictions: {file.path} has rows without input and outputs; expected RULER's")
        target = _target(folder, file)
        if (other := taken.setdefault(target, file)) is not file:
            found = f"--ruler-predictions: {other.path} and {file.path} would both be {target}"
            raise RecipeError(f"{found}; expected one file of a task")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"--ruler-predictions: {folder}: {error.strerror}; expected a folder") from None


def check(folder: Path, files: Sequence[File], records: Sequence[Record]) -> None:
    """Raise SetupError where writing would replace anything but the present answers."""
    for file in files:
        target = _target(folder, file)
        try:
            found = set(target.read_text(encoding="utf-8").splitlines()) if target.exists() else set()
        except (OSError, ValueError) as error:
            raise SetupError(f"--ruler-predictions: {target}: {error}; expected another folder") from None
        if found and not found <= set(_lines(file, records)):
            raise SetupError(f"--ruler-predictions: {target}: holds something else; expected another folder")


def write(folder: Path, files: Sequence[File], records: Sequence[Record]) -> list[str]:
    """Write the answers to each file's rows, in their order; return a line for each file with their number."""
    notes = []
    for file in files:
        target = _target(folder, file)
        with whole(target) as new, new.open("w", encoding="utf-8") as out:
            count = sum(out.write(f"{line}\n") > 0 for line in _lines(file, records))
        notes.append(f"{target}: {count} of {file.rows} rows")
    return notes


def _target(folder: Path, file: File) -> Path:
    return folder / f"{task_name(file.path)}.jsonl"


def _lines(file: File, records: Sequence[Record]) -> Iterator[str]:
    said = {r["index"]: r["prediction"] for r in records if (r["task"], r["length"]) == (file.name, file.length)}
    for number, row in enumerate(rows(file.path) if said else ()):
        if number in said and row.ruler is not None:
            yield json.dumps({"index": number, "pred": said[number], "input": row.prompt} | row.ruler)
