"""Cross-entropy of next-token predictions, computed in chunks of tokens: no tensor of (tokens, vocab) ever exists.

T tokens, D model dim. The loss is a sum, not a mean: the caller divides by the number of valid tokens in the whole
global batch, so that the result is the same number on every layout. Products take operands in x's dtype; logits,
log-sum-exp, sums and the weight's gradient are at least fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # label of a token that has nothing to predict


class Loss(NamedTuple):
    """The loss as a scalar, and the part of it, without gradient, that is the z-loss, if there is one."""

    total: Tensor
    z_loss: Tensor | None


def chunked_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk: int,
    z_loss: float = 0.0,
    look: Callable[[Tensor], None] | None = None,
) -> Loss:
    """Return the summed cross-entropy of `softmax(x weightᵀ)` against `labels`, fp32 (fp64 if x is fp64).

    x [T, D]; weight [vocab, D], cast once to x's dtype; labels [T] int64, IGNORED or in [0, vocab); `chunk` tokens are
    processed at a time. Gradients are computed along with the loss, so backward only scales them.
    `z_loss` times the sum of log² Z is added, Z being the softmax's denominator at a label that counts (PaLM,
    arXiv:2204.02311): it keeps log Z near zero. `look` is shown the logits of each chunk.
    """
    wanted = torch.is_grad_enabled()
    needs = (wanted and x.requires_grad, wanted and weight.requires_grad)
    total, part = _CrossEntropy.apply(x, weight, labels, chunk, z_loss, needs, look)  # type: ignore[no-untyped-call]
    return Loss(total, part)


@torch.no_grad()
def token_losses(x: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
    """Return each token's cross-entropy [T], 0 where ignored, in the same dtype as the loss; no gradient."""
    weight = weight.to(x.dtype)
    parts = zip(x.split(chunk), labels.split(chunk), strict=True)
    return torch.cat([_losses(_logits(tokens, weight), label)[0] for tokens, label in parts])


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk: int,
        z_loss: float,
        needs: tuple[bool, bool],
        look: Callable[[Tensor], None] | None,
    ) -> tuple[Tensor, Tensor | None]:
        operand = weight.to(x.dtype)
        exact = _accumulator(x)
        loss = x.new_zeros((), dtype=exact)
        z_part = x.new_zeros((), dtype=exact) if z_loss else None
        dx = torch.empty_like(x) if needs[0] else None
        dweight = torch.zeros_like(weight, dtype=exact) if needs[1] else None
        for start in range(0, len(x), chunk):
            part = slice(start, start + chunk)
            logits = _logits(x[part], operand)
            if look is not None:
                look(logits)
            if any(needs):
                gradient = _fused(z_loss) if x.is_cuda else partial(_losses_and_gradient, z_loss)
                losses, z_losses, dlogits = gradient(logits, labels[part], x.dtype)
            else:
                losses, z_losses = _losses(logits, labels[part], z_loss)
            loss += losses.sum()
            if z_part is not None and z_losses is not None:
                z_part += z_losses.sum()
            if dx is not None:
                torch.mm(dlogits, operand, out=dx[part])
            if dweight is not None:
                _accumulate(dweight, dlogits.T, x[part])
        ctx.save_for_backward(dx, dweight)
        ctx.weight_dtype = weight.dtype
        if z_part is None:
            return loss, None
        ctx.mark_non_differentiable(z_part)
        return loss + z_part, z_part

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        scaled_x = None if dx is None else dx * grad.to(dx.dtype)
        scaled_weight = None if dweight is None else (dweight * grad).to(ctx.weight_dtype)
        return scaled_x, scaled_weight, None, None, None, None, None


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    """Return x [C, D] times weight [vocab, D] transposed: [C, vocab], accumulated and returned in at least fp32."""
    exact = _accumulator(x)
    if x.dtype == exact:
        return x @ weight.T
    if x.is_cuda:
        return torch.mm(x, weight.T, out_dtype=exact)
    return x.to(exact) @ weight.to(exact).T


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to total, which is at least fp32; a and b may have fewer bits."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _losses(logits: Tensor, labels: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor | None]:
    """Return the cross-entropy and the z-loss [C], if any, of logits [C, vocab], 0 where ignored."""
    log_sum, ignored = logits.logsumexp(1), labels == IGNORED
    target = logits.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
    losses = (log_sum - target).masked_fill(ignored, 0)
    return losses, (z_loss * log_sum.square()).masked_fill(ignored, 0) if z_loss else None


def _losses_and_gradient(
    z_loss: float, logits: Tensor, labels: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return `_losses`, and their sum's gradient by the logits [C, vocab] in `dtype`: softmax minus one-hot, the
    softmax times 1 + 2 · z_loss · log Z.
    """
    log_sum = logits.logsumexp(1, keepdim=True)
    place = labels.clamp(min=0).unsqueeze(1)
    ignored = (labels == IGNORED).unsqueeze(1)
    losses = (log_sum - logits.gather(1, place)).masked_fill(ignored, 0).squeeze(1)
    hit = torch.arange(logits.shape[1], device=logits.device) == place
    softmax, z_losses = (logits - log_sum).exp(), None
    if z_loss:
        z_losses = (z_loss * log_sum.square()).masked_fill(ignored, 0).squeeze(1)
        softmax = softmax * (1 + 2 * z_loss * log_sum)
    dlogits = (softmax - hit.to(logits.dtype)).masked_fill(ignored, 0)
    return losses, z_losses, dlogits.to(dtype)


@cache
def _fused(z_loss: float) -> Callable[[Tensor, Tensor, torch.dtype], tuple[Tensor, Tensor | None, Tensor]]:
    """Return `_losses_and_gradient` compiled for a GPU, on first use, to keep imports light.

    One pass reads the logits for the sum, one writes the gradient.
    """

    def gradient(logits: Tensor, labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor]:
        return _losses_and_gradient(z_loss, logits, labels, dtype)

    return torch.compile(gradient, dynamic=False)
