"""What a plan predicts, against numbers known otherwise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lasptrain import plan
from lasptrain.errors import ResourceError
from lasptrain.recipe import load

RECIPES = Path(__file__).parent.parent / "recipes"
GIB = 2**30


def test_the_sizes_of_the_released_models() -> None:
    big = load(RECIPES / "1b_4096k.yaml")
    small = load(RECIPES / "tnl_0.4b_16k.yaml")
    assert sum(plan.parameters(big.model, 64000).values()) / 1e6 == pytest.approx(1020.3, abs=0.1)
    assert sum(plan.parameters(small.model, 64000).values()) / 1e6 == pytest.approx(399.0, abs=0.1)


def test_the_horizon_of_the_paper_model() -> None:
    model = load(RECIPES / "1b_4096k.yaml").model
    assert [sum(column) for column in zip(*plan.horizon(model, 1 << 22), strict=True)] == [33, 16, 16, 15, 11]
    assert 8_000 < plan.sees(model, 1 << 22) < 10_000


@pytest.mark.parametrize("sp", [1, 2, 4])
def test_a_segment_fits_divides_and_is_the_longest(sp: int) -> None:
    recipe = load(RECIPES / "1b_4096k.yaml")
    for available in (40 * GIB, 48 * GIB, 80 * GIB, None):
        segment = plan.choose_segment(recipe, 64000, 1, sp, available)
        assert recipe.data.window % segment == 0 and segment % sp == 0
        if available is not None:
            needed = sum(plan.memory(recipe, 64000, 1, sp, segment).values())
            assert needed <= plan.HEADROOM * available
            longer = sum(plan.memory(recipe, 64000, 1, sp, 2 * segment).values())
            assert longer > plan.HEADROOM * available or segment == plan.LONGEST_SLICE * sp


def test_what_cannot_fit_is_said() -> None:
    with pytest.raises(ResourceError, match=r"no segment of the 4,194,304-token window fits 16\.0 GiB"):
        plan.choose_segment(load(RECIPES / "1b_4096k.yaml"), 64000, 1, 1, 16 * GIB)


def test_recomputation_keeps_less() -> None:
    kept = [
        plan.activation_bytes(load(RECIPES / "1b_4096k.yaml", [f"parallel.recompute={mode}", f"train.compile={on}"]))
        for mode, on in (("full", "true"), ("selective", "false"), ("none", "true"), ("none", "false"))
    ]
    assert kept == sorted(kept) and len(set(kept)) == 4


def test_a_plan_needs_neither_gpu_nor_torch() -> None:
    code = (
        "import sys; from lasptrain.cli import app; app(sys.argv[1:], standalone_mode=False); "
        "assert 'torch' not in sys.modules"
    )
    arguments = ["plan", str(RECIPES / "1b_4096k.yaml"), "--gpus", "2", "--memory", "80GiB"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    for expected in ("peak memory", "2 × h100", "WARNING"):
        assert expected in done.stdout
