"""Counted collectives and a ring exchange, by which rivals share a window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from lasptrain.parallel.collectives import all_gather, reduce_scatter


class Traffic:
    """Collectives over a group, counting the bytes that this rank sends; offers a scan's attributes."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.group = group
        self.size, self.rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
        self.bytes_sent = 0
        self.calls = 0

    def all_to_all(self, x: Tensor) -> Tensor:
        """Exchange x [n, …], indexed by receiver → the same shape, indexed by sender."""
        x = x.contiguous()
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=self.group)
        self._count(x.numel() * x.element_size() * (self.size - 1) // self.size)
        return received

    def gather(self, x: Tensor) -> Tensor:
        """Gather x [B, T, …] of every rank → [B, n·T, …], in rank order."""
        if self.size == 1:
            return x
        parts = x.new_empty((self.size * x.shape[0], *x.shape[1:]))
        all_gather(parts, x.contiguous(), group=self.group)
        self._count(x.numel() * x.element_size() * (self.size - 1))
        whole: Tensor = parts.unflatten(0, (self.size, -1)).movedim(0, 1).flatten(1, 2)
        return whole

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Sum x [B, n·T, …] over ranks → [B, T, …], this rank's part."""
        if self.size == 1:
            return x
        parts = x.unflatten(1, (self.size, -1)).movedim(1, 0).contiguous()
        mine = torch.empty_like(parts[0])
        reduce_scatter(mine, parts.flatten(0, 1), group=self.group)
        self._count(mine.numel() * mine.element_size() * (self.size - 1))
        return mine

    def sum(self, x: Tensor) -> Tensor:
        """Sum x over ranks."""
        total = x.clone()
        if self.size == 1:
            return total
        dist.all_reduce(total, group=self.group)
        self._count(2 * x.numel() * x.element_size() * (self.size - 1) // self.size)
        return total

    def _count(self, sent: int) -> None:
        self.calls += 1
        self.bytes_sent += sent

    def ring_exchange(self, *tensors: Tensor) -> RingExchange:
        """Start sending tensors to the next rank, the last one's to the first."""
        sent = [x.contiguous() for x in tensors]
        received = [torch.empty_like(x) for x in sent]
        following, previous = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, x, group=self.group, group_peer=following) for x in sent]
            + [dist.P2POp(dist.irecv, x, group=self.group, group_peer=previous) for x in received]
        )
        self._count(sum(x.numel() * x.element_size() for x in sent))
        return RingExchange(works, sent, received)


class RingExchange(NamedTuple):
    """Tensors in transit; keeps the sent ones alive until they have arrived."""

    works: list[dist.Work]
    sent: list[Tensor]
    received: list[Tensor]

    def wait(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        return self.received


def exchange(x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `there(x)`, whose gradient is `back` of its output's."""
    result: Tensor = _Exchange.apply(x, there, back)  # type: ignore[no-untyped-call]
    return result


class _Exchange(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grad), None, None
