"""Point-to-point messages in a group of ranks: through the process group, or straight into the other GPU's memory.

All messages from one rank to another arrive in the order in which they were sent, and are received in it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lasptrain.parallel import mesh
from lasptrain.parallel.collectives import all_gather_object

BOOT = Path("/proc/sys/kernel/random/boot_id")
SMALLEST = 1 << 15  # bytes: four parts, whose flags are aligned as Triton expects it


class Messages(Protocol):
    """Messages between neighbours in a circle of ranks. Both methods return a function to call once, which waits."""

    def send(self, x: Tensor, to: int) -> Callable[[], None]:
        """Send x, which is kept until the wait; work queued on the current stream after the wait may write to x."""
        ...

    def recv(self, like: Tensor, source: int) -> Callable[[], Tensor]:
        """Receive the next message; the wait returns it, ready for use on the current stream."""
        ...


class ProcessGroupP2P:
    """Messages through the process group. Over NCCL each is a kernel on a stream of its own, at both ends."""

    def __init__(self, group: dist.ProcessGroup):
        self._group = group

    def send(self, x: Tensor, to: int) -> Callable[[], None]:
        x = x.contiguous()
        return partial(_sent, self._group.send([x], to, 0), x)  # `dist.send` checks for longer than a launch takes

    def recv(self, like: Tensor, source: int) -> Callable[[], Tensor]:
        x = torch.empty_like(like, memory_format=torch.contiguous_format)
        return partial(_received, self._group.recv([x], source, 0), x)


def _sent(work: dist.Work, kept: Tensor) -> None:
    work.wait()


def _received(work: dist.Work, x: Tensor) -> Tensor:
    work.wait()
    return x


def between(group: dist.ProcessGroup, device: torch.device, size: int) -> Messages:
    """Return messages of up to `size` bytes; collective over the group, and at first outside of a CUDA graph.

    NCCL_P2P_DISABLE=1 keeps GPUs out of each other's memory here as it does in NCCL.
    """
    return _between(group, device, max(SMALLEST, 1 << (size - 1).bit_length()))


@lru_cache
def _between(group: dist.ProcessGroup, device: torch.device, size: int) -> Messages:
    if device.type != "cuda":
        return ProcessGroupP2P(group)
    if not _reach_each_other(group, device):
        return _line(group)
    from lasptrain.parallel.p2p_symmetric import SharedMemory, SymmetricP2P  # here, as Triton is not everywhere

    try:
        memory = SharedMemory(group, device, size)
    except RuntimeError:  # a driver or a container that does not let processes share memory
        memory = None
    if not all(all_gather_object(memory is not None, group)):
        return _line(group)
    assert memory is not None
    return SymmetricP2P(memory, dist.get_rank(group), dist.get_world_size(group))


@lru_cache
def _reach_each_other(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Return True if all ranks of the group are on one machine, each with a GPU that can write the others' memory."""
    machine = socket.gethostname(), BOOT.read_text() if BOOT.exists() else ""
    places = all_gather_object((machine, device.index, os.environ.get("NCCL_P2P_DISABLE", "0")), group)
    others = [index for rank, (_, index, _) in enumerate(places) if rank != dist.get_rank(group)]
    reach = device.index not in others and all(torch.cuda.can_device_access_peer(device, other) for other in others)
    alike = {(found, off) for found, _, off in places} == {(machine, "0")}
    return all(all_gather_object(reach and alike, group))


@lru_cache
def _line(group: dist.ProcessGroup) -> ProcessGroupP2P:
    """Return messages over a new group of an NCCL group's ranks, for hiding behind kernels; collective over it.

    A message in flight takes whole multiprocessors from a kernel that was sized to fill them. Limited to a few, it fits
    in what a wave of programs has to spare; but then it needs priority to get those first.
    """
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.max_ctas = 8
    options._timeout = mesh.timeout()
    ranks = [*range(dist.get_world_size(group))]
    line = dist.split_group(group, [ranks], timeout=options._timeout, pg_options=options)
    assert line is not None  # every rank is in it
    return ProcessGroupP2P(line)
