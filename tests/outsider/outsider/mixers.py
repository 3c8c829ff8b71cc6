"""The layers of the two architectures."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasptrain.models.layers import srms
from lasptrain.models.linear import Linear, multi_linear
from lasptrain.models.mixer import RecurrentMixer, split_heads
from lasptrain.models.start import Start
from lasptrain.ops import state_dtype
from lasptrain.ops.recurrence import Inputs, Recurrence
from lasptrain.parallel.recurrence import ShardedRecurrence

from .architectures import SlowDiagonal, SlowMatrix
from .recurrences import DIAGONAL, MATRIX


def mixer(model: SlowMatrix | SlowDiagonal, layer: int, attention: ShardedRecurrence) -> SlowMixer:
    """Return the mixer of a layer."""
    return MatrixMixer(model, attention) if isinstance(model, SlowMatrix) else DiagonalMixer(model, attention)


class Decay(nn.Module):
    """A learned decay per head, in full precision whatever that of the layer."""

    full_precision = True

    def __init__(self, heads: int, slowest: float):
        super().__init__()
        self.logit, self.slowest = nn.Parameter(torch.empty(heads)), slowest

    def initial(self, part: str, start: Start) -> Tensor:
        """Return logits of decays from 0.9 to the slowest."""
        return torch.linspace(0.9, self.slowest, start.shape[0], dtype=torch.float64, device=start.device).logit()

    def forward(self) -> Tensor:
        """Return log decays [H]."""
        return F.logsigmoid(self.logit)


class SlowMixer(RecurrentMixer):
    """q, k = silu(W h), v = W h, A made of h, y = W rms(o) per head; a decay per head is learned."""

    def __init__(self, model: SlowMatrix | SlowDiagonal, attention: ShardedRecurrence):
        super().__init__()
        self.heads, self.attention = model.heads, attention
        self.q, self.k = Linear(model.dim, model.heads * model.K), Linear(model.dim, model.heads * model.K)
        self.v, self.out = Linear(model.dim, model.heads * model.V), Linear(model.heads * model.V, model.dim)
        self.transition = Linear(model.dim, model.heads * model.transition)
        self.decay = Decay(model.heads, model.slowest)

    def prepare(self, length: int) -> Tensor:
        """Return the log decays [H]."""
        log_decay: Tensor = self.decay()
        return log_decay

    def keys(self, h: Tensor, log_decay: Tensor) -> Inputs:
        """Return k and v, [B, T, H, ·], and the transitions."""
        k, v, transition = multi_linear(h, self.k, self.v, self.transition)
        return split_heads(F.silu(k), self.heads), split_heads(v, self.heads), self._transition(transition, log_decay)

    def queries(self, h: Tensor, log_decay: Tensor) -> tuple[Tensor]:
        """Return q [B, T, H, K]."""
        return (split_heads(F.silu(self.q(h)), self.heads),)

    def project(self, h: Tensor, log_decay: Tensor) -> tuple[Inputs, Tensor]:
        """Return `keys` and `queries`."""
        return self.keys(h, log_decay), *self.queries(h, log_decay)

    def output(self, o: Tensor) -> Tensor:
        """Return y [B, T, D] from o [B, T, H, V]."""
        y: Tensor = self.out(srms(o).flatten(2))
        return y

    def _transition(self, x: Tensor, log_decay: Tensor) -> Tensor:
        raise NotImplementedError


class MatrixMixer(SlowMixer):
    """The mixer of `SlowMatrix`."""

    rule: ClassVar[Recurrence] = MATRIX

    def __init__(self, model: SlowMatrix, attention: ShardedRecurrence):
        super().__init__(model, attention)
        self.mixing = model.mixing

    def _transition(self, x: Tensor, log_decay: Tensor) -> Tensor:
        """Return a (I + mixing · tanh(x)) [B, T, H, K, K]."""
        wide = split_heads(x.to(state_dtype(x)), self.heads)
        wide = wide.unflatten(-1, (round(wide.shape[-1] ** 0.5), -1))
        near = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device) + self.mixing * wide.tanh()
        transition: Tensor = log_decay.exp()[:, None, None] * near
        return transition


class DiagonalMixer(SlowMixer):
    """The mixer of `SlowDiagonal`."""

    rule: ClassVar[Recurrence] = DIAGONAL

    def _transition(self, x: Tensor, log_decay: Tensor) -> Tensor:
        """Return a^(2 σ(x)) [B, T, H, K]."""
        wide = split_heads(x.to(state_dtype(x)), self.heads)
        return (2 * wide.sigmoid() * log_decay[:, None]).exp()
