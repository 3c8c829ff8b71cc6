"""Tensors that wait in the host's memory for their turn."""

from __future__ import annotations

import torch
from torch import Tensor


def to_host(x: Tensor) -> Tensor:
    """x in page-locked host memory, copied in the order of the stream: nobody waits for it. On a CPU x itself."""
    if not x.is_cuda:
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """The way back."""
    return x.to(device, non_blocking=True)
