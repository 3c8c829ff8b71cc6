"""The Linear Transformer's mixer (arXiv:2006.16236)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lasptrain.architectures import linear_transformer as architecture
from lasptrain.models.layers import RMSNorm
from lasptrain.models.linear import Linear, multi_linear
from lasptrain.models.mixer import RecurrentMixer, split_heads
from lasptrain.ops.recurrence import Inputs
from lasptrain.parallel.recurrence import ShardedRecurrence


def mixer(model: architecture.LinearTransformer, layer: int, attention: ShardedRecurrence) -> LinearTransformer:
    """Return the mixer of a layer."""
    sizes = (model.dim, model.heads, model.K, model.V)
    return LinearTransformer(*sizes, normalizer=model.normalizer, attention=attention)


class LinearTransformer(RecurrentMixer):
    """The linear transformer's attention (arXiv:2006.16236): φ(x) = elu(x) + 1, no decay, no gate.

    Without normaliser o = rms(q S / √K) per head; with it o = rms(q S / (q z + 1e-10)), where z, the sum of keys, is
    one more column of the state because v gets a column of ones.
    """

    def __init__(
        self, dim: int, heads: int, key_dim: int, value_dim: int, *, normalizer: bool, attention: ShardedRecurrence
    ):
        super().__init__()
        self.heads, self.normalizer, self.attention = heads, normalizer, attention
        self.scale = key_dim**-0.5
        self.q, self.k = Linear(dim, heads * key_dim), Linear(dim, heads * key_dim)
        self.v, self.out = Linear(dim, heads * value_dim), Linear(heads * value_dim, dim)
        self.norm = RMSNorm(value_dim)
        self.slope = None

    def keys(self, h: Tensor, phases: None) -> Inputs:
        """Return k and v, [B, T, H, ·], v with its column of ones, and no decay."""
        k, v = multi_linear(h, self.k, self.v)
        return self._feature(k), self._value(v), None

    def queries(self, h: Tensor, phases: None) -> tuple[Tensor]:
        """Return q [B, T, H, K], scaled where there is no normaliser."""
        return (self._query(self.q(h)),)

    def project(self, h: Tensor, phases: None) -> tuple[Inputs, Tensor]:
        """Return `keys` and `queries` at once."""
        k, v, q = multi_linear(h, self.k, self.v, self.q)
        return (self._feature(k), self._value(v), None), self._query(q)

    def _feature(self, x: Tensor) -> Tensor:
        return split_heads(F.elu(x) + 1, self.heads)

    def _value(self, v: Tensor) -> Tensor:
        v = split_heads(v, self.heads)
        return F.pad(v, (0, 1), value=1.0) if self.normalizer else v

    def _query(self, q: Tensor) -> Tensor:
        q = self._feature(q)
        return q if self.normalizer else q * self.scale

    def output(self, o: Tensor) -> Tensor:
        """Return y [B, T, D] from o [B, T, H, ·]."""
        if self.normalizer:
            o = o[..., :-1] / (o[..., -1:] + 1e-10)
        y: Tensor = self.out(self.norm(o).flatten(2))
        return y
