"""Softmax attention is attention under a mask: its definition, its merging, and the places its kernels are given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lasptrain.bench import softmax as bench
from lasptrain.ops import softmax, softmax_documents, softmax_fused, softmax_kernels, softmax_plan, softmax_reference
from lasptrain.ops.softmax import Documents
from lasptrain.ops.softmax_kernels import Mask
from lasptrain.parallel.shard import recompute
from tests.support.softmax_cases import Scene, brute, fake_kernels, gradients
from tests.support.tables import cells

ROUTES = ["definition", "dense and varlen", "varlen"]
FAR = 2**40


class Block:
    """A layer, to `recompute`."""

    recompute: Callable[..., Any] = staticmethod(lambda function, *inputs: function(*inputs))

    def compile_parts(self) -> None: ...


@pytest.fixture
def patched() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def take(patch: pytest.MonkeyPatch, route: str) -> None:
    """Compute by the definition or by kernels, in small blocks."""
    patch.setattr(softmax_reference, "BLOCK", 5)
    patch.setattr(softmax_plan, "SHORTEST", 4)
    patch.setattr(softmax_plan, "LONGEST", 8)
    patch.setattr(softmax_plan, "LEAST", 2)
    if route != "definition":
        kernels = fake_kernels(route != "varlen")
        patch.setattr(softmax_kernels, "select", lambda q, v: kernels)


def check(scene: Scene) -> None:
    """Compare a block's outputs and gradients with those under a mask."""
    q, k, v, do = scene.tensors()
    documents = scene.documents()
    o, lse = softmax.forward(q, k, v, documents, *scene.place)
    want, want_lse = brute(q, k, v, scene.visible())
    same(o, want)
    same(lse, want_lse)
    found = softmax.backward(q, k, v, o, lse, do, documents, *scene.place)
    for got, expected in zip(found, gradients(scene, q, k, v, do), strict=True):
        same(got, expected)


def same(found: Tensor, want: Tensor) -> None:
    assert found.shape == want.shape
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    """Blocks before, behind, around and across queries, with documents that begin anywhere."""
    t, j, query_start = draw(st.integers(1, 20)), draw(st.integers(0, 40)), draw(st.integers(0, 40))
    begins = st.sets(st.integers(0, t - 1), max_size=t).map(lambda found: tuple(sorted(found)))
    return Scene(
        t,
        j,
        query_start,
        draw(st.one_of(st.integers(-9, 60), st.just(max(0, query_start + t - j)), st.just(max(0, query_start - j)))),
        draw(st.one_of(st.none(), st.integers(1, 50))),
        draw(st.one_of(st.none(), begins)),
        draw(st.one_of(st.none(), st.integers(0, query_start))),
        draw(st.sampled_from([1, 1, 3])),
        draw(st.sampled_from([(2, 1), (4, 2)])),
        draw(st.sampled_from([(8, 8), (3, 5)])),
    )


@pytest.mark.parametrize("route", ROUTES)
@given(scene=scenes())
@settings(max_examples=100)
def test_a_block_is_attention_under_a_mask(route: str, scene: Scene) -> None:
    with pytest.MonkeyPatch.context() as patch:
        take(patch, route)
        check(scene)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "scene",
    [
        Scene(16, 16, 0, 0),
        Scene(16, 16, 0, 0, begins=tuple(range(16))),
        Scene(16, 16, 0, 0, begins=(0,), b=3),
        Scene(13, 29, 16, 0, begins=(5, 6, 12), carry=7, b=3),
        Scene(16, 16, 16, 0, begins=(1,), carry=3, b=2),
        Scene(16, 16, 16, 0, 9, begins=(12,), carry=3),
        Scene(16, 31, 16, 1, 16, begins=(12,), carry=3),
        Scene(4, 8, 4, 0, b=3),
        Scene(16, 8, 8, 12, begins=(2,)),
        Scene(12, 17, 0, -5, 6),
        Scene(12, 17, 2, -3, 6, begins=(4,), b=2),
        Scene(12, 15, 0, -3),
        Scene(4, 0, 9, 9),
        Scene(4, 3, 9, 30),
        Scene(1, 20, 19, 0),
        Scene(9, 30, FAR + 21, FAR, 12, begins=(3,), carry=FAR + 2),
        Scene(9, 30, FAR + 21, FAR, begins=(3,), carry=0),
    ],
    ids=str,
)
def test_edges(route: str, scene: Scene, patched: pytest.MonkeyPatch) -> None:
    take(patched, route)
    check(scene)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("cuts", [(0, 40), (3, 11, 24, 24, 31), (20, 24, 36)])
def test_blocks_add_up(route: str, window: int | None, cuts: tuple[int, ...], patched: pytest.MonkeyPatch) -> None:
    take(patched, route)
    scene = Scene(16, 40, 24, 0, window, (5, 9), 2, 2, (4, 2), (6, 4))
    q, k, v, do = scene.tensors()
    documents, edges = scene.documents(), [0, *cuts, 40]
    blocks = [slice(*edge) for edge in pairwise(edges)]
    o, lse = torch.zeros_like(do), torch.full((2, 4, 16), -torch.inf, dtype=torch.float64)
    for block in blocks:
        part = softmax.forward(q, k[:, block], v[:, block], documents, 24, block.start, window)
        o, lse = softmax.merge(o, lse, *part)
    want, want_lse = brute(q, k, v, scene.visible())
    same(o, want)
    same(lse, want_lse)
    parts = [
        softmax.backward(q, k[:, block], v[:, block], o, lse, do, documents, 24, block.start, window)
        for block in blocks
    ]
    dq, dk, dv = zip(*parts, strict=True)
    for found, expected in zip(
        (sum(dq), torch.cat(dk, 1), torch.cat(dv, 1)), gradients(scene, q, k, v, do), strict=True
    ):
        assert isinstance(found, Tensor)
        same(found, expected)


def test_merging_ends_that_saw_nothing() -> None:
    some, none = (
        (torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1)),
        (torch.zeros(1, 1, 1, 2), torch.full((1, 1, 1), -torch.inf)),
    )
    for pair, want in (((some, none), some), ((none, some), some), ((none, none), none)):
        found = softmax.merge(*pair[0], *pair[1])
        assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1])


@pytest.mark.parametrize("route", ROUTES)
def test_gradients_of_a_layer(route: str, patched: pytest.MonkeyPatch) -> None:
    take(patched, route)
    scene = Scene(16, 24, 8, 0, begins=(5,), carry=1)
    q, k, v, do = scene.tensors()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = softmax.attend(q, k, v, scene.documents(), *scene.place)
    for found, want in zip(torch.autograd.grad(o, leaves, do), gradients(scene, q, k, v, do), strict=True):
        same(found, want)


@pytest.mark.parametrize("route", ROUTES)
def test_selective_recomputation_keeps_outputs(route: str, patched: pytest.MonkeyPatch) -> None:
    take(patched, route)
    computed: list[torch.Size] = []
    for module in (softmax_fused, softmax_reference):
        original = module.forward

        def counted(*given: Any, original: Callable[..., Any] = original) -> Any:
            computed.append(original(*given)[0].shape)
            return original(*given)

        patched.setattr(module, "forward", counted)
    block = Block()
    recompute([block], "selective")
    scene = Scene(8, 8, 0, 0, begins=(5,))
    q, k, v, do = scene.tensors()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = block.recompute(lambda q, k, v: softmax.attend(2 * q, k, v, scene.documents(), *scene.place), *leaves)
    found = torch.autograd.grad(o, leaves, do)
    for got, want, factor in zip(found, gradients(scene, 2 * q, k, v, do), (2, 1, 1), strict=True):
        same(got, factor * want)
    assert len(computed) == 1


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("wide", [False, True])
def test_dtypes(route: str, wide: bool, patched: pytest.MonkeyPatch) -> None:
    take(patched, route)
    for scene in (
        Scene(8, 8, 0, 0),
        Scene(13, 21, 8, 0, begins=(5,)),
        Scene(4, 0, 0, 0),
        Scene(8, 8, 0, 0, dims=(3, 5)),
    ):
        q, k, v, do = (x.bfloat16() for x in scene.tensors())
        documents, dtype = scene.documents(), torch.float32 if wide else torch.bfloat16
        o, lse = softmax.forward(q, k, v, documents, *scene.place, wide=wide)
        assert (o.dtype, lse.dtype, o.shape) == (dtype, torch.float32, do.shape)
        found = softmax.backward(q, k, v, o, lse, do, documents, *scene.place, wide=wide)
        assert [(x.dtype, x.shape) for x in found] == [(dtype, x.shape) for x in (q, k, v)]
        want, _ = brute(q.double(), k.double(), v.double(), scene.visible())
        assert not o.numel() or float((o - want).abs().max()) < 0.02


@pytest.mark.parametrize("wide", [False, True])
def test_operators_are_known_without_data(wide: bool, patched: pytest.MonkeyPatch) -> None:
    take(patched, "dense and varlen")
    scene = Scene(13, 29, 16, 0, begins=(5, 6, 12), carry=7, b=2, dims=(3, 5))
    q, k, v, do = (x.bfloat16() for x in scene.tensors())
    documents = scene.documents()
    plan = documents.plan(softmax_documents.Place(2, 13, 16, 29, 0, None), True, q.device)
    place, given = (documents.start, *scene.place), (q, k, v, *softmax.forward(q, k, v, documents, *scene.place), do)
    ops = torch.ops.lasptrain
    for op, arguments in (
        (ops.softmax_forward, (*given[:3], *plan, wide)),
        (ops.softmax_backward, (*given, *plan, wide)),
        (ops.softmax_reference_forward, (*given[:3], *place, wide)),
        (ops.softmax_reference_backward, (*given, *place, wide)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("route", ["dense and varlen", "varlen"])
def test_layers_share_a_plan(route: str, patched: pytest.MonkeyPatch) -> None:
    take(patched, route)
    made: list[bool] = []

    def counted(found: Iterable[softmax_plan.Piece], dense: bool) -> tuple[list[softmax_plan.Call], list[int]]:
        made.append(dense)
        return softmax_plan.calls(found, dense)

    patched.setattr(softmax_documents, "calls", counted)
    scene = Scene(16, 24, 8, 0, begins=(5,), carry=1)
    q, k, v, do = scene.tensors()
    documents = scene.documents()
    for window in (None, 4, None, 4):
        o, lse = softmax.forward(q, k, v, documents, 8, 0, window)
        softmax.backward(q, k, v, o, lse, do, documents, 8, 0, window)
    assert len(made) == 2


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("k", {"k": torch.zeros(1, 9, 3, 8)}),
        ("v", {"v": torch.zeros(1, 9, 1, 8)}),
        ("q, k, v", {"k": torch.zeros(1, 9, 2, 8).bfloat16()}),
        ("documents.start", {"documents": Documents(torch.zeros(1, 4, dtype=torch.int64))}),
        ("window", {"window": 0}),
    ],
)
def test_arguments_that_do_not_fit_are_refused(name: str, change: dict[str, Any]) -> None:
    fitting: dict[str, Any] = {"q": torch.zeros(1, 5, 4, 8), "k": torch.zeros(1, 9, 2, 8), "v": torch.zeros(1, 9, 2, 6)}
    arguments = {**fitting, "documents": Documents(), "query_start": 4, "key_start": 0, "window": None}
    softmax.attend(**arguments)
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        softmax.attend(**arguments | change)


def test_documents() -> None:
    ids = torch.tensor([[0, 0, 1, 1, 2], [1, 1, 1, 2, 3]])
    assert Documents.of(None, 7).start is None
    found = Documents.of(ids, 100, torch.tensor([40, 50]))
    assert found.start is not None and found.start.dtype == torch.int64
    assert found.start.tolist() == [[40, 40, 102, 102, 104], [100, 100, 100, 103, 104]]
    assert found.runs == [[(0, 40), (2, 102), (4, 104)], [(0, 100), (3, 103), (4, 104)]]
    alone = Documents.of(ids, 100).start
    assert alone is not None and alone[0, 0] == 0
    assert Documents.of(None, 100, torch.tensor([40, 50])).runs == [[(0, 40)], [(0, 50)]]


def test_a_window_reads_its_band() -> None:
    t, window = 1 << 15, 2048
    found = list(softmax_plan.pieces([[(0, 0)]], t, 1 << 20, t + window - 1, (1 << 20) - window + 1, window))
    assert [(piece.rows, piece.keys, piece.left) for piece in found] == [(t, t + window - 1, window - 1)]
    found = list(softmax_plan.pieces([[(0, 0)]], t, 1 << 20, 1 << 20, 0, window))
    assert [(piece.rows, piece.keys) for piece in found] == [(window - 1, window - 1)]


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("window", [None, 1000])
def test_rows_and_keys_of_a_call_are_few_enough_for_31_bits(window: int | None, dense: bool) -> None:
    t = (1 << 20) + 5000
    for starts in ([0], [*range(0, t, 1 << 13), t - 3000]):
        found = softmax_plan.pieces([[(start, start) for start in starts]], t, 0, t, 0, window)
        made, _ = softmax_plan.calls(found, dense)
        assert all(max(call.rows, call.keys - (window or 0)) <= softmax_plan.LONGEST for call in made)


def test_large_pieces_are_of_few_shapes() -> None:
    shapes: set[tuple[int, int, int]] = set()
    for n in range(4096, 40000, 997):
        made, _ = softmax_plan.calls(softmax_plan.pieces([[(0, 0)]], n, 100_000, 100_000 + n, 0, None), True)
        shapes |= {(call.rows, call.keys, call.causal) for call in made if call.dense}
        assert sum(not call.dense for call in made) <= 5
    assert {side for shape in shapes for side in shape[:2]} == {1 << bits for bits in range(12, 18)}
    assert len(shapes) <= 4 + 4 * 6


def test_a_benchmark_counts_what_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "DOCUMENT", 16)
    monkeypatch.setattr(bench, "WINDOW", 8)
    rows = []
    for case in bench.cases(64, "cpu"):
        position = torch.arange(case.query_start, case.query_start + case.queries)[:, None]
        start, key = 0 if case.documents.start is None else case.documents.start[0][:, None], torch.arange(case.keys)
        seen = (key <= position) & (key >= start) & (key > position - (case.window or 1000))
        assert case.pairs() == seen.sum()
        rows.append(bench.Row(case.name, "lasptrain", case.pairs(), 1.0, 2.0, None, None, 1e-3))
    (table,) = bench.result("GPU", rows, 64, bench.Sizes(4, 2, 8), "bf16").tables
    assert [row[:2] for row in cells(table)] == [[row.case, "lasptrain"] for row in rows]


def test_large_pieces_of_one_size_are_a_batch() -> None:
    made, _ = softmax_plan.calls(softmax_plan.pieces([[(0, 0)]] * 3, 8192, 0, 8192, 0, None), True)
    assert [(call.row, call.sequences, call.most_rows) for call in made] == [(0, 2, 8192), (16384, 1, 8192)]
    documents = [(first, first) for first in range(0, 32768, 4096)]
    made, _ = softmax_plan.calls(softmax_plan.pieces([documents], 32768, 0, 32768, 0, None), True)
    assert [(call.sequences, call.rows, call.keys) for call in made] == [(8, 32768, 32768)]


@pytest.mark.parametrize("mask", [Mask(True), Mask(False), Mask(True, 40), Mask(False, 40)])
def test_flash_attention_is_called_as_it_is_declared(mask: Mask) -> None:
    q, k, v = (
        torch.empty(n, heads, 64, dtype=torch.bfloat16, device="meta") for n, heads in ((70, 4), (90, 2), (90, 2))
    )
    edges = torch.empty(4, dtype=torch.int32, device="meta")
    lengths = softmax_kernels.Lengths(edges, edges, 128, 128)
    o, lse = softmax_kernels.flash_forward(q, k, v, lengths, mask, 0.1)
    assert (o.shape, lse.shape, lse.dtype) == (q.shape, (4, 70), torch.float32)
    found = softmax_kernels.flash_backward(q, k, v, o, lse, o, lengths, mask, 0.1)
    assert [x.shape for x in found] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dims", [3, 4])
def test_cudnn_is_called_as_it_is_declared(causal: bool, dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax_kernels, "_cudnn_stats", lambda *_: dims)
    q, k, v = (torch.empty(2, 128, heads, 64, dtype=torch.bfloat16, device="meta") for heads in (4, 2, 2))
    o, lse = softmax_kernels.cudnn_forward(q, k, v, causal, 0.1)
    assert (o.shape, lse.shape, lse.dtype) == (q.shape, (2, 4, 128), torch.float32)
    assert o.is_contiguous()
    found = softmax_kernels.cudnn_backward(q, k, v, o, lse, o, causal, 0.1)
    assert [x.shape for x in found] == [q.shape, k.shape, v.shape] and all(x.is_contiguous() for x in found)
