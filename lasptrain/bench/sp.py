"""`lasptrain bench sp`: the cost of sharing a window between ranks, beside the same tokens per rank without sharing.

On GPUs through NCCL, elsewhere a dry run through gloo. Layers are timed in one job, and then whole steps in one; a time
is the median of the slowest rank. Methods take turns with the unshared one, so that both see the same clocks; steps
only where two models fit. CUDA graphs come last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple, cast

import torch.distributed as dist
from rich.table import Table

from lasptrain.bench import layers, methods
from lasptrain.bench.layers import Layer
from lasptrain.bench.methods import NONE, RIVALS, SPLIT
from lasptrain.bench.result import Column, Result, table
from lasptrain.bench.rivals.megatron import Megatron
from lasptrain.bench.rivals.traffic import Traffic
from lasptrain.bench.steps import repeats_for, reset, shared, timed, unshared, update, vocabulary
from lasptrain.cost import gpus, links, plan
from lasptrain.cost.rates import MeasuredHardware
from lasptrain.data.loader import SliceLoader
from lasptrain.errors import ResourceError
from lasptrain.parallel import mesh
from lasptrain.parallel.collectives import all_reduce_max, all_reduce_min
from lasptrain.parallel.mesh import device_name
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.parallel.scan import Scan
from lasptrain.process.local_ranks import SILENCE, TrialFailure, trials
from lasptrain.recipe.schema import Recipe
from lasptrain.training.job import build

ROOM = 1.25  # free memory for a second model, as a multiple of its own


class Step(NamedTuple):
    """Steps of the whole model, or the reason why there are none."""

    method: str
    tokens: int  # per rank
    tokens_per_s: float | None = None  # per rank
    memory: int | None = None  # peak, bytes
    sent: int | None = None  # bytes per step to share the window, by the rank that sends most
    predicted: float | None = None  # tokens per second per rank, by `links.step_seconds`
    ratio: float | None = None  # median over turns of its time ÷ that of NONE
    failure: str | None = None
    oom: bool = False  # it ran out of memory


def measure(
    recipe: Recipe,
    ranks: int,
    names: Sequence[str],
    tokens: Sequence[int],
    steps: Sequence[int],
    measured: MeasuredHardware | None = None,
    limit: float = SILENCE,
) -> Iterator[Result[Step]]:
    """Time layers at each of `tokens` per rank, and whole steps of the recipe's model at each of `steps` per rank.

    Steps have a prediction beside them, from `measured`, or else from the known rates of such GPUs. A method whose
    steps take more than `limit` seconds at some length is given up there.

    Starts processes, one per rank, on this machine; yields all results so far after each measurement. Raises
    RecipeError for a method that does not exist.
    """
    methods.check(names)
    device, timed_layers, timed_steps = "", list[Layer](), list[Step]()
    if tokens:
        device, timed_layers = layers.measure(recipe, ranks, names, tokens)
        yield result(device, ranks, timed_layers, [])
    given = [(recipe, name, length) for length in steps for name in names]
    step_of = partial(_step, compare=NONE in names)
    for (_, name, length), row in trials(ranks, step_of, given, skip_after=_hopeless, silence=limit):
        if isinstance(row, TrialFailure):
            step = Step(name, length, failure=row.reason, oom=row.memory)
        else:
            device, vocab, values = row
            predicted = _predicted(recipe, vocab, ranks, name, length, device, measured)
            step = Step(*values)._replace(predicted=predicted)
        timed_steps = [*timed_steps, step]
        yield result(device, ranks, timed_layers, timed_steps)
    order = {(name, length): place for place, (_, name, length) in enumerate(given)}
    timed_steps.sort(key=lambda row: order[row.method, row.tokens])
    yield result(device, ranks, layers.with_replays(recipe, ranks, timed_layers), timed_steps)


def _hopeless(failed: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return bool(failed[1] == other[1] and failed[2] <= other[2])


def _predicted(
    recipe: Recipe, vocab: int, ranks: int, method: str, tokens: int, device: str, measured: MeasuredHardware | None
) -> float | None:
    """Predicted tokens per second and rank; None for unknown methods and devices."""
    rates = measured.rates if measured else gpus.of(device).sustained
    if rates is None:
        return None
    whole = shared(recipe, tokens, ranks, "ring")
    segments = tokens * ranks // plan.choose_segment(whole, vocab, 1, ranks, rates.memory)
    between = measured.links if measured else links.ASSUMED
    seconds = links.step_seconds(whole, vocab, ranks, tokens, rates, between, segments)
    found = seconds.get(method)
    return None if found is None else tokens / found


def _step(recipe: Recipe, method: str, tokens: int, *, compare: bool) -> tuple[str, int, Step]:
    """Time steps with one window over all ranks, or with NONE a window each; return device, vocabulary and row."""
    reset(mesh.device())
    step, loader, traffic = _trainer(recipe, method, tokens, dist.get_world_size())
    before = traffic.bytes_sent
    seconds, memory = timed(step, mesh.device(), repeats_for(tokens))
    sent = int(all_reduce_max(traffic.bytes_sent - before)) // sum(repeats_for(tokens))
    ratio = _ratio(recipe, step, tokens, memory) if compare and method != NONE else None
    loader.close()
    return device_name(), vocabulary(recipe), Step(method, tokens, tokens / seconds, memory, sent, ratio=ratio)


def _ratio(recipe: Recipe, run: Callable[[int], float], tokens: int, memory: int) -> float | None:
    """Median of an update's time ÷ that of one with a window per rank; None without room for a second `memory`."""
    device = mesh.device()
    if device.type == "cuda" and all_reduce_min(mesh.free_memory(device)) < ROOM * memory:
        return None
    beside, loader, _ = _trainer(recipe, NONE, tokens, dist.get_world_size())
    warmup, count = repeats_for(tokens)
    for step in range(warmup):
        beside(step)
    steps = range(warmup + count, warmup + 3 * count)
    ratios = [all_reduce_max(run(step)) / all_reduce_max(beside(step)) for step in steps]
    loader.close()
    return median(ratios)


def _trainer(
    recipe: Recipe, method: str, tokens: int, ranks: int
) -> tuple[Callable[[int], float], SliceLoader, Scan | Traffic]:
    """Build a model with its optimizer; return its update (seconds), its data, and the counter of bytes sent."""
    if method in SPLIT:
        whole = _in_one_segment(recipe, method, tokens, ranks)
        rival = Megatron(whole, mesh.world(), SPLIT[method])
        return rival.step, rival.loader, rival.traffic
    if method == NONE:
        job = build(unshared(recipe, tokens, ranks))
    elif method in RIVALS:
        make, whole = RIVALS[method], _in_one_segment(recipe, method, tokens, ranks)
        job = build(whole, lambda kernel, mesh: cast(ShardedRecurrence, make(kernel, mesh.sp_group)))
    else:
        job = build(shared(recipe, tokens, ranks, method))
    return partial(update, job), job.loader, job.model.blocks[0].mixer.attention.scan


def _in_one_segment(recipe: Recipe, method: str, tokens: int, ranks: int) -> Recipe:
    """Return the recipe with the window in one segment, all that rivals can do, even for one that does not fit.

    Raises ResourceError, on all ranks alike, where it is certain not to fit.
    """
    whole = shared(recipe, tokens, ranks, "ring", reset_at_documents=False)
    whole = whole.replace(train={"segment": tokens * ranks})
    device = mesh.device()
    if device.type == "cuda":
        available = all_reduce_min(mesh.free_memory(device))
        needed = plan.memory(whole, vocabulary(recipe), 1, ranks, tokens * ranks)
        least = needed["activations"] + needed["one block"]
        if least > available:
            raise ResourceError(f"activations alone would take {least / 2**30:.0f} of {available / 2**30:.0f} GiB")
    return whole


def result(device: str, ranks: int, layers: list[Layer], steps: list[Step]) -> Result[Step]:
    """Return a result with tables of every method beside the one that shares nothing."""
    title = f"{ranks} × {device}"
    tables = [*([_layer_table(layers, title)] if layers else []), *([_step_table(steps, title)] if steps else [])]
    return Result(steps, tables, {"device": device, "ranks": ranks, "layers": layers}, "steps")


def _layer_table(rows: list[Layer], title: str) -> Table:
    columns: list[Column[Layer]] = [
        ("tokens per rank", lambda row: row.tokens, ","),
        ("method", lambda row: row.method, "<"),
        ("ms", lambda row: row.ms, ".3f"),
        ("× none", lambda row: row.ratio, ".3f"),
        ("host ms", lambda row: row.host_ms, ".3f"),
        ("replayed ms", lambda row: row.replayed_ms, ".3f"),
        ("× none", lambda row: row.replayed_ratio, ".3f"),
        ("bytes sent", lambda row: row.sent, ","),
        ("formula", lambda row: row.formula, ","),
    ]
    failures = dict.fromkeys(row.failure for row in rows if row.failure)
    return table(f"one attention layer, forward and backward, {title}", rows, columns, "\n".join(failures))


def _step_table(rows: list[Step], title: str) -> Table:
    unshared_speeds = {row.tokens: row.tokens_per_s for row in rows if row.method == NONE}

    def ratio(row: Step) -> float | None:
        speed, base = row.tokens_per_s, unshared_speeds.get(row.tokens)
        return row.ratio or (base / speed if base and speed else None)

    columns: list[Column[Step]] = [
        ("tokens per rank", lambda row: row.tokens, ","),
        ("method", lambda row: row.method, "<"),
        ("tokens/s per rank", lambda row: row.tokens_per_s or ("OOM" if row.oom else "failed"), ",.0f"),
        ("predicted", lambda row: row.predicted, ",.0f"),
        ("time × none", ratio, ".3f"),
        ("peak GiB", lambda row: row.memory and row.memory / 2**30, ".1f"),
        ("sent MB", lambda row: None if row.sent is None else row.sent / 1e6, ",.1f"),
    ]
    failures = {row.method: f"{row.method}, {row.tokens:,}: {row.failure}" for row in reversed(rows) if row.failure}
    return table(f"whole steps, {title}", rows, columns, "\n".join(failures.values()))
