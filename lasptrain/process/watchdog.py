"""Hangs: every rank says how far it is and when it will have said more; the launcher ends a rank that does not keep it.

A line in a small file per rank, on the launcher's machine: process id, how many segments it has done, and the time
(monotonic, one clock for all processes of a machine) until which silence means nothing. A rank that ends in order says
that too. Where one has died the others are ended soon: what waits for it inside NCCL hears no signal. No torch.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

STARTUP_GRACE = 1800.0  # seconds granted to what has no segments: starting, compiling, saving
PERIOD = 0.25  # seconds between looks
LOST = 1.5  # seconds in which ranks notice by themselves that another one has died
HUNG, ORPHANED = "hung", "bereft"  # why a rank was ended
DYING = "dying"  # the state of a process between its end and the word of it
PULSE = "pulse-"

_file: int | None = None
_count = 0


class Heartbeat(NamedTuple):
    """What a rank has said last."""

    rank: int
    pid: int
    signs: int
    until: float


def begin(folder: Path, rank: int) -> None:
    """From now on this process beats as `rank` into a file in `folder`."""
    global _file
    _file = os.open(folder / f"{PULSE}{rank}", os.O_WRONLY | os.O_CREAT, 0o666)
    heartbeat(STARTUP_GRACE)


def heartbeat(silence: float) -> None:
    """Say that this rank goes on, and will say so again within `silence` seconds."""
    global _count
    _count += 1
    _say(os.getpid(), time.monotonic() + silence)


def leave() -> None:
    """Say that this rank ends in order: what the others still do is their own affair."""
    _say(0, math.inf)


def _say(pid: int, until: float) -> None:
    if _file is not None:
        os.pwrite(_file, f"{pid} {_count} {until:.3f}".ljust(64).encode(), 0)


class Watchdog(threading.Thread):
    """Looks after the ranks whose pulses are in `folder` until it is told to `end`.

    Of ranks that wait for each other none goes on: hung is the one that is stopped, else the one that has done least.
    `tell(rank, HUNG, message)` is called, then all ranks show their stacks (SIGUSR2), then that one is killed.
    Ranks that are there `LOST` seconds after another one has died are killed after `tell(rank, ORPHANED, message)`.
    """

    def __init__(self, folder: Path, tell: Callable[[int, str, str], None]) -> None:
        super().__init__(daemon=True, name="watch")
        self._folder, self._tell = folder, tell
        self._over = threading.Event()

    def run(self) -> None:
        died = math.inf
        while not self._over.wait(PERIOD):
            pulses = self._pulses()
            states = {pulse: _state(pulse.pid) for pulse in pulses}
            alive = [pulse for pulse, state in states.items() if state not in ("", "Z", "X", DYING)]
            now = time.monotonic()
            if len(alive) < len(pulses):
                died = min(died, now)
            elif any(now > pulse.until for pulse in alive):
                self._end_hung(alive)
            if now > died + LOST and DYING not in states.values():  # or the agent would take the next one for the first
                self._end_bereft(alive)
                return

    def end(self) -> None:
        """Stop looking."""
        self._over.set()
        self.join()

    def _pulses(self) -> list[Heartbeat]:
        """Of the ranks that have begun and not left."""
        found = []
        for file in self._folder.glob(f"{PULSE}*"):
            pid, count, until = file.read_text().split() or ("0", "0", "inf")
            if int(pid):
                found.append(Heartbeat(int(file.name.removeprefix(PULSE)), int(pid), int(count), float(until)))
        return found

    def _end_hung(self, pulses: list[Heartbeat]) -> None:
        paused = [pulse for pulse in pulses if _state(pulse.pid) in ("T", "t")]
        least = min(pulse.signs for pulse in pulses)
        hung = paused or [pulse for pulse in pulses if pulse.signs == least]
        for pulse in hung:
            why = "it is stopped" if pulse in paused else "see its stack above"
            alone = "" if len(hung) < len(pulses) else ", as all others here"
            self._tell(pulse.rank, HUNG, f"hung after {pulse.signs} signs of life{alone}; {why}")
        _send(signal.SIGUSR2, pulses)
        time.sleep(PERIOD)
        _send(signal.SIGKILL, hung)
        time.sleep(PERIOD)

    def _end_bereft(self, pulses: list[Heartbeat]) -> None:
        for pulse in pulses:
            self._tell(pulse.rank, ORPHANED, "lost the other ranks and did not notice")
        _send(signal.SIGKILL, pulses)


def _send(number: int, pulses: list[Heartbeat]) -> None:
    for pulse in pulses:
        with suppress(ProcessLookupError):
            os.kill(pulse.pid, number)


def _state(pid: int) -> str:
    """R, S, T (stopped), Z, … as Linux says it; R where it says nothing, empty where there is no such process.

    DYING while Linux takes down what a process had, which with a GPU may take seconds.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "" if Path("/proc/self/stat").exists() else "R"
    exiting = int(fields[5]) & 0x4  # PF_EXITING
    return DYING if exiting and state not in ("Z", "X") else state
