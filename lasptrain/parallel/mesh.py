"""The 2D mesh of ranks: `dp` replicas of the batch × `sp` slices of a window.

`sp` is *context* parallelism in Megatron and torchtitan.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def silence_torch_logs() -> None:
    """Silence torch's logs of its own workings in the processes that this one starts."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")


def device() -> torch.device:
    """Return the device of this rank: the GPU of its local rank, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def device_name() -> str:
    """Return the name of this rank's GPU, or CPU."""
    found = device()
    return torch.cuda.get_device_name(found) if found.type == "cuda" else "CPU"


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Mesh(NamedTuple):
    """Ranks as dp × sp, and the same ranks in one row, over which parameters are sharded or replicated."""

    grid: DeviceMesh
    flat: DeviceMesh

    @property
    def size(self) -> int:
        return self.flat.size()

    def length(self, axis: str) -> int:
        """Return the number of ranks along `dp` or `sp`."""
        return self.grid.size(("dp", "sp").index(axis))

    def rank(self, axis: str) -> int:
        """Return this rank's index along `dp` or `sp`."""
        return self.grid.get_local_rank(axis)

    @property
    def sp_group(self) -> dist.ProcessGroup:
        return self.grid.get_group("sp")


def world() -> dist.ProcessGroup:
    """Return the group of all ranks."""
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def world_size() -> int:
    """Return the number of ranks of the job."""
    return dist.get_world_size()


def build(dp: int, sp: int) -> Mesh:
    """Build the mesh of all ranks; consecutive ranks share a window, so that its states travel the shortest way."""
    grid = init_device_mesh(device().type, (dp, sp), mesh_dim_names=("dp", "sp"))
    flat = grid["dp", "sp"]._flatten("dp_sp")
    for group in (*grid.get_all_groups(), flat.get_group()):
        for kind in group._device_types:
            backend = group._get_backend(kind)
            backend = getattr(backend, "wrapped_pg", backend)  # by TORCH_DISTRIBUTED_DEBUG=DETAIL
            backend._set_default_timeout(timeout())
    return Mesh(grid, flat)


def timeout() -> timedelta:
    """Return the timeout of the group of all ranks; groups made later have torch's own 10 or 30 minutes."""
    group = world()
    return group._get_backend(group._device_types[0]).options._timeout


def synchronize(on: torch.device) -> None:
    """Wait for the work of a GPU; a CPU has none outstanding."""
    if on.type == "cuda":
        torch.cuda.synchronize(on)


def peak_memory(on: torch.device) -> int:
    """Return the peak memory in bytes: of tensors on this GPU, or of this process on a CPU."""
    if on.type == "cuda":
        return torch.cuda.max_memory_allocated(on)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def free_memory(on: torch.device) -> int:
    """Return the bytes of GPU memory that this process could still allocate."""
    free, _ = torch.cuda.mem_get_info(on)
    return free + torch.cuda.memory_reserved(on) - torch.cuda.memory_allocated(on)


def host_memory() -> int | None:
    """Return the bytes of this machine's memory that processes could still take, None where it does not say."""
    info, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    try:  # of a container
        limit, used = (int((group / f"memory.{name}").read_text(encoding="utf-8")) for name in ("max", "current"))
        found.append(limit - used)
    except (OSError, ValueError):
        pass
    return min(found, default=None)


@contextmanager
def single_process_group() -> Iterator[None]:
    """Run the body in a group of this process only, unless there is a group already: for code that is collective."""
    if dist.is_initialized():
        yield
        return
    if device().type == "cuda":
        torch.cuda.set_device(device())  # else torch warns that it has to guess
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
