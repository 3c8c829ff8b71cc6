"""Small layers shared by the architectures."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasptrain.architectures.base import Norm
from lasptrain.models.linear import Linear, multi_linear
from lasptrain.models.start import Start
from lasptrain.ops import state_dtype
from lasptrain.ops.precision import UNIT_EPS


def wide(x: Tensor) -> Tensor:
    """Return x in at least fp32."""
    return x.to(state_dtype(x))


def srms(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Return x divided by its root mean square over the last axis, statistics in at least fp32, without weight."""
    return F.rms_norm(wide(x), x.shape[-1:], eps=eps).to(x.dtype)


class SimpleRMSNorm(nn.Module):
    """`srms` as a layer."""

    def __init__(self, eps: float = 1e-6):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return srms(x, self.eps)


class RMSNorm(nn.Module):
    """srms(x) times a weight [dim]; with `centred` times 1 + weight, which starts at zero."""

    def __init__(self, dim: int, eps: float = 1e-6, *, centred: bool = False):
        super().__init__()
        self.weight, self.eps, self.centred = nn.Parameter(torch.ones(dim)), eps, centred

    def initial(self, part: str, start: Start) -> Tensor | None:
        """Return zeros where one is added, else None for the usual ones."""
        return start.full(0.0) if self.centred else None

    def forward(self, x: Tensor) -> Tensor:
        weight = 1 + self.weight if self.centred else self.weight
        return srms(x, self.eps) * weight.to(x.dtype)


def norm(kind: Norm, dim: int) -> SimpleRMSNorm | RMSNorm:
    """Return the norm of a block of width `dim`."""
    return RMSNorm(dim, kind.eps, centred=kind.centred) if kind.weighted else SimpleRMSNorm(kind.eps)


class Mlp(nn.Module):
    """down(act(gate x) ⊙ up x): SwiGLU, or SGLU (arXiv:2307.14995) without activation."""

    def __init__(self, dim: int, width: int, *, activate: bool):
        super().__init__()
        self.gate, self.up, self.down = Linear(dim, width), Linear(dim, width), Linear(width, dim)
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        gate, up = multi_linear(x, self.gate, self.up)
        y: Tensor = self.down((F.silu(gate) if self.activate else gate) * up)
        return y


class Phases(NamedTuple):
    """Angles θt of a slice, t = hi·STEP + lo from its start, as two small tables; and the angle θ·T over all of it."""

    cos_lo: Tensor  # [STEP, H, K] at least fp32, like the other three
    sin_lo: Tensor
    cos_hi: Tensor  # [⌈T/STEP⌉, 1, H, K], or by window [B, ⌈T/STEP⌉, 1, H, K]
    sin_hi: Tensor
    turn: Tensor  # [H, K] fp64

    def features(self, x: Tensor) -> Tensor:
        """Return [x cos θt, x sin θt] [B, T, H, 2K] of x [B, T, H, K]."""
        cos, sin = self._table(x.shape[1])
        return torch.cat([x * cos, x * sin], dim=-1).to(x.dtype)

    def rotated(self, x: Tensor, start: int = 0) -> Tensor:
        """Rotate the first half of the channels of x [B, T, H, 2K] by θt against the second (RoPE, arXiv:2104.09864).

        t counts from `start`.
        """
        cos, sin = (table[..., start:, :, :] for table in self._table(start + x.shape[1]))
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)

    def _table(self, length: int) -> tuple[Tensor, Tensor]:
        cos = (self.cos_hi * self.cos_lo - self.sin_hi * self.sin_lo).flatten(-4, -3)
        sin = (self.sin_hi * self.cos_lo + self.cos_hi * self.sin_lo).flatten(-4, -3)
        return cos[..., :length, :, :], sin[..., :length, :, :]


STEP = 256  # tokens of the finer table


def phases(theta: Tensor, length: int, dtype: torch.dtype, start: int | Tensor = 0) -> Phases:
    """Return the phases of frequencies θ [H, K] over `length` tokens, tables in `dtype`, angles computed in fp64.

    Positions count from `start`, a number or one per window [B]: exact to 1e-9 radians at 4,194,304.
    """
    theta = theta.double()
    lo = theta * torch.arange(STEP, device=theta.device, dtype=torch.float64)[:, None, None]
    blocks = torch.arange(-(-length // STEP), device=theta.device, dtype=torch.float64)
    first = blocks * STEP + (start[:, None] if isinstance(start, Tensor) else start)
    hi = theta * first[..., None, None, None]
    cos_lo, sin_lo, cos_hi, sin_hi = (f(x).to(dtype) for x in (lo, hi) for f in (torch.cos, torch.sin))
    return Phases(cos_lo, sin_lo, cos_hi, sin_hi, theta * length)


class Rotary:
    """Fixed frequencies base^(−2i/K) of a rotated key of K channels, the same in every head; positions as in `Lrpe`."""

    def __init__(self, key_dim: int, base: float = 10000.0):
        self.key_dim, self.base = key_dim, base

    def __call__(self, length: int, device: torch.device, dtype: torch.dtype, start: int | Tensor = 0) -> Phases:
        """Return the phases of a slice of `length` tokens whose first has position `start`, or one per window [B]."""
        channel = torch.arange(0, self.key_dim, 2, device=device, dtype=torch.float64)
        return phases((self.base ** (-channel / self.key_dim))[None], length, dtype, start)


class Lrpe(nn.Module):
    """LRPE (arXiv:2307.14995) with learned θ [H, K].

    Positions count from the start of the slice, because only differences matter; the state that crosses slices is
    rotated by θ·T instead. So angles are as exact at four million tokens as at a thousand.
    """

    full_precision = True
    undecayed = ("theta",)

    def __init__(self, heads: int, key_dim: int):
        super().__init__()
        self.theta = nn.Parameter(torch.empty(heads, key_dim))

    def initial(self, part: str, start: Start) -> Tensor:
        """Return θ = 10000^(−2c/(HK)) for channel c of all H·K."""
        count = start.shape.numel()
        channel = torch.arange(count, dtype=torch.float64, device=start.device)
        return (10000.0 ** (-2.0 * channel / count)).view(start.shape)

    def forward(self, length: int) -> Phases:
        """Return the phases of a slice of `length` tokens."""
        return phases(self.theta, length, self.theta.dtype)


def unit(x: Tensor) -> Tensor:
    """Return x / √(|x|² + UNIT_EPS) over the last axis, in at least fp32."""
    x = wide(x)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + UNIT_EPS)
