"""`lasptrain bench sp`: what it costs to share a window between ranks, beside the same tokens per rank without sharing.

On GPUs through NCCL, elsewhere a dry run through gloo. All methods run in one job, in turns, so that they meet the same
clocks; a time is the median over turns of the slowest rank.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
import torch.distributed as dist
from rich.table import Table

from lasptrain import ops, train
from lasptrain.bench.left_product import LeftProduct
from lasptrain.bench.megatron import Local, Megatron
from lasptrain.bench.ranks import device_name, on_ranks
from lasptrain.bench.ring_attention import RingAttention
from lasptrain.bench.softmax import softmax
from lasptrain.bench.steps import TURNS, alone, largest, shared, timed
from lasptrain.bench.ulysses import Ulysses
from lasptrain.errors import RecipeError, SetupError
from lasptrain.models.decay import slopes
from lasptrain.parallel import mesh
from lasptrain.parallel.attention import Attention
from lasptrain.parallel.scan import SCANS
from lasptrain.recipe import Model, Recipe

LEAST = 0.05  # seconds of a turn
NONE = "none"  # the method that shares nothing
# With this project's kernel; from the left, as the LASP paper ran them; and as softmax attention, another model.
RIVALS: dict[str, Callable[[str, dist.ProcessGroup], Ulysses | RingAttention]] = {
    "ulysses": Ulysses,
    "ulysses_left": lambda kernel, group: Ulysses(kernel, group, LeftProduct()),
    "ulysses_softmax": lambda kernel, group: Ulysses(kernel, group, softmax),
    "ring_attention": RingAttention,
    "ring_attention_left": lambda kernel, group: RingAttention(kernel, group, left=True),
}
# Those that split the model too; they have whole steps only.
SPLIT: dict[str, Local | None] = {"megatron": None, "megatron_left": LeftProduct(), "megatron_softmax": softmax}
METHODS = [NONE, *SCANS, *RIVALS, *SPLIT]


@dataclass(frozen=True)
class Layer:
    """Forward and backward of one attention layer."""

    method: str
    tokens: int  # per rank
    ms: float
    sent: int  # bytes, forward and backward, by the rank that sends most
    formula: int  # what that should be


@dataclass(frozen=True)
class Step:
    """Steps of the whole model."""

    method: str
    tokens: int  # per rank
    tokens_per_s: float  # per rank
    memory: int  # peak, bytes
    sent: int  # bytes per step for the sake of the shared window, by the rank that sends most


@dataclass(frozen=True)
class Results:
    """All of it, and where it was measured."""

    device: str
    ranks: int
    layers: list[Layer]
    steps: list[Step]


def measure(recipe: Recipe, ranks: int, methods: Sequence[str], tokens: Sequence[int], steps: Sequence[int]) -> Results:
    """Layers at each of `tokens` per rank, whole steps of the recipe's model at each of `steps` tokens per rank.

    Starts one process per rank on this machine. Raises RecipeError for a method that is none of METHODS.
    """
    for method in methods:
        if method not in METHODS:
            raise RecipeError(f"--method: found {method!r}; expected one of {', '.join(METHODS)}")
    device, layers, whole = on_ranks(ranks, _rank, recipe, methods, tokens, steps)
    return Results(device, ranks, [Layer(**row) for row in layers], [Step(**row) for row in whole])


def _rank(
    recipe: Recipe, methods: Sequence[str], tokens: Sequence[int], steps: Sequence[int]
) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]]]:
    with torch.autograd.set_multithreading_enabled(False):
        alone = [method for method in methods if method not in SPLIT]
        layers = [asdict(row) for length in tokens for row in _layers(recipe, alone, length, mesh.device())]
    return device_name(), layers, [asdict(_step(recipe, method, length)) for length in steps for method in methods]


def _layers(recipe: Recipe, methods: Sequence[str], tokens: int, device: torch.device) -> list[Layer]:
    model = recipe.model
    dtype = train.DTYPES[recipe.train.precision]
    kernel = ops.select(recipe.train.kernel, device)
    decays = slopes(model.decay, model.layers, model.heads, tokens)[-1]
    log_decay = None if model.decay == "none" else -torch.tensor(decays, device=device)
    generator = torch.Generator(device).manual_seed(dist.get_rank())
    q, k, v, do = (
        torch.randn(1, tokens, model.heads, dim, generator=generator, device=device, dtype=dtype)
        for dim in (model.K, model.K, model.V, model.V)
    )
    inputs = tuple(x.requires_grad_() for x in (q, k, v))
    group = dist.group.WORLD
    assert group is not None
    attentions = {name: _attention(name, kernel, group, device) for name in methods}

    def call(attention: Attention) -> None:
        o, _ = attention.finish(attention.begin(k, v, log_decay, None), q)
        torch.autograd.grad(o, inputs, do)

    calls = {name: lambda attention=attention: call(attention) for name, attention in attentions.items()}
    sent = {name: _sent(attention, calls[name]) for name, attention in attentions.items()}
    times = _times(calls, device)
    formula = bytes_sent(model, tokens, dtype.itemsize, dist.get_world_size())
    return [Layer(name, tokens, 1e3 * times[name], sent[name], formula[name]) for name in methods]


def _attention(method: str, kernel: str, group: dist.ProcessGroup, device: torch.device) -> Attention:
    if method in RIVALS:
        return cast(Attention, RIVALS[method](kernel, group))
    return Attention(kernel, None if method == NONE else SCANS[method](group, device))


def bytes_sent(model: Model, tokens: int, size: int, ranks: int) -> dict[str, int]:
    """What the busiest rank sends for a layer, forward and backward, for `tokens` tokens of `size` bytes a number.

    Along a chain all ranks but the last send one state in fp32, and a gathering rank sends state and decays once:
    whatever the window. Ulysses sends all of q, k, v and o but the part that stays, and as much backward. Ring
    Attention hands k and v to every other rank, again in the backward, and their gradients in fp32 all the way round.
    """
    state = 4 * model.heads * model.K * model.V
    chain = state * min(ranks - 1, 2)
    traded = 2 * size * tokens * model.heads * 2 * (model.K + model.V) * (ranks - 1) // ranks
    shifted = tokens * model.heads * (model.K + model.V) * (2 * size * (ranks - 1) + max(size, 4) * ranks)
    rivals = {name: traded if name.startswith("ulysses") else shifted for name in RIVALS}
    return {NONE: 0, "ring": chain, "all_scan": chain, "all_gather": 2 * (state + 4 * model.heads)} | rivals


def _sent(attention: Attention, call: Callable[[], None]) -> int:
    before = attention.scan.bytes_sent
    call()
    return int(largest(attention.scan.bytes_sent - before))


def _times(calls: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Seconds of each call: the median over TURNS, taken in turns, of the slowest rank."""
    counts = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        counts[name] = min(200, int(LEAST / largest(_elapsed(call, 2, device))) + 1)
    turns = [
        {name: largest(_elapsed(call, counts[name], device)) for name, call in calls.items()} for _ in range(TURNS)
    ]
    return {name: median(turn[name] for turn in turns) for name in calls}


def _elapsed(call: Callable[[], object], count: int, device: torch.device) -> float:
    """Seconds of one of `count` calls in a row."""
    dist.barrier()
    _wait(device)
    began = time.perf_counter()
    for _ in range(count):
        call()
    _wait(device)
    return (time.perf_counter() - began) / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _step(recipe: Recipe, method: str, tokens: int) -> Step:
    """One window over all ranks; with NONE a window for each of them."""
    update, close, traffic = _trainer(recipe, method, tokens, dist.get_world_size())
    before = traffic()
    seconds, memory = timed(update, mesh.device())
    sent = int(largest(traffic() - before)) // (TURNS + 3)
    close()
    return Step(method, tokens, tokens / seconds, memory, sent)


def _trainer(
    recipe: Recipe, method: str, tokens: int, ranks: int
) -> tuple[Callable[[int], float], Callable[[], None], Callable[[], int]]:
    """A model with its optimizer: what makes an update and returns its seconds, what ends it, and the bytes it sent."""
    if method in SPLIT:
        whole = shared(recipe, tokens, ranks, "ring", reset_at_documents=False)
        assert dist.group.WORLD is not None
        rival = Megatron(whole, dist.group.WORLD, SPLIT[method])
        return rival.step, rival.loader.close, lambda: rival.traffic.bytes_sent
    if method == NONE:
        job = train.build(alone(recipe, tokens, ranks))
    elif method in RIVALS:
        make = RIVALS[method]
        whole = shared(recipe, tokens, ranks, "ring", reset_at_documents=False)
        job = train.build(whole, lambda kernel, mesh: cast(Attention, make(kernel, mesh.sp_group)))
    else:
        job = train.build(shared(recipe, tokens, ranks, method))
    scan = job.model.blocks[0].mixer.attention.scan
    return lambda step: float(train.one_step(job, step)["step_time"] or 0), job.loader.close, lambda: scan.bytes_sent


def report(results: Results) -> list[Table]:
    """Tables with every method beside the one that shares nothing."""
    title = f"{results.ranks} × {results.device}"
    return [
        *([_layer_table(results.layers, title)] if results.layers else []),
        *([_step_table(results.steps, title)] if results.steps else []),
    ]


def _layer_table(rows: list[Layer], title: str) -> Table:
    table = Table(title=f"one attention layer, forward and backward, {title}")
    for column in ("tokens per rank", "method", "ms", "× none", "bytes sent", "formula"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=column == "method")
    alone = {row.tokens: row for row in rows if row.method == NONE}
    for row in rows:
        base = alone.get(row.tokens)
        table.add_row(
            f"{row.tokens:,}",
            row.method,
            f"{row.ms:.3f}",
            _ratio(row.ms, base.ms if base else None),
            f"{row.sent:,}",
            f"{row.formula:,}",
        )
    return table


def _step_table(rows: list[Step], title: str) -> Table:
    table = Table(title=f"whole steps, {title}")
    for column in ("tokens per rank", "method", "tokens/s per rank", "time × none", "peak GiB", "sent MB"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=column == "method")
    alone = {row.tokens: row for row in rows if row.method == NONE}
    for row in rows:
        base = alone.get(row.tokens)
        table.add_row(
            f"{row.tokens:,}",
            row.method,
            f"{row.tokens_per_s:,.0f}",
            _ratio(base.tokens_per_s if base else None, row.tokens_per_s),
            f"{row.memory / 2**30:.1f}",
            f"{row.sent / 1e6:,.1f}",
        )
    return table


def _ratio(value: float | None, base: float | None) -> str:
    return "" if value is None or base is None else f"{value / base:.3f}"


def write(file: Path, results: Results) -> None:
    """The same as JSON."""
    file.write_text(json.dumps(asdict(results), indent=1))


def plot(results: Results, file: Path) -> None:
    """Tokens per second and memory of whole steps by tokens per rank, as PNG; SetupError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SetupError("--plot needs matplotlib: pip install 'lasptrain[bench]'") from None
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    for method in dict.fromkeys(row.method for row in results.steps):
        rows = [row for row in results.steps if row.method == method]
        lengths = [row.tokens for row in rows]
        speed.plot(lengths, [row.tokens_per_s for row in rows], marker="o", label=method)
        memory.plot(lengths, [row.memory / 2**30 for row in rows], marker="o", label=method)
    for axes, label in ((speed, "tokens/s per rank"), (memory, "peak GiB")):
        axes.set(xscale="log", xlabel="tokens per rank", ylabel=label)
        axes.set_ylim(bottom=0)
    speed.legend()
    figure.suptitle(f"{results.ranks} × {results.device}")
    figure.savefig(file)
