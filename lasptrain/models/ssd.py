"""State-space duality (Mamba-2, arXiv:2405.21060) as linear attention: a scalar decay per head, fixed or per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasptrain.architectures.ssd import Ssd
from lasptrain.models.convolution import Convolution, ConvWeights
from lasptrain.models.layers import srms
from lasptrain.models.linear import Linear, multi_linear
from lasptrain.models.mixer import COMPILED, Context, Kinds, Mixer, State, split_heads
from lasptrain.models.start import UNIT_STEP, Start
from lasptrain.parallel.halo import halo
from lasptrain.parallel.recurrence import Pending, ShardedRecurrence


def mixer(model: Ssd, layer: int, attention: ShardedRecurrence) -> StateSpace:
    """Return the mixer of a layer."""
    return StateSpace(
        model.dim,
        model.heads,
        model.K,
        model.V,
        data_dependent=model.data_dependent,
        learned=model.learned,
        conv=model.conv,
        eps=model.norm.eps,
        attention=attention,
    )


class TimeStepWeights(NamedTuple):
    """Weights of a step's logit x Wᵀ + b, in full precision; takes the place of a `Linear` in `multi_linear`."""

    weight: Tensor  # [H, D]
    bias: Tensor  # [H]
    log_slope: Tensor | None  # [H], where it is learned
    operand: None = None


class TimeStep(nn.Module):
    """The weights of a data-dependent step; initially W is zero and b = ln(e − 1), so that every step is one."""

    full_precision = True

    def __init__(self, dim: int, heads: int, *, learned: bool):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(heads, dim)), nn.Parameter(torch.empty(heads))
        self.log_slope = nn.Parameter(torch.empty(heads)) if learned else None

    def initial(self, part: str, start: Start) -> Tensor:
        """Return initial weights: each step is one, slopes are the schedule's."""
        if part == "log_slope":
            assert start.slopes is not None
            return start.slopes.log().to(start.device)
        return start.full(UNIT_STEP if part == "bias" else 0.0)

    def forward(self) -> TimeStepWeights:
        """Return copies: where parameters are sharded, they are gathered only while this runs."""
        log_slope = None if self.log_slope is None else self.log_slope.clone()
        return TimeStepWeights(self.weight.clone(), self.bias.clone(), log_slope)


class GatedNorm(nn.Module):
    """rms(o ⊙ silu(gate)) per head, times a weight [H·V]: the gate comes first."""

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, o: Tensor, gate: Tensor) -> Tensor:
        """Return [B, T, H·V] of o [B, T, H, V] and the gate [B, T, H·V]."""
        o = o * F.silu(gate).view(o.shape)
        return srms(o, self.eps).flatten(2) * self.weight.to(o.dtype)


class SsdWeights(NamedTuple):
    """The small weights of a mixer, which stay in full precision; None where it has none."""

    step: TimeStepWeights | None
    taps: ConvWeights | None

    @property
    def steps(self) -> list[TimeStepWeights]:
        return [] if self.step is None else [self.step]


class StateSpace(Mixer):
    """q, k, v = silu(conv(W h)); S_t = a_t S_{t−1} + Δ_t k_tᵀ v_t; y = W norm(o ⊙ silu(gate)).

    a = e^{−sΔ} with a slope s per head. Δ = 1, or with `data_dependent` Δ = softplus(W h + b): a token that opens the
    state (large Δ) writes more and forgets more; `learned` slopes are trained with it. `conv` is the number of tokens
    that the convolution sees; with 0 there is none, and nothing but the state crosses slices.
    """

    compiled = (*COMPILED, "convolved")
    elementwise: ClassVar[Kinds] = {"dt": "decays"}

    def __init__(
        self,
        dim: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        *,
        data_dependent: bool,
        learned: bool = False,
        conv: int,
        eps: float = 1e-5,
        attention: ShardedRecurrence,
    ):
        super().__init__()
        self.heads, self.attention = heads, attention
        self.q, self.k = Linear(dim, heads * key_dim), Linear(dim, heads * key_dim)
        self.v, self.gate = Linear(dim, heads * value_dim), Linear(dim, heads * value_dim)
        self.out = Linear(heads * value_dim, dim)
        self.norm = GatedNorm(heads * value_dim, eps)
        self.dt = TimeStep(dim, heads, learned=learned) if data_dependent else None
        self.channels = (heads * value_dim, heads * key_dim, heads * key_dim)  # of v, k, q
        self.conv = Convolution(sum(self.channels), conv) if conv else None
        self.slope: Tensor
        self.register_buffer("slope", None if learned else torch.empty(heads))

    def prepare(self, length: int) -> SsdWeights:
        return SsdWeights(None if self.dt is None else self.dt(), None if self.conv is None else self.conv())

    def forward(self, h: Tensor, weights: SsdWeights, context: Context) -> tuple[Tensor, State]:
        o, gate, state = self._attended(h, weights, context)
        return self.output(o, gate), state

    def state(self, h: Tensor, weights: SsdWeights, context: Context) -> State:
        """Return the next segment's initial state, without computing outputs."""
        rows = None
        if weights.taps is None:
            inputs = self.keys(h, weights)
        else:
            k, v, decay, _, _, rows = self._with_neighbours(h, weights, context)
            inputs = k, v, decay
        return self.attention.final_state_of(self._begin(inputs, context)), rows

    def _attended(self, h: Tensor, weights: SsdWeights, context: Context) -> tuple[Tensor, Tensor, State]:
        """Return o, the gate and the final state; what else the scan needed is freed."""
        rows = None
        if weights.taps is not None:
            *inputs, q, gate, rows = self._with_neighbours(h, weights, context)
            pending = self._begin(inputs, context)
        elif self.attention.scan.size > 1:
            pending = self._begin(self.keys(h, weights), context)
            q, gate = self.queries(h, weights)
        else:
            *inputs, q, gate = self.project(h, weights)
            pending = self._begin(inputs, context)
        o, final_state = self.attention.finish(pending, q)
        return o, gate, (final_state, rows)

    def _begin(self, inputs: Sequence[Tensor], context: Context) -> Pending:
        doc_ids, (carry, _), saved, wanted, _ = context
        return self.attention.begin(tuple(inputs), doc_ids, carry=carry, saved=saved, output_final_state=wanted)

    def keys(self, h: Tensor, weights: SsdWeights) -> tuple[Tensor, Tensor, Tensor]:
        """Return k and v [B, T, H, ·], v times its step, and the log decay [H] or [B, T, H]."""
        k, v, *dt = multi_linear(h, self.k, self.v, *weights.steps)
        return split_heads(F.silu(k), self.heads), *self._stepped(F.silu(v), dt, weights)

    def queries(self, h: Tensor, weights: SsdWeights) -> tuple[Tensor, Tensor]:
        """Return q [B, T, H, K] and the gate [B, T, H·V]."""
        q, gate = multi_linear(h, self.q, self.gate)
        return split_heads(F.silu(q), self.heads), gate

    def project(self, h: Tensor, weights: SsdWeights) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return `keys` and `queries` at once."""
        k, v, q, gate, *dt = multi_linear(h, self.k, self.v, self.q, self.gate, *weights.steps)
        return (
            split_heads(F.silu(k), self.heads),
            *self._stepped(F.silu(v), dt, weights),
            split_heads(F.silu(q), self.heads),
            gate,
        )

    def _with_neighbours(
        self, h: Tensor, weights: SsdWeights, context: Context
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Return the results of `project`, convolved, and the rows before the next segment."""
        assert weights.taps is not None
        n = weights.taps.weight.shape[1] - 1
        v, k, q, gate, *dt = multi_linear(h, self.v, self.k, self.q, self.gate, *weights.steps)
        doc_ids, (_, carry), saved, wanted, _ = context
        before, final_state = halo((v, k, q), n, doc_ids, carry, self.attention.scan, saved.rows, wanted)
        return *self.convolved(v, k, q, before, dt, weights, doc_ids), gate, final_state

    def convolved(
        self,
        v: Tensor,
        k: Tensor,
        q: Tensor,
        before: Tensor,
        dt: list[Tensor],
        weights: SsdWeights,
        doc_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return k, v, log decay and q from the products and the rows before them."""
        assert weights.taps is not None
        v, k, q = weights.taps.each((v, k, q), before, doc_ids, self.attention.kernel)
        return split_heads(k, self.heads), *self._stepped(v, dt, weights), split_heads(q, self.heads)

    def _stepped(self, v: Tensor, dt: list[Tensor], weights: SsdWeights) -> tuple[Tensor, Tensor]:
        """Return values times their steps, and the log decay, from products v and dt; steps are in at least fp32."""
        if weights.step is None:
            return split_heads(v, self.heads), -self.slope
        step = F.softplus(dt[0].to(torch.promote_types(v.dtype, torch.float32)) + weights.step.bias)
        slope = self.slope if weights.step.log_slope is None else weights.step.log_slope.exp()
        return (split_heads(v, self.heads) * step[..., None]).to(v.dtype), -slope * step

    def output(self, o: Tensor, gate: Tensor) -> Tensor:
        """Return y [B, T, D] from o [B, T, H, V] and the gate."""
        y: Tensor = self.out(self.norm(o, gate))
        return y
