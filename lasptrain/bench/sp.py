"""`lasptrain bench sp`: the cost of sharing a window between ranks, beside the same tokens per rank without sharing.

On GPUs through NCCL, elsewhere a dry run through gloo. Layers are timed in one job, and then whole steps in one; a time
is the median of the slowest rank. Methods take turns with the unshared one, so that both see the same clocks; steps
only where two models fit. CUDA graphs come last.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
import torch.distributed as dist
from rich.table import Table

from data_tools.dataset import open_dataset
from lasptrain import train
from lasptrain.bench import layers, methods
from lasptrain.bench.layers import Layer
from lasptrain.bench.megatron import Megatron
from lasptrain.bench.methods import METHODS, NONE, RIVALS, SPLIT
from lasptrain.bench.steps import reset, shared, timed, turns, unshared
from lasptrain.console.tables import number
from lasptrain.cost import gpus, links, plan
from lasptrain.cost.rates import MeasuredHardware
from lasptrain.errors import ResourceError
from lasptrain.parallel import mesh
from lasptrain.parallel.collectives import all_reduce_max, all_reduce_min
from lasptrain.parallel.mesh import device_name
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.process.local_ranks import SILENCE, Failure, trials
from lasptrain.recipe.resolve import resolve_vocabulary
from lasptrain.recipe.schema import Recipe
from lasptrain.training.job import build

ROOM = 1.25  # free memory for a second model, as a multiple of its own

__all__ = ["METHODS", "NONE", "Layer", "Results", "Step", "measure", "report", "write"]


@dataclass(frozen=True)
class Step:
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


@dataclass(frozen=True)
class Results:
    """All layers and steps, and the device they were measured on."""

    device: str
    ranks: int
    layers: list[Layer]
    steps: list[Step]


def measure(
    recipe: Recipe,
    ranks: int,
    names: Sequence[str],
    tokens: Sequence[int],
    steps: Sequence[int],
    known: MeasuredHardware | None = None,
    limit: float = SILENCE,
) -> Iterator[Results]:
    """Time layers at each of `tokens` per rank, and whole steps of the recipe's model at each of `steps` per rank.

    Steps have a prediction beside them, from `known`, or else from the known rates of such GPUs. A method whose steps
    take more than `limit` seconds at some length is given up there.

    Starts processes, one per rank, on this machine; yields all results so far after each measurement. Raises
    RecipeError for a method that does not exist.
    """
    methods.check(names)
    found = Results("", ranks, [], [])
    if tokens:
        device, rows = layers.measure(recipe, ranks, names, tokens)
        yield (found := replace(found, device=device, layers=rows))
    given = [(recipe, name, length) for length in steps for name in names]
    step_of = partial(_step, compare=NONE in names)
    for (_, name, length), row in trials(ranks, step_of, given, skip_after=_hopeless, silence=limit):
        if isinstance(row, Failure):
            step = Step(name, length, failure=row.reason, oom=row.memory)
        else:
            device, vocab, values = row
            found = replace(found, device=device)
            step = replace(Step(**values), predicted=_predicted(recipe, vocab, ranks, name, length, device, known))
        yield (found := replace(found, steps=[*found.steps, step]))
    order = {(name, length): place for place, (_, name, length) in enumerate(given)}
    found.steps.sort(key=lambda row: order[row.method, row.tokens])
    if found.layers:
        yield replace(found, layers=layers.with_replays(recipe, ranks, found.layers))


def _hopeless(failed: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return bool(failed[1] == other[1] and failed[2] <= other[2])


def _predicted(
    recipe: Recipe, vocab: int, ranks: int, method: str, tokens: int, device: str, known: MeasuredHardware | None
) -> float | None:
    """Predicted tokens per second and rank; None for unknown methods and devices."""
    rates = known.rates if known else gpus.of(device).sustained
    if rates is None:
        return None
    whole = shared(recipe, tokens, ranks, "ring")
    segments = tokens * ranks // plan.choose_segment(whole, vocab, 1, ranks, rates.memory)
    seconds = links.step_seconds(whole, vocab, ranks, tokens, rates, known.links if known else links.ASSUMED, segments)
    found = seconds.get(method)
    return None if found is None else tokens / found


def _step(recipe: Recipe, method: str, tokens: int, *, compare: bool) -> tuple[str, int, dict[str, Any]]:
    """Time steps with one window over all ranks, or with NONE a window each; return device, vocabulary and row."""
    reset(mesh.device())
    update, close, traffic = _trainer(recipe, method, tokens, dist.get_world_size())
    before = traffic()
    seconds, memory = timed(update, mesh.device(), turns(tokens))
    sent = int(all_reduce_max(traffic() - before)) // sum(turns(tokens))
    ratio = _ratio(recipe, update, tokens, memory) if compare and method != NONE else None
    close()
    vocab = resolve_vocabulary(recipe.model, open_dataset(recipe.data).vocab_size)
    return device_name(), vocab, asdict(Step(method, tokens, tokens / seconds, memory, sent, ratio=ratio))


def _ratio(recipe: Recipe, update: Callable[[int], float], tokens: int, memory: int) -> float | None:
    """Median of an update's time ÷ that of one with a window per rank; None without room for a second `memory`."""
    device = mesh.device()
    if device.type == "cuda" and all_reduce_min(mesh.free_memory(device)) < ROOM * memory:
        return None
    beside, close, _ = _trainer(recipe, NONE, tokens, dist.get_world_size())
    warmup, count = turns(tokens)
    for step in range(warmup):
        beside(step)
    steps = range(warmup + count, warmup + 3 * count)
    ratios = [all_reduce_max(update(step)) / all_reduce_max(beside(step)) for step in steps]
    close()
    return median(ratios)


def _trainer(
    recipe: Recipe, method: str, tokens: int, ranks: int
) -> tuple[Callable[[int], float], Callable[[], None], Callable[[], int]]:
    """Build a model with its optimizer; return functions that make an update (seconds), close it, count bytes sent."""
    if method in SPLIT:
        whole = _in_one_segment(recipe, method, tokens, ranks)
        rival = Megatron(whole, mesh.world(), SPLIT[method])
        return rival.step, rival.loader.close, lambda: rival.traffic.bytes_sent
    if method == NONE:
        job = build(unshared(recipe, tokens, ranks))
    elif method in RIVALS:
        make, whole = RIVALS[method], _in_one_segment(recipe, method, tokens, ranks)
        job = build(whole, lambda kernel, mesh: cast(ShardedRecurrence, make(kernel, mesh.sp_group)))
    else:
        job = build(shared(recipe, tokens, ranks, method))
    scan = job.model.blocks[0].mixer.attention.scan
    return lambda step: float(train.train_step(job, step)["step_time"] or 0), job.loader.close, lambda: scan.bytes_sent


def _in_one_segment(recipe: Recipe, method: str, tokens: int, ranks: int) -> Recipe:
    """Return the recipe with the window in one segment, all that rivals can do, even for one that does not fit.

    Raises ResourceError, on all ranks alike, where it is certain not to fit.
    """
    whole = shared(recipe, tokens, ranks, "ring", reset_at_documents=False)
    whole = whole.replace(train={"segment": tokens * ranks})
    device = mesh.device()
    if device.type == "cuda":
        vocab = resolve_vocabulary(recipe.model, open_dataset(recipe.data).vocab_size)
        available = all_reduce_min(mesh.free_memory(device))
        needed = plan.memory(whole, vocab, 1, ranks, tokens * ranks)
        least = needed["activations"] + needed["one block"]
        if least > available:
            raise ResourceError(f"activations alone would take {least / 2**30:.0f} of {available / 2**30:.0f} GiB")
    return whole


def report(results: Results) -> list[Table]:
    """Tables with every method beside the one that shares nothing."""
    title = f"{results.ranks} × {results.device}"
    return [
        *([_layer_table(results.layers, title)] if results.layers else []),
        *([_step_table(results.steps, title)] if results.steps else []),
    ]


def _layer_table(rows: list[Layer], title: str) -> Table:
    failures = dict.fromkeys(row.failure for row in rows if row.failure)
    table = _table(
        f"one attention layer, forward and backward, {title}",
        ("tokens per rank", "method", "ms", "× none", "host ms", "replayed ms", "× none", "bytes sent", "formula"),
        list(failures),
    )
    for row in rows:
        table.add_row(
            f"{row.tokens:,}",
            row.method,
            f"{row.ms:.3f}",
            number(row.ratio, ".3f"),
            number(row.host_ms, ".3f"),
            number(row.replayed_ms, ".3f"),
            number(row.replayed_ratio, ".3f"),
            f"{row.sent:,}",
            f"{row.formula:,}",
        )
    return table


def _step_table(rows: list[Step], title: str) -> Table:
    failures = {row.method: f"{row.method}, {row.tokens:,}: {row.failure}" for row in reversed(rows) if row.failure}
    table = _table(
        f"whole steps, {title}",
        ("tokens per rank", "method", "tokens/s per rank", "predicted", "time × none", "peak GiB", "sent MB"),
        [*failures.values()],
    )
    unshared = {row.tokens: row.tokens_per_s for row in rows if row.method == NONE}
    for row in rows:
        speed, base = row.tokens_per_s, unshared.get(row.tokens)
        lacking = "OOM" if row.oom else "failed"
        table.add_row(
            f"{row.tokens:,}",
            row.method,
            number(speed, ",.0f") or lacking,
            number(row.predicted, ",.0f"),
            number(row.ratio or (base / speed if base and speed else None), ".3f"),
            "" if row.memory is None else f"{row.memory / 2**30:.1f}",
            "" if row.sent is None else f"{row.sent / 1e6:,.1f}",
        )
    return table


def _table(title: str, columns: Sequence[str], notes: Sequence[str]) -> Table:
    table = Table(title=title, caption="\n".join(notes) or None)
    for column in columns:
        kind: dict[str, Any] = (
            {"justify": "left", "no_wrap": True} if column == "method" else {"justify": "right", "overflow": "fold"}
        )
        table.add_column(column, **kind)
    return table


def write(file: Path, results: Results) -> None:
    """Write the results as JSON."""
    file.write_text(json.dumps({**asdict(results), "torch": torch.__version__}, indent=1))
