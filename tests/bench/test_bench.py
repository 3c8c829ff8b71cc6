"""Measurements of `lasptrain bench` on small models, and their tables and files."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lasptrain.bench import ablation, layers, longest, mqar, optim, parity, plot, prefill, scale, sp
from lasptrain.bench.kernels import Row, floors, result
from lasptrain.bench.methods import NONE
from lasptrain.bench.steps import repeats_for
from lasptrain.cost.gpus import Rates
from lasptrain.errors import RecipeError, SetupError
from lasptrain.parallel import mesh as meshes
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.parallel.scan import Ring
from lasptrain.process import local_ranks
from lasptrain.recipe.loading import load
from tests.recipe.test_recipe import RECIPES
from tests.support.gloo import PATIENCE, spawn
from tests.support.tables import cells
from tests.support.trial import trial

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
    (table,) = result("GPU", rows, RATES, 16, 128, "bf16", "head").tables
    ours, other, _, broken, *_ = cells(table)
    assert ours[:3] == ["4,096", "lasptrain", "1.000"] and ours[6:9] == ["2.50", "1.000", "3.50"]
    assert other[6:9] == ["", "3.500", ""] and broken[4:9] == [""] * 5
    assert broken[2] == "4.000" and table.caption == "will not run"


@pytest.mark.slow
def test_shared_windows_are_compared_on_ranks_of_this_machine() -> None:
    small = ["model.dim=16", "model.layers=2", "model.heads=2", "model.mlp=32", "train.precision=fp32"]
    methods = ["none", "all_gather", "all_scan", "ulysses", "ring_attention"]
    *_, found = sp.measure(load(RECIPES / "quickstart.yaml", small), 2, [*methods, "megatron"], [32], [64])
    layered = found.facts["layers"]
    assert all(bool(row.sent) == (row.method != NONE) for row in found.rows)
    assert [row.ratio is None for row in found.rows] == [True] + [False] * 5
    assert [(row.method, row.tokens) for row in layered] == [(method, 32) for method in methods]
    assert [(row.method, row.tokens) for row in found.rows] == [(method, 64) for method in [*methods, "megatron"]]
    assert all(row.sent == row.formula for row in layered)
    assert layered[0].ratio == 1.0 and all(row.ratio for row in layered)
    assert all((row.sent > 0) == (row.method != NONE) for row in layered)
    assert [[row[1] for row in cells(table)] for table in found.tables] == [methods, [*methods, "megatron"]]


def test_results_are_written_with_their_facts_as_objects(tmp_path: Path) -> None:
    cell = longest.Cell(longest.Form("ddp", "none", "on"), 1024, 7, failed=True)
    longest.result("GPU", 2, [cell], late=False).write(tmp_path / "cells.json")
    written = json.loads((tmp_path / "cells.json").read_text())
    assert written == {"torch": torch.__version__, "device": "GPU", "ranks": 2, "cells": written["cells"]}
    assert written["cells"] == [cell._asdict() | {"form": {"kind": "ddp", "recompute": "none", "sharing": "on"}}]


def test_methods_are_compared_turn_by_turn() -> None:
    times = {NONE: [1.0, 2.0, 4.0, 3.0], "ring": [1.1, 2.2, 4.4, 9.0]}
    assert layers.compared(times, "ring") == pytest.approx(1.1) and layers.compared({"ring": [1.0]}, "ring") is None


def test_whole_steps_are_compared_turn_by_turn(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both get ever slower, and are interrupted now and then; what takes 1.5 times as long still does."""
    recipe, taken = load(RECIPES / "quickstart.yaml"), list[int]()

    def beside(step: int) -> float:
        taken.append(step)
        return float(step + 1)

    monkeypatch.setattr(sp, "_trainer", lambda *_: (beside, SimpleNamespace(close=taken.clear), None))
    updates = [1.5 * (step + 1) for step in range(100)]
    warmup, count = repeats_for(64)
    updates[warmup + count] *= 9
    assert sp._ratio(recipe, updates.__getitem__, 64, 0) == 1.5 and taken == []


def test_a_trial_that_fails_costs_only_itself_and_those_that_would_fail_too() -> None:
    given = [("fine", 1), ("short", 1), ("short", 2), ("fine", 2)]
    found = dict(local_ranks.trials(2, trial, given, skip_after=lambda failed, other: failed[0] == other[0]))
    lacking = local_ranks.TrialFailure("CUDA out of memory. Tried to allocate 2 GiB", memory=True)
    assert found == dict(zip(given, [1, lacking, lacking, 2], strict=True))


class Interrupting:
    """A rank is interrupted when this is read, as by Ctrl-C while it starts, which is for the group of its parent."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _interrupted, ()


def _interrupted() -> int:
    os.kill(os.getpid(), signal.SIGINT)
    return 7


def given_back(value: int) -> int:
    return value


def test_ctrl_c_while_ranks_start_is_heard_by_their_parent_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_ranks, "START", "spawn")
    assert local_ranks.on_ranks(1, given_back, Interrupting()) == 7


def test_methods_that_ran_out_of_memory_are_drawn_and_listed(tmp_path: Path) -> None:
    steps = [sp.Step("none", 1 << 15, 2e4, 1 << 34, 0, predicted=1.9e4), sp.Step("none", 1 << 16, 2e4, 1 << 35, 0)]
    steps += [
        sp.Step("megatron_left", 1 << 15, 1e4, 1 << 35, 9),
        sp.Step("megatron_left", 1 << 16, failure="no", oom=True),
    ]
    results = sp.result("GPU", 2, [], steps)
    plot.draw(results, tmp_path / "steps.png")
    assert (tmp_path / "steps.png").read_bytes()[16:20] == (1050).to_bytes(4, "big")
    (table,) = results.tables
    assert [row[1:5] for row in cells(table)] == [
        ["none", "20,000", "19,000", "1.000"],
        ["none", "20,000", "", "1.000"],
        ["megatron_left", "10,000", "", "2.000"],
        ["megatron_left", "OOM", "", ""],
    ]
    assert table.caption == "megatron_left, 65,536: no"


def test_updates_by_both_optimizers_are_timed(group: None) -> None:
    small = ["model.dim=16", "model.layers=2", "model.heads=2", "model.mlp=32", "train.precision=bf16"]
    found = optim.result(*optim._rank(load(RECIPES / "quickstart.yaml", small)))
    adamw, muon = found.rows
    matrices = 2 * (5 * 16 * 16 + 3 * 16 * 32)
    assert adamw.seconds > 0 and muon.seconds > 0
    assert muon.state == adamw.state - 4 * matrices - 4 * 2 * 8  # a number each less, and the step of each of 16
    assert muon.flops == 5 * 2 * (5 * 6 * 16**3 + 3 * (4 * 16 * 16 * 32 + 2 * 16**3)) and adamw.flops == 0
    told = optim.result(found.facts | {"step": 2.0}, [optim.Update("muon", 0.5, 1 << 30, 10**12)])
    ((table,), (beside,)) = found.tables, told.tables
    assert str(table.title).endswith("zero3 on 1 × CPU") and [row[2] for row in cells(table)] == ["", ""]
    assert cells(beside) == [["muon", "500.0", "25.00%", "1.00", "2.0"]]
    assert str(beside.caption).startswith("a step of 16,384 tokens takes 2.00 s")


@pytest.mark.slow
def test_texts_are_read_beside_the_forward_of_training() -> None:
    small = ["model.dim=16", "model.layers=2", "model.heads=2", "model.mlp=32", "train.precision=fp32"]
    with meshes.single_process_group():
        found = prefill.result(*prefill._rank(load(RECIPES / "quickstart.yaml", small), [100, 600], 64))
    assert [row.tokens for row in found.rows] == [100, 600] and not found.facts["fused"]
    assert found.facts["training"] > 0 and all(row.tokens_per_s > 0 and row.memory > 0 for row in found.rows)
    (table,) = found.tables
    assert "segments of 64 tokens" in str(table.title) and [row[0] for row in cells(table)] == ["100", "600"]


@pytest.mark.slow
def test_the_longest_window_of_each_form_is_the_longest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(longest, "SHARES", (1.3, 1.6))
    monkeypatch.setattr(longest, "LOWER", (0.6, 1.0))
    small = ["model.dim=16", "model.layers=2", "model.heads=2", "model.mlp=16", "train.loss_chunk=128"]
    recipe, capacity = load(RECIPES / "quickstart.yaml", small), 16 << 20
    chosen = [longest.Form("ddp", "none", sharing) for sharing in ("on", "streaming")]
    *_, found = longest.measure(recipe, 2, 4096, capacity, 600, chosen)
    on, streaming = found.rows
    assert on.failed and on.window % 2048 == 0 and on.memory > 0
    vocab = 4096
    fits = [longest.predicted(recipe, vocab, 2, sp, capacity) for sp in (1, 2)]
    assert fits[1] / 2 < on.window <= fits[1] and fits[1] == pytest.approx(2 * fits[0], rel=0.01)
    laid, window = longest.laid_out(recipe, chosen[0], vocab, 2, 1.0, 4096, capacity)
    assert window <= fits[1] < window + 2048 and laid.train.segment == window == laid.data.window
    assert (streaming.window, streaming.failed) == (4096, False)
    assert cells(found.tables[0]) == [["ddp", "none", "", f"{on.window:,}", "≥ 4,096"]]
    *_, found = longest.measure(recipe, 2, 4096, capacity, 0, chosen[1:])
    assert found.rows[0].window == 2048 and "no time was left" in str(found.tables[0].caption)


@pytest.mark.slow
def test_states_that_are_not_kept_are_made_again() -> None:
    changes = ["model.dim=16", "model.layers=2", "model.heads=2", "model.mlp=32", "train.precision=fp64"]
    assert all(one < 1e-12 for one in spawn(2, forgotten))
    found = ablation.measure(load(RECIPES / "quickstart.yaml", changes), 2, 16)
    assert [(row.kernel, row.kept) for row in found.rows] == [
        (k, s) for k in ("reference", "chunked") for s in (False, True)
    ]
    (table,) = found.tables
    assert [row[:2] for row in cells(table)] == [[row.kernel, "yes" if row.kept else "no"] for row in found.rows]


def forgotten(rank: int, world: int) -> float:
    """Distance of gradients from those of kept states; the exchanges must be twice the forward's."""
    found = {}
    for kind in (ShardedRecurrence, ablation.Recomputing):
        scan = Ring(dist.group.WORLD, torch.device("cpu"))
        x = torch.randn(3, 1, 8, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
        q, k, v = (part.requires_grad_() for part in x)
        attention = kind("chunked", scan)
        o, _ = attention.finish(attention.begin((k, v, torch.full((2,), -0.1)), None), q)
        found[kind] = torch.stack(torch.autograd.grad(o.square().sum(), (q, k, v))), scan.calls
    (want, once), (got, again) = found.values()
    assert (once, again) == (2, 3)
    return float((got - want).abs().max())


@pytest.mark.slow
def test_every_layout_trains_alike() -> None:
    small = ["model.dim=32", "model.layers=2", "model.heads=2", "model.mlp=48", "data.window=64"]
    exact = ["train.precision=fp32", "optim.warmup=2", "data.source=python:source"]
    changes = [*small, *exact, "data.tokenizer=tokenizers/python-4k.model"]
    *_, found = parity.measure(load(RECIPES / "tnl_0.4b_16k.yaml", changes), 2, 4)
    assert len(found.rows) == 11 and len({curve.layout for curve in found.rows}) == 11
    assert all(len(set(curve.losses)) == 4 for curve in found.rows)
    assert max(parity.differences(found.rows)) < 1e-4
    assert [row[0] for row in cells(found.tables[0])] == [curve.layout for curve in found.rows]
    assert "zero2, sp 2" in {curve.layout for curve in found.rows}


def test_layouts_are_chosen_by_kind() -> None:
    assert [str(layout) for layout in parity.layouts(2, ["zero3"])] == [
        "ddp, sp 1",
        "ddp, sp 1, 2 segments",
        "zero3, sp 1",
        "zero3, sp 2",
    ]
    with pytest.raises(RecipeError, match="--kind: found 'zero4'; expected one of ddp, zero1"):
        next(parity.measure(load(RECIPES / "tnl_0.4b_16k.yaml"), 2, 1, ["zero4"]))


def test_a_method_that_does_not_exist_is_named() -> None:
    with pytest.raises(RecipeError, match="--method: found 'rings'; expected one of none, ring"):
        next(sp.measure(load(RECIPES / "quickstart.yaml"), 2, ["rings"], [32], []))


def test_what_a_rank_refuses_is_said_once() -> None:
    with pytest.raises(SetupError, match=r"^ulysses: 3 heads do not go to 2 ranks; expected a multiple$"):
        changes = ["model.dim=24", "model.heads=3", "model.layers=1", "model.mlp=8"]
        list(sp.measure(load(RECIPES / "quickstart.yaml", changes), 2, ["ulysses"], [32], []))


@pytest.mark.slow
def test_ever_more_ranks_share_the_work(tmp_path: Path) -> None:
    small = ["model.dim=16", "model.layers=2", "model.heads=2", "model.mlp=32", "train.precision=fp32"]
    recipe = load(RECIPES / "quickstart.yaml", small)
    listed = scale.cases(recipe, [1, 2], [32], [64, 63], [(recipe, 128)])
    assert [row.method for _, row in listed if row.kind == "weak"] == ["none", "none", "ring", "all_gather", "all_scan"]
    *_, found = scale.measure(listed, 600)
    weak = [row for row in found.rows if row.kind == "weak"]
    assert {row.tokens // row.ranks for row in weak} == {32} and all(row.speed for row in weak)
    assert [scale.compared(row, weak) for row in weak if row.method == "none"] == [1, 1]
    one, odd, two, uneven = (row for row in found.rows if row.kind == "strong")
    assert one.speed and two.speed and odd.speed and uneven.failure == "2 ranks cannot share it"
    assert scale.compared(two, found.rows) == pytest.approx(two.speed / one.speed)
    named = [str(table.title).split(",")[0] for table in found.tables]
    assert named == ["weak scaling", "strong scaling", "long windows"]
    assert [table.caption for table in found.tables] == [None, "–: 2 ranks cannot share it", None]
    assert [row[4] == "–" for row in cells(found.tables[1])] == [False, False, False, True]
    plot.draw_scaling(found, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes()[16:20] == (1050).to_bytes(4, "big")


def test_what_time_does_not_allow_is_not_run() -> None:
    recipe = load(RECIPES / "quickstart.yaml")
    (found,) = scale.measure(scale.cases(recipe, [1], [32], [], []), -1)
    (row,) = found.rows
    assert row.seconds is None and row.failure == "no time left"


@pytest.mark.slow
def test_recall_is_learnt_alike_by_ranks_that_share_sequences() -> None:
    assert mqar.sizes(256, 16) == [(64, 4), (128, 8), (256, 16)] and mqar.sizes(96, 3) == [(96, 3)]
    small = ["model.dim=16", "model.heads=2", "model.key_dim=8", "model.value_dim=8", "model.mlp=16", "optim.warmup=2"]
    recipe = load(RECIPES / "mqar.yaml", [*small, "train.steps=12", "train.batch=4"])
    alone, shared = (mqar.measure(recipe, n, 128, 8, 40) for n in (1, 2))
    assert alone.facts["sizes"] == [[64, 4], [128, 8]] and [len(row) for _, row in alone.rows] == [2]
    assert shared.facts["losses"] == pytest.approx(alone.facts["losses"], rel=1e-4)
    assert alone.facts["losses"][0] == pytest.approx(math.log(64), rel=0.1)  # rows of the vocabulary
    assert [size[:2] for size in alone.facts["harder"]] == [[64, 8], [64, 16]]
    assert [[row[0] for row in cells(table)] for table in alone.tables] == [["12"], [""]]


def test_what_cannot_be_recalled_is_refused_before_training() -> None:
    recipe = load(RECIPES / "mqar.yaml")
    for arguments, message in (
        ((1, 64, 17, 8192), "--pairs: found 17 for --tokens 64; expected at most 16"),
        ((1, 64, 8, 17), "--pairs: found 8 for --vocab 17; expected at most 7"),
        ((8, 136, 8, 8192), "--tokens: found 136, learnt from sequences of 68 on, for 8 ranks"),
    ):
        with pytest.raises(RecipeError, match=message):
            mqar.measure(recipe, *arguments)


@pytest.mark.slow
def test_ranks_do_not_outlive_what_measures(tmp_path: Path) -> None:
    pids: list[int] = []
    command = [sys.executable, "-c", f"import tests.support.trial as t; t.run_forever({str(tmp_path)!r})"]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    try:
        deadline = time.monotonic() + PATIENCE
        while len(pids := [int(file.name) for file in tmp_path.iterdir()]) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(pids) == 2
    finally:
        process.terminate()
        process.wait()
    deadline = time.monotonic() + PATIENCE
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
