"""An evaluation from model to report, on one rank or several."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.markup import escape
from rich.table import Table

from data_tools.dataset import open_stages
from lasptrain import __version__
from lasptrain.console.progress import asking
from lasptrain.data.dataset import TokenDataset
from lasptrain.errors import DataError
from lasptrain.eval import predictions, report
from lasptrain.eval.generate import Sampling, decode
from lasptrain.eval.inference import Reader, join
from lasptrain.eval.load import Trained, load_model
from lasptrain.eval.runner import PERPLEXITY, EvalConfig, EvalRunner, Key, Record, ResultsLog, settings
from lasptrain.eval.tasks import TASKS
from lasptrain.parallel import mesh as meshes
from lasptrain.parallel.collectives import barrier
from lasptrain.process.local_ranks import on_ranks
from lasptrain.run import folder as runs
from lasptrain.run.tensorboard import write_results


def evaluate(
    run: Path, asked: EvalConfig, out: Path | None, segment: int, nproc: int | None, ruler: Path | None = None
) -> Record:
    """Run every sample that has no answer yet, write the report, and return the contents of results.json and `folder`.

    Answers to files of RULER are also written into the folder `ruler`, in the format of RULER's own programs.
    """
    if ruler is not None:
        predictions.begin(ruler, asked.files)
    ranks = nproc or torch.cuda.device_count() or 1
    if ranks > 1:
        found: Record = on_ranks(ranks, _evaluate, run, asked, out, segment, ruler)
        return found
    return _evaluate(run, asked, out, segment, ruler)


def _evaluate(run: Path, asked: EvalConfig, out: Path | None, segment: int, ruler: Path | None) -> Record:
    """Evaluate, on every rank."""
    with meshes.single_process_group():
        world = meshes.world_size()
        mesh = meshes.build(1, world)
        is_main = mesh.rank("sp") == 0
        trained = load_model(run)
        fuse = trained.recipe.train.compile and meshes.device().type == "cuda"
        reader = Reader(trained.model, mesh, segment, fuse=fuse)
        folder = out or run / "eval" / f"step-{trained.step}"
        if out is None:
            runs.refuse_links(run)
        identity = asked.identity() | {"step": trained.step, "tokenizer": trained.tokenizer.sha256}
        ledger = ResultsLog(folder, identity, is_main)
        ledger.check(asked.files)
        if ruler is not None:
            predictions.check(ruler, asked.files, ledger.records)
        done = ledger.done
        barrier()  # all have read what there is before anyone writes
        notes: list[str] = []
        dataset = _dataset(trained, notes) if set(PERPLEXITY) & set(asked.tasks) else None
        began, peak = time.perf_counter(), meshes.peak_memory(reader.device)
        with asking(*_counts(asked, done), is_main) as show:
            answers = EvalRunner(asked, trained.tokenizer, dataset, _told(reader, show))
            for record in answers.answers(reader, done, is_main, notes.append):
                if is_main:
                    ledger.add(record)
                    show(_answered(record), 1)
        peak = max(peak, meshes.peak_memory(reader.device))
        header = _header(trained, asked, reader, dataset) | {"notes": notes, "peak_bytes": peak}
        header["seconds"] = time.perf_counter() - began
        found = report.cells(ledger.records)
        if is_main:
            report.write(folder, found, header, ledger.records)
            write_results(folder, trained.step, report.scalars(found), report.rows(found))
            if ruler is not None:
                notes += predictions.write(ruler, asked.files, ledger.records)
    return {**header, "cells": found, "folder": str(folder)}


def _counts(asked: EvalConfig, done: set[Key]) -> tuple[int, int]:
    """Number of samples, as far as it is known, and of those already answered."""
    tasks = [task for task in asked.tasks if task in TASKS]
    cells = {(task, length): asked.samples for task in tasks for length in asked.lengths}
    cells |= {(file.name, file.length): file.count(asked.rows) for file in asked.files}
    answered = sum(index < cells.get((task, length), 0) for task, length, index in done)
    return sum(cells.values()), answered


def _told(reader: Reader, show: Callable[[str, int], None]) -> Callable[[Key], None]:
    """Return the function to call before each sample; from then on the reader shows how far it has read."""

    def told(key: Key) -> None:
        what, began = _label(*key), time.perf_counter()
        show(what, 0)

        def reading(done: int, total: int) -> None:
            rate = done / max(time.perf_counter() - began, 1e-9)
            show(f"{what}: {done:,} of {total:,} tokens read, {rate:,.0f} tokens/s", 0)

        reader.told = reading

    return told


def _answered(record: Record) -> str:
    found = [f"{name} {record[name]:.2f}" for name in ("score", "exact", "answer_nll") if name in record]
    key = _label(record["task"], record["length"], record["index"])
    return f"{key}: {', '.join(found)}" if found else key


def _label(task: str, length: int, index: int) -> str:
    """Label of a sample for rich: brackets in the name of a file are no markup."""
    return escape(f"{task} at {report.short(length)}, sample {index + 1}")


def _dataset(trained: Trained, notes: list[str]) -> TokenDataset | None:
    try:
        return open_stages(trained.recipe, run=trained.path).dataset
    except DataError as error:
        notes.append(f"no perplexity: {error}")
        return None


def _header(trained: Trained, asked: EvalConfig, reader: Reader, dataset: TokenDataset | None) -> Record:
    return {
        "name": trained.recipe.name,
        "step": trained.step,
        "window_trained": trained.recipe.data.window,
        "asked": settings(asked),
        "template": "base",
        "tokenizer_sha256": trained.tokenizer.sha256,
        "dataset": None if dataset is None else dataset.fingerprint,
        "sp": reader.sp,
        "segment": reader.segment,
        "compiled": reader.whole is not reader.spread,
        "dtype": str(trained.model.dtype).removeprefix("torch."),
        "versions": {"lasptrain": __version__, "torch": torch.__version__},
    }


def shown(found: Record, plot: bool) -> Iterator[Table | str]:
    """Yield tables and lines for the terminal; draw the pictures if `plot`."""
    folder, cells = Path(found["folder"]), found["cells"]
    title = f"{found['name']} after {found['step']} steps: % right, nats per answer token (samples)"
    if any(cell["task"] not in PERPLEXITY for cell in cells):
        yield report.table(cells, title)
    yield from report.by_length(cells)
    yield from report.curves(cells)
    yield from found["notes"]
    for file in report.plot(folder, cells) if plot else ():
        yield f"{file}"
    yield f"{folder / report.PAGE}  ({found['seconds']:.0f} s)"


def generate(run: Path, prompts: Sequence[str], count: int, temperature: float, top_p: float, seed: int) -> list[str]:
    """Continue each prompt by up to `count` tokens."""
    trained = load_model(run)
    reader, tokenizer = Reader(trained.model), trained.tokenizer
    pasts = [reader.read(torch.tensor([[tokenizer.bos, *tokenizer.encode(prompt)]])) for prompt in prompts]
    rows = decode(trained.model, join(pasts), count, Sampling(temperature, top_p, seed), stop=tokenizer.bos)
    return [tokenizer.decode(row) for row in rows]
