"""Detection of hangs: every rank writes heartbeats, each with a deadline for the next; the launcher kills a late rank.

A heartbeat is a line in a small file per rank, on the launcher's machine: process id, number of segments done, and the
deadline (monotonic seconds, one clock for all processes of a machine). A rank that ends in order writes that too. Once
one has died the others are killed soon: a rank that waits for it inside NCCL handles no signal. No torch.
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

STARTUP_GRACE = 1800.0  # seconds granted where there are no segments: starting, compiling, saving
PERIOD = 0.25  # seconds between checks
LOST = 1.5  # seconds that ranks get to notice by themselves that another one has died
HUNG, ORPHANED = "hung", "bereft"  # why a rank was killed
DYING = "dying"  # state of a process that has ended and is still being torn down
PULSE = "pulse-"

_file: int | None = None
_count = 0


class Heartbeat(NamedTuple):
    """The last heartbeat of a rank: `signs` of life so far, and the deadline for the next."""

    rank: int
    pid: int
    signs: int
    until: float


def begin(folder: Path, rank: int) -> None:
    """Start writing this process's heartbeats, as `rank`, into a file in `folder`."""
    global _file
    _file = os.open(folder / f"{PULSE}{rank}", os.O_WRONLY | os.O_CREAT, 0o666)
    _say(os.getpid(), time.monotonic() + STARTUP_GRACE)  # where there is no room, nothing begins


def heartbeat(silence: float) -> None:
    """Write that this rank is alive, and will write again within `silence` seconds."""
    global _count
    _count += 1
    with suppress(OSError):  # the next one may be heard
        _say(os.getpid(), time.monotonic() + silence)


def leave() -> None:
    """Write that this rank ends in order, so that its end is not taken for a death."""
    with suppress(OSError):
        _say(0, math.inf)


def _say(pid: int, until: float) -> None:
    if _file is not None:
        os.pwrite(_file, f"{pid} {_count} {until:.3f}".ljust(64).encode(), 0)


def all_left(folder: Path) -> bool:
    """True where ranks have begun and all have ended in order."""
    last = [file.read_text().split()[:1] for file in folder.glob(f"{PULSE}*")]
    return bool(last) and all(pid == ["0"] for pid in last)


class Watchdog(threading.Thread):
    """Thread that watches the ranks whose heartbeats are in `folder` until `end` is called.

    Ranks that wait for each other all stall: the hung one is the one that is stopped, else the one that has done least.
    `tell(rank, HUNG, message)` is called, then all ranks print their stacks (SIGUSR2), then that one is killed.
    Ranks alive `LOST` seconds after another one has died are killed after `tell(rank, ORPHANED, message)`.
    """

    def __init__(
        self, folder: Path, tell: Callable[[int, str, str], None], now: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(daemon=True, name="watch")
        self._folder, self._tell, self._now = folder, tell, now
        self._died = math.inf  # when a rank was first seen to be gone
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(PERIOD) and not self.look():
            pass

    def look(self) -> bool:
        """End ranks that are hung or orphaned; return True where nothing is left to watch."""
        pulses = self._pulses()
        states = {pulse: _state(pulse.pid) for pulse in pulses}
        alive = [pulse for pulse, state in states.items() if state not in ("", "Z", "X", DYING)]
        now = self._now()
        if len(alive) < len(pulses):
            self._died = min(self._died, now)
        elif any(now > pulse.until for pulse in alive):
            self._end_hung(alive)
        last = now > self._died + LOST and DYING not in states.values()  # or the agent would blame the next one
        if last:
            self._end_orphaned(alive)
        return last

    def end(self) -> None:
        """Stop watching."""
        self._over.set()
        self.join()

    def _pulses(self) -> list[Heartbeat]:
        """The last heartbeats of the ranks that have begun and not left."""
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

    def _end_orphaned(self, pulses: list[Heartbeat]) -> None:
        for pulse in pulses:
            self._tell(pulse.rank, ORPHANED, "lost the other ranks and did not notice")
        _send(signal.SIGKILL, pulses)


def _send(number: int, pulses: list[Heartbeat]) -> None:
    for pulse in pulses:
        with suppress(ProcessLookupError):
            os.kill(pulse.pid, number)


def _state(pid: int) -> str:
    """Return a process's state as Linux names it: R, S, T (stopped), Z, …; R without /proc, "" for no such process.

    DYING while Linux tears the process down, which with a GPU may take seconds.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "" if Path("/proc/self/stat").exists() else "R"
    exiting = int(fields[5]) & 0x4  # PF_EXITING
    return DYING if exiting and state not in ("Z", "X") else state
