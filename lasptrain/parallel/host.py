"""Tensors kept off the device: in host memory until needed, or nowhere because nothing reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def to_host(x: Tensor) -> Tensor:
    """Copy x to page-locked host memory in stream order, without waiting. Returns x itself on a CPU."""
    if not x.is_cuda:
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def unread(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor of this shape in the memory of one element, to attach a gradient to; reading it gives NaN.

    Its device is that of `like`, and its dtype too unless another is given.
    """
    one = like.new_full((), math.nan, dtype=dtype)
    # No view, as `expand` would be: FSDP warns of modules that return views.
    return one.new_empty(0).set_(one.untyped_storage(), 0, tuple(shape), (0,) * len(shape))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy x back to the device, in stream order."""
    return x.to(device, non_blocking=True)


class Number:
    """A whole number on its way from a device to the host."""

    def __init__(self, x: Tensor):
        self._copy = to_host(x)
        self._arrived = torch.cuda.current_stream(x.device).record_event() if x.is_cuda else None

    def value(self) -> int:
        """Return it; waits no longer than for what was queued on the device before it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return int(self._copy)
