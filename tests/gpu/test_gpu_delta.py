"""Law 1 for the delta rule in Triton on a GPU: every launch, in all dtypes, against float64."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from lasptrain.ops import delta_chunked, delta_rule
from lasptrain.ops.delta_triton_forward import LAUNCHES
from lasptrain.ops.delta_triton_slice import cut
from tests.ops.test_delta import Case, low, make, measured
from tests.ops.test_delta_triton import Scene, error, forward
from tests.support.apart import leaks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BOUNDS = {torch.bfloat16: 6e-3, torch.float16: 1.5e-3, torch.float32: 1e-5}
DIMS = [(16, 24), (64, 64), (128, 128), (64, 128), (128, 64), (96, 192), (128, 256), (40, 136)]
SCENES = [
    *(Scene("gdn", 777, *dims, (3, 100, 500), "strong", beta=0.3, heads=(2, 1, 2)) for dims in DIMS),
    *(Scene("gdn", t, 128, 128, (t // 2,), heads=(2, 2, 4)) for t in (1, 63, 64, 65, 500, 3000)),
    *(Scene("gdn", t, 64, 64, beta=0.05, edge=False) for t in (1, 64, 1025)),
    Scene("gdn_head", 3000, 128, 128, (0, 64, 2999), beta=0.1),
    Scene("gdn_head", 300, 64, 64, decays="strong", heads=(1, 2, 6)),
    Scene("delta", 1500, 128, 128, (700,), beta=0.02),
    Scene("delta", 300, 64, 128, beta=0.0),
    Scene("gdn", 300, 128, 128, (90,), beta=0.0),
    Scene("gdn", 40_000, 128, 128, (10_000, 10_001), beta=0.05, heads=(1, 1, 2)),
    Scene("gdn", 200, 128, 128, tuple(range(0, 200, 7)), heads=(1, 1, 300)),  # one block
]
HALVES = ["forward", "both"] if find_spec("lasptrain.ops.delta_triton_back") else ["forward"]


def found(half: str, kernel: str, x: Case, handed_on: bool) -> dict[str, torch.Tensor]:
    """What a kernel makes of a slice, in its forward half or in both."""
    if half == "both":
        return measured(kernel, x, handed_on)
    from lasptrain.ops import delta_triton

    return forward(delta_triton if kernel == "triton" else delta_chunked, x, handed_on)


def on_gpu(x: Case, dtype: torch.dtype) -> Case:
    """The same of that dtype on the GPU, its states in fp32."""
    x = x.map(lambda y: y.to("cuda", dtype))
    doc_ids = None if x.doc_ids is None else x.doc_ids.cuda()
    return x._replace(doc_ids=doc_ids, initial_state=low(x.initial_state), dfinal=low(x.dfinal))


def compare(half: str, x: Case, dtype: torch.dtype, factor: float = 1.0) -> None:
    x = on_gpu(x, dtype)
    want = found(half, "chunked", x.map(lambda y: y.double()), True)
    for handed_on in (True, False):
        got = found(half, "triton", x, handed_on)
        for name in want:
            assert error(got[name], want[name]) < factor * BOUNDS[dtype], (name, handed_on)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("scene", SCENES, ids=str)
def test_kernel_is_the_recurrence(scene: Scene, dtype: torch.dtype, half: str) -> None:
    few = scene.length == 1  # a gradient of two numbers: their roundings do not average out
    compare(half, scene.case(), dtype, 2.0 if few else 1.0)


def test_scenes_reach_every_launch() -> None:
    reached = set()
    for scene in SCENES:
        b, key_heads, heads = scene.heads
        k, v = torch.empty(b, scene.length, key_heads, scene.keys), torch.empty(b, scene.length, heads, scene.values)
        reached.add(min(128, max(cut(k, v).widths)))
    assert reached == {width for _, width in LAUNCHES}


@pytest.mark.parametrize("half", HALVES)
def test_a_key_that_comes_back_is_replaced(half: str) -> None:
    compare(half, make("gdn", 1000, one_key=True, sizes=(1, 1, 2, 128, 128)), torch.bfloat16, 4.0)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("beta", [0.01, 0.5])
def test_sixty_four_thousand_tokens(beta: float, half: str) -> None:
    x = make("gdn", 65536, beta=beta, begins=(20000,), sizes=(1, 1, 2, 128, 128))
    assert x.log_decay is not None
    compare(half, x._replace(log_decay=0.01 * x.log_decay), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_documents_do_not_see_each_other(dim: int, dtype: torch.dtype) -> None:
    begins = (1, 64, 100, 120, 256, 500)
    x = on_gpu(make("gdn", 512, begins=begins, sizes=(1, 1, 2, dim, dim)), dtype)
    assert not leaks(lambda given: measured("triton", given), x, begins)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("tokens", [64, 500, 20_000])
def test_a_state_is_the_same_without_its_map(tokens: int, dim: int) -> None:
    """Of slices of one block and of several."""
    x = on_gpu(make("gdn", tokens, begins=(30,), sizes=(1, 1, 2, dim, dim)), torch.bfloat16)
    inputs = (x.k, x.v, x.beta, x.log_decay)
    alone, with_map = (delta_rule.summarize("triton", inputs, x.doc_ids, wanted)[0] for wanted in (1, 2))
    assert torch.equal(alone, with_map)


def test_more_than_two_to_the_31_elements() -> None:
    """The last tokens of a slice whose tensors outgrow 32-bit offsets, against the same tokens alone."""
    t, h, dim, tail = 2**20 + 77, 16, 128, 500
    assert t * h * dim > 2**31
    end = on_gpu(make("gdn", tail, sizes=(1, h, h, dim, dim)), torch.bfloat16)
    end = end._replace(initial_state=None, dfinal=None)

    def behind(y: torch.Tensor) -> torch.Tensor:
        """Those tokens behind many that are alike."""
        begin = torch.zeros(1, t - tail, *y.shape[2:], dtype=y.dtype, device=y.device)
        return torch.cat([begin + y[:, :1], y], dim=1)

    doc_ids = torch.zeros(1, t, dtype=torch.int32, device="cuda")
    doc_ids[:, -tail:] = 1
    whole = found("forward", "triton", end.map(behind)._replace(doc_ids=doc_ids), True)
    alone = found("forward", "chunked", end.map(lambda y: y.double()), True)
    assert error(whole["o"][:, -tail:], alone["o"]) < BOUNDS[torch.bfloat16]
    assert error(whole["state"], alone["state"]) < BOUNDS[torch.bfloat16]
    assert not whole["linear"].any()
