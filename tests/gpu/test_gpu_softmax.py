"""Law 1 for softmax attention on a GPU: cuDNN and flash kernels in bf16 and fp16 against the definition in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lasptrain.ops import softmax, softmax_kernels, softmax_plan, softmax_reference
from lasptrain.ops.softmax import Documents
from tests.support.softmax_cases import Scene

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
MANY = tuple(range(5, 1000, 37))
CAUSAL = Scene(1000, 1000, 0, 0, heads=(4, 2), dims=(128, 128))
PREFIX = Scene(600, 900, 1000, 100, carry=400, heads=(4, 2), dims=(128, 128))
SCENES = {
    **{f"causal, {heads}": CAUSAL._replace(heads=heads) for heads in ((4, 4), (16, 4), (16, 1))},
    **{f"causal, {dims}": CAUSAL._replace(dims=dims) for dims in ((64, 64), (256, 256), (128, 64), (40, 136))},
    "causal, B 3": CAUSAL._replace(b=3),
    "many documents": CAUSAL._replace(begins=MANY),
    "many documents, B 3": CAUSAL._replace(begins=MANY, b=3, dims=(64, 64)),
    "boundaries at the edges": CAUSAL._replace(begins=(0, 500, 999)),
    "documents of one token": CAUSAL._replace(t=300, j=300, begins=tuple(range(300)), heads=(4, 1)),
    "some documents of one token": CAUSAL._replace(begins=(1, 2, 3, 700, 701)),
    "prefix": PREFIX,
    "prefix, dim 256": PREFIX._replace(dims=(256, 256)),
    "prefix of the document before, B 3": PREFIX._replace(begins=(250,), b=3, heads=(16, 4)),
    "prefix and slice": PREFIX._replace(j=1500, begins=(250, 251, 400)),
    "prefix and slice, B 3": PREFIX._replace(j=1500, begins=(250, 251, 400), b=3, dims=(64, 64)),
    "keys end within the queries": Scene(900, 700, 500, 300, None, (100, 800), 420, 2, (4, 2), (64, 64)),
    "keys begin within the queries": Scene(900, 700, 500, 700, None, (100, 800), 420, 2, (4, 2), (64, 64)),
    "sliding": CAUSAL._replace(window=100),
    "sliding by one": CAUSAL._replace(window=1),
    "sliding, documents": CAUSAL._replace(window=100, begins=MANY, b=3),
    "sliding, halo": CAUSAL._replace(query_start=99, j=1099, window=100, begins=(3, 600), carry=50),
    "sliding by more than the slice": PREFIX._replace(j=1500, window=1200),
    "sliding by less, from a prefix": PREFIX._replace(window=250, carry=None),
    "sliding by more, from a prefix": PREFIX._replace(window=1100, carry=900, b=2),
    "no keys": CAUSAL._replace(j=0),
    "one query": Scene(1, 700, 699, 0, heads=(8, 2), dims=(128, 128)),
    "far": PREFIX._replace(query_start=2**40 + 900, key_start=2**40, carry=2**40 + 300, begins=(77,)),
}
LARGE = {
    "large, a prefix": Scene(9000, 24000, 15000, 0, carry=1200, heads=(4, 1), dims=(128, 128)),
    "large, documents": Scene(16384, 16384, 0, 0, None, (4096, 4100, 13000), heads=(4, 2), dims=(128, 128)),
}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Dense pieces from 256 rows on."""
    monkeypatch.setattr(softmax_plan, "SHORTEST", 256)
    yield


def poison() -> None:
    """What is allocated next is NaN."""
    torch.cuda.empty_cache()
    for size in (1 << 28, 1 << 19):
        torch.full((size // 4,), torch.nan, device="cuda")


def error(found: Tensor, want: Tensor) -> float:
    """Relative error; of something that is zero but for rounding, relative to a little per element."""
    assert found.shape == want.shape and found.isfinite().all()
    scale = max(float(want.norm()), 2e-3 * want.numel() ** 0.5)
    return float((found.double() - want).norm()) / scale if want.numel() else 0.0


def compare(scene: Scene, dtype: torch.dtype) -> None:
    q, k, v, do = (x.to("cuda", dtype) for x in scene.tensors())
    documents = scene.documents("cuda")
    wide = [x.double() for x in (q, k, v)]
    want, want_lse = softmax_reference.forward(wide[0], wide[1], wide[2], documents.start, *scene.place)
    gradients = softmax_reference.backward(
        wide[0], wide[1], wide[2], want, want_lse, do.double(), documents.start, *scene.place
    )
    poison()
    o, lse = softmax.forward(q, k, v, documents, *scene.place)
    seen = want_lse > -torch.inf
    assert torch.equal(seen, lse > -torch.inf)
    assert not seen.any() or float((lse - want_lse)[seen].abs().max()) < 1e-3
    assert error(o, want) < BOUNDS[dtype]
    poison()
    found = softmax.backward(q, k, v, o, lse, do, documents, *scene.place)
    for name, got, expected in zip(("dq", "dk", "dv"), found, gradients, strict=True):
        assert error(got, expected) < BOUNDS[dtype], name


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", SCENES)
def test_kernels_are_the_definition(name: str, dtype: torch.dtype) -> None:
    compare(SCENES[name], dtype)


@pytest.mark.parametrize("name", LARGE)
def test_large_pieces(name: str) -> None:
    compare(LARGE[name], torch.bfloat16)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", ["many documents", "prefix and slice, B 3"])
def test_flash_attention_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = softmax_kernels.Kernels(softmax_kernels.flash_forward, softmax_kernels.flash_backward)
    monkeypatch.setattr(softmax_kernels, "select", lambda q, v: kernels)
    compare(SCENES[name], torch.bfloat16)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("window", [None, 300])
def test_blocks_add_up(window: int | None) -> None:
    scene = Scene(1000, 3000, 2000, 0, window, (300, 301), 250, 2, (8, 2), (128, 128))
    q, k, v, do = (x.to("cuda", torch.bfloat16) for x in scene.tensors())
    documents, edges = scene.documents("cuda"), [0, 700, 2000, 2500, 3000]
    blocks = [slice(first, last) for first, last in zip(edges, edges[1:], strict=False)]  # noqa: RUF007
    parts = [
        softmax.forward(q, k[:, block], v[:, block], documents, 2000, block.start, window, wide=True)
        for block in blocks
    ]
    o, lse = parts[0]
    for part in parts[1:]:
        o, lse = softmax.merge(o, lse, *part)
    whole = [x.double() for x in (q, k, v)]
    want, want_lse = softmax_reference.forward(whole[0], whole[1], whole[2], documents.start, *scene.place)
    assert error(o, want) < 1e-2
    found = [
        softmax.backward(q, k[:, n], v[:, n], o.to(q.dtype), lse, do, documents, 2000, n.start, window, wide=True)
        for n in blocks
    ]
    gradients = softmax_reference.backward(
        whole[0], whole[1], whole[2], want, want_lse, do.double(), documents.start, *scene.place
    )
    dq, dk, dv = zip(*found, strict=True)
    for got, expected in zip((torch.stack(dq).sum(0), torch.cat(dk, 1), torch.cat(dv, 1)), gradients, strict=True):
        assert got.dtype == torch.float32 and error(got, expected) < 1e-2


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # says that it is a prototype
def test_a_layer_waits_for_nothing() -> None:
    """A slice's first layer waits for the GPU once, the others do not."""
    scene = SCENES["prefix and slice"]
    q, k, v, do = (x.to("cuda", torch.bfloat16) for x in scene.tensors())
    leaves, documents = [x.requires_grad_() for x in (q, k, v)], scene.documents("cuda")
    softmax.attend(q, k, v, documents, *scene.place).backward(do)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(softmax.attend(q, k, v, documents, *scene.place), leaves, do)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("window", [None, 1000])
def test_more_than_two_to_the_31_elements(window: int | None) -> None:
    """The last queries of a slice whose tensors outgrow 32-bit offsets, against the same alone: two documents."""
    t, tail = 2**20 + 5000, 3000
    assert t * 16 * 128 > 2**31
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v, do = (
        torch.randn(1, t, heads, 128, generator=g, device="cuda", dtype=torch.bfloat16) for heads in (16, 4, 4, 16)
    )
    starts = torch.zeros(1, t, dtype=torch.int32, device="cuda")
    starts[:, :: 1 << 13] = 1
    starts[:, -tail] = 1
    documents = Documents.of(starts.cumsum(1), 0)
    o, lse = softmax.forward(q, k, v, documents, 0, 0, window)
    found = (o, *softmax.backward(q, k, v, o, lse, do, documents, 0, 0, window))
    q, k, v, do = (x[:, -tail:].double() for x in (q, k, v, do))
    want, lse = softmax_reference.forward(q, k, v, None, 0, 0, window)
    expected = (want, *softmax_reference.backward(q, k, v, want, lse, do, None, 0, 0, window))
    for got, exact in zip(found, expected, strict=True):
        assert error(got[:, -tail:], exact) < 1e-2
