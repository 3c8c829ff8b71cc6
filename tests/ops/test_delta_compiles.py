"""The delta rule's Triton programs compile for Hopper, as they are launched; no GPU is needed, and none computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.test_delta import Case, make
from tests.support.interpreted import INTERPRETED

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
    layout = f",{x.layout!r}" if hasattr(x, "layout") else ""
    return f"tensordesc<{NAMES[base.dtype]}[{','.join(map(str, block))}]{layout}>"


def compiled(program: Any, like: Tensor, grid: object, launch: Any, constants: dict[str, Any], *args: object) -> None:
    """What `run` would launch, compiled instead."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    assert [*constants] == program.arg_names[len(args) :]
    kinds = dict(zip(program.arg_names, map(kind, args), strict=False))
    fixed = {name: None for name, of in kinds.items() if of == "constexpr"} | constants
    pointers = {(i,): [["tt.divisibility", 16]] for i, of in enumerate(kinds.values()) if of.startswith("*")}
    made_of = GluonASTSource if isinstance(program, GluonJITFunction) else ASTSource
    source = made_of(
        fn=program,
        signature=kinds | dict.fromkeys(constants, "constexpr"),
        constexprs={(program.arg_names.index(name),): value for name, value in fixed.items()},
        attrs=pointers,
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options())
    assert made.metadata.shared <= 227 << 10, program.__name__


HOPPER = [  # programs that a Hopper GPU takes instead
    "invert_chunks",
    "summarize_delta",
    "walk_delta",
    "query_gradients",
    "walk_gradients",
    "input_gradients",
]
SLICES = [  # kind, dtype, keys, values, heads, tokens
    ("gdn", torch.bfloat16, 128, 128, (1, 1, 2), 600),
    ("gdn_head", torch.bfloat16, 64, 64, (1, 2, 4), 600),
    ("delta", torch.float16, 96, 192, (1, 1, 2), 200),
    ("gdn", torch.float32, 64, 128, (1, 1, 1), 600),
    ("gdn", torch.bfloat16, 128, 128, (1, 1, 1), 1),
]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Names of the programs that were launched: they were only compiled."""
    pytest.importorskip("triton")
    from lasptrain.ops import delta_hopper, delta_triton_back, delta_triton_forward, delta_triton_slice

    names: set[str] = set()

    def compile_it(program: Any, *args: Any) -> None:
        names.add(f"{program.fn.__module__.rpartition('.')[2]}.{program.fn.__name__}")
        compiled(program, *args)

    for module in (delta_triton_slice, delta_triton_forward, delta_triton_back, delta_hopper):
        monkeypatch.setattr(module, "run", compile_it)
    yield names


def both_halves(x: Case) -> None:
    """Launch whatever there is, forward and backward."""
    from lasptrain.ops import delta_triton as kernel

    given = (x.beta, x.log_decay, x.doc_ids)
    for wanted in (1, 2):
        _, _, blocks = kernel.summarize(x.k, x.v, *given, wanted)
        for state in (None, x.initial_state):
            kernel.attend(x.q, x.k, x.v, *given, state, blocks)
            _, kept = kernel.attend(x.q, x.k, x.v, *given, state, [])
    _, rest = kernel.grad_query(x.q, x.k, x.v, x.do, *given, kept)
    for wanted in range(3):
        _, _, dblocks = kernel.grad_initial_state(x.q, x.do, x.k, *given, kept, wanted)
        for dfinal in (None, x.dfinal):
            kernel.grad_inputs(x.q, x.k, x.v, x.do, *given, dfinal, dblocks, kept, rest)


def slice_of(of: str, dtype: torch.dtype, keys: int, values: int, heads: tuple[int, int, int], tokens: int) -> Case:
    begins = (9,) if of == "gdn_head" else ()
    return make(of, tokens, begins=begins, sizes=(*heads, keys, values)).map(lambda y: y.to(dtype))


@pytest.mark.parametrize("of,dtype,keys,values,heads,tokens", SLICES, ids=str)
def test_compiles(
    of: str,
    dtype: torch.dtype,
    keys: int,
    values: int,
    heads: tuple[int, int, int],
    tokens: int,
    launched: set[str],
) -> None:
    both_halves(slice_of(of, dtype, keys, values, heads, tokens))
    assert {name.partition(".")[0] for name in launched} == {"delta_triton_kernels", "delta_triton_back_kernels"}


@pytest.mark.parametrize(
    "of,heads,tokens", [("gdn", (1, 1, 2), 600), ("gdn", (1, 1, 1), 64), ("gdn_head", (1, 2, 4), 600)], ids=str
)
def test_compiles_for_hopper(
    of: str, heads: tuple[int, int, int], tokens: int, launched: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The programs that a Hopper GPU takes instead: all of them, and none that they replace; of one block, too."""
    from lasptrain.ops import delta_hopper

    monkeypatch.setattr(delta_hopper, "fits", lambda s, like: True)
    both_halves(slice_of(of, torch.bfloat16, 128, 128, heads, tokens))
    kept = {"measure_decays", "scan_maps"}, {"scan_gradients", "finish_gradients"}
    assert launched == (
        {f"delta_hopper_kernels.{name}" for name in HOPPER}
        | {f"delta_triton_kernels.{name}" for name in kept[0]}
        | {f"delta_triton_back_kernels.{name}" for name in kept[1]}
    )
