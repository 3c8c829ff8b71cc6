"""Law 1: every kernel is the recurrence, in outputs and in all gradients."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from lasptrain.errors import SetupError
from lasptrain.ops import decay_rule, reference, select
from lasptrain.ops.reference import recurrence
from tests.support.kernel_cases import closing

KERNELS = ["reference", "chunked"]
LENGTHS = [1, 63, 64, 65, 130]
DECAYS = ["none", "head", "token", "closing", "closed"]
BOUNDARIES = {"none": [], "first": [0], "middle": [30], "last": [-1], "many": [0, 1, 2, 40, 64, 128, -1]}


def inputs(length: int, decay: str, boundary: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor | None]:
    b, h, kdim, vdim = 2, 3, 8, 5
    g = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    uniform = torch.rand(b, length, h, generator=g, dtype=torch.float64)
    log_decay = {
        "none": None,
        "head": -torch.tensor([0.0, 0.01, 2.0], dtype=torch.float64),
        "token": -uniform * torch.tensor([0.01, 0.1, 2.0]),
        "closing": closing(-(10 ** (-1 - 3 * uniform))),
        "closed": -torch.tensor([1e3, 1e4, float("inf")], dtype=torch.float64),
    }[decay]
    begin = torch.zeros(b, length, dtype=torch.int32)
    for i in BOUNDARIES[boundary]:
        if i < length:
            begin[0, i] = 1
    return {
        "q": normal(b, length, h, kdim),
        "k": normal(b, length, h, kdim),
        "v": normal(b, length, h, vdim),
        "log_decay": log_decay,
        "doc": begin.cumsum(1).int() if BOUNDARIES[boundary] else None,
        "entering": normal(b, h, kdim, vdim),
        "do": normal(b, length, h, vdim),
        "dleaving": normal(b, h, kdim, vdim),
    }


def expected(x: dict[str, Tensor | None]) -> dict[str, Tensor]:
    names = ["q", "k", "v", "entering"]
    if x["log_decay"] is not None and x["log_decay"].dim() == 3:
        names.append("log_decay")
    leaves = {n: x[n].detach().clone().requires_grad_() for n in names}  # type: ignore[union-attr]
    arguments = {**x, **leaves}
    o, final_state = recurrence(*(arguments[n] for n in ("q", "k", "v", "log_decay", "doc", "entering")))  # type: ignore[arg-type]
    grads = torch.autograd.grad([o, final_state], list(leaves.values()), [x["do"], x["dleaving"]])
    return {"o": o.detach(), "leaving": final_state.detach()} | {f"d{n}": g for n, g in zip(names, grads, strict=True)}


def measured(kernel: str, x: dict[str, Tensor | None], with_blocks: bool) -> dict[str, Tensor]:
    q, k, v, log_decay, doc_ids, initial_state, do, dfinal = x.values()
    assert q is not None and do is not None and initial_state is not None and dfinal is not None
    given = k, v, log_decay
    state, decay, blocks = decay_rule.summarize(kernel, given, doc_ids, 2)
    o, kept = decay_rule.attend(kernel, q, given, doc_ids, initial_state, blocks if with_blocks else [])
    dinitial, backwards, dblocks = decay_rule.grad_initial_state(kernel, q, do, given, doc_ids, kept, 2)
    dq, rest = decay_rule.grad_query(kernel, q, given, do, doc_ids, kept)
    dk, dv, dlog = decay_rule.grad_inputs(
        kernel, q, given, do, doc_ids, dfinal, dblocks if with_blocks else [], kept, rest
    )
    assert dk is not None and dv is not None and torch.equal(backwards, decay)
    found = {
        "o": o,
        "leaving": decay[..., None, None] * initial_state + state,
        "dq": dq,
        "dk": dk,
        "dv": dv,
        "dentering": dinitial + decay[..., None, None] * dfinal,
    }
    return found | ({} if dlog is None else {"dlog_decay": dlog})


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12))


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", LENGTHS)
def test_kernels_are_the_recurrence(length: int, decay: str, boundary: str) -> None:
    x = inputs(length, decay, boundary)
    want = expected(x)
    kernels = KERNELS if length <= 65 else ["chunked"]  # the reference is slow and does not depend on the length
    for kernel, with_blocks in product(kernels, (True, False)):
        got = measured(kernel, x, with_blocks)
        assert got.keys() == want.keys()
        for name in want:
            assert error(got[name], want[name]) < 1e-12, (kernel, with_blocks, name)


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("decay", ["token", "closing"])
def test_low_precision_inputs_keep_fp32_states(decay: str, dtype: torch.dtype, bound: float) -> None:
    x = inputs(500, decay, "many", dtype)
    want = expected({n: t if t is None or n == "doc" else t.double() for n, t in x.items()})
    got = measured("chunked", x, True)
    assert got["leaving"].dtype == torch.float32 and got["o"].dtype == dtype
    for name in want:
        assert error(got[name], want[name]) < bound, name


def test_decay_gradient_does_not_cancel_at_64k_tokens() -> None:
    t, h = 65536, 1
    g = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(1, t, h, 8, generator=g) for _ in range(4))
    log_decay = -torch.rand(1, t, h, generator=g) * 1e-3

    def grad(dtype: torch.dtype) -> Tensor:
        query, do_, *given = (y.to(dtype) for y in (q, do, k, v, log_decay))
        x = tuple(given)
        _, kept = decay_rule.attend("chunked", query, x, None, None, [])
        _, rest = decay_rule.grad_query("chunked", query, x, do_, None, kept)
        dlog = decay_rule.grad_inputs("chunked", query, x, do_, None, None, [], kept, rest)[2]
        assert dlog is not None
        return dlog

    assert error(grad(torch.float32), grad(torch.float64)) < 1e-5


def test_operators_have_fake_implementations() -> None:
    x = inputs(65, "token", "middle", torch.float32)
    q, k, v, log_decay, doc_ids, initial_state, do, dfinal = x.values()
    ops = torch.ops.lasptrain
    *_, blocks = ops.summarize("chunked", k, v, log_decay, doc_ids, 2)
    _, kept = ops.attend("chunked", q, k, v, log_decay, doc_ids, initial_state, blocks)
    _, rest = ops.grad_query("chunked", q, k, v, do, log_decay, doc_ids, kept)
    *_, dblocks = ops.grad_initial_state("chunked", q, do, log_decay, doc_ids, 2)
    checks = {
        ops.summarize.default: ("chunked", k, v, log_decay, doc_ids, 2),
        ops.attend.default: ("chunked", q, k, v, log_decay, doc_ids, initial_state, blocks),
        ops.grad_initial_state.default: ("chunked", q, do, log_decay, doc_ids, 2),
        ops.grad_query.default: ("chunked", q, k, v, do, log_decay, doc_ids, kept),
        ops.grad_inputs.default: ("chunked", q, k, v, do, log_decay, doc_ids, dfinal, dblocks, kept, rest),
    }
    for op, args in checks.items():
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_a_document_never_sees_another() -> None:
    x = inputs(200, "head", "middle")
    first = measured("chunked", x, True)
    for name in ("q", "k", "v", "do"):
        x[name] = x[name].clone()  # type: ignore[union-attr]
        x[name][0, 29] += 100.0  # type: ignore[index]
    second = measured("chunked", x, True)
    for name in ("o", "dq", "dk", "dv"):
        assert torch.equal(first[name][0, 30:], second[name][0, 30:]), name
        assert not torch.equal(first[name][0, :30], second[name][0, :30]), name
    assert torch.equal(first["leaving"][0], second["leaving"][0])


def test_reference_zeroes_the_state_where_a_document_starts() -> None:
    doc_ids = torch.tensor([[0, 1, 1]])
    assert reference.starts(doc_ids).tolist() == [[False, True, False]]


def test_kernels_that_need_another_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.version, "hip", None)
    assert (select("auto", gpu), select("auto", torch.device("cpu"))) == ("triton", "chunked")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert select("auto", gpu) == "chunked"
    with pytest.raises(SetupError, match="triton needs an NVIDIA GPU, found one of AMD; use chunked or auto"):
        select("triton", gpu)
