"""Tensors that are elsewhere: in the host's memory until their turn, or nowhere because nobody reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def to_host(x: Tensor) -> Tensor:
    """x in page-locked host memory, copied in the order of the stream: nobody waits for it. On a CPU x itself."""
    if not x.is_cuda:
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def unread(shape: Sequence[int], like: Tensor) -> Tensor:
    """A tensor of this shape in the memory of one element, to hang a gradient on. Whoever reads it all the same reads
    NaN.
    """
    return like.new_full((), math.nan).expand(tuple(shape))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """The way back."""
    return x.to(device, non_blocking=True)
