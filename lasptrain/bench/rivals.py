"""Shared parts of the rivals in `bench sp`: counted collectives and a ring exchange."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from lasptrain.errors import SetupError
from lasptrain.ops import decay_rule
from lasptrain.ops.recurrence import Inputs, Recurrence
from lasptrain.parallel.collectives import all_gather, reduce_scatter
from lasptrain.parallel.recurrence import SavedStates


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


class Pending(NamedTuple):
    """Tensors that a method keeps between `begin` and `finish`."""

    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    angle: Tensor | None


def whole_windows(name: str, doc_ids: Tensor | None, carry: Tensor | None, output_final_state: bool) -> None:
    """Raise SetupError for anything but a window in one segment and without documents."""
    if doc_ids is not None or carry is not None or output_final_state:
        raise SetupError(f"{name}: takes neither documents nor segments; set data.reset_at_documents=false")


def begun(
    name: str,
    inputs: Inputs,
    doc_ids: Tensor | None,
    *,
    rule: Recurrence = decay_rule,
    angle: Tensor | None = None,
    carry: Tensor | None = None,
    saved: SavedStates | None = None,
    output_final_state: bool = False,
) -> Pending:
    """Keep inputs of the decay rule and angle: the arguments of `ShardedRecurrence.begin`.

    Raises SetupError for anything but the decay rule over a window in one segment and without documents.
    """
    if rule is not decay_rule:
        raise SetupError(f"{name}: takes linear attention with a decay per head alone")
    whole_windows(name, doc_ids, carry, output_final_state)
    k, v, log_decay = inputs
    assert k is not None and v is not None
    return Pending(k, v, log_decay, angle)


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


def rotated(x: Tensor, angle: Tensor | None, slices: int) -> Tensor:
    """Rotate features [B, T, H, K], cosine then sine half, as if positions began `slices` slices further left; a slice
    turns by `angle` [H, K/2] radians, None for no rotation.
    """
    if angle is None or slices == 0:
        return x
    phase = angle * slices
    cos, sin = phase.cos().to(x.dtype), phase.sin().to(x.dtype)
    by_cos, by_sin = x.chunk(2, dim=-1)
    return torch.cat([by_cos * cos - by_sin * sin, by_sin * cos + by_cos * sin], dim=-1)
