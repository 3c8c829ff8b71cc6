"""Whole steps of a model, laid out and timed for a comparison."""

from __future__ import annotations

import gc
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch

from lasptrain.parallel import mesh
from lasptrain.parallel.collectives import all_reduce_max
from lasptrain.recipe.schema import Recipe

SHORT = 65_536  # tokens per rank; of longer steps fewer are timed


class Repeats(NamedTuple):
    """How many steps are made and how many of them, the last, are timed."""

    warmup: int
    timed: int


def turns(tokens: int) -> Repeats:
    """For steps of so many tokens per rank; the first two compile, allocate and tune."""
    return Repeats(3, 5) if tokens <= SHORT else Repeats(2, 3)


def alone(recipe: Recipe, tokens: int, ranks: int) -> Recipe:
    """The recipe with a window for each rank."""
    return recipe.replace(data={"window": tokens, "repeat": True}, train={"batch": ranks}, mesh={"sp": 1})


def shared(recipe: Recipe, tokens: int, ranks: int, scan: str, **data: Any) -> Recipe:
    """The recipe with one window over all ranks."""
    data |= {"window": tokens * ranks, "repeat": True}
    return recipe.replace(data=data, train={"batch": 1}, mesh={"sp": ranks, "scan": scan})


def clear(device: torch.device) -> None:
    """Forget what a model before this one has left: memory in circles or caches, and compiled graphs, whose number is
    limited.
    """
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def timed(update: Callable[[int], float], device: torch.device, turns: Repeats) -> tuple[float, int]:
    """Median seconds of `update`, which takes a step's number, by the slowest rank; and the largest peak, in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for step in range(turns.warmup):
        update(step)
    seconds = median(all_reduce_max(update(turns.warmup + step)) for step in range(turns.timed))
    return seconds, int(all_reduce_max(mesh.peak_memory(device)))
