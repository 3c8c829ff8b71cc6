"""The convolution in one pass, in Triton: the definition's result and gradients, in the interpreter and on a GPU."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lasptrain.models import layers
from lasptrain.models.convolution import ConvWeights, Form
from lasptrain.ops.precision import UNIT_EPS
from tests.support.interpreted import inside, interpreted


class Scene(NamedTuple):
    """A slice [B, T, C] of some dtype, convolved by `taps`; `begins` are tokens at which documents start."""

    tokens: int
    channels: int
    taps: int
    form: Form = Form()
    begins: tuple[int, ...] = ()
    bias: bool = False
    batch: int = 1
    strided: bool = False


SCENES = {
    "one_token": Scene(1, 8, 4),
    "fewer_than_taps": Scene(2, 40, 4, begins=(1,), bias=True),
    "units": Scene(70, 64, 4, Form(32, 0.25), begins=(0, 1, 33, 69)),
    "odd_heads": Scene(40, 48, 3, Form(24), batch=2, strided=True),
    "no_neighbours": Scene(33, 16, 1, bias=True),
    "rows": Scene(200, 16, 4, Form(16), begins=(62, 64, 65, 129, 190), bias=True),
    "many_channels": Scene(600, 130, 4, begins=(500,), batch=2, strided=True),
}


def made(scene: Scene, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor | None]:
    """x, the rows before it, weight and bias, and documents."""
    torch.manual_seed(0)
    b, t, c, n = scene.batch, scene.tokens, scene.channels, scene.taps - 1
    x = torch.randn(b, t, 2 * c if scene.strided else c)[..., :c]
    given = [x.to(dtype), torch.randn(b, n, c).to(dtype), torch.randn(c, n + 1), torch.randn(c)]
    starts = torch.zeros(b, t, dtype=torch.int32)
    starts[:, list(scene.begins)] = 1
    doc_ids = starts.cumsum(1).int().to(device) if scene.begins else None
    tensors = [y.to(device).detach() for y in given]
    if scene.strided:
        tensors[0] = torch.cat([tensors[0], tensors[0]], -1)[..., :c]
    return [y.requires_grad_() for y in tensors], doc_ids


def results(scene: Scene, fused: bool, given: list[Tensor], doc_ids: Tensor | None) -> list[Tensor]:
    """The result and the gradients."""
    x, before, weight, bias = given
    taps = ConvWeights(weight, bias if scene.bias else None)
    y = (taps.fused if fused else taps.formed)(x, before, doc_ids, scene.form)
    torch.manual_seed(1)
    dy = torch.randn(y.shape).to(y)
    wanted = [x, *([before] if before.numel() else []), weight, *([bias] if scene.bias else [])]
    return [y, *torch.autograd.grad(y, wanted, dy)]


def alike(scene: Scene, device: str, dtype: torch.dtype, bound: float) -> None:
    given, doc_ids = made(scene, device, dtype)
    exact = [x.detach().double().requires_grad_() for x in given]
    for got, want in zip(results(scene, True, given, doc_ids), results(scene, False, exact, doc_ids), strict=True):
        assert got.shape == want.shape
        assert float((got.detach() - want.detach()).norm()) <= bound * float(want.detach().norm())


def test_lengths_have_one_eps() -> None:
    from lasptrain.ops import triton_convolution

    assert triton_convolution.EPS.value is UNIT_EPS is vars(layers)["UNIT_EPS"]


def test_in_the_interpreter() -> None:
    assert f"{len(SCENES)} passed" in interpreted(__file__, "test_scene")


@inside
@pytest.mark.parametrize("name", SCENES)
def test_scene(name: str) -> None:
    alike(SCENES[name], "cpu", torch.float32, 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype,bound", [(torch.bfloat16, 8e-3), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("name", SCENES)
def test_on_a_gpu(name: str, dtype: torch.dtype, bound: float) -> None:
    alike(SCENES[name], "cuda", dtype, bound)
