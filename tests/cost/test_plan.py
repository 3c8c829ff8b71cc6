"""What a plan predicts, against numbers known otherwise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from typer.testing import CliRunner

from lasptrain import train
from lasptrain.bench.rates import measure
from lasptrain.cli.main import app
from lasptrain.cost import gpus, links, plan, rates
from lasptrain.errors import RecipeError, ResourceError
from lasptrain.recipe.loading import load
from lasptrain.training.job import Job

RECIPES = Path(__file__).parents[2] / "recipes"
GIB = 2**30


def test_the_sizes_of_the_released_models() -> None:
    big = load(RECIPES / "1b_4096k.yaml")
    small = load(RECIPES / "tnl_0.4b_16k.yaml")
    assert sum(plan.parameters(big.model, 64000).values()) / 1e6 == pytest.approx(1020.3, abs=0.1)
    assert sum(plan.parameters(small.model, 64000).values()) / 1e6 == pytest.approx(399.0, abs=0.1)


def test_the_horizon_of_the_paper_model() -> None:
    model = load(RECIPES / "1b_4096k.yaml").model
    assert [sum(column) for column in zip(*plan.memory_horizon(model, 1 << 22), strict=True)] == [33, 16, 16, 15, 11]
    hybrid = model.model_copy(update={"softmax": (0,), "softmax_heads": 2})
    assert plan.memory_horizon(hybrid, 1 << 22)[0] == [2] * len(plan.DISTANCES)
    assert 8_000 < plan.effective_context(model, 1 << 22) < 10_000


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
            assert longer > plan.HEADROOM * available or segment == plan.ENOUGH_SLICE * sp


@pytest.mark.parametrize(
    ("window", "memory", "segment"),
    [(1 << 16, 140, 1 << 16), (1 << 16, 64, 1 << 15), (1 << 17, 140, 1 << 16), (1 << 22, 140, 1 << 15)],
)
def test_a_window_is_one_segment_where_it_fits_and_few_where_that_is_faster(
    window: int, memory: int, segment: int
) -> None:
    recipe = load(RECIPES / "1b_4096k.yaml", [f"data.window={window}"])
    assert plan.choose_segment(recipe, 64000, 1, 1, memory * GIB) == segment


HYBRID = RECIPES / "gdn_hybrid_1b_256k.yaml"


def test_a_window_that_softmax_layers_see_all_of_streams() -> None:
    recipe = load(HYBRID, ["data.window=1048576"])
    each = 4 * 2 * 4 * 128  # layers, k and v, heads, channels
    segment = plan.choose_segment(recipe, 64000, 1, 1, 140 * GIB)
    assert segment == plan.ENOUGH_SLICE and plan.effective_context(recipe.model, 1 << 20) == float("inf")
    assert plan.prefix_bytes(recipe, 1, segment) == (2 * each << 20, 4 * each * ((1 << 20) - segment))
    sharded = recipe.replace(parallel={"prefix": "sharded"})
    assert plan.prefix_bytes(sharded, 4, segment) == tuple(size / 4 for size in plan.prefix_bytes(recipe, 4, segment))
    kept, away = (plan.memory(one, 64000, 1, 1, segment)["prefix"] for one in (recipe, sharded.replace(
        parallel={"prefix": "host"})))  # fmt: skip
    assert kept - sum(plan.prefix_bytes(recipe, 1, segment)) < away < kept / 4
    whole = load(HYBRID, ["data.window=32768"])
    assert plan.prefix_bytes(whole, 1, 32768) == (2 * each * 32768, 0)
    extra = [plan.flops_per_token(load(RECIPES / "hybrid_1b_4096k.yaml", [s]).model, 64000, 131072)
             for s in ("model.sliding_window=1", "model.sliding_window=1025", "model.sliding_window=null")]  # fmt: skip
    assert extra[1] - extra[0] == 3 * 4 * 4 * 2048 * 1020  # the first 1024 tokens see half as many
    assert extra[2] - extra[0] == 3 * 4 * 4 * 2048 * 65536


def test_a_prefix_lies_where_it_fits() -> None:
    recipe = load(HYBRID, ["data.window=4194304", "parallel.data_parallel=zero3"])
    gathered, host = (
        plan.memory(recipe.replace(parallel={"prefix": kind}), 64000, 1, 1, 8192) for kind in ("gathered", "host")
    )
    assert sum(gathered.values()) > 0.92 * 100 * GIB > sum(host.values())
    chosen = [plan.with_prefix(recipe, 64000, 1, sp, memory and memory * GIB).parallel.prefix
              for sp, memory in ((1, None), (1, 140), (1, 100), (4, 100), (4, 40))]  # fmt: skip
    assert chosen == ["gathered", "gathered", "host", "sharded", "host"]
    told = recipe.replace(parallel={"prefix": "host"})
    needed = plan.host_memory(told, 64000, 1, 1, plan.ENOUGH_SLICE)
    assert needed["prefix"] == sum(plan.prefix_bytes(told, 1, plan.ENOUGH_SLICE))
    assert needed["outputs"] == 3 * (2 * 2048 + 4 * 16) * (4194304 - plan.ENOUGH_SLICE)  # the last layer has none
    for room, outputs in ((None, "host"), (sum(needed.values()), "host"), (sum(needed.values()) - 1, "again")):
        kept = plan.with_prefix(told, 64000, 1, 1, 140 * GIB, room)
        assert (kept.parallel.prefix, kept.parallel.outputs) == ("host", outputs)
    with pytest.raises(
        ResourceError, match=r"data.window: the keys .* 4,194,304 .* host memory .* at most \d,\d{3},\d{3} tokens"
    ):
        plan.with_prefix(recipe, 64000, 1, 1, 100 * GIB, host=64 * GIB)
    with pytest.raises(
        ResourceError, match=r"no segment of the 4,194,304-.*; the longest window that would: [\d,]+ tokens"
    ):
        plan.choose_segment(recipe.replace(parallel={"prefix": "gathered"}), 64000, 1, 1, 100 * GIB)


def test_keys_are_sent_once_or_whenever_they_are_read() -> None:
    recipe = load(HYBRID, ["data.window=1048576"])
    own = 4 * 2 * 4 * 128 * (1 << 20) // 8  # numbers of a rank's slices
    sent = [plan.prefix_sent(recipe.replace(parallel={"prefix": kind}), 8, 31) for kind in plan.PREFIXES]
    assert sent == [own * (2 + 7 * 4), own * 16 * (2 * 2 + 7 * 4), sent[1]] and plan.prefix_sent(recipe, 1, 31) == 0


def test_ranks_of_a_softmax_layer_are_uneven_and_that_costs() -> None:
    recipe, h200 = load(HYBRID, ["data.window=1048576"]), gpus.PLANNED["h200"]
    assert plan.uneven(1, 1) == 1 and plan.uneven(8, 1) == 1.875 and plan.uneven(8, 32) < 1.03
    alone, one, many = (plan.seconds_per_token(recipe, 64000, n, h200, sp) for sp, n in ((1, 32), (8, 4), (8, 32)))
    assert alone < many < one
    # What the last of eight ranks sees in four segments, beside what all see.
    seen = [sum(range(start, start + 8)) for start in range(0, 256, 8)]
    last, mean = sum(seen[7::8]) / 4, sum(seen) / 32
    assert last / mean == pytest.approx(plan.uneven(8, 4), rel=0.01)
    segments = [plan.choose_segment(recipe, 64000, 1, sp, 140 * GIB) // sp for sp in (1, 8)]
    assert segments == [plan.ENOUGH_SLICE, plan.EFFICIENT_SLICE]


def test_what_cannot_fit_is_said() -> None:
    with pytest.raises(ResourceError, match=r"no segment of the 4,194,304-token window fits 16\.0 GiB"):
        plan.choose_segment(load(RECIPES / "1b_4096k.yaml"), 64000, 1, 1, 16 * GIB)


def test_recomputation_keeps_less() -> None:
    kept = [
        plan.activation_bytes(load(RECIPES / "1b_4096k.yaml", [f"parallel.recompute={mode}", f"train.compile={on}"]))
        for mode, on in (("full", "true"), ("selective", "false"), ("none", "true"), ("none", "false"))
    ]
    assert kept == sorted(kept) and len(set(kept)) == 4


def test_the_scan_is_the_cheapest_of_three_formulas() -> None:
    one = links.Link(latency=2.0, bandwidth=16.0)
    even = links.Links(one, one)
    assert links.scan_seconds(5, 64, even) == {"ring": 4 * 6.0, "all_gather": 3 * 2.0 + 4 * 4.0, "all_scan": 7 * 3.0}
    carried = links.scan_seconds(5, 64, even, carried=True)
    assert carried == {"ring": 5 * 6.0, "all_gather": 3 * 2.0 + 4 * 4.0, "all_scan": 7 * 3.0 + 6.0}
    assert set(links.scan_seconds(1, 64, even, carried=True).values()) == {0.0}
    machines = links.Links(one, links.Link(latency=10.0, bandwidth=4.0), node=2)  # links of five: in, out, in, out
    assert links.scan_seconds(5, 64, machines) == {
        "ring": 2 * 6.0 + 2 * 26.0,
        "all_gather": 3 * 10.0 + 4 * 16.0,
        "all_scan": 2 * 3.0 + 2 * 14.0 + 3 * 14.0,
    }


@pytest.mark.parametrize(
    ("sp", "segment", "micro_batch", "scan"),
    [
        (2, 1 << 22, 1, "ring"),  # one message either way, and the ring sends it in one direction only
        (2, 1 << 15, 1, "all_gather"),  # the ring would have to carry states back to its first rank
        (8, 1 << 22, 1, "all_gather"),
        (16, 1 << 22, 1, "ring"),  # small states: what is gathered all crosses the network, the ring does once
        (16, 1 << 22, 16, "all_scan"),  # large states: bandwidth decides, and 15 whole ones are gathered
    ],
)
def test_auto_chooses_the_scan(sp: int, segment: int, micro_batch: int, scan: str) -> None:
    recipe = load(RECIPES / "1b_4096k.yaml", [f"train.micro_batch={micro_batch}", "train.batch=16"])
    assert recipe.mesh.scan == "auto"
    assert links.with_scan(recipe, sp, segment).mesh.scan == scan
    fixed = load(RECIPES / "1b_4096k.yaml", ["mesh.scan=all_scan"])
    assert links.with_scan(fixed, sp, segment) == fixed


def test_sharing_a_window_costs_what_travels_in_the_open() -> None:
    recipe = load(RECIPES / "1b_4096k.yaml")
    slow = links.Links(links.Link(0.0, 1e9), links.Link(0.0, 1e9))
    rates = gpus.PLANNED["h200"]
    short, long = (links.step_seconds(recipe, 64000, 2, tokens, rates, slow) for tokens in (8, 1 << 19))
    alone, shared = short["none"], short["ring"]
    state, layers = plan.state_bytes(recipe.model), 16
    assert alone is not None and shared is not None
    hidden = 8 * (2 * 2048 * 4096 / rates.products + 4 * 4096 / (0.8 * rates.copies))
    assert shared - alone == pytest.approx(2 * state / 1e9 - layers * hidden)  # LRPE's layer has a larger state
    assert long["ring"] == long["none"]  # behind 524,288 tokens nothing is seen of it
    traded = 2 * 2 * 8 * 2048 * 2 * 1  # bytes of q, k, v and o of which half goes to the other rank, both ways
    assert short["ulysses"] == pytest.approx(alone + layers * 2 * traded / 1e9 / 2)
    count = sum(plan.parameters(recipe.model, 64000).values())
    sent = alone - 8 * plan.seconds_per_token(recipe, 64000, 1, rates)
    assert sent == pytest.approx((4 + 2 + 2) * count / 2 / 1e9)  # gradients in fp32, parameters twice in bf16
    replicated = load(RECIPES / "1b_4096k.yaml", ["parallel.data_parallel=ddp"])
    assert links.weights_sent(replicated, 64000, 4) == 2 * 4 * count * 3 / 4
    assert links.step_seconds(recipe, 64000, 32, 8, rates)["megatron"] is None  # 16 heads


def test_more_segments_expose_more_exchanges() -> None:
    recipe = load(RECIPES / "1b_4096k.yaml")
    slow, h200 = links.Links(links.Link(1e-3, 1e9), links.Link(1e-3, 1e9)), gpus.PLANNED["h200"]
    one, four = (links.step_seconds(recipe, 64000, 2, 1 << 16, h200, slow, n) for n in (1, 4))
    alone = [plan.seconds_per_token(recipe, 64000, n, h200) for n in (1, 4)]
    assert one["none"] and four["none"] and one["ring"] and four["ring"]
    assert four["none"] - one["none"] == pytest.approx((1 << 16) * (alone[1] - alone[0]))
    assert four["ring"] - four["none"] > 2 * (one["ring"] - one["none"])
    assert one["megatron"] == four["megatron"]


def test_measured_rates_are_kept_in_a_file_and_predicted_from(tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    measured = measure(2)
    rates.write(file, measured)
    assert rates.read(file) == measured
    assert measured.hop and measured.gather and measured.links.slowest(2) == measured.gather
    assert min(*measured.hop, *measured.gather, *measured.rates) > 0
    assert measured.links.between == links.ASSUMED.between
    known = [row[2] for row in rates.provenance(measured.rates, measured.links, measured)]
    assert known == ["measured, CPU"] * 5 + ["assumed"]
    for gpu, told in (("h200", "measured, NVIDIA H200"), ("h100", "assumed"), ("a100", "assumed")):
        planned = [row[2] for row in rates.provenance(gpus.PLANNED[gpu], links.ASSUMED, None)]
        assert planned == [told] * 3 + ["assumed", "as a hop", "assumed"]
    for text, told in (("{}", "holds no rates"), ("no", "holds no rates")):
        file.write_text(text)
        with pytest.raises(RecipeError, match=f"--rates: .*{told}; expected a file of plan --measure"):
            rates.read(file)


def test_what_each_kind_of_data_parallelism_keeps_on_a_rank() -> None:
    count, largest = sum(plan.parameters(load(RECIPES / "1b_4096k.yaml").model, 64000).values()), 64000 * 2048
    whole, half, shard, node = 4 * count, 2 * count, 4 * count // 16, 4 * count // 8
    expected = {  # dp 2 × sp 8: parameters, gradients, optimizer
        "ddp": (whole + half, whole, 2 * whole),
        "zero1": (whole + half, whole, 8 * largest),  # a sixteenth would be half of the embedding, which is not split
        "zero2": (shard + half, whole + shard, 8 * count // 16),
        "zero3": (shard + half, whole + shard, 8 * count // 16),
        "hsdp": (node + half, whole + node, 8 * count // 8),
    }
    for kind, sizes in expected.items():
        recipe = load(RECIPES / "1b_4096k.yaml", [f"parallel.data_parallel={kind}", "parallel.reduce=step"])
        found = plan.fixed_bytes(recipe, 64000, 2, 8)
        assert [found[part] for part in ("parameters", "gradients", "optimizer")] == pytest.approx(sizes, abs=8), kind
        tight = plan.with_reduction(load(RECIPES / "1b_4096k.yaml", [f"parallel.data_parallel={kind}"]), 64000, 2, 8, 1)
        assert tight.parallel.reduce == ("step" if kind in ("ddp", "zero1") else "segment")


def test_muon_keeps_one_number_less_of_each_matrix() -> None:
    parts = plan.parameters(load(RECIPES / "1b_4096k.yaml").model, 64000)
    count, matrices, largest = sum(parts.values()), parts["mixer"] + parts["mlp"], 64000 * 2048
    states = {"ddp": 2 * count - matrices, "zero3": (2 * count - matrices) // 16, "zero1": 2 * largest}
    for kind, numbers in states.items():
        recipe = load(RECIPES / "1b_4096k.yaml", [f"parallel.data_parallel={kind}", "optim.kind=muon"])
        assert plan.fixed_bytes(recipe, 64000, 2, 8)["optimizer"] == 4 * numbers
    two = load(RECIPES / "1b_4096k.yaml", ["parallel.data_parallel=zero1", "optim.kind=muon"])
    assert plan.fixed_bytes(two, 64000, 2, 1)["optimizer"] == 4 * (count // 2 + count - matrices)


def test_what_waits_in_host_memory() -> None:
    recipe = load(RECIPES / "1b_4096k.yaml", ["parallel.recompute=offload", "parallel.data_parallel=zero3"])
    count, state = sum(plan.parameters(recipe.model, 64000).values()), plan.state_bytes(recipe.model)
    found = plan.host_memory(recipe, 64000, 1, 2, 65536)
    assert found["states"] == 63 * state
    assert found["checkpoint"] == pytest.approx(12 * count / 2, abs=8)
    assert found["activations"] == 32768 * plan.activation_bytes(load(RECIPES / "1b_4096k.yaml"))
    plain = plan.host_memory(load(RECIPES / "1b_4096k.yaml", ["parallel.data_parallel=ddp"]), 64000, 2, 1, 1 << 22)
    assert plain == {"states": 0, "activations": 0, "checkpoint": 12 * count}


def test_a_card_is_known_by_its_whole_name() -> None:
    """What the data sheet promises, and what is sustained, are two numbers of one table."""
    promised = {
        "NVIDIA H200": 989e12,
        "NVIDIA H200 NVL": 835e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-40GB": 312e12,
        "NVIDIA L40S": 362e12,
    }
    strangers = ("NVIDIA RTX A1000", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A10G", "NVIDIA H200 Z", "CPU", "")
    assert {name: gpus.of(name).peak for name in promised} == promised
    assert [gpus.of(name) for name in strangers] == [gpus.Card()] * len(strangers)
    assert gpus.of("NVIDIA H200").sustained == gpus.PLANNED["h200"]
    assert gpus.of("NVIDIA H100 PCIe").sustained is None  # two thirds of the other H100's memory bandwidth
    for card in gpus.CARDS.values():
        assert card.sustained is None or (card.peak and 0.6 < card.sustained.products / card.peak < 0.9)


def test_who_is_short_of_memory_is_told_what_takes_it_and_what_would_help() -> None:
    recipe = load(RECIPES / "1b_4096k.yaml", ["parallel.data_parallel=ddp"])
    told = plan.oom_advice(recipe, 64000, 1, 2, 65536)
    parts = plan.memory(recipe, 64000, 1, 2, 65536)
    assert told.startswith(f"expected on each rank: activations {parts['activations'] / 2**30:.1f} GiB, optimizer ")
    for key in ("train.segment below 65536", "recompute: full", "zero3 instead of ddp", "loss_chunk below 8192"):
        assert key in told
    job = SimpleNamespace(
        stage=SimpleNamespace(span=recipe.longest),
        dataset=SimpleNamespace(vocab_size=64000),
        mesh=SimpleNamespace(length={"dp": 1, "sp": 2}.__getitem__),
        loader=SimpleNamespace(segment=65536),
        device=torch.device("cpu"),
    )
    refusal = train.out_of_memory(
        cast(Job, job), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
    )
    assert isinstance(refusal, ResourceError)
    assert "GiB: CUDA out of memory. Tried to allocate 2 GiB. expected on" in str(refusal)
    assert str(refusal).endswith(told)
    alone = plan.oom_advice(load(RECIPES / "quickstart.yaml", ["train.loss_chunk=512"]), 4096, 1, 1, 512)
    assert alone.endswith("less would need: parallel.recompute: full, more GPUs")


def test_a_plan_needs_neither_gpu_nor_torch() -> None:
    code = (
        "import sys; from lasptrain.cli.main import app; app(sys.argv[1:], standalone_mode=False); "
        "assert 'torch' not in sys.modules"
    )
    arguments = ["plan", str(RECIPES / "1b_4096k.yaml"), "--gpus", "2", "--memory", "80GiB"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    for expected in ("peak memory", "2 × h100", "WARNING"):
        assert expected in done.stdout


def test_what_is_small_is_told_too() -> None:
    given = ("data.window=1024", "train.steps=5", "model.vocab=4096", "train.loss_chunk=64")
    said = CliRunner().invoke(
        app, ["plan", str(RECIPES / "quickstart.yaml"), *(x for s in given for x in ("--set", s))]
    )
    rows = dict(line.strip("│ \n").split("│", 1) for line in said.output.splitlines() if line.count("│") == 3)
    told = {key.strip(): value.strip() for key, value in rows.items()}
    assert told["parameters"] == "0.01 GiB" and told["states"] == "0.53 MiB"
    assert told["peak memory"].endswith(" of 79.0 GiB on each") and not told["peak memory"].startswith("0.0")
    assert re.search(r", 0\.0*[1-9]\d? s per step", told["speed"])
    assert re.search(r" tokens, 0\.0*[1-9]\d? seconds$", told["training"])
