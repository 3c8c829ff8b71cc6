"""The Triton backward of the delta rule against the definition, in Triton's interpreter on the CPU; small sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lasptrain.ops import delta_chunked, delta_reference
from tests.ops.test_delta import MANY, Case, chained, error, expected, make, measured
from tests.support.interpreted import inside, interpreted, with_bf16

CHUNK = 64


def transforms(x: Case, dtype: torch.dtype) -> Tensor:
    """(I + A)⁻¹ of each chunk [B, H, n, C, C], of A without decays."""
    b, _, h, _ = x.v.shape
    assert x.beta is not None
    matrix = delta_chunked.Chunks(x.k, x.v, x.beta, None, None).transform()[0]
    return matrix.to(dtype).reshape(b, h, -1, CHUNK, CHUNK)


def kept(x: Case, length: int, maps: bool = True) -> list[Tensor]:
    """What the forward leaves behind, in fp32 from inputs in fp64; T in fp16 for inputs of 16 bits."""
    exact = x.map(lambda y: y.double())
    state, states, linear = exact.initial_state, [], []
    assert state is not None
    for start in range(0, x.v.shape[1], length):
        part = exact.cut(start, start + length)
        states.append(state.mT)
        state, matrix, _ = delta_reference.summarize(part.k, part.v, part.beta, part.log_decay, part.doc_ids, 2)
        state = state + matrix @ states[-1].mT
        linear.append(matrix)
    dtype = torch.float32 if x.k.dtype == torch.float32 else torch.float16
    return [
        transforms(exact, dtype),
        torch.stack([*states, state.mT], 2).float().contiguous(),
        torch.stack(linear, 2).float().contiguous() if maps else torch.empty(1, 2, 0, 64, 64),
    ]


def backward(x: Case, handed_on: bool = True, maps: bool = True, wanted: int = 2) -> dict[str, Tensor]:
    """All three functions on one slice."""
    from lasptrain.ops import delta_triton as triton
    from lasptrain.ops.delta_triton_slice import Given, cut, measured

    given = (x.beta, x.log_decay, x.doc_ids)
    s = cut(x.k, x.v)
    decays = torch.zeros(s.batch, s.heads, s.blocks)  # which leaves all to the maps
    left = [*kept(x, s.length, maps), measured(Given.of(x.k, x.v, *given)), decays]
    dinitial, linear, dblocks = triton.grad_initial_state(x.q, x.do, x.k, *given, left, wanted)
    dq, rest = triton.grad_query(x.q, x.k, x.v, x.do, *given, left)
    dk, dv, dbeta, dlog = triton.grad_inputs(
        x.q, x.k, x.v, x.do, *given, x.dfinal, dblocks if handed_on else [], left, rest
    )
    found = {"dq": dq, "dk": dk, "dv": dv, "dbeta": dbeta, "dlog_decay": dlog, "linear": linear, "sent": dinitial}
    shapes = triton.rest_like(x.q, x.v, x.beta, x.log_decay), triton.dblocks_like(x.q, x.do, *given[:2], wanted)
    for made, like in zip((rest, dblocks), shapes, strict=True):
        assert [(y.shape, y.dtype) for y in made] == [(y.shape, y.dtype) for y in like]
    return {name: y for name, y in found.items() if y is not None}


def wanted_of(x: Case) -> dict[str, Tensor]:
    """The definition in fp64; `sent` is the gradient of the initial state by the slice's outputs alone."""
    exact = x.map(lambda y: y.double())
    want = expected(exact)
    want["linear"] = delta_reference.summarize(*exact[1:5], x.doc_ids, 2)[1]
    want["sent"] = expected(exact._replace(dfinal=None))["dinitial"]
    for name in ("o", "final", "dinitial"):
        del want[name]
    return want


def alike(found: dict[str, Tensor], want: dict[str, Tensor], bound: float) -> None:
    assert found.keys() == want.keys()
    errors = {name: error(found[name], want[name]) for name in want}
    assert max(errors.values()) < bound, errors


def low(x: Case, dtype: torch.dtype) -> Case:
    """x in dtype, with states in fp32."""
    initial_state, dfinal = (None if y is None else y.float() for y in (x.initial_state, x.dfinal))
    return x.map(lambda y: y.to(dtype))._replace(initial_state=initial_state, dfinal=dfinal)


Sizes = tuple[int, int, int, int, int]
SMALL: Sizes = (1, 1, 2, 64, 64)
CASES: dict[str, Callable[[], Case]] = {
    "one_token": lambda: make("gdn", 1, sizes=(2, 2, 4, 8, 5)),
    "short": lambda: make("gdn", 63, sizes=(1, 2, 4, 16, 33), decays="strong", begins=(0, 30)),
    "whole": lambda: make("delta", 64, sizes=SMALL, beta=2.0),
    "one_more": lambda: make("gdn_head", 65, sizes=(2, 1, 1, 32, 8), begins=(-1,)),
    "chunks": lambda: make("gdn", 130, sizes=SMALL, decays="strong", begins=(0, 1, 2, 40, 64, 65, 128, -1)),
    "blocks": lambda: make("gdn", 300, sizes=SMALL, beta=0.1),
    "blocks_documents": lambda: make("gdn", 300, sizes=SMALL, decays="strong", begins=(100, 192)),
    "wide": lambda: make("gdn", 130, sizes=(1, 1, 1, 96, 192), beta=0.5),
    "one_key": lambda: make("gdn", 130, sizes=(1, 1, 1, 16, 16), one_key=True),
    "nothing": lambda: make("gdn", 70, sizes=(1, 1, 1, 16, 16), beta=0.0),
}
# one key that β = 1 replaces at every token: what is left is a difference of what rounding keeps
ROUNDED = {"one_key": 2e-2}
WHOLE: dict[str, Callable[[], Case]] = {
    "token": lambda: make("gdn", 1, sizes=SMALL, begins=(0,)),
    "grouped": lambda: make("gdn", 130, sizes=(1, 2, 4, 16, 33), decays="strong", begins=MANY),
    "blocks": lambda: make("gdn", 330, sizes=SMALL, beta=0.05, begins=(200,)),
    "no_edges": lambda: make("delta", 300, sizes=SMALL, beta=0.1)._replace(dfinal=None),
    "head": lambda: make("gdn_head", 100, sizes=(1, 1, 2, 96, 192), beta=0.1),
}
QUICK = ("one_token", "one_more", "blocks_documents", "token")  # of both, those that take a few seconds


@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["few", "rest"])
def test_in_the_interpreter(quick: bool) -> None:
    named = " or ".join(f"[{name}-" for name in QUICK)
    told = interpreted(__file__, f"not test_in and {'' if quick else 'not'} ({named})")
    left = 2 * (len(CASES) + len(WHOLE) - len(QUICK)) + 3
    assert f"{2 * len(QUICK) if quick else left} passed" in told


@inside
@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.bfloat16, 6e-3)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_backward_is_of_the_recurrence(
    name: str, dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_bf16(monkeypatch)
    x = low(CASES[name](), dtype)
    found = backward(x)
    alike(found, wanted_of(x), bound if dtype == torch.float32 else ROUNDED.get(name, bound))
    if x.log_decay is not None and "dlog_decay" in found:
        gone = delta_reference.with_starts(x.v, x.log_decay, x.doc_ids)[..., 0].isinf()
        assert not found["dlog_decay"][gone].any()


@inside
@pytest.mark.parametrize("handed_on", [True, False])
@pytest.mark.parametrize("name", WHOLE)
def test_both_halves_are_the_recurrence(name: str, handed_on: bool) -> None:
    x = low(WHOLE[name](), torch.float32)
    found = measured("triton", x, handed_on)
    alike(found, expected(x.map(lambda y: y.double())), 1e-5)


@inside
def test_both_halves_in_slices_are_the_window() -> None:
    x = low(make("gdn", 500, sizes=(1, 1, 1, 32, 16), beta=0.05, begins=(150, 400)), torch.float32)
    found = chained(x, [0, 1, 71, 370, 500], kernel="triton")
    alike(found, expected(x.map(lambda y: y.double())), 1e-5)


@inside
@pytest.mark.parametrize("length", [65, 300])
def test_operators_have_fakes_and_only_what_is_wanted(length: int) -> None:
    x = low(make("gdn", length, sizes=SMALL), torch.float16)
    given, ops = (x.beta, x.log_decay, x.doc_ids), torch.ops.lasptrain
    kept = ops.delta_attend("triton", x.q, x.k, x.v, *given, x.initial_state, [])[1]
    rest = ops.delta_grad_query("triton", x.q, x.k, x.v, x.do, *given, kept)[1]
    checks: list[tuple[Any, tuple[object, ...]]] = [
        (ops.delta_grad_query.default, (x.q, x.k, x.v, x.do, *given, kept)),
        (ops.delta_grad_inputs.default, (x.q, x.k, x.v, x.do, *given, x.dfinal, [], kept, rest)),
    ]
    for wanted in range(3):
        checks.append((ops.delta_grad_initial_state.default, (x.q, x.do, x.k, *given, kept, wanted)))
        state, linear, _ = ops.delta_grad_initial_state("triton", x.q, x.do, x.k, *given, kept, wanted)
        assert bool(state.isnan().all()) is (wanted < 1) and bool(state.isnan().any()) is (wanted < 1)
        assert bool(linear.isnan().all()) is (wanted < 2) and bool(linear.isnan().any()) is (wanted < 2)
    for op, args in checks:
        torch.library.opcheck(op, ("triton", *args), test_utils=("test_schema", "test_faketensor"))
