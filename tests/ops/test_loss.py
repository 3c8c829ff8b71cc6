"""Chunked cross-entropy is F.cross_entropy in float64, and never holds (tokens, vocab) logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lasptrain.ops.cross_entropy import IGNORED, chunked_cross_entropy, token_losses

T, D, VOCAB = 37, 24, 101


def _case(dtype: torch.dtype, weight_dtype: torch.dtype, tokens: int = T) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, D, generator=generator, dtype=torch.float64).to(weight_dtype).requires_grad_()
    labels = torch.randint(VOCAB, (tokens,), generator=generator)
    labels[::5] = IGNORED
    return x, weight, labels


def _reference(
    x: Tensor, weight: Tensor, labels: Tensor, scale: float, z_loss: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients in float64 of the same values, the weight rounded to x's dtype as the products see it."""
    x64 = x.detach().double().requires_grad_()
    weight64 = weight.detach().to(x.dtype).double().requires_grad_()
    logits = x64 @ weight64.T
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    loss = loss + z_loss * logits.logsumexp(1)[labels != IGNORED].square().sum()
    dx, dweight = torch.autograd.grad(loss * scale, (x64, weight64))
    return loss.detach(), dx, dweight


def _error(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b).norm() / b.norm())


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("chunk", [1, 8, T, 64])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "loss_error", "grad_error"),
    [
        (torch.float64, torch.float64, 1e-14, 1e-14),
        (torch.float32, torch.float32, 1e-6, 1e-6),
        (torch.bfloat16, torch.float32, 1e-6, 4e-3),
        (torch.bfloat16, torch.bfloat16, 1e-6, 4e-3),
    ],
)
def test_equals_float64(
    dtype: torch.dtype, weight_dtype: torch.dtype, loss_error: float, grad_error: float, chunk: int, z_loss: float
) -> None:
    x, weight, labels = _case(dtype, weight_dtype)
    loss, part = chunked_cross_entropy(x, weight, labels, chunk, z_loss)
    (loss * 0.3).backward()
    expected, dx, dweight = _reference(x, weight, labels, 0.3, z_loss)
    assert x.grad is not None
    assert weight.grad is not None
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (x.grad.dtype, weight.grad.dtype) == (dtype, weight_dtype)
    assert _error(loss, expected) < loss_error
    assert _error(x.grad, dx) < grad_error
    assert _error(weight.grad, dweight) < grad_error
    assert not x.grad[labels == IGNORED].any()
    with torch.no_grad():
        assert _error(chunked_cross_entropy(x, weight, labels, chunk, z_loss).total, expected) < loss_error
    if not z_loss:
        assert part is None
        return
    assert part is not None and not part.requires_grad and loss.requires_grad
    assert _error(part, expected - _reference(x, weight, labels, 1.0)[0]) < 10 * loss_error


def test_weight_gradient_is_accumulated_in_fp32() -> None:
    """In bf16, thousands of chunks would each be rounded into a sum that is much larger than they are."""
    x, weight, labels = _case(torch.bfloat16, torch.float32, tokens=4096)
    chunked_cross_entropy(x, weight, labels, 2).total.backward()
    assert weight.grad is not None
    assert _error(weight.grad, _reference(x, weight, labels, 1.0)[2]) < 4e-3


def test_large_logits_and_nothing_valid() -> None:
    x, weight, labels = _case(torch.float32, torch.float32)
    loss = chunked_cross_entropy(x * 1e4, weight, labels, 8).total
    assert _error(loss, _reference(x.detach() * 1e4, weight, labels, 1.0)[0]) < 1e-6
    nothing = chunked_cross_entropy(x, weight, torch.full_like(labels, IGNORED), 8).total
    nothing.backward()
    assert nothing.item() == 0
    assert x.grad is not None
    assert not x.grad.any()


def test_token_losses_sum_to_the_loss() -> None:
    x, weight, labels = _case(torch.bfloat16, torch.float32)
    losses = token_losses(x, weight, labels, 8)
    expected = F.cross_entropy(
        x.double() @ weight.to(x.dtype).double().T, labels, ignore_index=IGNORED, reduction="none"
    )
    assert losses.dtype == torch.float32
    assert not losses.requires_grad
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses.sum(), chunked_cross_entropy(x, weight, labels, 8).total.detach())


class _Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor, and of matrix products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.products += "mm" in func.__name__
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return out


def test_logits_of_all_tokens_never_exist() -> None:
    x, weight, labels = _case(torch.float32, torch.float32, tokens=512)
    with _Largest() as largest:
        chunked_cross_entropy(x, weight, labels, 16).total.backward()
        token_losses(x, weight, labels, 16)
    assert largest.elements == max(x.numel(), weight.numel())  # 16 x 101 logits are smaller, 512 x 101 are not


@pytest.mark.parametrize("mode", ["no_grad", "frozen"])
def test_gradients_only_where_wanted(mode: str) -> None:
    x, weight, labels = _case(torch.float32, torch.float32)
    if mode == "frozen":
        x.requires_grad_(False)
        weight.requires_grad_(False)
    with torch.set_grad_enabled(mode == "frozen"), _Largest() as counted:
        loss = chunked_cross_entropy(x, weight, labels, T).total
    assert counted.products == 1
    assert not loss.requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_bf16_products_on_the_gpu(z_loss: float) -> None:
    x, weight, labels = _case(torch.bfloat16, torch.float32, tokens=4096)
    x_gpu, weight_gpu = x.detach().cuda().requires_grad_(), weight.detach().cuda().requires_grad_()
    loss = chunked_cross_entropy(x_gpu, weight_gpu, labels.cuda(), 64, z_loss).total
    loss.backward()
    expected, dx, dweight = _reference(x, weight, labels, 1.0, z_loss)
    assert x_gpu.grad is not None
    assert weight_gpu.grad is not None
    assert _error(loss.cpu(), expected) < 1e-6
    assert _error(x_gpu.grad.cpu(), dx) < 4e-3
    assert _error(weight_gpu.grad.cpu(), dweight) < 4e-3
