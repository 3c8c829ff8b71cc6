"""`lasptrain bench longest`: the longest window that trains, by data parallelism, recomputation and sharing.

The LASP paper's table, on this machine's ranks: a window per rank (`off`), one window over all ranks in one segment
(`on`), and the same in as many segments as it takes (`streaming`). A window counts if two updates of it ran, the second
with the optimizer's states in place. Windows are tried upwards from one that is almost certain to fit, and below it
only where that fails.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

from data_tools.dataset import open_dataset
from lasptrain import train
from lasptrain.bench.steps import reset, shared, unshared
from lasptrain.cost import plan
from lasptrain.errors import ResourceError
from lasptrain.parallel import mesh
from lasptrain.parallel.collectives import all_reduce_max
from lasptrain.parallel.mesh import device_name
from lasptrain.process.local_ranks import Failure, trials
from lasptrain.recipe.resolve import resolve_vocabulary
from lasptrain.recipe.schema import Recipe
from lasptrain.training.job import build

KINDS = ("ddp", "zero3")
MODES = ("none", "full")
SHARING = ("off", "on", "streaming")
SHARES = (0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)  # of the predicted window
LOWER = (0.4, 0.6)  # tried where the first of SHARES fails
GRAIN = 1024  # tokens of a slice
UPDATES = 2


class Form(NamedTuple):
    """One way to train a window."""

    kind: str
    recompute: str
    sharing: str


@dataclass(frozen=True)
class Cell:
    """Result of a form: the longest `window` that ran, 0 if none; `failed` if a longer one did not run."""

    form: Form
    window: int = 0
    memory: int = 0  # peak, bytes
    failed: bool = False
    failure: str | None = None


@dataclass(frozen=True)
class Results:
    """All cells, and the device they were measured on."""

    device: str
    ranks: int
    cells: list[Cell]
    cut: bool = False  # time ran out


def forms() -> list[Form]:
    """Return all forms, in the order of the table."""
    return [Form(kind, mode, sharing) for kind in KINDS for mode in MODES for sharing in SHARING]


def measure(
    recipe: Recipe, ranks: int, most: int, capacity: int | None, seconds: float, chosen: Sequence[Form]
) -> Iterator[Results]:
    """Find the longest windows with one process per rank on this machine; yield all results so far after each trial.

    Args:
        most: tokens of the longest window that is streamed.
        capacity: bytes of each rank, to set a lower limit than the GPU's; a CPU has no other limit.
        seconds: after which no trial starts.
    """
    until = time.monotonic() + seconds
    blank = found = Results("", ranks, [Cell(form) for form in chosen])

    def given(forms: Sequence[Form], shares: Callable[[Form], Sequence[float]]) -> list[tuple[Any, ...]]:
        return [(recipe, tuple(form), share, most, capacity) for form in forms for share in shares(form)]

    for found in _tried(blank, given(chosen, _shares), until):
        yield found
    none = [cell.form for cell in found.cells if cell.failed and not cell.window]
    if none and not found.cut:
        yield from _tried(found, given(none, lambda form: LOWER), until)


def _tried(found: Results, given: Sequence[tuple[Any, ...]], until: float) -> Iterator[Results]:
    """Yield results after each further window, of each form from short to long until one fails."""
    tried = trials(found.ranks, _trial, given, skip_after=lambda failed, other: bool(failed[1] == other[1]))
    for number, ((_, form, *_), result) in enumerate(tried, 1):
        over = isinstance(result, Failure)
        cut = time.monotonic() > until and any(not (over and other[1] == form) for other in given[number:])
        found = replace(_with(found, Form(*form), result), cut=cut)
        yield found
        if cut:
            tried.close()
            return


def _shares(form: Form) -> Sequence[float]:
    return (0.25, 1.0) if form.sharing == "streaming" else SHARES


def _with(results: Results, form: Form, result: Any | Failure) -> Results:
    (index,) = (number for number, cell in enumerate(results.cells) if cell.form == form)
    cell, device = results.cells[index], results.device
    if isinstance(result, Failure):
        cell = replace(cell, failed=True, failure=cell.failure or result.reason)
    else:
        device, window, memory = result
        cell = replace(cell, window=window, memory=memory)
    return replace(results, device=device, cells=[*results.cells[:index], cell, *results.cells[index + 1 :]])


def _trial(
    recipe: Recipe, form: tuple[str, str, str], share: float, most: int, capacity: int | None
) -> tuple[str, int, int]:
    """Train a window on every rank; return the device, the window and the peak memory in bytes."""
    device, kind = mesh.device(), Form(*form)
    reset(device)
    limit = _limit(device, capacity)
    vocab = resolve_vocabulary(recipe.model, open_dataset(recipe.data).vocab_size)
    laid, window = laid_out(recipe, kind, vocab, mesh.world_size(), share, most, limit)
    if device.type == "cpu" and not _fits(laid, vocab, window, limit):
        raise ResourceError(f"{window:,} tokens: predicted not to fit")
    job = build(laid)
    for step in range(UPDATES):
        train.train_step(job, step)
    job.loader.close()
    return device_name(), window, int(all_reduce_max(mesh.peak_memory(device)))


def _limit(device: torch.device, capacity: int | None) -> int:
    """Limit this rank's memory to `capacity` bytes; return the limit in bytes."""
    if device.type == "cpu":
        return capacity or 1 << 30
    torch.cuda.reset_peak_memory_stats(device)
    total = torch.cuda.get_device_properties(device).total_memory
    if capacity is None or capacity >= total:
        return total
    torch.cuda.set_per_process_memory_fraction(capacity / total, device)
    return capacity


def laid_out(
    recipe: Recipe, form: Form, vocab: int, ranks: int, share: float, most: int, capacity: int
) -> tuple[Recipe, int]:
    """Return the recipe in this form, with a window of `share` times the one predicted to fit `capacity` bytes, or of
    `share` times `most` tokens if streamed; and the window.
    """
    recipe = recipe.replace(parallel={"data_parallel": form.kind, "recompute": form.recompute})
    sp = 1 if form.sharing == "off" else ranks
    if form.sharing == "streaming":
        tokens = max(1, round(share * most / ranks / GRAIN)) * GRAIN
    else:
        tokens = max(1, int(share * predicted(recipe, vocab, ranks, sp, capacity) / sp / GRAIN)) * GRAIN
    whole = unshared(recipe, tokens, ranks) if sp == 1 else shared(recipe, tokens, ranks, "ring")
    segment = "auto" if form.sharing == "streaming" else tokens * sp
    return whole.replace(train={"segment": segment}), tokens * sp


def predicted(recipe: Recipe, vocab: int, ranks: int, sp: int, capacity: int) -> int:
    """Tokens of the longest window in one segment that is predicted to fit; memory is linear in tokens."""
    dp = ranks // sp
    recipe = plan.with_reduction(recipe, vocab, dp, sp, capacity)
    fixed, more = (sum(plan.memory(recipe, vocab, dp, sp, segment).values()) for segment in (0, 1 << 20))
    return max(0, int((capacity - fixed) / (more - fixed) * (1 << 20)))


def _fits(recipe: Recipe, vocab: int, window: int, capacity: int) -> bool:
    """Predict if the window fits: it stands in for the device's limit on a CPU, which has none."""
    sp = int(recipe.mesh.sp)
    needed = sum(plan.memory(recipe, vocab, mesh.world_size() // sp, sp, window).values())
    return recipe.train.segment == "auto" or needed <= capacity


def report(results: Results) -> Table:
    """A table with a line per data parallelism and recomputation, as in the paper; ≥ where nothing longer failed."""
    table = Table(
        title=f"tokens of the longest window, {results.ranks} × {results.device}",
        caption="empty: no time was left; ≥: nothing longer was tried" if results.cut else None,
    )
    for column in ("data parallelism", "recompute", *(f"sp {sharing}" for sharing in SHARING)):
        table.add_column(column, justify="right" if column.startswith("sp") else "left")
    cells = {cell.form: cell for cell in results.cells}
    for kind, mode in dict.fromkeys((form.kind, form.recompute) for form in cells):
        row = (cells.get(Form(kind, mode, sharing)) for sharing in SHARING)
        table.add_row(kind, mode, *(_text(cell) for cell in row))
    return table


def _text(cell: Cell | None) -> str:
    if cell is None or not (cell.window or cell.failed):
        return ""
    if not cell.window:
        return "none"
    return f"{'' if cell.failed else '≥ '}{cell.window:,}"


def write(file: Path, results: Results) -> None:
    """Write the cells as JSON."""
    cells = [{**asdict(cell), "form": cell.form._asdict()} for cell in results.cells]
    head = {"device": results.device, "torch": torch.__version__, "ranks": results.ranks}
    file.write_text(json.dumps({**head, "cells": cells}, indent=1))
