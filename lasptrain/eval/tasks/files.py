"""The user's own questions: RULER's rows, SQuAD's articles, or JSON lines of prompts and answers."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_tools.tokenizer import Tokenizer
from lasptrain.console.stdio import argument
from lasptrain.errors import DataError, RecipeError
from lasptrain.eval.score import METRICS
from lasptrain.eval.tasks.sample import Encoder, PromptDraft, Question, Sample, written
from lasptrain.files import sha256

BUDGETS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}  # RULER's, by the start of a task's name
SQUAD_BUDGET, USUAL_BUDGET = 32, 64
SUBSETS = ("validation", "test")  # names that RULER gives to the files of all its tasks
LARGEST = 1 << 30  # tokens
COUNTS = ("length", "budget")  # keys of a row with numbers of tokens
TEXTS = ("answer_prefix", "gap", "metric")


@dataclass(frozen=True)
class Row:
    """One question of a file."""

    prompt: str
    references: tuple[str, ...]
    budget: int
    metric: str
    length: int | None = None  # what the file says
    own_gap: str | None = None  # between prompt and answer, where the file says it
    ruler: dict[str, Any] | None = None  # what RULER's predictions repeat of its rows

    @property
    def gap(self) -> str:
        """Text between prompt and answer: a space, unless there is one."""
        return self.own_gap if self.own_gap is not None else "" if self.prompt[-1:].isspace() else " "


@dataclass(frozen=True)
class File:
    """A file of questions that has been looked through: each of its rows can be asked and scored."""

    path: Path
    name: str  # in tables, none of a task: the end of the path, as long as tells it from others
    length: int  # RULER's target, if the path says it, else the power of two that holds its longest row with the answer
    is_target: bool
    is_ruler: bool  # every row is
    rows: int
    sha256: str

    def count(self, most: int | None) -> int:
        """Number of rows that are asked: all, or the first `most`."""
        return self.rows if most is None else min(self.rows, most)


def open_files(paths: Sequence[Path], tokenizer: Tokenizer) -> tuple[File, ...]:
    """The files, each looked through before any is asked.

    Raises RecipeError where one is given twice, has no rows, or has one that cannot be scored.
    """
    real = [os.path.realpath(path) for path in paths]
    for number, path in enumerate(paths):
        if real[number] in real[:number]:
            raise RecipeError(f"--file: found {path} twice; expected each file once")
    try:
        found = [_looked_through(_absolute(path), tokenizer) for path in paths]
    except DataError as error:
        raise RecipeError(f"--file: {error}") from None
    names = _names([(file.path, file.length) for file in found])
    return tuple(replace(file, name=name) for file, name in zip(found, names, strict=True))


def _absolute(path: Path) -> Path:
    whole = path.resolve() if ".." in path.parts else path.absolute()  # a link's own name is its name
    return Path(argument("--file", str(whole)))


def _looked_through(path: Path, tokenizer: Tokenizer) -> File:
    count, longest, is_ruler = 0, 0, True
    for row in rows(path):
        size = row.length or asked_of(row, tokenizer)[0]
        count, longest, is_ruler = count + 1, max(longest, size), is_ruler and row.ruler is not None
    if not count:
        raise DataError(f"{path}: found nothing to ask; expected at least one row")
    target = _target(path)
    fits = target is not None and target >= longest
    length = target if target is not None and fits else _power(longest)
    return File(path, "", length, fits, is_ruler, count, sha256(path))


def _target(path: Path) -> int | None:
    """RULER keeps what it made for a `max_seq_length` in LENGTH/data/TASK/validation.jsonl."""
    found = re.fullmatch(r".*/0*([1-9]\d{0,9})/(?:data/)?[^/]+/[^/]+", path.as_posix())
    return int(found[1]) if found and path.stem in SUBSETS else None


def _names(files: Sequence[tuple[Path, int]]) -> list[str]:
    """The end of each path: its file, with the folder where RULER's layout needs it; more where two would share a cell.

    A name without a dot is none either, as it could be a task's.
    """
    parts = [2 if path.stem in SUBSETS or not path.suffix else 1 for path, _ in files]
    while True:
        names = [Path(*path.parts[-count:]).as_posix() for (path, _), count in zip(files, parts, strict=True)]
        cells = [(name, length) for name, (_, length) in zip(names, files, strict=True)]
        taken = Counter(cells)
        if max(taken.values(), default=1) == 1:
            return names
        parts = [count + (taken[cell] > 1) for cell, count in zip(cells, parts, strict=True)]


def task_name(file: Path) -> str:
    """RULER keeps rows in TASK/validation.jsonl; any other file is its own task."""
    return file.parent.name if file.stem in SUBSETS and file.parent.name else file.stem


def rows(file: Path) -> Iterator[Row]:
    """The questions of a file, in its order. Raises DataError naming the line or key that does not fit."""
    try:
        if file.suffix == ".jsonl":
            with file.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _row(_json(line, number), task_name(file), f"{file}:{number}")
        else:
            yield from _squad(json.loads(file.read_text(encoding="utf-8")), file)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read: {error}; expected .jsonl, or SQuAD's .json") from None


def _json(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from None


def _row(row: Any, task: str, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{where}: found {type(row).__name__}; expected an object")
    row = {key: value for key, value in row.items() if value is not None}
    ruler = "outputs" in row
    prompt = row.get("input" if ruler else "prompt")
    answers = row.get("outputs") if ruler else row.get("answers", row.get("answer"))
    answers = [answers] if isinstance(answers, str) else answers
    if not _can_be_asked(prompt, answers):
        raise DataError(
            f"{where}: found keys {', '.join(row) or 'none'}; expected input and outputs (RULER), or prompt and answers"
            ", as texts"
        )
    family = task.split("_")[0]
    _check(row, where, ruler)
    metric = row.get("metric", "match_part" if family == "qa" else "match_all")
    if metric not in METRICS:
        raise DataError(f"{where}: metric {metric!r} is unknown; expected one of {', '.join(METRICS)}")
    again = {key: row[key] for key in ("index",) if key in row} | {
        "outputs": answers,
        "others": row.get("others", {}),
        "truncation": row.get("truncation", -1),
        "length": row.get("length", -1),
    }
    return Row(
        prompt + row.get("answer_prefix", ""),
        tuple(answers),
        row.get("budget", BUDGETS.get(family, USUAL_BUDGET)),
        metric,
        row.get("length"),
        row.get("gap"),
        again if ruler else None,
    )


def _check(row: dict[str, Any], where: str, ruler: bool) -> None:
    """Raises DataError at the first key whose value is of another kind than it must be."""
    fits = {key: isinstance(row[key], str) for key in TEXTS if key in row}
    fits |= {key: type(row[key]) is int and 1 <= row[key] <= LARGEST for key in COUNTS if key in row}
    if ruler and "others" in row:
        fits["others"] = isinstance(row["others"], dict)
    for key, right in fits.items():
        if not right:
            wanted = "text" if key in TEXTS else f"a number from 1 to {LARGEST:,}" if key in COUNTS else "an object"
            raise DataError(f"{where}: {key}: found {row[key]!r}; expected {wanted}")


def _can_be_asked(prompt: Any, answers: Any) -> bool:
    """True if they are texts, in characters that a tokenizer takes, and there is something to answer."""
    if not isinstance(prompt, str) or not isinstance(answers, list) or not answers:
        return False
    if not all(isinstance(answer, str) and answer.strip() for answer in answers):
        return False
    "".join([prompt, *answers]).encode()
    return True


def _squad(content: Any, file: Path) -> Iterator[Row]:
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    if answers := list(dict.fromkeys(answer["text"] for answer in question["answers"])):
                        prompt = f"{paragraph['context']}\n\nQuestion: {question['question']}\nAnswer:"
                        if not _can_be_asked(prompt, answers):
                            raise DataError(f"{file}: found answers {answers!r}; expected texts")
                        yield Row(prompt, tuple(answers), SQUAD_BUDGET, "f1")
    except (KeyError, TypeError) as error:
        raise DataError(f"{file}: not in SQuAD's form (data, paragraphs, qas, answers): {error!r} is missing") from None


def asked_of(row: Row, tokenizer: Tokenizer) -> tuple[int, Sample]:
    """The power of two that holds a row with its answer, by the file's word or the tokens it has, and its sample."""
    gap = row.gap
    shown = row.references if row.metric == "match_all" else row.references[:1]
    question = Question(gap + ", ".join(shown), row.references, row.budget, row.metric)
    sample = written(Encoder(tokenizer), PromptDraft(row.prompt, ""), question)
    return _power(row.length or len(sample.prompt) + row.budget), sample


def _power(tokens: int) -> int:
    return 1 << (tokens - 1).bit_length()
