"""`lasptrain bench saving`: the stall of training, and the slowdown of its steps, while checkpoints are saved."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.table import Table

from lasptrain import train
from lasptrain.checkpoint.saver import Saver
from lasptrain.checkpoint.steps import committed, folder_of
from lasptrain.console.tables import figures
from lasptrain.parallel.collectives import all_reduce_max
from lasptrain.parallel.mesh import device_name
from lasptrain.process.local_ranks import on_ranks
from lasptrain.recipe.schema import Recipe
from lasptrain.training.job import build, checkpoint_meta

WARM = 3  # steps that compile, allocate and tune
QUIET = 5  # steps without a save, whose median is the baseline


@dataclass(frozen=True)
class Save:
    """One save, in seconds: training's `stall`, time until `written`, and the sum by which steps were `slower`."""

    stall: float
    written: float
    slower: float


@dataclass(frozen=True)
class Results:
    """All saves, and the device and recipe they were measured on."""

    device: str
    ranks: int
    size: int  # bytes of a checkpoint
    step: float  # seconds
    every: int  # steps, as the recipe saves
    saves: list[Save]


def measure(recipe: Recipe, run: Path, ranks: int, saves: int) -> Results:
    """Train on `ranks` processes of this machine and save `saves` times into `run`, each after the one before."""
    device, size, step, rows = on_ranks(ranks, _rank, recipe, run, saves)
    return Results(device, ranks, size, step, recipe.checkpoint.every, [Save(*row) for row in rows])


def _rank(recipe: Recipe, run: Path, saves: int) -> tuple[str, int, float, list[tuple[float, float, float]]]:
    job = build(recipe)
    done = 0

    def step() -> float:
        nonlocal done
        began = time.perf_counter()
        train.train_step(job, done)
        done += 1
        return time.perf_counter() - began

    for _ in range(WARM):
        step()
    usual = median(step() for _ in range(QUIET))
    saver = Saver(run, job.model, job.optimizer, recipe.checkpoint, None)
    rows = []
    for _ in range(saves):
        began, at = time.perf_counter(), done
        saver.save(done, checkpoint_meta(job))
        stall, slower = saver.stall(), 0.0
        while not all_reduce_max(saver.newest == at):
            slower += step() - usual
            saver.poll()
        rows.append((stall, time.perf_counter() - began, slower))
    saver.wait(last=True)
    saver.close()
    job.loader.close()
    newest = folder_of(run, committed(run)[0])
    return device_name(), sum(file.stat().st_size for file in newest.iterdir()), usual, rows


def report(results: Results) -> Table:
    """A table with a line per save; shares are of the time between saves."""
    interval = results.every * results.step
    title = f"{results.size:,} bytes, saved every {results.every} steps of {figures(results.step)} s"
    table = Table(title=f"{title}, on {results.ranks} × {results.device}")
    for column in ("stall s", "share", "committed s", "slower s", "together"):
        table.add_column(column, justify="right", no_wrap=True)
    for save in results.saves:
        both = save.stall + max(save.slower, 0.0)
        table.add_row(
            f"{save.stall:.3f}",
            f"{save.stall / interval:.2%}",
            f"{save.written:.2f}",
            f"{save.slower:.2f}",
            f"{both / interval:.2%}",
        )
    return table
