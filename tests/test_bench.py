"""What `bench kernels` makes of its measurements."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from lasptrain.bench import ablation, parity, prefill, sp
from lasptrain.bench.kernels import Row, floors, report
from lasptrain.errors import RecipeError, SetupError
from lasptrain.parallel import mesh as meshes
from lasptrain.parallel.attention import Attention
from lasptrain.parallel.scan import Ring
from lasptrain.plan import Rates
from lasptrain.recipe import load
from tests.gloo import spawn
from tests.test_recipe import RECIPES

RATES = Rates(products=792e12, copies=4.305e12, memory=0)


def test_the_floors_are_those_of_the_counted_bytes_and_products() -> None:
    memory, product = floors(131_072, 16, 128, "bf16", RATES)
    found = [memory.forward, memory.both, product.forward, product.both]
    assert found == pytest.approx([0.499, 1.372, 0.260, 0.911], abs=1e-3)


def test_the_report_compares_with_the_fastest_and_says_what_failed() -> None:
    rows = [
        Row("lasptrain", 4096, 1.0, 2.0, 0.5, 1.0),
        Row("other", 4096, 3.0, 9.0, 1.5, 3.5),
        Row("another", 4096, 3.0, 5.0, 1.5, 4.0),
        Row("broken", 4096, 4.0, None, None, failure="will not run"),
    ]
    console = Console(width=150, record=True)
    console.print(report(rows, RATES, 16, 128, "bf16", "head"))
    text = console.export_text()
    ours, *_, broken = (line for line in text.splitlines() if "lasptrain" in line or "broken" in line)
    assert "2.50" in ours and "3.50" in ours and "4.000" in broken and "will not run" in text


def test_shared_windows_are_compared_on_ranks_of_this_machine() -> None:
    small = ["model.dim=16", "model.layers=2", "model.heads=2", "model.mlp=32", "train.precision=fp32"]
    methods = ["none", "all_gather", "all_scan", "ulysses", "ring_attention"]
    found = sp.measure(load(RECIPES / "quickstart.yaml", small), 2, [*methods, "megatron"], [32], [64])
    assert all((row.sent > 0) == (row.method != sp.NONE) for row in found.steps)
    assert [(row.method, row.tokens) for row in found.layers] == [(method, 32) for method in methods]
    assert [(row.method, row.tokens) for row in found.steps] == [(method, 64) for method in [*methods, "megatron"]]
    assert all(row.sent == row.formula for row in found.layers)
    assert all((row.sent > 0) == (row.method != sp.NONE) for row in found.layers)
    console = Console(width=120, record=True)
    console.print(*sp.report(found))
    assert console.export_text().count("all_gather") == 2


def test_texts_are_read_beside_the_forward_of_training() -> None:
    small = ["model.dim=16", "model.layers=2", "model.heads=2", "model.mlp=32", "train.precision=fp32"]
    with meshes.alone():
        device, fused, parameters, rate, reads = prefill._rank(load(RECIPES / "quickstart.yaml", small), [100, 600], 64)
    found = prefill.Results(device, 1, 64, fused, parameters, rate, [prefill.Read(*row) for row in reads])
    assert [row.tokens for row in found.reads] == [100, 600] and not found.fused
    assert found.training > 0 and all(row.tokens_per_s > 0 and row.memory > 0 for row in found.reads)
    console = Console(width=120, record=True)
    console.print(prefill.report(found))
    assert "segments of 64 tokens" in console.export_text()


def test_states_that_are_not_kept_are_made_again() -> None:
    changes = ["model.dim=16", "model.layers=2", "model.heads=2", "model.mlp=32", "train.precision=fp64"]
    assert all(one < 1e-12 for one in spawn(2, forgotten))
    device, rows = ablation.measure(load(RECIPES / "quickstart.yaml", changes), 2, 16)
    assert [(row.kernel, row.kept) for row in rows] == [(k, s) for k in ("reference", "chunked") for s in (False, True)]
    console = Console(width=120, record=True)
    console.print(ablation.report(device, 2, 16, rows))
    assert console.export_text().count("chunked") == 2


def forgotten(rank: int, world: int) -> float:
    """How far gradients are from those of kept states; the exchanges must be twice the forward's."""
    found = {}
    for kind in (Attention, ablation.Forgetful):
        scan = Ring(dist.group.WORLD, torch.device("cpu"))
        x = torch.randn(3, 1, 8, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
        q, k, v = (part.requires_grad_() for part in x)
        attention = kind("chunked", scan)
        o, _ = attention.finish(attention.begin(k, v, torch.full((2,), -0.1), None), q)
        found[kind] = torch.stack(torch.autograd.grad(o.square().sum(), (q, k, v))), scan.calls
    (want, once), (got, again) = found.values()
    assert (once, again) == (2, 3)
    return float((got - want).abs().max())


def test_every_layout_trains_alike() -> None:
    small = ["model.dim=32", "model.layers=2", "model.heads=2", "model.mlp=48", "data.window=64", "train.batch=2"]
    exact = ["train.precision=fp32", "optim.warmup=2", "data.source=python:source"]
    changes = [*small, *exact, "data.tokenizer=tokenizers/python-4k.model"]
    found = parity.measure(load(RECIPES / "tnl_0.4b_16k.yaml", changes), 2, 4)
    assert len(found.curves) == 11 and len({curve.layout for curve in found.curves}) == 11
    assert all(len(set(curve.losses)) == 4 for curve in found.curves)
    assert max(parity.differences(found.curves)) < 1e-4
    console = Console(width=120, record=True)
    console.print(parity.report(found))
    assert "zero2, sp 2" in console.export_text()


def test_a_method_that_does_not_exist_is_named() -> None:
    with pytest.raises(RecipeError, match="--method: found 'rings'; expected one of none, ring"):
        sp.measure(load(RECIPES / "quickstart.yaml"), 2, ["rings"], [32], [])


def test_what_a_rank_refuses_is_said_once() -> None:
    with pytest.raises(SetupError, match=r"^ulysses: 3 heads do not go to 2 ranks; expected a multiple$"):
        changes = ["model.dim=24", "model.heads=3", "model.layers=1", "model.mlp=8"]
        sp.measure(load(RECIPES / "quickstart.yaml", changes), 2, ["ulysses"], [32], [])
