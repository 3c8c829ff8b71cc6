"""Collectives over all ranks or over those of a group."""

from __future__ import annotations

from typing import TypeVar, cast

import torch
import torch.distributed as dist

from lasptrain.parallel.mesh import device

T = TypeVar("T")
N = TypeVar("N", int, float)


# The names changed in torch 2.13.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def barrier() -> None:
    """Wait until every rank is here."""
    all_reduce_min(0)


def all_reduce_min(value: int) -> int:
    """Return the smallest of a number over all ranks."""
    found = torch.tensor(value, device=device())
    dist.all_reduce(found, op=dist.ReduceOp.MIN)
    return int(found)


def all_reduce_max(value: N) -> N:
    """Return the largest of a number over all ranks, through host memory: does not wait for a GPU."""
    found = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return type(value)(found)


def all_gather_object(what: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return the objects of all ranks, or of those of a group, in rank order; small picklable ones."""
    gathered: list[T | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, what, group=group)
    return cast("list[T]", gathered)


def all_reduce_sum(x: torch.Tensor) -> torch.Tensor:
    """Return the sum of x over all ranks, in its own dtype."""
    x = x.detach().clone()
    dist.all_reduce(x)
    return x


def all_reduce_largest(x: torch.Tensor) -> torch.Tensor:
    """Return the elementwise largest of x over all ranks, in its own dtype."""
    x = x.detach().clone()
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def broadcast(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the x of the group's rank 0 on all of its ranks; theirs has the same shape and dtype."""
    x = x.detach().contiguous().clone()
    dist.broadcast(x, group=group, group_src=0)
    return x
