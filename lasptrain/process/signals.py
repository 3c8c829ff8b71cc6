"""The signals that ask a rank to stop. Light: `rank` listens before it imports torch.

While nothing would be lost a rank leaves at once. Inside `deferred` a signal is only noted: the loop asks at every
segment what any rank has noted, saves the newest step and leaves by itself. The second signal leaves at once, unsaved.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from lasptrain.errors import INTERRUPTED, STOPPED, TERMINATED, Stopped

CODES = {
    signal.SIGTERM: STOPPED,
    signal.SIGUSR1: STOPPED,  # Slurm's warning before the time is over
    signal.SIGHUP: STOPPED,
    signal.SIGINT: INTERRUPTED,
}
ECHO = 0.5  # seconds in which a signal that came to us and through the launcher is one

_noted, _at, _unsaved = 0, 0.0, False


def interrupt() -> None:
    """Have Ctrl-C raise KeyboardInterrupt as ever, but end this process while torch is loaded, which can swallow it."""

    def hear(number: int, frame: FrameType | None) -> None:
        if getattr(getattr(sys.modules.get("torch"), "__spec__", None), "_initializing", False):
            os._exit(INTERRUPTED)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else whoever started us has it ignored
        signal.signal(signal.SIGINT, hear)


def listen(leave: Callable[[int], None] = lambda number: None) -> None:
    """Take the signals. `leave` is told the number of the one by which this process then ends, having lost nothing."""

    def hear(number: int, frame: FrameType | None) -> None:
        global _noted, _at
        if _noted and time.monotonic() - _at > ECHO:
            os._exit(TERMINATED)
        if not _noted:
            _noted, _at = number, time.monotonic()
            if not _unsaved:
                leave(number)
                os._exit(CODES[signal.Signals(number)])

    for number in CODES:
        signal.signal(number, hear)


@contextmanager
def deferred() -> Iterator[None]:
    """While this lasts there is something to save, and signals are only noted."""
    global _unsaved
    _unsaved = True
    try:
        yield
    finally:
        _unsaved = False


def pending() -> int:
    """The signal that this process has received, 0 if none."""
    return _noted


def interruption(number: int, what: str) -> Stopped:
    """How a process ends by a signal: `what` says what has become of its work."""
    return Stopped(f"stopped by {signal.Signals(number).name}; {what}", CODES[signal.Signals(number)])
