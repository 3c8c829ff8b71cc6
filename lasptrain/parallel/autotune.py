"""The fastest scan on this mesh: measured, in less than a second, with states of the real size."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from lasptrain.parallel.mesh import synchronize
from lasptrain.parallel.scan import SCANS, Scan
from lasptrain.parallel.transition import Transition

WARM, COUNT = 3, 20  # exchanges, forward and backward
Shape = tuple[int, int, int, int]


def fastest_scan(
    group: dist.ProcessGroup,
    device: torch.device,
    shape: Shape,
    carried: bool,
    now: Callable[[], float] = time.perf_counter,
    *,
    linear: tuple[int, ...] | None = None,
) -> str:
    """Return the name of the scan that is fastest for states [B, H, K, V] of this shape, forward and backward.

    The time is that of the slowest rank of the job; collective over all ranks, which get the same name.

    Args:
        carried: states are carried from segment to segment.
        linear: shape of a slice's transition, as in `Transition`; None: a number per head.
    """
    transition = Transition(torch.ones(linear or shape[:2], device=device))
    seconds = [_seconds(scan(group, device), device, shape, transition, carried, now) for scan in SCANS.values()]
    slowest = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return [*SCANS][int(slowest.argmin())]


def _seconds(
    scan: Scan,
    device: torch.device,
    shape: Shape,
    transition: Transition,
    carried: bool,
    now: Callable[[], float],
) -> float:
    state = torch.zeros(shape, device=device)
    carry = state if carried else None

    def there_and_back() -> None:
        for reverse in (False, True):
            scan.start(state, transition, carry, reverse=reverse, output_final_state=carried).wait()

    for _ in range(WARM):
        there_and_back()
    synchronize(device)
    began = now()
    for _ in range(COUNT):
        there_and_back()
    synchronize(device)
    return now() - began
