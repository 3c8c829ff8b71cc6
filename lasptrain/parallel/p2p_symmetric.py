"""Messages that a kernel writes straight into the memory of the other GPU, where another kernel waits for them.

NCCL's messages are kernels on a stream of their own, which take multiprocessors from those that compute, and occupy
both ends for longer than the transfer of a state takes. Here the sender only writes, on the current stream, and the
receiver waits where the message is needed, by when it has mostly long arrived. NVSHMEM's put with signal works so too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor

from lasptrain.ops import triton_p2p

SLOTS = 8  # most messages from one rank that the next has not taken yet
BUFFERS = 2 * SLOTS  # from either side


class PeerMemory(Protocol):
    """Memory that all ranks of a group can write: BUFFERS buffers of each rank, two flags for every part of one."""

    def buffer(self, rank: int, slot: int, dtype: torch.dtype) -> Tensor: ...

    def full(self, rank: int, slot: int) -> Tensor: ...

    def busy(self, rank: int, slot: int) -> Tensor: ...


class SymmetricP2P:
    """Messages in slots: `side · SLOTS + n % SLOTS` for message n of those forward (side 0) or back in the circle.

    A slot's buffer and `full` are the receiver's, `busy` is the sender's. Flags are yes or no: counts would be wrong in
    the next replay of a CUDA graph.
    """

    def __init__(self, memory: PeerMemory, rank: int, size: int):
        self.memory, self.rank, self.size = memory, rank, size
        self._sent, self._received = [0, 0], [0, 0]

    def send(self, x: Tensor, to: int) -> Callable[[], None]:
        slot = self._next(self._sent, self._side(self.rank, to))
        triton_p2p.send(x.contiguous(), *self._slot(x.dtype, slot, self.rank, to))
        return _nothing

    def recv(self, like: Tensor, source: int) -> Callable[[], Tensor]:
        slot = self._next(self._received, self._side(source, self.rank))
        return partial(self._receive, like, source, slot)

    def _receive(self, like: Tensor, source: int, slot: int) -> Tensor:
        x = torch.empty_like(like, memory_format=torch.contiguous_format)
        triton_p2p.receive(x, *self._slot(x.dtype, slot, source, self.rank))
        return x

    def _slot(self, dtype: torch.dtype, slot: int, sender: int, receiver: int) -> tuple[Tensor, Tensor, Tensor]:
        memory = self.memory
        return memory.buffer(receiver, slot, dtype), memory.full(receiver, slot), memory.busy(sender, slot)

    def _side(self, source: int, to: int) -> int:
        return 0 if (source + 1) % self.size == to else 1

    def _next(self, counts: list[int], side: int) -> int:
        slot = side * SLOTS + counts[side] % SLOTS
        counts[side] += 1
        return slot


def _nothing() -> None:
    """Wait for nothing: work queued next on the stream runs after the message."""


class SharedMemory:
    """Memory of the GPUs of one machine, which PyTorch maps into all of their processes."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, size: int):
        """Collective over the group. size: bytes of a buffer, whose number of parts is a multiple of 4."""
        self._size, self._parts = size, triton_p2p.parts(size)
        self._memory = symmetric.empty(BUFFERS * (size + 8 * self._parts), dtype=torch.uint8, device=device)
        self._memory.zero_()
        self._shared = symmetric.rendezvous(self._memory, group)
        self._shared.barrier()
        self._views: dict[tuple[object, ...], Tensor] = {}

    def buffer(self, rank: int, slot: int, dtype: torch.dtype) -> Tensor:
        return self._view(rank, self._size // dtype.itemsize, dtype, slot * self._size // dtype.itemsize)

    def full(self, rank: int, slot: int) -> Tensor:
        return self._flags(rank, slot)

    def busy(self, rank: int, slot: int) -> Tensor:
        return self._flags(rank, BUFFERS + slot)

    def _flags(self, rank: int, row: int) -> Tensor:
        return self._view(rank, self._parts, torch.int32, BUFFERS * self._size // 4 + row * self._parts)

    def _view(self, rank: int, count: int, dtype: torch.dtype, offset: int) -> Tensor:
        key = rank, dtype, offset
        if key not in self._views:
            self._views[key] = self._shared.get_buffer(rank, [count], dtype, offset)
        return self._views[key]
