"""Law 1 for the Triton kernels, in Triton's interpreter on the CPU; small sizes. On a GPU: test_gpu_kernels."""

from __future__ import annotations

import pytest
import torch

from lasptrain.ops import chunked
from tests.support.interpreted import inside, interpreted
from tests.support.kernel_cases import STATES, WAYS, Case, backward, error, inputs

CASES = [
    Case(1, 32, 32, "token", (0,), heads=2),
    Case(63, 32, 64, "head", heads=2),
    Case(65, 64, 32, "token", (0, 30, 64), batch=1, heads=2),
    Case(130, 32, 33, "none", (1, 64, 129), batch=1, heads=1),
    Case(300, 32, 32, "token", (3, 100, 255, 256, 299), batch=1, heads=2),
    Case(130, 64, 64, "token", batch=1, heads=1),
    Case(260, 32, 32, "token", (3, 100), batch=1, heads=1, edges=False),
    Case(33, 256, 32, "head", (5,), batch=1, heads=1),
    Case(70, 32, 32, "closed", batch=1),
    Case(71, 32, 32, "closing", (30, 40, 41), batch=1),
    Case(260, 32, 32, "closing", batch=1),
]


FEW = ("none", "closed", "closing")  # decays of the cases that take a few seconds


@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["few", "rest"])
def test_in_the_interpreter(few: bool) -> None:
    count = sum((case.decay in FEW) is few for case in CASES)
    named = " or ".join(FEW)
    told = interpreted(__file__, f"recurrence and {'' if few else 'not'} ({named})")
    assert f"{2 * count} passed" in told


@inside
@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-6), (torch.float16, 1e-3)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_is_the_recurrence(case: Case, dtype: torch.dtype, bound: float) -> None:
    from lasptrain.ops import triton_launch

    x = inputs(case, dtype, torch.device("cpu"))
    want = backward(chunked, x.double())
    ways = WAYS if case.tokens < 70 or not case.edges else {"all": (True, True)}
    for given, (with_blocks, wanted) in ways.items():
        got = backward(triton_launch, x, with_blocks, wanted)
        assert got.keys() == want.keys() - (set() if wanted else STATES)
        for name in got:
            assert error(got[name], want[name]) < bound, f"{name}, given {given}"
