"""Runs all samples of an evaluation and resumes where it was stopped: every answer is a line in samples.jsonl.

Each prompt is read once; from that snapshot its gold answer is scored, in one forward, and an answer is generated.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch

from data_tools.tokenizer import Tokenizer
from lasptrain.data.dataset import Split, TokenDataset
from lasptrain.errors import DataError, RecipeError, SetupError
from lasptrain.eval import perplexity
from lasptrain.eval.generate import decode
from lasptrain.eval.inference import Reader
from lasptrain.eval.score import METRICS
from lasptrain.eval.tasks import TASKS
from lasptrain.eval.tasks.files import File, asked_of, rows
from lasptrain.eval.tasks.sample import Sample, SampleRequest
from lasptrain.files import replace

T = TypeVar("T")
Record = dict[str, Any]
Say = Callable[[str], None]

SAMPLES = "samples.jsonl"
BY_POSITION, VS_CONTEXT = "ppl_by_position", "ppl_vs_context"
PERPLEXITY = (BY_POSITION, VS_CONTEXT)
SHOWN = 200  # characters of a prompt's end that are kept


@dataclass(frozen=True)
class EvalConfig:
    """Tasks, lengths and files of an evaluation, and the numbers that define its samples."""

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int = 10  # of each task and length
    depths: int = 10
    seed: int = 0
    control: bool = False  # also with the evidence for the answer removed
    text: tuple[str, ...] = ()  # sentences for haystacks
    files: tuple[File, ...] = ()
    rows: int | None = None  # the first of each file; all if not given

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in TASKS and task not in PERPLEXITY]
        if unknown:
            raise RecipeError(f"--tasks: found {unknown[0]!r}; expected some of {', '.join((*TASKS, *PERPLEXITY))}")

    def covers(self, task: str, length: int) -> bool:
        """True if an answer at this task and length belongs to this evaluation."""
        if task in TASKS:
            return task in self.tasks and length in self.lengths
        return task in self.tasks or (task, length) in {(file.name, file.length) for file in self.files}

    def identity(self) -> Record:
        """Settings that answers depend on, besides the model and the choice of tasks and lengths."""
        text = hashlib.sha256("\n".join(self.text).encode()).hexdigest() if self.text else None
        return {"seed": self.seed, "depths": self.depths, "text": text, "control": self.control}


Key = tuple[str, int, int]  # task or file, length, index
KEYS = ("task", "length", "index")


@dataclass(frozen=True)
class EvalRunner:
    """Runs the samples in order; `dataset` gives the documents for perplexity, from its validation split.

    `told` is called before each sample.
    """

    asked: EvalConfig
    tokenizer: Tokenizer
    dataset: TokenDataset | None = None
    told: Callable[[Key], None] = lambda key: None

    def answers(self, reader: Reader, done: set[Key], is_main: bool, say: Say) -> Iterator[Record]:
        """Yield records of samples not in `done`, on the main rank; empty ones on others. Collective over ranks."""
        for task in dict.fromkeys(self.asked.tasks):
            for length in dict.fromkeys(self.asked.lengths) if task in TASKS else ():
                yield from self._cell(reader, task, length, done, is_main, say)
            if task in PERPLEXITY:
                yield from self._perplexity(reader, task, done, say)
        for file in self.asked.files:
            yield from self._file(reader, file, done, is_main)

    def _unanswered(self, task: str, length: int, items: Iterable[T], done: set[Key]) -> Iterator[tuple[Key, T]]:
        """Yield the items whose key is not in `done`, each with its key, which is told."""
        for index, item in enumerate(items):
            if (key := (task, length, index)) not in done:
                self.told(key)
                yield key, item

    def _cell(
        self, reader: Reader, task: str, length: int, done: set[Key], is_main: bool, say: Say
    ) -> Iterator[Record]:
        asked = self.asked
        for key, index in self._unanswered(task, length, range(asked.samples), done):
            try:
                sample = TASKS[task](SampleRequest(self.tokenizer, length, index, asked.seed, asked.depths, asked.text))
            except RecipeError as error:
                say(f"{task} not run: {error}")
                return
            yield _record(key) | answer(reader, self.tokenizer, sample, asked.control, is_main)

    def _file(self, reader: Reader, file: File, done: set[Key], is_main: bool) -> Iterator[Record]:
        source = {"file": str(file.path), "sha256": file.sha256, "rows": file.rows}
        for key, row in self._unanswered(file.name, file.length, islice(rows(file.path), self.asked.rows), done):
            size, sample = asked_of(row, self.tokenizer)
            found = answer(reader, self.tokenizer, sample, self.asked.control, is_main)
            yield _record(key) | source | {"up_to": file.length if file.is_target else size} | found

    def _perplexity(self, reader: Reader, task: str, done: set[Key], say: Say) -> Iterator[Record]:
        length = max(self.asked.lengths)
        found = []
        if self.dataset is not None:
            split = self.dataset.split("validation")
            if not isinstance(split, Split):
                say(f"{task} not run: the held-out text is a mixture; expected one source")
                return
            found = perplexity.enough_documents(split, self.dataset.bos, length, self.asked.samples)
        if not found:
            say(f"{task} not run: no held-out document has {perplexity.LEAST:,} tokens")
        for key, document in self._unanswered(task, len(found[0]) if found else 0, found, done):
            began = time.perf_counter()
            if task == BY_POSITION:
                values = {str(end): value for end, (value, _) in perplexity.by_position(reader, document).items()}
            else:
                found_at = perplexity.against_context(reader, document)
                values = {str(context): value for context, value in found_at.items()}
            yield _record(key) | {"tokens": len(document), "nats": values, "seconds": time.perf_counter() - began}


def _record(key: Key) -> Record:
    return dict(zip(KEYS, key, strict=True))


def _key(record: Record) -> Key:
    return record["task"], record["length"], record["index"]


def answer(reader: Reader, tokenizer: Tokenizer, sample: Sample, control: bool, is_main: bool) -> Record:
    """Run a sample and return its record. Every rank reads; the main one scores and generates."""
    began = time.perf_counter()
    past = reader.read(torch.tensor([sample.prompt]))
    seconds = time.perf_counter() - began
    other = None
    if control and sample.control:
        other = reader.read(torch.tensor([sample.control]))
    if not is_main:
        return {}
    nats, hits = reader.score(past, sample.inputs, sample.labels)
    record: Record = {
        "tokens": len(sample.prompt),
        "depth": sample.depth,
        "distance": sample.distance,
        "answer_nll": float(nats.mean()),
        "accuracy": float(hits.double().mean()),
        "exact": float(hits.all()),
        "seconds": seconds,
        "prompt_end": tokenizer.decode(sample.prompt[-SHOWN:])[-SHOWN:],
    }
    if other is not None:
        record["control_nll"] = float(reader.score(other, sample.inputs, sample.labels)[0].mean())
    if sample.references:
        prediction = tokenizer.decode(decode(reader.model, past, sample.budget, stop=tokenizer.bos)[0])
        score = METRICS[sample.metric](prediction, sample.references)
        record |= {"metric": sample.metric, "score": score, "prediction": prediction, "references": sample.references}
    return record


class ResultsLog:
    """The answers so far, in FOLDER/samples.jsonl, after a first line with the model and settings they belong to."""

    def __init__(self, folder: Path, identity: Record, is_main: bool = True):
        """Open the log. Raises SetupError where the folder has answers of another model or other settings."""
        self.file = folder / SAMPLES
        present = self._read()
        if present and present[0].get("identity") != json.loads(json.dumps(identity)):
            found = f"{self.file}: holds answers under {present[0].get('identity')}, now {identity}"
            raise SetupError(f"{found}; use another --out")
        self._answers = {_key(record): record for record in present[1:]}
        self._is_main = is_main
        if is_main:
            folder.mkdir(parents=True, exist_ok=True)
            lines = [{"identity": identity}, *self.records]  # without a line that a kill has torn
            replace(self.file, "".join(json.dumps(line) + "\n" for line in lines))

    def _read(self) -> list[Record]:
        """Read the lines, but for one that a kill has torn."""
        lines: list[Record] = []
        try:
            for number, line in enumerate(self.file.read_bytes().split(b"\n"), 1):
                try:
                    found = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if not isinstance(found, dict) or (lines and not set(KEYS) <= found.keys()):
                    raise DataError(f"{self.file}:{number}: found no answer; expected those of an earlier evaluation")
                lines.append(found)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise DataError(f"{self.file}: {error.strerror}; expected answers of an earlier evaluation") from None
        return lines

    @property
    def records(self) -> list[Record]:
        """The answers, one for each sample."""
        return list(self._answers.values())

    @property
    def done(self) -> set[Key]:
        return set(self._answers)

    def check(self, files: Sequence[File]) -> None:
        """Raise SetupError where there are answers to earlier contents of a file of that path or name."""
        for file in files:
            for record in self.records:
                same = record.get("file") == str(file.path) or _key(record)[:2] == (file.name, file.length)
                if same and record.get("sha256") != file.sha256:
                    found = f"{self.file}: holds answers to other rows than {file.path} has now"
                    raise SetupError(f"{found}; expected the file as it was, or another --out")

    def add(self, record: Record) -> None:
        """Add an answer and append it to the file at once."""
        self._answers[_key(record)] = record
        if self._is_main:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def settings(asked: EvalConfig) -> Record:
    """Settings of the evaluation for JSON; of the user's text only its digest."""
    return asdict(asked) | asked.identity() | {"files": [str(file.path) for file in asked.files]}
