"""State-space duality (Mamba-2, arXiv:2405.21060) as linear attention: a scalar decay per head, fixed or per token."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasptrain.models.layers import srms
from lasptrain.models.linear import Linear, products
from lasptrain.models.mixers import State
from lasptrain.parallel.attention import Attention, Memory, Pending

EPS = 1e-5  # of every norm of this architecture


class StepWeights(NamedTuple):
    """What makes a step's logit x Wᵀ + b, in full precision; takes the place of a `Linear` in `products`."""

    weight: Tensor  # [H, D]
    bias: Tensor  # [H]
    operand: None = None


class Step(nn.Module):
    """The weights of a data-dependent step; W is zero and b = ln(e − 1) at first, so that every step is one."""

    full_precision = True
    FIRST_BIAS = 0.541324854612918

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(heads, dim)), nn.Parameter(torch.empty(heads))

    def forward(self) -> StepWeights:
        """Copies: where parameters are sharded, these are here only while this runs."""
        return StepWeights(self.weight.clone(), self.bias.clone())


class GatedNorm(nn.Module):
    """rms(o ⊙ silu(gate)) per head, times a weight [H·V]: the gate comes first."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, o: Tensor, gate: Tensor) -> Tensor:
        """[B, T, H·V] of o [B, T, H, V] and the gate [B, T, H·V]."""
        o = o * F.silu(gate).view(o.shape)
        return srms(o, EPS).flatten(2) * self.weight.to(o.dtype)


class StateSpace(nn.Module):
    """q, k, v = silu(W h); S_t = a_t S_{t−1} + Δ_t k_tᵀ v_t; y = W norm(o ⊙ silu(gate)).

    a = e^{−sΔ} with a slope s per head. Δ = 1, or with `data_dependent` Δ = softplus(W h + b): a token that opens the
    state (large Δ) writes more and forgets more. Without convolution, so that nothing but the state crosses slices.
    """

    def __init__(
        self, dim: int, heads: int, key_dim: int, value_dim: int, *, data_dependent: bool, attention: Attention
    ):
        super().__init__()
        self.heads, self.attention = heads, attention
        self.q, self.k = Linear(dim, heads * key_dim), Linear(dim, heads * key_dim)
        self.v, self.gate = Linear(dim, heads * value_dim), Linear(dim, heads * value_dim)
        self.out = Linear(heads * value_dim, dim)
        self.norm = GatedNorm(heads * value_dim)
        self.dt = Step(dim, heads) if data_dependent else None
        self.slope: Tensor
        self.register_buffer("slope", torch.empty(heads))

    def phases(self, length: int) -> StepWeights | None:
        return None if self.dt is None else self.dt()

    def forward(
        self, h: Tensor, phases: StepWeights | None, doc: Tensor | None, carry: State, memory: Memory, leave: bool
    ) -> tuple[Tensor, State]:
        if self.attention.scan.size > 1:
            pending = self._begin(*self.keys(h, phases), doc, carry, memory, leave)
            q, gate = self.queries(h, phases)
        else:
            k, v, decay, q, gate = self.project(h, phases)
            pending = self._begin(k, v, decay, doc, carry, memory, leave)
        o, leaving = self.attention.finish(pending, q)
        return self.output(o, gate), (leaving,)

    def state(self, h: Tensor, phases: StepWeights | None, doc: Tensor | None, carry: State, memory: Memory) -> State:
        """What leaves the segment, without outputs."""
        return (self.attention.leave(self._begin(*self.keys(h, phases), doc, carry, memory, True)),)

    def _begin(
        self, k: Tensor, v: Tensor, decay: Tensor, doc: Tensor | None, carry: State, memory: Memory, leave: bool
    ) -> Pending:
        return self.attention.begin(k, v, decay, doc, carry=carry[0], memory=memory, leave=leave)

    def keys(self, h: Tensor, phases: StepWeights | None) -> tuple[Tensor, Tensor, Tensor]:
        """k and v [B, T, H, ·], v times its step, and the log decay [H] or [B, T, H]."""
        k, v, *dt = products(h, self.k, self.v, *_given(phases))
        return self._active(k), *self._stepped(v, dt, phases)

    def queries(self, h: Tensor, phases: StepWeights | None) -> tuple[Tensor, Tensor]:
        """q [B, T, H, K] and the gate [B, T, H·V]."""
        q, gate = products(h, self.q, self.gate)
        return self._active(q), gate

    def project(self, h: Tensor, phases: StepWeights | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """`keys` and `queries` at once."""
        k, v, q, gate, *dt = products(h, self.k, self.v, self.q, self.gate, *_given(phases))
        return self._active(k), *self._stepped(v, dt, phases), self._active(q), gate

    def _active(self, x: Tensor) -> Tensor:
        return F.silu(x).view(*x.shape[:2], self.heads, -1)

    def _stepped(self, v: Tensor, dt: list[Tensor], phases: StepWeights | None) -> tuple[Tensor, Tensor]:
        """Values times their steps, and the log decay, of what `products` made; steps are in at least fp32."""
        if phases is None:
            return self._active(v), -self.slope
        wide = torch.promote_types(v.dtype, torch.float32)
        step = F.softplus(dt[0].to(wide) + phases.bias.to(wide))
        return (self._active(v) * step[..., None]).to(v.dtype), -self.slope * step

    def output(self, o: Tensor, gate: Tensor) -> Tensor:
        """y [B, T, D] from o [B, T, H, V] and the gate."""
        y: Tensor = self.out(self.norm(o, gate))
        return y


def _given(phases: StepWeights | None) -> list[StepWeights]:
    return [] if phases is None else [phases]
