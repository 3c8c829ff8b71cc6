"""A short causal depthwise convolution: it lets a token see its neighbours before it writes to the state."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lasptrain.models.layers import unit
from lasptrain.models.start import Start
from lasptrain.ops.convolution import TAPS, short_convolution

# Its result is recomputed in the backward: a compiler would keep x shifted by every tap.
again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class Form(NamedTuple):
    """The form of what is convolved: heads of so many channels are unit vectors, unless that is 0; times `scale`."""

    head: int = 0
    scale: float = 1.0


class ConvWeights(NamedTuple):
    """The weights of a convolution over n + 1 tokens, in full precision."""

    weight: Tensor  # [C, n + 1], the present token's last
    bias: Tensor | None  # [C]

    def split(self, *channels: int) -> list[ConvWeights]:
        """Split into the weights of consecutive groups of channels."""
        biases = [None] * len(channels) if self.bias is None else self.bias.split(channels)
        return [ConvWeights(w, b) for w, b in zip(self.weight.split(channels), biases, strict=True)]

    def each(
        self,
        parts: Sequence[Tensor],
        before: Tensor,
        doc_ids: Tensor | None,
        kernel: str,
        forms: Sequence[Form] | None = None,
    ) -> list[Tensor]:
        """Return parts [B, T, ·], whose channels side by side are the C, convolved and recomputed in the backward.

        Args as of a call, `before` [B, n, C]; `kernel` of the recurrence; `forms` of the results, in the parts' dtypes.
        """
        channels = [x.shape[-1] for x in parts]
        rows = before.split(channels, dim=-1)
        fits = kernel == "triton" and before.shape[1] < TAPS
        call = ConvWeights.fused if fits else partial(again, ConvWeights.formed)
        given = zip(self.split(*channels), parts, rows, forms or [Form()] * len(parts), strict=True)
        return [call(w, x, r, doc_ids, form) for w, x, r, form in given]

    def formed(self, x: Tensor, before: Tensor, doc_ids: Tensor | None, form: Form) -> Tensor:
        """Return a call's result [B, T, C] in that form and x's dtype."""
        y = self(x, before, doc_ids)
        if form.head:
            y = unit(y.unflatten(-1, (-1, form.head))).flatten(2)
        return (y * form.scale if form.scale != 1 else y).to(x.dtype)

    def fused(self, x: Tensor, before: Tensor, doc_ids: Tensor | None, form: Form) -> Tensor:
        """Return `formed` in Triton, in one pass."""
        return short_convolution(x, before, self.weight, self.bias, doc_ids, *form)

    def __call__(self, x: Tensor, before: Tensor, doc_ids: Tensor | None) -> Tensor:
        """Return silu(b + Σ_j w_j x_{t−j}) [B, T, C], in at least fp32, over tokens of the same document.

        Args:
            x: [B, T, C].
            before: the n rows before x [B, n, C]; zero where they belong to an earlier document than token −1.
            doc_ids: document numbers in the slice [B, T]; document 0 continues from the left. None: one document.
        """
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        n = before.shape[1]
        y = self.weight[:, n] * x.to(wide)
        if self.bias is not None:
            y = y + self.bias
        for j in range(1, n + 1):
            shifted = _shifted(x, before, j)
            if doc_ids is not None:
                shifted = shifted * (_shifted(doc_ids, None, j) == doc_ids)[..., None]
            y = y + self.weight[:, n - j] * shifted.to(wide)
        return F.silu(y)


def _shifted(x: Tensor, before: Tensor | None, j: int) -> Tensor:
    """Shift x [B, T, …] right by j tokens; `before` [B, n, …], zero if not given, moves in.

    Sums padded tensors instead of concatenating, because a compiler fuses these into one kernel.
    """
    length = x.shape[1]
    rest = [0, 0] * (x.dim() - 2)
    if length <= j:
        return torch.zeros_like(x) if before is None else before[:, before.shape[1] - j :][:, :length]
    moved = F.pad(x, [*rest, j, -j])
    if before is None:
        return moved
    return moved + F.pad(before[:, before.shape[1] - j :], [*rest, 0, length - j])


class Convolution(nn.Module):
    """The weights, initially uniform in ±1/√(n + 1) as in torch, but with zero bias."""

    full_precision = True

    def __init__(self, channels: int, width: int, *, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.undecayed: tuple[str, ...] = ()  # parameters without weight decay

    def initial(self, part: str, start: Start) -> Tensor:
        """Return initial weights; see the class."""
        bound = start.shape[-1] ** -0.5 if part == "weight" else 0.0
        return start.empty().uniform_(-bound, bound, generator=start.generator)

    def forward(self) -> ConvWeights:
        """Return copies: where parameters are sharded, they are gathered only while this runs."""
        return ConvWeights(self.weight.clone(), None if self.bias is None else self.bias.clone())
