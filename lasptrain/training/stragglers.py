"""Straggler detection: every rank times the same small piece of work, and its waits for data; who is behind is named.

In every exchange all ranks wait for the slowest, so steps take equally long everywhere and do not show which it is.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable
from statistics import fmean, median_low
from typing import NamedTuple

import torch

from lasptrain.parallel import collectives

PERIOD = 20.0  # seconds of training between looks
BETWEEN = 4.0  # seconds between probes
THRESHOLD = 1.5  # times as slow as the median is a straggler
LOOKS = 2  # in a row at which a rank must be a straggler before it is reported


class Slowest(NamedTuple):
    """The slowest rank, and the ratio of a step's time to that with a rank of median speed in its place."""

    rank: int
    ratio: float
    why: str


class StragglerDetector:
    """Comparison of a run's ranks every PERIOD. Collective over all ranks, which get the same result."""

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self._device, self._now = device, now
        self._hosts = collectives.all_gather_object(socket.gethostname())
        self._probed = -math.inf  # when this rank last did
        self._next = 1  # steps until the next look
        self._rank, self._looks = -1, 0
        self._start()

    def _start(self) -> None:
        self._work: list[float] = []  # seconds of each probe
        self._waited, self._spent, self._steps = 0.0, 0.0, 0

    def observe(self, data_wait: float, step_time: float) -> Slowest | None:
        """Note a step of `step_time` seconds, `data_wait` of them for data; return the slowest rank, at some steps."""
        if len(self._hosts) == 1:
            return None
        self._waited, self._spent, self._steps = self._waited + data_wait, self._spent + step_time, self._steps + 1
        if self._now() - self._probed > BETWEEN or self._steps == self._next:
            self._work.append(probe(self._device, self._now))
            self._probed = self._now()
        if self._steps < self._next:
            return None
        rows = collectives.all_gather_object((fmean(self._work), self._waited / self._spent, self._spent / self._steps))
        found = slowest([(seconds, share) for seconds, share, _ in rows])
        self._next = max(1, int(PERIOD / max(step for *_, step in rows)))
        self._start()
        again = found.ratio > THRESHOLD and found.rank == self._rank
        self._rank, self._looks = found.rank, self._looks + 1 if again else int(found.ratio > THRESHOLD)
        return found

    def straggler(self, found: Slowest) -> str | None:
        """Return a message about the rank that a look has found, if it has been far behind for long enough."""
        if self._looks < LOOKS:
            return None
        return f"rank {found.rank} on {self._hosts[found.rank]} slows a step down {found.ratio:.1f} times: {found.why}"


def slowest(rows: list[tuple[float, float]]) -> Slowest:
    """Return the slowest rank; rows: seconds for the same work, and share of time spent waiting for data, by rank."""
    usual, patient = median_low(seconds for seconds, _ in rows), median_low(share for _, share in rows)
    found = []
    for rank, (seconds, share) in enumerate(rows):
        found.append(Slowest(rank, seconds / usual, f"matrix products take {seconds / usual:.1f} times the median"))
        reading = (1 - min(patient, 0.99)) / (1 - min(share, 0.99))
        found.append(Slowest(rank, reading, f"it waits for data in {share:.0%} of the time"))
    return max(found, key=lambda one: one.ratio)


def probe(device: torch.device, now: Callable[[], float]) -> float:
    """Return the seconds of matrix products: some 2 ms of a GPU, 40 ms of a core, which other processes interrupt."""
    cuda = device.type == "cuda"
    size, times = (4096, 10) if cuda else (256, 64)
    x = torch.ones(size, size, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
    out = torch.empty_like(x)
    if cuda:
        torch.cuda.synchronize(device)
    began = now()
    for _ in range(times):
        torch.mm(x, x, out=out)
    if cuda:
        torch.cuda.synchronize(device)
    return now() - began
