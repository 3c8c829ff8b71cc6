"""Models and their whole steps, laid out and timed for a comparison."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from data_tools.dataset import open_dataset
from lasptrain import ops, train
from lasptrain.models.language_model import LanguageModel, initial_values
from lasptrain.parallel import mesh
from lasptrain.parallel.collectives import all_reduce_max
from lasptrain.parallel.mesh import Mesh
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.parallel.scan import SCANS
from lasptrain.parallel.shard import parallelize
from lasptrain.recipe.resolve import resolve_vocabulary
from lasptrain.recipe.schema import Recipe
from lasptrain.training.job import Job, build, language_model

SHORT = 65_536  # tokens per rank; fewer of longer steps are timed


class Repeats(NamedTuple):
    """Numbers of steps: `warmup` ones first, then `timed` ones."""

    warmup: int
    timed: int


def repeats_for(tokens: int) -> Repeats:
    """Return the repeats for steps of `tokens` per rank; the first two compile, allocate and tune."""
    return Repeats(3, 5) if tokens <= SHORT else Repeats(2, 3)


def unshared(recipe: Recipe, tokens: int, ranks: int) -> Recipe:
    """Return the recipe with a window of `tokens` for each rank."""
    return recipe.replace(data={"window": tokens, "repeat": True}, train={"batch": ranks}, mesh={"sp": 1})


def shared(recipe: Recipe, tokens: int, ranks: int, scan: str, **data: Any) -> Recipe:
    """Return the recipe with one window over all ranks, `tokens` each."""
    data |= {"window": tokens * ranks, "repeat": True}
    return recipe.replace(data=data, train={"batch": 1}, mesh={"sp": ranks, "scan": scan})


def vocabulary(recipe: Recipe) -> int:
    """Return the size of the model's vocabulary; prepares the dataset if need be."""
    return resolve_vocabulary(recipe.model, open_dataset(recipe.data).vocab_size)


def model_of(recipe: Recipe, of: Mesh, kind: str, *, scan: str | None = None, fused: bool = False) -> LanguageModel:
    """Return the recipe's model with initial weights, spread over the mesh by a kind of data parallelism."""
    device = mesh.device()
    kernel = ops.select(recipe.train.kernel, device, recipe.model.kernels)
    exchange = None if scan is None else SCANS[scan](of.sp_group, device)
    model = language_model(recipe, ShardedRecurrence(kernel, exchange))
    values = initial_values(model, recipe.train.seed, device)
    parallelize(model, model.blocks, of, device, kind=kind, mode="none", dtype=model.dtype, fuse=fused, values=values)
    return model


def reset(device: torch.device) -> None:
    """Free the remains of an earlier model: memory in reference cycles and caches, and compiled graphs, whose number
    is limited.
    """
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def timed(update: Callable[[int], float], device: torch.device, repeats: Repeats) -> tuple[float, int]:
    """Time `update`, which takes a step's number: median seconds of the slowest rank, and the largest peak in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for step in range(repeats.warmup):
        update(step)
    seconds = median(all_reduce_max(update(repeats.warmup + step)) for step in range(repeats.timed))
    return seconds, int(all_reduce_max(mesh.peak_memory(device)))


def elapsed(call: Callable[[], object], count: int = 1) -> tuple[float, float]:
    """Return the seconds per call of `count` calls in a row on the slowest rank: until done, and until launched."""
    device = mesh.device()
    dist.barrier()
    mesh.synchronize(device)
    began = time.perf_counter()
    for _ in range(count):
        call()
    launched = time.perf_counter()
    mesh.synchronize(device)
    done = time.perf_counter()
    return all_reduce_max((done - began) / count), all_reduce_max((launched - began) / count)


def median_seconds(call: Callable[[], object], count: int = 1, turns: int = 5) -> float:
    """Return the median over `turns` of the seconds per call of `count` calls in a row on the slowest rank."""
    return median(elapsed(call, count)[0] for _ in range(turns))


def update(job: Job, step: int) -> float:
    """Make update number `step`; return its seconds."""
    return float(train.train_step(job, step)["step_time"] or 0)


def trained(
    recipe: Recipe, repeats: Repeats, attention: Callable[[str, Mesh], ShardedRecurrence] | None = None
) -> tuple[Job, float, int]:
    """Train the recipe on these ranks for some steps; return its closed job, seconds and bytes as of `timed`."""
    reset(mesh.device())
    job = build(recipe, attention)
    seconds, memory = timed(partial(update, job), mesh.device(), repeats)
    job.loader.close()
    return job, seconds, memory
