"""Law 2 in bf16 on a GPU: a window in segments, or with its activations elsewhere, has the gradient of the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lasptrain.architectures.tnl import Tnl
from lasptrain.models.language_model import LanguageModel, initial_values
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.parallel.shard import fill, recompute
from lasptrain.training.segments import backward
from tests.laws.test_layouts import BOS, pieces

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LAYERS, VOCAB = 4, 1000


def gradient(
    tokens: Tensor,
    segments: int,
    kernel: str = "triton",
    mode: str = "none",
    dtype: torch.dtype = torch.bfloat16,
    softmax: tuple[int, ...] = (),
    prefix: str = "gathered",
) -> Tensor:
    """The gradient of the mean loss of a small TransNormerLLM on tokens [1, T + 1], all parameters in one."""
    device, count = tokens.device, tokens.shape[1] - 1
    cfg = Tnl(dim=256, layers=LAYERS, heads=4, mlp=512, vocab=VOCAB, softmax=softmax)
    model = LanguageModel(cfg, count, ShardedRecurrence(kernel, prefix=prefix), dtype=dtype).to(device)
    fill(model, initial_values(model, 0, device))
    recompute(model.blocks, mode)
    backward(model, LAYERS, pieces(tokens, 1, 0, segments), 1 / count)
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def window(tokens: int, device: str = "cuda") -> Tensor:
    """Random tokens [1, tokens + 1] with some documents, one of them long."""
    generator = torch.Generator().manual_seed(0)
    made = torch.randint(1, VOCAB, (1, tokens + 1), generator=generator)
    made[0, torch.randint(0, tokens // 2, (20,), generator=generator)] = BOS
    return made.to(device)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("segments", [2, 4, 16])
def test_segments_add_no_error(segments: int) -> None:
    tokens = window(65536)
    exact = gradient(tokens, 1, dtype=torch.float32)
    rounding = distance(gradient(tokens, 1), exact)
    assert 0 < distance(gradient(tokens, segments), exact) <= 1.02 * rounding


@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("prefix", ["gathered", "host"])
def test_a_prefix_in_blocks_adds_no_error(prefix: str, mode: str) -> None:
    tokens = window(32768)
    exact = gradient(tokens, 1, dtype=torch.float32, softmax=(1, 3))
    rounding = distance(gradient(tokens, 1, softmax=(1, 3)), exact)
    assert 0 < distance(gradient(tokens, 4, mode=mode, softmax=(1, 3), prefix=prefix), exact) <= 1.1 * rounding


@pytest.mark.parametrize("mode", ["full", "offload"])
def test_what_is_recomputed_or_offloaded_is_the_same(mode: str) -> None:
    tokens = window(16384)
    assert torch.equal(gradient(tokens, 2, mode=mode), gradient(tokens, 2))
