"""A trial for the ranks of a measurement, apart from the test, which imports more than they need."""

from __future__ import annotations

import torch
import torch.distributed as dist


def trial(kind: str, size: int) -> int:
    """Rank 1 has too little memory for anything short, while rank 0 waits for it."""
    if kind == "short" and dist.get_rank() == 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    dist.barrier()
    return size
