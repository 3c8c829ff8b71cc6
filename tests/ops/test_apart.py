"""Law 2 for kernels: not one bit of what is computed of a document depends on another, decays included, in fp32."""

from __future__ import annotations

import torch

from tests.ops.test_delta import low, make, measured
from tests.support.apart import leaks
from tests.support.interpreted import inside, interpreted
from tests.support.kernel_cases import Case, backward, inputs

BEGINS = (20, 30, 33, 64, 100)  # four in a chunk, one that ends with it


def test_in_the_interpreter() -> None:
    assert "2 passed" in interpreted(__file__, "triton")


def delta_leaks(kernel: str) -> set[tuple[str, int, int]]:
    x = make("gdn", 130, begins=BEGINS, sizes=(1, 1, 1, 16, 16)).map(lambda y: y.float())
    x = x._replace(initial_state=low(x.initial_state), dfinal=low(x.dfinal))
    return leaks(lambda given: measured(kernel, given), x, BEGINS)


def test_delta_rule_in_chunks() -> None:
    assert not delta_leaks("chunked")


@inside
def test_delta_rule_in_triton() -> None:
    assert not delta_leaks("triton")


def decay_case() -> Case:
    return Case(130, 32, 32, "token", BEGINS, batch=1, heads=1)


def test_decay_rule_in_chunks() -> None:
    from lasptrain.ops import chunked

    x = inputs(decay_case(), torch.float32, torch.device("cpu"))
    assert not leaks(lambda given: backward(chunked, given), x, BEGINS)


@inside
def test_decay_rule_in_triton() -> None:
    from lasptrain.ops import triton_launch

    x = inputs(decay_case(), torch.float32, torch.device("cpu"))
    assert not leaks(lambda given: backward(triton_launch, given), x, BEGINS)
