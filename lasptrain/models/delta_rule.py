"""The mixer that Gated DeltaNet, Kimi Delta Attention and GLA share: projections, convolutions, gates, norm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasptrain.architectures.delta_rule import STEP, GatedByData
from lasptrain.models.convolution import Convolution, ConvWeights, Form
from lasptrain.models.layers import srms, unit, wide
from lasptrain.models.linear import HasWeight, Linear, multi_linear
from lasptrain.models.mixer import COMPILED, Context, Kinds, Mixer, State, split_heads
from lasptrain.models.start import UNIT_STEP, Start
from lasptrain.ops import delta_rule
from lasptrain.ops.recurrence import Inputs, Recurrence
from lasptrain.parallel.halo import halo
from lasptrain.parallel.recurrence import Pending, ShardedRecurrence

GATES: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}


class Prepared(NamedTuple):
    """The small weights of a mixer, in full precision: the decay's own, and the convolution's if there is one."""

    decay: Any
    taps: ConvWeights | None


class GatedNorm(nn.Module):
    """rms(o) per head, times a weight [V], times the activated gate, in at least fp32."""

    def __init__(self, value_dim: int, eps: float, gate: str):
        super().__init__()
        self.weight, self.eps, self.gate = nn.Parameter(torch.ones(value_dim)), eps, GATES[gate]

    def forward(self, o: Tensor, gate: Tensor) -> Tensor:
        """Return [B, T, H·V] of o [B, T, H, V] and the gate [B, T, H·V]."""
        y: Tensor = srms(wide(o), self.eps) * self.weight.to(wide(o).dtype) * self.gate(wide(gate)).view(o.shape)
        return y.flatten(2).to(o.dtype)


class ZeroLinear(Linear):
    """A `Linear` that starts at zero: what it steers starts as its bias says."""

    def initial(self, part: str, start: Start) -> Tensor:
        return start.full(0.0)


class LowRank(nn.Module):
    """W_up W_down through a bottleneck of `rank` channels; `zero`: W_up starts at zero."""

    def __init__(self, inputs: int, rank: int, outputs: int, *, zero: bool = False):
        super().__init__()
        self.down, self.up = Linear(inputs, rank), (ZeroLinear if zero else Linear)(rank, outputs)


class Rate(NamedTuple):
    """The weights of a decay that its input does not touch, in full precision."""

    bias: Tensor  # [H] or [H·K]
    log_slope: Tensor  # [H]


class Decay(nn.Module):
    """ln a = −e^A softplus(x + b), with A [H] and b [H] or [H·K].

    Starts so that x = 0 gives the slopes of the schedule: softplus(b) is one, and A their logarithm; or with `paper`
    as the papers do: softplus(b) log-uniform in 0.001 to 0.1, and e^A the slopes over the geometric mean of these.
    """

    full_precision = True

    def __init__(self, heads: int, count: int, *, paper: bool):
        super().__init__()
        self.bias, self.log_slope = nn.Parameter(torch.empty(count)), nn.Parameter(torch.empty(heads))
        self.paper = paper

    def initial(self, part: str, start: Start) -> Tensor:
        """Return initial weights; see the class."""
        if part == "log_slope":
            assert start.slopes is not None
            return (start.slopes.double() / (STEP if self.paper else 1.0)).log().to(start.device)
        if not self.paper:
            return start.full(UNIT_STEP)
        step = (start.empty().uniform_(-1, 1, generator=start.generator).double() * math.log(10)).exp() * STEP
        return step + torch.log(-torch.expm1(-step))

    def forward(self) -> Rate:
        """Return copies: where parameters are sharded, they are gathered only while this runs."""
        return Rate(self.bias.clone(), self.log_slope.clone())


def log_decay(x: Tensor, rate: Rate, heads: int) -> Tensor:
    """Return ln a, [B, T, H] or [B, T, H, K] in at least fp32, of the product x [B, T, H] or [B, T, H·K]."""
    step = F.softplus(wide(x) + rate.bias)
    slope = rate.log_slope.exp()
    return -slope * step if x.shape[-1] == heads else -slope[:, None] * step.unflatten(-1, (heads, -1))


class DeltaRule(Mixer):
    """o from S_t = (I − β_t k_t k_tᵀ) diag(a_t) S_{t−1} + β_t k_t v_tᵀ; y = W norm(o, gate).

    q, k and v pass a convolution and silu, or are linear without one. What a subclass adds: the products of h for beta,
    decay and gate in `_beside_keys` and `_beside_queries`, and `_log_decay`; units of length one where `erases`.
    """

    compiled = (*COMPILED, "convolved")
    rule: ClassVar[Recurrence] = delta_rule
    elementwise: ClassVar[Kinds] = {"beta": "betas", "decay_proj": "decays", "decay": "decays"}  # they steer the state
    erases: ClassVar[bool] = True  # q and k are unit vectors, and beta says how much of what a key holds is replaced

    def __init__(self, cfg: GatedByData, key_heads: int, gate: str, attention: ShardedRecurrence):
        super().__init__()
        dim, self.heads, self.key_heads, self.attention = cfg.dim, cfg.heads, key_heads, attention
        self.head_dim, self.scale = cfg.K, float(cfg.K**-0.5)
        keys, values = key_heads * cfg.K, cfg.heads * cfg.V
        self.q, self.k, self.v = Linear(dim, keys), Linear(dim, keys), Linear(dim, values)
        self.out = Linear(values, dim)
        self.norm = GatedNorm(cfg.V, cfg.output_eps, gate)
        self.channels = (keys, keys, values)  # of q, k, v
        self.conv = Convolution(sum(self.channels), cfg.conv, bias=False) if cfg.conv else None
        if self.conv is not None:
            self.conv.undecayed = ("weight",)

    def _decay_weights(self) -> Any:
        """Return the decay's own weights, in full precision."""
        raise NotImplementedError

    def _gates(self) -> list[HasWeight]:
        """Return the layers whose products of h `_written` takes: for beta and decay."""
        raise NotImplementedError

    def _written(self, products: list[Tensor], decay: Any) -> tuple[Tensor | None, Tensor]:
        """Return beta [B, T, H], or None, and log decays, in at least fp32, from the products of `_gates`."""
        raise NotImplementedError

    def _output_gate(self) -> HasWeight:
        """Return the layer of the gate; `output` gets its product."""
        raise NotImplementedError

    def prepare(self, length: int) -> Prepared:
        return Prepared(self._decay_weights(), None if self.conv is None else self.conv())

    def forward(self, h: Tensor, weights: Prepared, context: Context) -> tuple[Tensor, State]:
        o, state, gate = self._attended(h, weights, context)
        return self.output(o, gate), state

    def state(self, h: Tensor, weights: Prepared, context: Context) -> State:
        """Return the next segment's initial state, without computing outputs."""
        rows = None
        if weights.taps is None:
            inputs = self.keys(h, weights)
        else:
            inputs, _, _, rows = self._with_neighbours(h, weights, context)
        return self.attention.final_state_of(self._begin(inputs, context)), rows

    def _attended(self, h: Tensor, weights: Prepared, context: Context) -> tuple[Tensor, State, Tensor]:
        """Return o, the final state and the gate; what else the scan needed is freed."""
        rows = None
        if weights.taps is not None:
            inputs, q, gate, rows = self._with_neighbours(h, weights, context)
            pending = self._begin(inputs, context)
        elif self.attention.scan.size > 1:
            pending = self._begin(self.keys(h, weights), context)
            q, gate = self.queries(h, weights)
        else:
            inputs, q, gate = self.project(h, weights)
            pending = self._begin(inputs, context)
        o, final_state = self.attention.finish(pending, q)
        return o, (final_state, rows), gate

    def _begin(self, inputs: Inputs, context: Context) -> Pending:
        doc_ids, (carry, _), saved, wanted, _ = context
        return self.attention.begin(
            inputs, doc_ids, rule=self.rule, carry=carry, saved=saved, output_final_state=wanted
        )

    def keys(self, h: Tensor, weights: Prepared) -> Inputs:
        """Return k, v, beta and log decays, without a convolution."""
        k, v, *gates = multi_linear(h, self.k, self.v, *self._gates())
        return self._key(k, k.dtype), split_heads(v, self.heads), *self._written(gates, weights.decay)

    def queries(self, h: Tensor, weights: Prepared) -> tuple[Tensor, Tensor]:
        """Return q [B, T, H_k, K] and the gate [B, T, H·V], without a convolution."""
        q, gate = multi_linear(h, self.q, self._output_gate())
        return self._query(q, q.dtype), self._opened(gate)

    def project(self, h: Tensor, weights: Prepared) -> tuple[Inputs, Tensor, Tensor]:
        """Return `keys` and `queries` at once."""
        k, v, q, gate, *gates = multi_linear(h, self.k, self.v, self.q, self._output_gate(), *self._gates())
        inputs = self._key(k, k.dtype), split_heads(v, self.heads), *self._written(gates, weights.decay)
        return inputs, self._query(q, q.dtype), self._opened(gate)

    def _with_neighbours(
        self, h: Tensor, weights: Prepared, context: Context
    ) -> tuple[Inputs, Tensor, Tensor, Tensor | None]:
        """Return inputs, q and gate, convolved, and the rows before the next segment."""
        assert weights.taps is not None
        n = weights.taps.weight.shape[1] - 1
        q, k, v, gate, *gates = multi_linear(h, self.q, self.k, self.v, self._output_gate(), *self._gates())
        doc_ids, (_, carry), saved, wanted, _ = context
        before, final_state = halo((q, k, v), n, doc_ids, carry, self.attention.scan, saved.rows, wanted)
        return *self.convolved(q, k, v, gate, before, gates, weights, doc_ids), final_state

    def convolved(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor,
        before: Tensor,
        gates: list[Tensor],
        weights: Prepared,
        doc_ids: Tensor | None,
    ) -> tuple[Inputs, Tensor, Tensor]:
        """Return inputs, q and gate from the products and the rows before them."""
        assert weights.taps is not None
        head = self.head_dim if self.erases else 0
        forms = Form(head, self.scale), Form(head), Form()
        q, k, v = weights.taps.each((q, k, v), before, doc_ids, self.attention.kernel, forms)
        inputs = split_heads(k, self.key_heads), split_heads(v, self.heads), *self._written(gates, weights.decay)
        return inputs, split_heads(q, self.key_heads), self._opened(gate)

    def _key(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return keys by head; those of unit length are rounded to `dtype` after they have got it."""
        x = split_heads(x, self.key_heads)
        return (unit(x) if self.erases else x).to(dtype)

    def _query(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return queries by head, likewise, times K^−½."""
        x = split_heads(x, self.key_heads)
        return ((unit(x) if self.erases else x) * self.scale).to(dtype)

    def _opened(self, gate: Tensor) -> Tensor:
        """Return the gate [B, T, H·V] from the product of `_output_gate`."""
        return gate

    def output(self, o: Tensor, gate: Tensor) -> Tensor:
        """Return y [B, T, D] from o [B, T, H, V] and the gate."""
        y: Tensor = self.out(self.norm(o, gate))
        return y
