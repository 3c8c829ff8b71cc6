"""Law 2 in bf16 on a GPU: a window in segments, or with its activations elsewhere, has the gradient of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lasptrain.architectures.base import Architecture
from lasptrain.architectures.gdn import Gdn
from lasptrain.architectures.ssd import Ssd
from lasptrain.architectures.tnl import Tnl
from lasptrain.eval.inference import Reader
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
DTYPES = torch.float32, torch.bfloat16
SIZES: dict[str, Any] = {"dim": 256, "layers": LAYERS, "mlp": 512, "vocab": VOCAB}
MODELS: dict[str, Architecture] = {  # the delta rule with heads of 128 channels, which Hopper has programs for
    "tnl": Tnl(heads=4, **SIZES),
    "ssd": Ssd(heads=2, key_dim=128, value_dim=128, data_dependent=True, conv=4, **SIZES),
    "gdn": Gdn(heads=2, key_dim=128, value_dim=128, **SIZES),
    "hybrid": Gdn(heads=2, key_dim=128, value_dim=128, softmax=(1, 3), **SIZES),
}


def gradient(
    tokens: Tensor,
    segments: int,
    kernel: str = "triton",
    mode: str = "none",
    dtype: torch.dtype = torch.bfloat16,
    cfg: Architecture = MODELS["tnl"],
    prefix: str = "gathered",
) -> Tensor:
    """The gradient of a model's mean loss on tokens [1, T + 1], all parameters in one."""
    device, count = tokens.device, tokens.shape[1] - 1
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


@pytest.mark.parametrize("length,segments", [(65536, 4), (2048, 4), (1000, 8)])  # the last are of one block each
@pytest.mark.parametrize("name", ["ssd", "gdn", "hybrid"])
def test_segments_add_no_error_where_data_decide(name: str, length: int, segments: int) -> None:
    tokens, cfg = window(length), MODELS[name]
    exact = gradient(tokens, 1, dtype=torch.float32, cfg=cfg)
    rounding = distance(gradient(tokens, 1, cfg=cfg), exact)
    assert 0 < distance(gradient(tokens, segments, cfg=cfg), exact) <= 1.2 * rounding


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_text_read_in_segments_and_continued_adds_no_error(name: str) -> None:
    tokens, read = window(339)[:, :-1], 320
    models = {dtype: LanguageModel(MODELS[name], 339, ShardedRecurrence("triton"), dtype=dtype) for dtype in DTYPES}
    wanted: dict[torch.dtype, Tensor] = {}
    for dtype, model in models.items():
        fill(model.cuda(), initial_values(model, 0, tokens.device))
        wanted[dtype] = model.logits(model.hidden(tokens)[0])[:, read - 1 :].double()
    model, found = models[torch.bfloat16], list[Tensor]()
    past = Reader(model, segment=128).read(tokens[:, :read])
    carry, logits = past.carry, past.logits
    for token in tokens[:, read:].split(1, dim=1):
        found.append(logits)
        x, carry = model.hidden(token, carry=carry, output_final_state=True)
        logits = model.logits(x[:, -1])
    exact = wanted[torch.float32]
    rounding = distance(wanted[torch.bfloat16], exact)
    assert distance(torch.stack([*found, logits], 1).double(), exact) <= 1.5 * rounding


@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("prefix", ["gathered", "host"])
def test_a_prefix_in_blocks_adds_no_error(prefix: str, mode: str) -> None:
    tokens = window(32768)
    cfg = MODELS["tnl"].model_copy(update={"softmax": (1, 3)})
    exact = gradient(tokens, 1, dtype=torch.float32, cfg=cfg)
    rounding = distance(gradient(tokens, 1, cfg=cfg), exact)
    assert 0 < distance(gradient(tokens, 4, mode=mode, cfg=cfg, prefix=prefix), exact) <= 1.1 * rounding


@pytest.mark.parametrize("mode", ["full", "offload"])
def test_what_is_recomputed_or_offloaded_is_the_same(mode: str) -> None:
    tokens = window(16384)
    assert torch.equal(gradient(tokens, 2, mode=mode), gradient(tokens, 2))
