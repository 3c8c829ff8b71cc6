"""Law 1 and law 6 for the Triton kernels on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lasptrain.ops import chunked
from tests.support.apart import INPUTS, leaks
from tests.support.kernel_cases import STATES, WAYS, Case, Inputs, backward, error, inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BOUNDS = {torch.bfloat16: 3e-3, torch.float16: 6e-4, torch.float32: 2e-6}
SIZES = [(1, 64, 64), (63, 32, 64), (64, 128, 64), (65, 64, 128), (500, 256, 128), (777, 128, 129), (3000, 128, 128)]
CASES = [
    Case(t, k, v, decay, boundaries, edges=edges)
    for t, k, v in SIZES
    for decay, boundaries, edges in [
        ("none", (), True),
        ("head", (0,), True),
        ("head", (), False),
        ("token", (t // 2,), True),
        ("token", (t - 1,), False),
        ("closing", (), True),
        ("closing", (t // 3, t // 2), False),
    ]
] + [Case(300, 256, 256, "token", (3, 100)), Case(300, 48, 48, "head", (64, 128)), Case(500, 128, 128, "closed")]


def poison(case: Case) -> None:
    """Leaves NaN in the memory that the outputs are about to get."""
    shapes = [(case.batch, case.tokens, case.heads, d) for d in (case.keys, case.values) for _ in range(4)]
    spent = [torch.full(s, float("nan"), device="cuda") for s in shapes]
    del spent


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_is_the_recurrence(case: Case, dtype: torch.dtype) -> None:
    from lasptrain.ops import triton_launch

    x = inputs(case, dtype, torch.device("cuda"))
    want = backward(chunked, x.double())
    lone = case.tokens == 1 and dtype == torch.bfloat16  # is rounded but once or twice: there is nothing to average
    for given, (with_blocks, wanted) in WAYS.items():
        poison(case)
        got = backward(triton_launch, x, with_blocks, wanted)
        for name in want.keys() - (set() if wanted else STATES):
            assert error(got[name], want[name]) < (3.5e-3 if lone else BOUNDS[dtype]), f"{name}, given {given}"


@pytest.mark.parametrize("memory", [4, 50, 10_000], ids=lambda m: f"memory of {m} tokens")
def test_decay_gradient_does_not_cancel_at_64k_tokens(memory: int) -> None:
    from lasptrain.ops import triton_launch

    case = Case(65536, 128, 128, "token", batch=1, heads=2)
    x = inputs(case, torch.bfloat16, torch.device("cuda"))
    assert x.log_decay is not None
    x = x._replace(log_decay=-torch.rand_like(x.log_decay) * 2 / memory)
    got = backward(triton_launch, x)["dlog_decay"]
    want = backward(chunked, x.double())["dlog_decay"]
    assert error(got, want) < 3e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("decay", ["head", "token"])
def test_documents_do_not_see_each_other(decay: str, dtype: torch.dtype) -> None:
    """Decays per token are rounded with those before them, except in fp32."""
    from lasptrain.ops import triton_launch

    begins = (1, 64, 100, 120, 256, 500)
    x = inputs(Case(512, 64, 64, decay, begins, batch=1), dtype, torch.device("cuda"))
    changed = INPUTS if dtype == torch.float32 else [name for name in INPUTS if name != "log_decay"]
    assert not leaks(lambda given: backward(triton_launch, given), x, begins, changed)


def test_more_than_two_to_the_31_elements() -> None:
    """The last tokens of a slice whose tensors outgrow 32-bit offsets, against the same tokens alone."""
    from lasptrain.ops import triton_launch

    t, h, dim, tail = 2**20 + 77, 16, 128, 500
    assert t * h * dim > 2**31
    generator = torch.Generator("cuda").manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(1, t, h, dim, generator=generator, device="cuda", dtype=torch.bfloat16)

    q, k, v, do = normal(), normal(), normal(), normal()
    doc_ids = torch.zeros(1, t, dtype=torch.int32, device="cuda")
    doc_ids[:, -tail:] = 1
    log_decay = -torch.rand(1, t, h, generator=generator, device="cuda") * 0.1
    whole = backward(triton_launch, Inputs(q, k, v, do, log_decay, doc_ids, None, None))
    end = Inputs(q, k, v, do, log_decay, None, None, None).map(lambda x: x[:, -tail:].contiguous())
    alone = backward(chunked, end.double())
    for name in ("o", "dq", "dk", "dv", "dlog_decay"):
        got, want = whole[name][:, -tail:], alone[name].clone()
        if name == "dlog_decay":
            want[:, 0] = 0
        assert error(got, want) < BOUNDS[torch.bfloat16], name
    assert error(whole["state"], alone["state"]) < BOUNDS[torch.bfloat16]
