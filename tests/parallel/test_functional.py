"""Linear attention as a function: the definition in every result and gradient, and one clear error for each misuse."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import lasptrain
from lasptrain.ops.delta_reference import recurrence as delta_definition
from lasptrain.ops.reference import recurrence as definition
from lasptrain.parallel.recurrence import ShardedRecurrence
from tests.support.gloo import spawn

B, T, H, K, V = 2, 70, 3, 8, 5
PAGE = Path(__file__).parents[2] / "lasptrain" / "parallel" / "README.md"


def given(decay: str = "token", dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    found = {"q": normal(B, T, H, K), "k": normal(B, T, H, K), "v": normal(B, T, H, V)}
    found["log_decay"] = -torch.rand((H,) if decay == "head" else (B, T, H), generator=g, dtype=torch.float64)
    starts = torch.zeros(B, T, dtype=torch.int64)
    starts[0, [20, 64]] = 1
    return found | {"doc_ids": starts.cumsum(1), "initial_state": normal(B, H, K, V)}


@pytest.mark.parametrize("decay", ["head", "token"])
@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_function_is_the_definition_with_every_gradient(kernel: str, decay: str) -> None:
    x = given(decay)
    leaves = {name: value.requires_grad_() for name, value in x.items() if value.is_floating_point()}
    results = {
        "function": lasptrain.linear_attention(**x, output_final_state=True, kernel=kernel),
        "definition": definition(*x.values()),
    }
    found = {}
    for name, (o, final_state) in results.items():
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in (o, final_state)]
        found[name] = o, final_state, *torch.autograd.grad([o, final_state], list(leaves.values()), weights)
    for got, want in zip(found["function"], found["definition"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta", [True, False])
@pytest.mark.parametrize("decay", ["head", "token", "channel"])
def test_delta_rule_is_the_definition_with_every_gradient(decay: str, beta: bool) -> None:
    x = given("token" if decay == "channel" else decay)
    x["k"] = torch.nn.functional.normalize(x["k"], dim=-1)[:, :, :1]
    x["q"] = x["q"][:, :, :1]
    if decay == "channel":
        x["log_decay"] = x["log_decay"][..., None] * torch.linspace(0.1, 2.0, K, dtype=torch.float64)
    if beta:
        x["beta"] = 2 * torch.rand(B, T, H, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    leaves = [value.requires_grad_() for value in x.values() if value.is_floating_point()]
    names = ("q", "k", "v", "beta", "log_decay", "doc_ids", "initial_state")
    results = [
        lasptrain.delta_rule(**x, output_final_state=True, kernel="chunked"),
        delta_definition(*(x.get(name) for name in names)),  # type: ignore[arg-type]
    ]
    found = []
    for o, final_state in results:
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in (o, final_state)]
        found.append([o, final_state, *torch.autograd.grad([o, final_state], leaves, weights)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("v", lambda x: x[:, :, :2], "v: expected [2, 70, 3 or a multiple, V], found [2, 70, 2, 5]"),
        ("beta", lambda x: x - 1, "beta[0, 0, 0]: expected 0 to 2, found -0.5"),
        ("beta", lambda x: x[..., None], "beta: expected [2, 70, 3], found [2, 70, 3, 1]"),
        (
            "log_decay",
            lambda x: x[..., None].expand(*x.shape, 7),
            "log_decay: expected [2, 70, 3], found [2, 70, 3, 7]",
        ),
    ],
)
def test_misuse_of_the_delta_rule_is_one_clear_error(name: str, change: Any, message: str) -> None:
    x = given() | {"beta": torch.full((B, T, H), 0.5, dtype=torch.float64)}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        lasptrain.delta_rule(**(x | {name: change(x[name])}))


def both(dtype: torch.dtype, **changed: Any) -> list[list[Tensor]]:
    """Results and gradients of both functions, in `dtype`."""
    found = []
    for function in (lasptrain.linear_attention, lasptrain.delta_rule):
        x: dict[str, Any] = given(dtype=dtype) | changed
        x["k"] = torch.nn.functional.normalize(x["k"], dim=-1)
        if function is lasptrain.linear_attention:
            x.pop("beta", None)
        leaves = [value.requires_grad_() for value in x.values() if value.is_floating_point()]
        o, final_state = function(**x, output_final_state=True)
        assert final_state is not None
        found.append([o, final_state, *torch.autograd.grad([o.sum() + final_state.sum()], leaves)])
    return found


def test_a_wider_beta_is_taken() -> None:
    beta = torch.rand(B, T, H, generator=torch.Generator().manual_seed(2))
    for dtype in (torch.float32, torch.bfloat16):
        x = given(dtype=torch.float32)
        x = {name: value.to(dtype) if name in ("q", "k", "v") else value for name, value in x.items()}
        x["k"] = torch.nn.functional.normalize(x["k"], dim=-1)
        wide, narrow = beta.double().requires_grad_(), beta.clone().requires_grad_()
        (found, _), (expected, _) = (lasptrain.delta_rule(**x, beta=b) for b in (wide, narrow))
        torch.testing.assert_close(found, expected)
        (dwide,) = torch.autograd.grad(found.sum(), wide)
        (dnarrow,) = torch.autograd.grad(expected.sum(), narrow)
        torch.testing.assert_close(dwide, dnarrow.double())


def test_autocast_rounds_nothing() -> None:
    beta = torch.full((B, T, H), 0.5)
    expected = both(torch.float32, beta=beta.clone())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = both(torch.float32, beta=beta.clone())
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0.0, atol=0.0)


def test_functions_with_states_can_be_compiled() -> None:
    x = given()
    for function in (lasptrain.linear_attention, lasptrain.delta_rule):
        torch.compiler.reset()
        found = torch.compile(
            lambda function=function: function(**x, output_final_state=True)[0] * 2, backend="eager"
        )()
        torch.testing.assert_close(found, function(**x, output_final_state=True)[0] * 2)


def test_no_state_is_returned_unless_asked_for() -> None:
    x = given()
    assert lasptrain.linear_attention(x["q"], x["k"], x["v"])[1] is None


def positive(log_decay: Tensor) -> Tensor:
    log_decay[1, 30, 2] = 0.25
    return log_decay


@pytest.mark.parametrize(
    "name,change,message",
    [
        ("q", lambda x: x[0], "q: expected [B, T, H, K], none of them 0, found [70, 3, 8]"),
        ("q", lambda x: x[:, :0], "q: expected [B, T, H, K], none of them 0, found [2, 0, 3, 8]"),
        (
            "q",
            lambda x: x.int(),
            "q: expected torch.bfloat16, torch.float16, torch.float32 or torch.float64, found torch.int32",
        ),
        ("q", lambda x: x.tolist(), "q: expected a tensor, found list"),
        ("k", lambda _: None, "k: expected a tensor, found NoneType"),
        ("log_decay", lambda _: -0.1, "log_decay: expected a tensor, found float"),
        ("k", lambda x: x[:, :, :2], "k: expected [2, 70, 3, 8], found [2, 70, 2, 8]"),
        ("k", lambda x: x.float(), "k: expected torch.float64, found torch.float32"),
        ("v", lambda x: x[:, 1:], "v: expected [2, 70, 3, V], found [2, 69, 3, 5]"),
        ("v", lambda x: x.half(), "v: expected torch.float64, found torch.float16"),
        ("log_decay", lambda x: x[0], "log_decay: expected [2, 70, 3], found [70, 3]"),
        ("log_decay", lambda x: x.int(), "log_decay: expected torch.float32 or torch.float64, found torch.int32"),
        ("log_decay", positive, "log_decay[1, 30, 2]: expected at most 0, found 0.25"),
        ("log_decay", lambda x: x * float("nan"), "log_decay[0, 0, 0]: expected at most 0, found nan"),
        ("doc_ids", lambda x: x[:1], "doc_ids: expected [2, 70], found [1, 70]"),
        ("doc_ids", lambda x: x.double(), "doc_ids: expected torch.int32 or torch.int64, found torch.float64"),
        ("doc_ids", lambda x: x - 1, "doc_ids[0, 0]: expected numbers from 0 on that never fall, found -1"),
        ("doc_ids", lambda x: x % 2, "doc_ids[0, 64]: expected numbers from 0 on that never fall, found 0"),
        ("initial_state", lambda x: x[0], "initial_state: expected [2, 3, 8, 5], found [3, 8, 5]"),
        ("initial_state", lambda x: x.float(), "initial_state: expected torch.float64, found torch.float32"),
        ("kernel", lambda _: "fast", "kernel: expected auto, triton, chunked, reference, found fast"),
        ("kernel", lambda _: "triton", "kernel: triton needs an NVIDIA GPU, found cpu; use chunked or auto"),
    ],
)
def test_misuse_is_refused_by_name(name: str, change: Any, message: str) -> None:
    x: dict[str, Any] = given() | {"kernel": "auto"}
    x[name] = change(x[name])
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        lasptrain.linear_attention(**x)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"k": (2, 70, 3)}, "k, v: expected [B, T, H_k, K] and [B, T, H, V], found [2, 70, 3] and [2, 70, 3, 5]"),
        ({"v": (2, 70, 4, 5)}, "v: expected [2, 70, a multiple of 3, V] beside k, found [2, 70, 4, 5]"),
        ({"v": (2, 70, 6, 5), "log_decay": (6,)}, "v: expected 3 heads as in k, found 6"),
        ({"log_decay": (2, 70)}, "inputs[2]: expected [3] or [2, 70, 3, …], found [2, 70]"),
        ({"log_decay": (2, 70, 3, 8)}, "log_decay: expected [H] or [B, T, H], found [2, 70, 3, 8]"),
        ({"doc_ids": (2, 71)}, "doc_ids: expected [2, 70], found [2, 71]"),
        ({"angle": (3, 8)}, "angle: expected [3, 4], found [3, 8]"),
        ({"carry": (2, 3, 5, 8)}, "carry: expected [2, 3, 8, 5], found [2, 3, 5, 8]"),
        ({"q": (2, 70, 3, 4)}, "q: expected [2, 70, 3, 8], found [2, 70, 3, 4]"),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_a_slice_is_refused_where_shapes_do_not_fit(
    alone: bool, change: dict[str, tuple[int, ...]], message: str
) -> None:
    shapes = {"q": (B, T, H, K), "k": (B, T, H, K), "v": (B, T, H, V), "log_decay": (B, T, H)}
    x: dict[str, Any] = {name: torch.zeros(shape) for name, shape in (shapes | change).items()}
    q, *inputs = (x.pop(name) for name in shapes)
    recurrence = ShardedRecurrence("chunked")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        recurrence.finish(recurrence.begin(tuple(inputs), x.pop("doc_ids", None), output_final_state=not alone, **x), q)


def test_importing_lasptrain_does_not_import_torch() -> None:
    code = "import sys, lasptrain; assert 'torch' not in sys.modules; dir(lasptrain); assert lasptrain.linear_attention"
    subprocess.run([sys.executable, "-c", code + "; assert 'torch' in sys.modules"], check=True)
    with pytest.raises(AttributeError, match="no attribute 'quadratic_attention'"):
        _ = lasptrain.quadratic_attention


def page(rank: int, world: int) -> bool:
    """Whether the page's examples run, and the second is the first on twice the text with its q doubled."""
    torch.manual_seed(rank)
    scope: dict[str, Any] = {"group": dist.group.WORLD}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, scope)  # noqa: S102
    whole = []
    for name in ("q", "k", "v", "log_decay", "o"):
        parts = [torch.empty_like(scope[name]) for _ in range(world)]
        dist.all_gather(parts, scope[name].detach().contiguous())
        whole.append(torch.cat(parts, dim=1))
    *arguments, o = whole
    return scope["more"].shape == o[:, :256].shape and torch.allclose(
        lasptrain.linear_attention(*arguments)[0], o, rtol=1e-4, atol=1e-4
    )


def test_the_page_holds() -> None:
    assert spawn(2, page) == [True, True]
