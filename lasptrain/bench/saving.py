"""`lasptrain bench saving`: the stall of training, and the slowdown of its steps, while checkpoints are saved."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from lasptrain import train
from lasptrain.bench.result import Column, Result, table
from lasptrain.checkpoint.saver import Saver
from lasptrain.checkpoint.steps import committed, folder_of
from lasptrain.console.tables import figures
from lasptrain.parallel.collectives import all_reduce_max
from lasptrain.parallel.mesh import device_name, world_size
from lasptrain.process.local_ranks import on_ranks
from lasptrain.recipe.schema import Recipe
from lasptrain.training.job import build, checkpoint_meta

WARM = 3  # steps that compile, allocate and tune
QUIET = 5  # steps without a save, whose median is the baseline


class Save(NamedTuple):
    """One save, in seconds: training's `stall`, time until `written`, and the sum by which steps were `slower`."""

    stall: float
    written: float
    slower: float


def measure(recipe: Recipe, run: Path, ranks: int, saves: int) -> Result[Save]:
    """Train on `ranks` processes of this machine and save `saves` times into `run`, each after the one before."""
    facts, rows = on_ranks(ranks, _rank, recipe, run, saves)
    return result(facts | {"every": recipe.checkpoint.every}, [Save(*row) for row in rows])


def _rank(recipe: Recipe, run: Path, saves: int) -> tuple[dict[str, Any], list[Save]]:
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
        saver.save(done, checkpoint_meta(job, done))
        stall, slower = saver.stall(), 0.0
        while not all_reduce_max(saver.newest == at):
            slower += step() - usual
            saver.poll()
        rows.append(Save(stall, time.perf_counter() - began, slower))
    saver.wait(last=True)
    saver.close()
    job.loader.close()
    newest = folder_of(run, committed(run)[0])
    size = sum(file.stat().st_size for file in newest.iterdir())
    return {"device": device_name(), "ranks": world_size(), "size": size, "step": usual}, rows


def result(facts: dict[str, Any], saves: list[Save]) -> Result[Save]:
    """Return a result whose table has a line per save; shares are of the time between saves.

    Facts are the device, its number of ranks, the bytes in a checkpoint (`size`), the seconds of a step, and the steps
    after which the recipe saves (`every`).
    """
    interval = facts["every"] * facts["step"]
    saved = f"{facts['size']:,} bytes, saved every {facts['every']} steps of {figures(facts['step'])} s"
    columns: list[Column[Save]] = [
        ("stall s", lambda save: save.stall, ".3f"),
        ("share", lambda save: save.stall / interval, ".2%"),
        ("committed s", lambda save: save.written, ".2f"),
        ("slower s", lambda save: save.slower, ".2f"),
        ("together", lambda save: (save.stall + max(save.slower, 0.0)) / interval, ".2%"),
    ]
    return Result(saves, [table(f"{saved}, on {facts['ranks']} × {facts['device']}", saves, columns)], facts)
