"""A trial for the ranks of a measurement, apart from the test, which imports more than they need."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from lasptrain.process.local_ranks import on_ranks


def trial(kind: str, size: int) -> int:
    """Rank 1 has too little memory for anything short, while rank 0 waits for it."""
    if kind == "short" and dist.get_rank() == 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    dist.barrier()
    return size


def forever(folder: str) -> None:
    """Leaves word of its process and never ends."""
    (Path(folder) / str(os.getpid())).touch()
    while True:
        time.sleep(1)


def run_forever(folder: str) -> None:
    """Two ranks of it."""
    on_ranks(2, forever, folder)
