"""The user's own questions: RULER's rows, SQuAD's articles, or JSON lines of prompts and answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from data_tools.tokenizer import Tokenizer
from lasptrain.errors import DataError
from lasptrain.eval.score import METRICS
from lasptrain.eval.tasks.sample import Draft, Encoder, Question, Sample, written

BUDGETS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}  # RULER's, by the start of a task's name
SQUAD_BUDGET, USUAL_BUDGET = 32, 64


@dataclass(frozen=True)
class Row:
    """One question of a file."""

    prompt: str
    references: tuple[str, ...]
    budget: int
    metric: str
    length: int | None = None  # what the file says
    own_gap: str | None = None  # between prompt and answer, where the file says it

    @property
    def gap(self) -> str:
        """What stands between prompt and answer: a space, unless there is one."""
        return self.own_gap if self.own_gap is not None else "" if self.prompt[-1:].isspace() else " "


def task_name(file: Path) -> str:
    """RULER keeps rows in TASK/validation.jsonl; any other file is its own task."""
    return file.parent.name if file.stem in ("validation", "test") and file.parent.name else file.stem


def rows(file: Path) -> Iterator[Row]:
    """The questions of a file, in its order. Raises DataError naming the line or key that does not fit."""
    try:
        if file.suffix == ".jsonl":
            with file.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _row(json.loads(line), task_name(file), f"{file}:{number}")
        else:
            yield from _squad(json.loads(file.read_text(encoding="utf-8")), file)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read: {error}; expected .jsonl, or SQuAD's .json") from None


def _row(row: Any, task: str, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{where}: found {type(row).__name__}; expected an object")
    ruler = "outputs" in row
    prompt = row.get("input" if ruler else "prompt")
    answers = row.get("outputs") if ruler else row.get("answers", row.get("answer"))
    answers = [answers] if isinstance(answers, str) else answers
    fits = isinstance(prompt, str) and isinstance(answers, list) and answers
    if not fits or not all(isinstance(answer, str) and answer for answer in answers or []):
        raise DataError(
            f"{where}: found keys {', '.join(row) or 'none'}; expected input and outputs (RULER), or prompt and answers"
        )
    assert isinstance(prompt, str) and answers
    family = task.split("_")[0]
    metric = row.get("metric") or ("match_part" if family == "qa" else "match_all")
    if metric not in METRICS:
        raise DataError(f"{where}: metric {metric!r} is unknown; expected one of {', '.join(METRICS)}")
    budget, length = row.get("budget", BUDGETS.get(family, USUAL_BUDGET)), row.get("length")
    return Row(prompt + row.get("answer_prefix", ""), tuple(answers), int(budget), metric, length, row.get("gap"))


def _squad(content: Any, file: Path) -> Iterator[Row]:
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    if answers := tuple(dict.fromkeys(answer["text"] for answer in question["answers"])):
                        prompt = f"{paragraph['context']}\n\nQuestion: {question['question']}\nAnswer:"
                        yield Row(prompt, answers, SQUAD_BUDGET, "f1")
    except (KeyError, TypeError) as error:
        raise DataError(f"{file}: not in SQuAD's form (data, paragraphs, qas, answers): {error!r} is missing") from None


def samples(file: Path, tokenizer: Tokenizer, count: int) -> Iterator[tuple[int, Sample]]:
    """The first `count` questions, each with its length: the file's word, or the power of two that holds its tokens."""
    for row in islice(rows(file), count):
        gap = row.gap
        question = Question(gap + ", ".join(row.references[:1]), row.references, row.budget, row.metric)
        if row.metric == "match_all":
            question = Question(gap + ", ".join(row.references), row.references, row.budget, row.metric)
        sample = written(Encoder(tokenizer), Draft(row.prompt, ""), question)
        yield row.length or 1 << (len(sample.prompt) + row.budget - 1).bit_length(), sample
