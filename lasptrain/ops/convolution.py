"""A short causal depthwise convolution with silu, and with heads of length one if wanted, in one pass over memory.

The definition is `lasptrain.models.convolution`; here is its Triton form as a PyTorch operator, whose backward
computes what it needs again from its inputs. n + 1 taps, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd

from lasptrain.ops import LIBRARY, fake, operator

TAPS = 4  # of its Triton form, at most


@operator
def _short_convolution(
    x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None, doc_ids: Tensor | None, head: int, scale: float
) -> Tensor:
    from lasptrain.ops.triton_convolution import forward

    return forward(x, before, weight, bias, doc_ids, head, scale)


@operator
def _short_convolution_grad(
    dy: Tensor,
    x: Tensor,
    before: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    doc_ids: Tensor | None,
    head: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from lasptrain.ops.triton_convolution import backward

    return backward(dy, x, before, weight, bias, doc_ids, head, scale)


@fake("short_convolution")
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


@fake("short_convolution_grad")
def _(dy: Tensor, x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None, *_: object) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), before.new_empty(before.shape), torch.empty_like(weight), weight.new_empty(len(weight))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.head, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, before, weight, bias, doc_ids = ctx.saved_tensors
    dx, dbefore, dweight, dbias = _short_convolution_grad(dy, x, before, weight, bias, doc_ids, ctx.head, ctx.scale)
    return dx, dbefore, dweight, None if bias is None else dbias, None, None, None


register_autograd("lasptrain::short_convolution", _backward, setup_context=_save, lib=LIBRARY)


def short_convolution(
    x: Tensor,
    before: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    doc_ids: Tensor | None,
    head: int = 0,
    scale: float = 1.0,
) -> Tensor:
    """Return y = silu(b + Σ_j w_j x_{t−j}) over tokens of the same document, [B, T, C] in x's dtype.

    Times `scale`, and with `head` channels in one, y / √(|y|² + UNIT_EPS) of each head. Sums are in fp32.

    Args:
        x: [B, T, C], on a GPU.
        before: the n rows before x [B, n, C]; zero where they belong to an earlier document than token −1.
        weight, bias: [C, n + 1 ≤ TAPS], the present token's last, and [C], fp32.
        doc_ids: [B, T] int32 or int64; document 0 continues from the left. None: one document.
    """
    y: Tensor = _short_convolution(x, before, weight, bias, doc_ids, head, scale)
    return y
