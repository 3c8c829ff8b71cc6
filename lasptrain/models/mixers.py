"""Mixers: the layers that move information between tokens.

Each takes the normalised input h [B, T, D] and what the scan needs, and returns y [B, T, D] with its leaving state. If
ranks share the window it makes k and v first, so that the exchange travels while q and the gate are computed. What
`phases` returns is small and full precision; the block makes it outside of recomputation and hands it in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasptrain.models.layers import Lrpe, Phases, RMSNorm, srms
from lasptrain.models.linear import Linear, products
from lasptrain.parallel.recurrence import Attention, Memory, Pending

State = tuple[Tensor | None, ...]  # what a mixer carries from segment to segment; only the mixer understands it


COMPILED = ("keys", "queries", "project", "output")  # the parts of a mixer between exchanges


class Recurrence(nn.Module):
    """A mixer that is one linear recurrence: what all have in common is the order of work around the exchange.

    `keys` gives k and v, `queries` q and what else `output` takes, `project` both at once. Slopes of None: no decay.
    """

    parts: ClassVar[tuple[str, ...]] = COMPILED
    attention: Attention
    slope: Tensor | None
    keys: Callable[..., tuple[Tensor, Tensor]]
    queries: Callable[..., tuple[Tensor, ...]]
    project: Callable[..., tuple[Tensor, ...]]
    output: Callable[..., Tensor]

    def phases(self, length: int) -> Phases | None:
        return None

    def forward(
        self, h: Tensor, phases: Phases | None, doc: Tensor | None, carry: State, memory: Memory, leave: bool
    ) -> tuple[Tensor, State]:
        if self.attention.scan.size > 1:
            pending = self._begin(*self.keys(h, phases), phases, doc, carry, memory, leave)
            q, *rest = self.queries(h, phases)
        else:
            k, v, q, *rest = self.project(h, phases)
            pending = self._begin(k, v, phases, doc, carry, memory, leave)
        o, leaving = self.attention.finish(pending, q)
        return self.output(o, *rest), (leaving,)

    def state(self, h: Tensor, phases: Phases | None, doc: Tensor | None, carry: State, memory: Memory) -> State:
        """What leaves the segment, without outputs."""
        k, v = self.keys(h, phases)
        return (self.attention.leave(self._begin(k, v, phases, doc, carry, memory, True)),)

    def _begin(
        self,
        k: Tensor,
        v: Tensor,
        phases: Phases | None,
        doc: Tensor | None,
        carry: State,
        memory: Memory,
        leave: bool,
    ) -> Pending:
        decay = None if self.slope is None else -self.slope
        turn = None if phases is None else phases.turn
        return self.attention.begin(k, v, decay, doc, angle=turn, carry=carry[0], memory=memory, leave=leave)


class TransNormer(Recurrence):
    """Linear attention of TransNormerLLM (arXiv:2307.14995).

    q, k = silu(W h), with LRPE in flagged layers; v and the gate u are linear; y = W (u ⊙ srms(o)) over all heads.
    """

    def __init__(
        self, dim: int, heads: int, key_dim: int, value_dim: int, *, lrpe: bool, decayed: bool, attention: Attention
    ):
        super().__init__()
        self.heads, self.attention = heads, attention
        self.q, self.k = Linear(dim, heads * key_dim), Linear(dim, heads * key_dim)
        self.v, self.gate = Linear(dim, heads * value_dim), Linear(dim, heads * value_dim)
        self.out = Linear(heads * value_dim, dim)
        self.lrpe = Lrpe(heads, key_dim) if lrpe else None
        self.register_buffer("slope", torch.empty(heads) if decayed else None)

    def phases(self, length: int) -> Phases | None:
        return None if self.lrpe is None else self.lrpe(length)

    def keys(self, h: Tensor, phases: Phases | None) -> tuple[Tensor, Tensor]:
        """k and v, [B, T, H, ·]."""
        k, v = products(h, self.k, self.v)
        return self._features(k, phases), _heads(v, self.heads)

    def queries(self, h: Tensor, phases: Phases | None) -> tuple[Tensor, Tensor]:
        """q [B, T, H, ·] and the gate [B, T, H·V]."""
        q, gate = products(h, self.q, self.gate)
        return self._features(q, phases), gate

    def project(self, h: Tensor, phases: Phases | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`keys` and `queries` at once."""
        k, v, q, gate = products(h, self.k, self.v, self.q, self.gate)
        return self._features(k, phases), _heads(v, self.heads), self._features(q, phases), gate

    def _features(self, x: Tensor, phases: Phases | None) -> Tensor:
        x = _heads(F.silu(x), self.heads)
        return x if phases is None else phases.features(x)

    def output(self, o: Tensor, gate: Tensor) -> Tensor:
        """y [B, T, D] from o [B, T, H, V] and the gate."""
        y: Tensor = self.out(gate * srms(o.flatten(2)))
        return y


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:2], heads, -1)


class Undecayed(Recurrence):
    """The linear transformer's attention (arXiv:2006.16236): φ(x) = elu(x) + 1, no decay, no gate.

    Without normaliser o = rms(q S / √K) per head; with it o = rms(q S / (q z + 1e-10)), where z, the sum of keys, is
    one more column of the state because v gets a column of ones.
    """

    def __init__(self, dim: int, heads: int, key_dim: int, value_dim: int, *, normalizer: bool, attention: Attention):
        super().__init__()
        self.heads, self.normalizer, self.attention = heads, normalizer, attention
        self.scale = key_dim**-0.5
        self.q, self.k = Linear(dim, heads * key_dim), Linear(dim, heads * key_dim)
        self.v, self.out = Linear(dim, heads * value_dim), Linear(heads * value_dim, dim)
        self.norm = RMSNorm(value_dim)
        self.slope = None

    def keys(self, h: Tensor, phases: None) -> tuple[Tensor, Tensor]:
        """k and v, [B, T, H, ·]; v with its column of ones."""
        k, v = products(h, self.k, self.v)
        return self._feature(k), self._value(v)

    def queries(self, h: Tensor, phases: None) -> tuple[Tensor]:
        """q [B, T, H, K], scaled where nothing normalises it."""
        return (self._query(self.q(h)),)

    def project(self, h: Tensor, phases: None) -> tuple[Tensor, Tensor, Tensor]:
        """`keys` and `queries` at once."""
        k, v, q = products(h, self.k, self.v, self.q)
        return self._feature(k), self._value(v), self._query(q)

    def _feature(self, x: Tensor) -> Tensor:
        return _heads(F.elu(x) + 1, self.heads)

    def _value(self, v: Tensor) -> Tensor:
        v = _heads(v, self.heads)
        return F.pad(v, (0, 1), value=1.0) if self.normalizer else v

    def _query(self, q: Tensor) -> Tensor:
        q = self._feature(q)
        return q if self.normalizer else q * self.scale

    def output(self, o: Tensor) -> Tensor:
        """y [B, T, D] from o [B, T, H, ·]."""
        if self.normalizer:
            o = o[..., :-1] / (o[..., -1:] + 1e-10)
        y: Tensor = self.out(self.norm(o).flatten(2))
        return y
