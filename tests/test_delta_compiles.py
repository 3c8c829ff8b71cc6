"""The delta rule's Triton programs compile for Hopper, as they are launched; no GPU is needed, and none computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.interpreted import INTERPRETED
from tests.test_delta import make

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(INTERPRETED, reason="compiles"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning"),
]
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32"}


def kind(x: object) -> str:
    """The type of an argument, in Triton's words."""
    if x is None:
        return "constexpr"
    if isinstance(x, int):
        return "i32"
    if isinstance(x, Tensor):
        return f"*{NAMES[x.dtype]}"
    base, block = x.base, x.block_shape  # type: ignore[attr-defined]
    return f"tensordesc<{NAMES[base.dtype]}[{','.join(map(str, block))}]>"


def compiled(program: Any, like: Tensor, grid: object, launch: Any, constants: dict[str, Any], *args: object) -> None:
    """What `run` would launch, compiled instead."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    assert [*constants] == program.arg_names[len(args) :]
    kinds = dict(zip(program.arg_names, map(kind, args), strict=False))
    fixed = {name: None for name, of in kinds.items() if of == "constexpr"} | constants
    pointers = {(i,): [["tt.divisibility", 16]] for i, of in enumerate(kinds.values()) if of.startswith("*")}
    source = ASTSource(
        fn=program,
        signature=kinds | dict.fromkeys(constants, "constexpr"),
        constexprs={(program.arg_names.index(name),): value for name, value in fixed.items()},
        attrs=pointers,
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options())
    assert made.metadata.shared <= 227 << 10, program.__name__


SLICES = [  # kind, dtype, keys, values, heads, tokens
    ("gdn", torch.bfloat16, 128, 128, (1, 1, 2), 600),
    ("gdn_head", torch.bfloat16, 64, 64, (1, 2, 4), 600),
    ("delta", torch.float16, 96, 192, (1, 1, 2), 200),
    ("gdn", torch.float32, 64, 128, (1, 1, 1), 600),
    ("gdn", torch.bfloat16, 128, 128, (1, 1, 1), 1),
]


@pytest.mark.parametrize("of,dtype,keys,values,heads,tokens", SLICES, ids=str)
def test_forward(
    of: str,
    dtype: torch.dtype,
    keys: int,
    values: int,
    heads: tuple[int, int, int],
    tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    from lasptrain.ops import delta_triton_forward

    monkeypatch.setattr(delta_triton_forward, "run", compiled)
    x = make(of, tokens, begins=(9,) if of == "gdn_head" else (), sizes=(*heads, keys, values)).map(
        lambda y: y.to(dtype)
    )
    inputs = (x.k, x.v, x.beta, x.log_decay, x.doc_ids)
    for wanted in (1, 2):
        _, _, blocks = delta_triton_forward.summarize(*inputs, wanted)
        for state in (None, x.initial_state):
            delta_triton_forward.attend(x.q, *inputs, state, blocks)
            delta_triton_forward.attend(x.q, *inputs, state, [])


@pytest.mark.parametrize("of,dtype,keys,values,heads,tokens", SLICES, ids=str)
def test_backward(
    of: str,
    dtype: torch.dtype,
    keys: int,
    values: int,
    heads: tuple[int, int, int],
    tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    from lasptrain.ops import delta_triton_back, delta_triton_forward

    for module in (delta_triton_back, delta_triton_forward):
        monkeypatch.setattr(module, "run", compiled)
    x = make(of, tokens, begins=(9,) if of == "gdn_head" else (), sizes=(*heads, keys, values)).map(
        lambda y: y.to(dtype)
    )
    given = (x.beta, x.log_decay, x.doc_ids)
    _, kept = delta_triton_forward.attend(x.q, x.k, x.v, *given, None, [])
    _, rest = delta_triton_back.grad_query(x.q, x.k, x.v, x.do, *given, kept)
    for wanted in range(3):
        _, _, dblocks = delta_triton_back.grad_initial_state(x.q, x.do, x.k, *given, kept, wanted)
        for dfinal in (None, x.dfinal):
            delta_triton_back.grad_inputs(x.q, x.k, x.v, x.do, *given, dfinal, dblocks, kept, rest)
