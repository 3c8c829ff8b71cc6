"""Measurement for `lasptrain plan --measure`: products, copies, and messages between the GPUs of this machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lasptrain.bench.kernels import measure_rates
from lasptrain.bench.steps import elapsed, median_seconds
from lasptrain.cost.gpus import Rates
from lasptrain.cost.links import Link
from lasptrain.cost.rates import MeasuredHardware
from lasptrain.parallel import mesh
from lasptrain.parallel.collectives import all_gather
from lasptrain.parallel.mesh import device_name
from lasptrain.parallel.p2p import between
from lasptrain.process.local_ranks import on_ranks

SMALL = 1 << 10  # bytes of a message whose time is latency
COUNT = 20  # messages in a row


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
    product, copy = median_seconds(lambda: a @ b), median_seconds(lambda: target.copy_(source))
    return Rates(2 * 512**3 / product, 2 * source.numel() / copy, memory)


def _link(send: Callable[[Tensor], None], device: torch.device, latencies: int, volumes: int) -> Link:
    """Fit a link to the times of a small and a large message; `send` takes `latencies` · α + `volumes` · bytes/β, as in
    `links.scan_seconds`.
    """
    big = 1 << 24 if device.type == "cuda" else 1 << 22
    small, large = (_message(send, torch.zeros(size, dtype=torch.uint8, device=device)) for size in (SMALL, big))
    return Link(small / latencies, volumes * (big - SMALL) / max(large - small, 1e-9))


def _message(send: Callable[[Tensor], None], x: Tensor) -> float:
    """Seconds of one message, after some that are not timed."""
    elapsed(lambda: send(x), COUNT)
    return median_seconds(lambda: send(x), COUNT)


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
