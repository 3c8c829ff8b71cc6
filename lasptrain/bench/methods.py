"""Methods of sharing a window between ranks, for comparison: none, this project's scans, and rivals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.distributed as dist

from lasptrain.bench.rivals.local import LeftProduct, Local, softmax
from lasptrain.bench.rivals.ring_attention import RingAttention
from lasptrain.bench.rivals.ulysses import Ulysses
from lasptrain.errors import RecipeError
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.parallel.scan import SCANS

NONE = "none"  # shares nothing
# With this project's kernel; from the left, as the LASP paper ran them; and as softmax attention, another model.
RIVALS: dict[str, Callable[[str, dist.ProcessGroup], Ulysses | RingAttention]] = {
    "ulysses": Ulysses,
    "ulysses_left": lambda kernel, group: Ulysses(kernel, group, LeftProduct()),
    "ulysses_softmax": lambda kernel, group: Ulysses(kernel, group, softmax),
    "ring_attention": RingAttention,
    "ring_attention_left": lambda kernel, group: RingAttention(kernel, group, left=True),
}
# Methods that split the model too; they have whole steps only.
SPLIT: dict[str, Local | None] = {"megatron": None, "megatron_left": LeftProduct(), "megatron_softmax": softmax}
METHODS = [NONE, *SCANS, *RIVALS, *SPLIT]


def check(methods: Sequence[str]) -> None:
    """Raise RecipeError for a method that is not in METHODS."""
    for method in methods:
        if method not in METHODS:
            raise RecipeError(f"--method: found {method!r}; expected one of {', '.join(METHODS)}")


def attention(method: str, kernel: str, group: dist.ProcessGroup, device: torch.device) -> ShardedRecurrence:
    """Return the model's `ShardedRecurrence`, or a rival in its place, for a method that does not split the model."""
    if method in RIVALS:
        return cast(ShardedRecurrence, RIVALS[method](kernel, group))
    return ShardedRecurrence(kernel, None if method == NONE else SCANS[method](group, device))
