"""The start of a parameter or buffer: the usual values, and what a module needs to make others."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor, nn

STD = 0.02  # of matrices
UNIT_STEP = 0.541324854612918  # ln(e − 1), of which softplus is one


class Start(NamedTuple):
    """The means to make one initial value, given to `initial(part, start)` of the module that owns it."""

    shape: torch.Size
    slopes: Tensor | None  # [H] fp32, of the layer; None outside of layers
    generator: torch.Generator  # of this value only
    device: torch.device

    def empty(self) -> Tensor:
        return torch.empty(self.shape, device=self.device)

    def full(self, value: float) -> Tensor:
        """Return the value everywhere, in fp64."""
        return torch.full(self.shape, value, device=self.device, dtype=torch.float64)


def initial(owner: nn.Module, part: str, start: Start) -> Tensor:
    """Return the value that `owner.initial` gives, else the usual one: N(0, 0.02²) for matrices, one for vectors."""
    own = getattr(owner, "initial", None)
    value: Tensor | None = None if own is None else own(part, start)
    if value is not None:
        return value
    if len(start.shape) == 1:
        return torch.ones(start.shape, device=start.device)
    return start.empty().normal_(0.0, STD, generator=start.generator)


def generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    """Return the generator of the value called `name`."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
