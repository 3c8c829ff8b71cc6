"""The interpreter of Gluon programs: what it takes for a hazard, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.support.gluon import Hazard, Programs

HEAD = """
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

@gluon.jit
def program(x, y):
    tile = gl.allocate_shared_memory(gl.bfloat16, [16, 16], gl.NVMMASharedLayout())
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    fence_async_shared()
    gl.barrier()
"""
STEPS = {
    "write": "tile.store(gl.zeros([16, 16], gl.bfloat16, None))",
    "read": "tile.load(None)",
    "fence": "fence_async_shared()",
    "barrier": "gl.barrier()",
    "load": "mbarrier.expect(bar, 512); tma.async_load(x, [8, 0], bar, tile)",
    "arrive": "mbarrier.wait(bar, 0)",
    "arrive_again": "mbarrier.wait(bar, 1)",
    "multiply": "product = warpgroup_mma(tile, tile, gl.zeros([16, 16], gl.float32, None), is_async=True)",
    "multiplied": "product = warpgroup_mma_wait(0, deps=[product])",
    "copy": "tma.async_store(y, [16, 0], tile)",
    "copied": "tma.store_wait(0)",
}


def tensor() -> SimpleNamespace:
    """A descriptor of 24 rows of ones, in blocks of 16."""
    rows = torch.ones(24, 16, dtype=torch.bfloat16)
    return SimpleNamespace(base=rows, shape=[24, 16], strides=[16, 1], block_shape=[16, 16])


def run(*lines: str) -> torch.Tensor:
    """What a program of these lines leaves behind its head."""
    y = tensor()
    y.base.zero_()
    Programs(HEAD + "".join(f"    {line}\n" for line in lines), "text").run("program", 1, {"x": tensor(), "y": y})
    left: torch.Tensor = y.base
    return left


HELD = [
    "write barrier read",
    "write barrier write",
    "write fence barrier multiply multiplied",
    "write barrier fence multiply multiplied",
    "write fence barrier copy copied",
    "write fence barrier load arrive",
    "load arrive read",
    "load arrive multiply multiplied",
    "read barrier write",
    "read barrier load arrive",
    "load arrive multiply multiplied barrier write",
    "load arrive multiply multiply multiplied barrier load arrive_again",
    "load arrive copy copied barrier write",
]
BROKEN = [
    "write read",
    "write fence read",
    "write write",
    "write barrier multiply multiplied",
    "write fence multiply multiplied",
    "write fence barrier write barrier multiply multiplied",
    "write barrier copy copied",
    "write barrier load arrive",
    "load read arrive",
    "load write arrive",
    "load multiply arrive multiplied",
    "load barrier fence read arrive",
    "read write",
    "read load arrive",
    "load arrive multiply barrier write multiplied",
    "load arrive multiply multiplied write",
    "load arrive multiply multiplied load arrive_again",
    "load arrive copy barrier write copied",
    "load arrive copy copied write",
    "load load arrive",
    "load arrive load arrive_again",
    "load arrive_again",
    "load arrive barrier load arrive",
    "arrive",
    "load",
    "load arrive multiply",
    "load arrive copy",
]


@pytest.mark.parametrize("steps", HELD)
def test_order_that_a_gpu_keeps(steps: str) -> None:
    run(*(STEPS[step] for step in steps.split()))


@pytest.mark.parametrize("steps", BROKEN)
def test_order_that_is_left_to_chance(steps: str) -> None:
    with pytest.raises(Hazard):
        run(*(STEPS[step] for step in steps.split()))


def test_blocks_end_where_a_tensor_does() -> None:
    left = run(*(STEPS[step] for step in ("load", "arrive", "copy", "copied")))
    assert left[16:].eq(1).all() and not left[:16].any()
    zeros = run(STEPS["load"].replace("[8, 0]", "[24, 0]"), *(STEPS[step] for step in ("arrive", "copy", "copied")))
    assert not zeros.any()


@pytest.mark.parametrize(
    "line,refusal",
    [
        ("mbarrier.init(bar, count=2)", NotImplementedError),
        ("mbarrier.arrive(bar)", AttributeError),
        ("gl.dot_fma(tile, tile, tile)", AttributeError),
        ("tile.atomic_add(1)", AttributeError),
        ("tile.load(None, cache=True)", TypeError),
        ("tile.slice(0, 8, dim=1).load(None)", NotImplementedError),
        ("from triton.experimental.gluon.language import amd", ImportError),
        ("from triton.experimental.gluon.language.amd import cdna3", ImportError),
        ("warpgroup_mma(tile, tile, gl.zeros([16, 16], gl.float32, None), is_async=False)", NotImplementedError),
        (STEPS["multiply"] + "; product * 2.0", TypeError),
        ("tile.store(gl.zeros([16, 8], gl.bfloat16, None))", Hazard),
        ("mbarrier.expect(bar, 256); tma.async_load(x, [0, 0], bar, tile)", Hazard),
        ("gl.allocate_shared_memory(gl.float32, [256, 256], None)", Hazard),
    ],
)
def test_what_is_not_modelled_or_wrong_is_refused(line: str, refusal: type[Exception]) -> None:
    with pytest.raises(refusal):
        run(line)
