"""Products with weights: one input, several weights, and copies of them in the precision of the product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lasptrain.models.linear import Linear, multi_linear
from lasptrain.recipe.sections import Optim
from lasptrain.training.optimizer import build_optimizer
from tests.support.kernel_cases import error


def _layers() -> list[Linear]:
    torch.manual_seed(0)
    return [Linear(24, 40), Linear(24, 8)]


def _gradients(layers: list[Linear], x: Tensor, seeds: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(multi_linear(x, *layers), (x, *(layer.weight for layer in layers)), seeds))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_products_and_gradients_are_those_of_separate_layers(dtype: torch.dtype) -> None:
    layers = [layer.to(torch.promote_types(dtype, torch.float32)) for layer in _layers()]
    for layer in layers:
        layer.cast(dtype)
    x = torch.randn(2, 33, 24, dtype=dtype, requires_grad=True)
    seeds = [torch.randn(2, 33, layer.out_features, dtype=dtype) for layer in layers]
    exact = x.detach().double().requires_grad_()
    weights = [layer.weight.detach().to(dtype).double().requires_grad_() for layer in layers]
    want = [F.linear(exact, weight) for weight in weights]
    bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    for found, wanted in zip(multi_linear(x, *layers), want, strict=True):
        assert found.dtype == dtype and error(found.detach(), wanted.detach()) < bound
    gradients = torch.autograd.grad(want, (exact, *weights), [seed.double() for seed in seeds])
    dx, *dweights = _gradients(layers, x, seeds)
    assert error(dx, gradients[0]) < bound
    for found, wanted in zip(dweights, gradients[1:], strict=True):
        assert found.dtype == layers[0].weight.dtype
        assert error(found, wanted) < min(bound, 1e-6), "weight gradients keep what fp32 accumulated"


def test_a_changed_weight_is_cast_again() -> None:
    layer, x = _layers()[0], torch.randn(5, 24, dtype=torch.bfloat16)
    optimizer = build_optimizer(torch.nn.Sequential(layer), Optim(lr=0.1))
    before = None
    for change in ("nothing", "update", "load"):
        if change == "update":
            layer.weight.grad = torch.randn_like(layer.weight)
            optimizer.step()
        elif change == "load":
            layer.load_state_dict({"weight": torch.randn_like(layer.weight)})
        layer.cast(x.dtype)
        y = layer(x)
        assert torch.equal(y, F.linear(x, layer.weight.to(x.dtype)))
        assert before is None or not torch.equal(y, before)
        before = y


def test_what_has_not_changed_is_not_cast_again() -> None:
    layer = _layers()[0]
    layer.cast(torch.bfloat16)
    assert layer.operand is not None
    layer.operand.zero_()
    layer.cast(torch.bfloat16)
    assert not layer.operand.any()


def test_operators_have_fake_implementations() -> None:
    dy, x, weight = torch.randn(7, 5), torch.randn(7, 3), torch.randn(5, 3)
    ops = torch.ops.lasptrain
    torch.library.opcheck(
        ops.input_gradient, ([dy, dy], [weight, weight]), test_utils=("test_schema", "test_faketensor")
    )
    torch.library.opcheck(ops.weight_gradient, (dy, x, torch.float32), test_utils=("test_schema", "test_faketensor"))
