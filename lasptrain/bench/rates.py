"""Measurement for `lasptrain plan --measure`: products, copies, and messages between the GPUs of this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lasptrain.bench.kernels import measure_rates
from lasptrain.cost.gpus import Rates
from lasptrain.cost.links import Link
from lasptrain.cost.rates import MeasuredHardware
from lasptrain.parallel import mesh
from lasptrain.parallel.collectives import all_gather, all_reduce_max
from lasptrain.parallel.mesh import device_name
from lasptrain.parallel.p2p import between
from lasptrain.process.local_ranks import on_ranks

SMALL = 1 << 10  # bytes of a message whose time is latency
COUNT = 20  # messages in a row
TURNS = 5


def measure(ranks: int) -> MeasuredHardware:
    """Measure this machine with one process per rank; without GPUs a dry run through gloo."""
    found = on_ranks(ranks, _rank)
    links = [found[name] and Link(**found[name]) for name in ("hop", "gather")]
    return MeasuredHardware(found["device"], Rates(**found["rates"]), *links)


def _rank() -> dict[str, Any]:
    device = mesh.device()
    rates = measure_rates("bf16") if device.type == "cuda" else _cpu_rates()
    ranks = dist.get_world_size()
    several = ranks > 1
    return {
        "device": device_name(),
        "rates": rates._asdict(),
        "hop": _link(_there_and_back, device, 2, 2)._asdict() if several else None,
        "gather": _link(_gather, device, (ranks - 1).bit_length(), ranks - 1)._asdict() if several else None,
    }


def _cpu_rates() -> Rates:
    a, b = torch.randn(2, 512, 512)
    source = torch.zeros(1 << 24, dtype=torch.uint8)
    target = torch.empty_like(source)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    product, copy = _seconds(lambda: a @ b), _seconds(lambda: target.copy_(source))
    return Rates(2 * 512**3 / product, 2 * source.numel() / copy, memory)


def _seconds(call: Callable[[], object]) -> float:
    def once() -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    return median(once() for _ in range(TURNS))


def _link(send: Callable[[Tensor], None], device: torch.device, latencies: int, volumes: int) -> Link:
    """Fit a link to the times of a small and a large message; `send` takes `latencies` · α + `volumes` · bytes/β, as in
    `links.scan_seconds`.
    """
    big = 1 << 24 if device.type == "cuda" else 1 << 22
    small, large = (_message(send, torch.zeros(size, dtype=torch.uint8, device=device)) for size in (SMALL, big))
    return Link(small / latencies, volumes * (big - SMALL) / max(large - small, 1e-9))


def _message(send: Callable[[Tensor], None], x: Tensor) -> float:
    """Seconds of one message: median over TURNS, slowest rank."""

    def turn() -> float:
        dist.barrier()
        _wait(x)
        began = time.perf_counter()
        for _ in range(COUNT):
            send(x)
        _wait(x)
        return all_reduce_max((time.perf_counter() - began) / COUNT)

    turn()
    return median(turn() for _ in range(TURNS))


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _there_and_back(x: Tensor) -> None:
    """Send from rank 0 to rank 1 and back, as states are sent."""
    messages = between(mesh.world(), x.device, x.nbytes)
    match dist.get_rank():
        case 0:
            messages.send(x, 1)()
            messages.recv(x, 1)()
        case 1:
            messages.recv(x, 0)()
            messages.send(x, 0)()


def _gather(x: Tensor) -> None:
    """All-gather `x`."""
    all_gather(x.new_empty(dist.get_world_size() * x.numel()), x)
