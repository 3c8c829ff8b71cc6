"""The user's own questions: RULER's rows, SQuAD's articles, or JSON lines of prompts and answers."""

from __future__ import annotations

import json
import os
import re
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_tools.fields import listed
from data_tools.tokenizer import Tokenizer
from lasptrain.console.stdio import argument
from lasptrain.errors import DataError, RecipeError
from lasptrain.eval.score import METRICS
from lasptrain.eval.tasks.sample import Encoder, PromptDraft, Question, Sample, written
from lasptrain.files import read, regular, sha256

BUDGETS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}  # RULER's, by the start of a task's name
SQUAD_BUDGET, USUAL_BUDGET = 32, 64
SUBSETS = ("validation", "test")  # names that RULER gives to the files of all its tasks
LARGEST = 1 << 30  # tokens
COUNTS = ("length", "budget")  # keys of a row with numbers of tokens
TEXTS = ("answer_prefix", "gap", "metric")
LINES = (".jsonl", ".ndjson")
LARGEST_LINE, LARGEST_FILE = 1 << 27, 1 << 28  # bytes of a question, which is in memory as a whole; of a .json
SHOWN = 60  # characters of a value that does not fit


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

    Raises RecipeError where one is given twice, DataError where one has no rows, or a row that cannot be scored.
    """
    real = [os.path.realpath(path) for path in paths]
    for number, path in enumerate(paths):
        if real[number] in real[:number]:
            raise RecipeError(f"--file: found {path} twice; expected each file once")
    try:
        found = [_looked_through(_absolute(path), tokenizer) for path in paths]
    except DataError as error:
        raise DataError(f"--file: {error}") from None
    names = _names([(file.path, file.length) for file in found])
    return tuple(replace(file, name=name) for file, name in zip(found, names, strict=True))


def _absolute(path: Path) -> Path:
    whole = os.path.realpath(path) if ".." in path.parts else path.absolute()  # a link's own name is its name
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
    """The questions of a file, in its order. Raises DataError naming the row, and the key, that does not fit."""
    lines = file.suffix.lower() in LINES
    try:
        yield from _lines(file) if lines else _squad(_parsed(read(file, LARGEST_FILE), f"{file}"), file)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{file}: cannot be read: {reason}; expected {', '.join(LINES)}, or SQuAD's .json") from None


def _lines(file: Path) -> Iterator[Row]:
    with regular(file) as stream:
        for number, line in enumerate(iter(lambda: stream.readline(LARGEST_LINE + 1), b""), 1):
            where = f"{file}:{number}"
            if len(line) > LARGEST_LINE:
                raise DataError(f"{where}: more than {LARGEST_LINE:,} bytes in a line; expected one question in each")
            if line.removeprefix(BOM_UTF8).strip():
                yield _row(_parsed(line, where), task_name(file), where)


def _parsed(content: bytes, where: str) -> Any:
    """Parse JSON. Raises DataError for what is none, or is nested too deep."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start} is not UTF-8; expected JSON in UTF-8") from None
    except ValueError as error:
        raise DataError(f"{where}: {error}; expected JSON") from None
    except RecursionError:
        raise DataError(f"{where}: nested too deep; expected a question") from None


def _row(row: Any, task: str, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{where}: found {type(row).__name__}; expected an object")
    row = {key: value for key, value in row.items() if value is not None}
    ruler = "outputs" in row
    prompt = "input" if ruler else "prompt"
    answers = "outputs" if ruler else "answers" if "answers" in row else "answer"
    if prompt not in row or answers not in row:
        expected = "input and outputs (RULER), or prompt and answers"
        raise DataError(f"{where}: found keys {listed(row)}; expected {expected}")
    family = task.split("_")[0]
    _check(row, where, prompt, ruler)
    references = _answers(row[answers], where, answers)
    metric = row.get("metric", "match_part" if family == "qa" else "match_all")
    if metric not in METRICS:
        raise DataError(f"{where}: metric: found {_shown(metric)}; expected one of {', '.join(METRICS)}")
    again = {key: row[key] for key in ("index",) if key in row} | {
        "outputs": list(references),
        "others": row.get("others", {}),
        "truncation": row.get("truncation", -1),
        "length": row.get("length", -1),
    }
    return Row(
        row[prompt] + row.get("answer_prefix", ""),
        references,
        row.get("budget", BUDGETS.get(family, USUAL_BUDGET)),
        metric,
        row.get("length"),
        row.get("gap"),
        again if ruler else None,
    )


def _check(row: dict[str, Any], where: str, prompt: str, ruler: bool) -> None:
    """Raises DataError at the first key whose value is of another kind than it must be."""
    for key in (prompt, *TEXTS):
        if key in row:
            _text(row[key], where, key)
    for key in COUNTS:
        if key in row and not (type(row[key]) is int and 1 <= row[key] <= LARGEST):
            expected = f"a number from 1 to {LARGEST:,}"
            raise DataError(f"{where}: {key}: found {_shown(row[key])}; expected {expected}")
    if ruler and not isinstance(row.get("others", {}), dict):
        raise DataError(f"{where}: others: found {_shown(row['others'])}; expected an object")


def _answers(value: Any, where: str, key: str) -> tuple[str, ...]:
    """Return the answers, one or several. Raises DataError where one is no text, or there is nothing to answer."""
    answers = value if isinstance(value, list) else [value]
    for answer in answers:
        _text(answer, where, key)
    if not answers or not all(answer.strip() for answer in answers):
        raise DataError(f"{where}: {key}: found {_shown(value)}; expected at least one answer, none of them blank")
    return tuple(answers)


def _text(value: Any, where: str, key: str) -> str:
    """Return a text. Raises DataError for anything else, and for characters that no tokenizer takes."""
    if not isinstance(value, str):
        raise DataError(f"{where}: {key}: found {_shown(value)}; expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        found = f"a lone surrogate, character {error.start}"
        raise DataError(f"{where}: {key}: found {found}; expected Unicode") from None
    return value


def _shown(value: Any) -> str:
    found = repr(value) if not isinstance(value, dict | list) else json.dumps(value)
    return found if len(found) <= SHOWN else f"{found[:SHOWN]}…"


def _squad(content: Any, file: Path) -> Iterator[Row]:
    """The answered questions of a file in SQuAD's form."""
    for article, outer in _members(content, "data", f"{file}: "):
        for paragraph, inner in _members(article, "paragraphs", f"{outer}."):
            for question, where in _members(paragraph, "qas", f"{inner}."):
                found = [_field(answer, "text", place) for answer, place in _members(question, "answers", f"{where}.")]
                if answers := _answers(list(dict.fromkeys(found)), where, "answers") if found else ():
                    asked = f"Question: {_field(question, 'question', where)}\nAnswer:"
                    yield Row(f"{_field(paragraph, 'context', inner)}\n\n{asked}", answers, SQUAD_BUDGET, "f1")


def _members(content: Any, key: str, where: str) -> Iterator[tuple[Any, str]]:
    """Yield the members of a list under a key, each with its place. Raises DataError where there is no such list."""
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise DataError(f"{where}{key}: found no list; expected SQuAD's form (data, paragraphs, qas, answers)")
    yield from ((member, f"{where}{key}[{number}]") for number, member in enumerate(found))


def _field(content: Any, key: str, where: str) -> str:
    return _text(content.get(key) if isinstance(content, dict) else None, where, key)


def asked_of(row: Row, tokenizer: Tokenizer) -> tuple[int, Sample]:
    """The power of two that holds a row with its answer, by the file's word or the tokens it has, and its sample."""
    gap = row.gap
    shown = row.references if row.metric == "match_all" else row.references[:1]
    question = Question(gap + ", ".join(shown), row.references, row.budget, row.metric)
    sample = written(Encoder(tokenizer), PromptDraft(row.prompt, ""), question)
    return _power(row.length or len(sample.prompt) + row.budget), sample


def _power(tokens: int) -> int:
    return 1 << (tokens - 1).bit_length()
