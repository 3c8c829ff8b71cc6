"""One attention layer over a window that ranks share, forward and backward: times, launch times, bytes sent.

Short slices take the host longer to launch than the GPU to work; a CUDA graph of the same calls, exchange included,
shows the GPU alone. A method takes turns with the layer that shares nothing, because the clocks of a GPU at its power
limit drift by more than sharing costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist

from lasptrain import ops
from lasptrain.architectures.base import Architecture
from lasptrain.bench.methods import NONE, RIVALS, SPLIT, attention
from lasptrain.bench.steps import elapsed
from lasptrain.errors import SetupError
from lasptrain.ops.precision import DTYPES
from lasptrain.parallel import mesh
from lasptrain.parallel.collectives import all_reduce_max
from lasptrain.parallel.mesh import device_name
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.process.local_ranks import TrialFailure, on_ranks, trials
from lasptrain.recipe.schema import Recipe

LEAST = 0.05  # seconds of a turn at least
TURNS, HOST_TURNS = 11, 5
CAPTURES, CAPTURED_TURNS = 5, 5  # graphs of the same calls differ by 1 %

Times = dict[str, list[float]]  # seconds of each turn, by method


class Layer(NamedTuple):
    """Forward and backward of one attention layer."""

    method: str
    tokens: int  # per rank
    ms: float
    host_ms: float | None  # the host's time to launch it, on a GPU
    sent: int  # bytes, forward and backward, by the rank that sends most
    formula: int  # the expected `sent`
    ratio: float | None = None  # median over turns of its time ÷ that of NONE
    replayed_ms: float | None = None  # from a CUDA graph
    replayed_ratio: float | None = None
    failure: str | None = None  # why there is no replay


def measure(recipe: Recipe, ranks: int, methods: Sequence[str], tokens: Sequence[int]) -> tuple[str, list[Layer]]:
    """Return the device, and a row for each of `tokens` per rank and each of `methods` that keeps the model whole."""
    device, rows = on_ranks(ranks, _lengths, recipe, [method for method in methods if method not in SPLIT], tokens)
    return device, [Layer(*row) for row in rows]


def with_replays(recipe: Recipe, ranks: int, rows: Sequence[Layer]) -> list[Layer]:
    """Add times from CUDA graphs to the rows, on GPUs, measured in a job of their own: a failed capture may break the
    ranks' links, and then only that row has no such time.
    """
    if all(row.host_ms is None for row in rows):
        return list(rows)
    given = [(recipe, row.method, row.tokens) for row in rows]
    found = {(args[1], args[2]): result for args, result in trials(ranks, _replayed, given, silence=60)}
    return [
        row._replace(failure=made.reason)
        if isinstance(made := found[row.method, row.tokens], TrialFailure)
        else row._replace(replayed_ms=made[0], replayed_ratio=made[1])
        for row in rows
    ]


def _lengths(recipe: Recipe, methods: Sequence[str], tokens: Sequence[int]) -> tuple[str, list[Layer]]:
    with torch.autograd.set_multithreading_enabled(False):
        rows = [row for length in tokens for row in _layers(recipe, methods, length, mesh.device())]
    return device_name(), rows


def _layers(recipe: Recipe, methods: Sequence[str], tokens: int, device: torch.device) -> list[Layer]:
    attentions, calls = _calls(recipe, methods, tokens, device)
    sent = {name: _sent(one, calls[name]) for name, one in attentions.items()}
    times = _times(calls)
    host = {name: _host(call, device) for name, call in calls.items()}
    formula = bytes_sent(recipe.model, tokens, DTYPES[recipe.train.precision].itemsize, dist.get_world_size())
    return [
        Layer(name, tokens, 1e3 * median(times[name]), host[name], sent[name], formula[name], compared(times, name))
        for name in methods
    ]


def _calls(
    recipe: Recipe, methods: Iterable[str], tokens: int, device: torch.device
) -> tuple[dict[str, ShardedRecurrence], dict[str, Callable[[], None]]]:
    """Return the recurrence of each method, and calls of their forward and backward on the same inputs."""
    kernel, dtype = ops.select(recipe.train.kernel, device), DTYPES[recipe.train.precision]
    attentions = {name: attention(name, kernel, mesh.world(), device) for name in methods}
    model = recipe.model
    decays = model.decays(tokens)[-1]
    log_decay = None if not any(decays) else -torch.tensor(decays, device=device)
    generator = torch.Generator(device).manual_seed(dist.get_rank())
    q, k, v, do = (
        torch.randn(1, tokens, model.heads, dim, generator=generator, device=device, dtype=dtype)
        for dim in (model.K, model.K, model.V, model.V)
    )
    inputs = tuple(x.requires_grad_() for x in (q, k, v))

    def call(attention: ShardedRecurrence) -> None:
        o, _ = attention.finish(attention.begin((k, v, log_decay), None), q)
        torch.autograd.grad(o, inputs, do)

    return attentions, {name: partial(call, one) for name, one in attentions.items()}


def bytes_sent(model: Architecture, tokens: int, size: int, ranks: int) -> dict[str, int]:
    """Bytes that the busiest rank sends for a layer, forward and backward: `tokens` tokens, `size` bytes a number.

    In a chain all ranks but the last send one state in fp32, and with all_gather each sends state and decays once,
    whatever the window. Ulysses sends all of q, k, v and o but the part that stays, and as much backward. Ring
    Attention passes k and v to every other rank, again in the backward, and their gradients in fp32 all round.
    """
    state = 4 * model.heads * model.K * model.V
    chain = state * min(ranks - 1, 2)
    traded = 2 * size * tokens * model.heads * 2 * (model.K + model.V) * (ranks - 1) // ranks
    shifted = tokens * model.heads * (model.K + model.V) * (2 * size * (ranks - 1) + max(size, 4) * ranks)
    rivals = {name: traded if name.startswith("ulysses") else shifted for name in RIVALS}
    return {NONE: 0, "ring": chain, "all_scan": chain, "all_gather": 2 * (state + 4 * model.heads)} | rivals


def _sent(attention: ShardedRecurrence, call: Callable[[], None]) -> int:
    before = attention.scan.bytes_sent
    call()
    return int(all_reduce_max(attention.scan.bytes_sent - before))


def compared(times: Times, name: str) -> float | None:
    """Median over turns of a method's time ÷ that of NONE in the same turn; None where NONE was not timed."""
    return median(a / b for a, b in zip(times[name], times[NONE], strict=True)) if NONE in times else None


def _times(calls: Mapping[str, Callable[[], object]], turns: int = TURNS) -> Times:
    """Seconds of each call in each turn, by the slowest rank."""
    counts = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        counts[name] = min(200, int(LEAST / elapsed(call, 2)[0]) + 1)
    times: Times = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            times[name].append(elapsed(call, counts[name])[0])
    return times


def _host(call: Callable[[], object], device: torch.device) -> float | None:
    """Milliseconds that the slowest rank takes to launch a call; measured on a few calls, which fit into any queue."""
    if device.type != "cuda":
        return None
    return 1e3 * median(elapsed(call, 3)[1] for _ in range(HOST_TURNS))


def _replayed(recipe: Recipe, method: str, tokens: int) -> tuple[float, float | None]:
    """Milliseconds from CUDA graphs, and their ratio to NONE's; SetupError on every rank where one rank's capture
    fails.
    """
    device = mesh.device()
    times: Times = {name: [] for name in (NONE, method)}
    with torch.autograd.set_multithreading_enabled(False):
        _, calls = _calls(recipe, times, tokens, device)
        for _ in range(CAPTURES):
            for name, found in _times_replayed(calls, tokens, device).items():
                times[name] += found
    return 1e3 * median(times[method]), compared(times, method)


def _times_replayed(calls: Mapping[str, Callable[[], object]], tokens: int, device: torch.device) -> Times:
    """Seconds of replaying a new graph of each call, in each turn."""
    graphs = {}
    for name, call in calls.items():
        graphs[name], failure = _captured(call, device)
        if all_reduce_max(int(bool(failure))):
            raise SetupError(f"{name}, {tokens:,} tokens: no CUDA graph: {failure or 'another rank failed'}")
    times = _times({name: graph.replay for name, graph in graphs.items()}, CAPTURED_TURNS)
    for graph in graphs.values():
        graph.reset()  # before its communicator is destroyed
    return times


def _captured(call: Callable[[], object], device: torch.device) -> tuple[torch.cuda.CUDAGraph, str]:
    """Capture a graph of the call; return it with the reason of failure, empty if there is none."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:  # thread_local: other threads, such as NCCL's watchdog, go on calling the driver
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            call()
    except RuntimeError as error:
        return graph, str(error).splitlines()[0]
    return graph, ""
