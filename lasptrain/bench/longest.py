"""`lasptrain bench longest`: the longest window that trains, by data parallelism, recomputation and sharing.

The LASP paper's table, on this machine's ranks: a window per rank (`off`), one window over all ranks in one segment
(`on`), and the same in as many segments as it takes (`streaming`). A window counts if two updates of it ran, the second
with the optimizer's states in place. Windows are tried upwards from one that is almost certain to fit, and below it
only where that fails.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from lasptrain.bench.result import Column, Result, table
from lasptrain.bench.steps import reset, shared, unshared, update, vocabulary
from lasptrain.cost import plan
from lasptrain.errors import ResourceError
from lasptrain.parallel import mesh
from lasptrain.parallel.collectives import all_reduce_max
from lasptrain.parallel.mesh import device_name
from lasptrain.process.local_ranks import TrialFailure, trials
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


class Cell(NamedTuple):
    """Result of a form: the longest `window` that ran, 0 if none; `failed` if a longer one did not run."""

    form: Form
    window: int = 0
    memory: int = 0  # peak, bytes
    failed: bool = False
    failure: str | None = None


def forms() -> list[Form]:
    """Return all forms, in the order of the table."""
    return [Form(kind, mode, sharing) for kind in KINDS for mode in MODES for sharing in SHARING]


def measure(
    recipe: Recipe, ranks: int, most: int, capacity: int | None, seconds: float, chosen: Sequence[Form]
) -> Iterator[Result[Cell]]:
    """Find the longest windows with one process per rank on this machine; yield all results so far after each trial.

    Each form is tried from short to long until one fails.

    Args:
        most: tokens of the longest window that is streamed.
        capacity: bytes of each rank, to set a lower limit than the GPU's; a CPU has no other limit.
        seconds: after which no trial starts.
    """
    until, device = time.monotonic() + seconds, ""
    cells = {form: Cell(form) for form in chosen}
    for shares in (_shares, _lower):
        given = [(recipe, form, share, most, capacity) for form in chosen for share in shares(cells[form])]
        tried = trials(ranks, _trial, given, skip_after=lambda failed, other: bool(failed[1] == other[1]))
        for number, ((_, form, *_), found) in enumerate(tried, 1):
            if isinstance(found, TrialFailure):
                cells[form] = cells[form]._replace(failed=True, failure=cells[form].failure or found.reason)
            else:
                device, window, memory = found
                cells[form] = cells[form]._replace(window=window, memory=memory)
            left = [other for other in given[number:] if not (isinstance(found, TrialFailure) and other[1] == form)]
            late = bool(left) and time.monotonic() > until
            yield result(device, ranks, [*cells.values()], late=late)
            if late:
                tried.close()
                return


def _shares(cell: Cell) -> Sequence[float]:
    return (0.25, 1.0) if cell.form.sharing == "streaming" else SHARES


def _lower(cell: Cell) -> Sequence[float]:
    return LOWER if cell.failed and not cell.window else ()


def _trial(recipe: Recipe, form: Form, share: float, most: int, capacity: int | None) -> tuple[str, int, int]:
    """Train a window on every rank; return the device, the window and the peak memory in bytes."""
    device = mesh.device()
    reset(device)
    limit = _limit(device, capacity)
    vocab = vocabulary(recipe)
    laid, window = laid_out(recipe, form, vocab, mesh.world_size(), share, most, limit)
    if device.type == "cpu" and not _fits(laid, vocab, window, limit):
        raise ResourceError(f"{window:,} tokens: predicted not to fit")
    job = build(laid)
    for step in range(UPDATES):
        update(job, step)
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


def result(device: str, ranks: int, cells: list[Cell], *, late: bool) -> Result[Cell]:
    """Return a result whose table has a line per data parallelism and recomputation, as in the paper; ≥ where nothing
    longer failed. `late`: time ran out.
    """
    found = {cell.form: cell for cell in cells}
    columns: list[Column[tuple[str, str]]] = [
        ("data parallelism", lambda row: row[0], "<"),
        ("recompute", lambda row: row[1], "<"),
        *((f"sp {way}", lambda row, way=way: _text(found.get(Form(row[0], row[1], way))), "") for way in SHARING),
    ]
    title = f"tokens of the longest window, {ranks} × {device}"
    caption = "empty: no time was left; ≥: nothing longer was tried" if late else ""
    shown = table(title, dict.fromkeys((form.kind, form.recompute) for form in found), columns, caption)
    return Result(cells, [shown], {"device": device, "ranks": ranks}, "cells")


def _text(cell: Cell | None) -> str:
    if cell is None or not (cell.window or cell.failed):
        return ""
    if not cell.window:
        return "none"
    return f"{'' if cell.failed else '≥ '}{cell.window:,}"
