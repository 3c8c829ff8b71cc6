"""The signals that ask a rank to stop. Light: a worker calls `listen` before it imports torch.

While nothing would be lost a rank exits at once. Inside `deferred` a signal is only recorded: at every segment the
training loop asks whether any rank has one pending, saves the newest step and exits. A second signal exits at once,
unsaved.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from lasptrain.errors import INTERRUPTED, STOPPED, TERMINATED, SetupError, Stopped

_BY_NAME = {
    "SIGTERM": STOPPED,
    "SIGUSR1": STOPPED,  # Slurm's warning before the time limit
    "SIGHUP": STOPPED,
    "SIGINT": INTERRUPTED,
}
CODES = {signal.Signals[name]: code for name, code in _BY_NAME.items() if hasattr(signal, name)}  # some: not on Windows
ALL_SAVED = "every step is saved"
ECHO = 0.5  # seconds within which a signal that comes both directly and through the launcher counts once

_noted, _at, _unsaved = 0, 0.0, False
_heard: int | None = None  # exit code of the signal that `interrupt` has heard last
_leave: Callable[[int], object] = int  # of the signal: by default nothing is done


def interrupt() -> None:
    """Have Ctrl-C raise KeyboardInterrupt, and the others SystemExit, so that what is temporary is removed.

    While torch is imported, which can swallow either, they end this process.
    """

    def hear(number: int, frame: FrameType | None) -> None:
        global _heard
        _heard = code = CODES[signal.Signals(number)]
        if getattr(getattr(sys.modules.get("torch"), "__spec__", None), "_initializing", False):
            os._exit(code)
        raise KeyboardInterrupt if code == INTERRUPTED else SystemExit(code)

    for number in CODES:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # else our parent has it ignored
            signal.signal(number, hear)


def heard() -> int | None:
    """Return the exit code of the signal that was heard since `interrupt`; some libraries make another error of it."""
    return _heard


def listen(leave: Callable[[int], None] = lambda number: None, now: Callable[[], float] = time.monotonic) -> None:
    """Install the handlers. `leave` gets the number of the signal by which this process then ends, nothing unsaved.

    SetupError on a system without these signals.
    """

    global _leave
    if len(CODES) < len(_BY_NAME):
        raise SetupError(f"found {sys.platform}, where this command does not run; expected Linux or macOS")
    _leave = leave

    def hear(number: int, frame: FrameType | None) -> None:
        global _noted, _at
        if _noted and now() - _at > ECHO:
            os._exit(TERMINATED)
        if not _noted:
            _noted, _at = number, now()
            if not _unsaved:
                _end(number)

    for number in CODES:
        signal.signal(number, hear)


@contextmanager
def deferred() -> Iterator[None]:
    """Only record signals inside this context: there is something to save. One that nobody asked for ends it then."""
    global _unsaved
    _unsaved = True
    try:
        yield
    finally:
        _unsaved = False
    if _noted:
        _end(_noted)


def _end(number: int) -> NoReturn:
    _leave(number)
    os._exit(CODES[signal.Signals(number)])


@contextmanager
def recorded() -> Iterator[None]:
    """Only record signals inside this context, where a process asks for `pending` ones; none of them ends it.

    Those that are ignored stay so. Raises Stopped at the end if one has come since it was asked for last.
    """
    global _noted
    _noted = 0

    def note(number: int, frame: FrameType | None) -> None:
        global _noted
        _noted = _noted or number

    heard = [number for number in CODES if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield
        check()
    finally:
        _noted = 0
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore() -> None:
    """Ignore signals from now on: this process is about to end with the code of the first."""
    for number in CODES:
        signal.signal(number, signal.SIG_IGN)


def check() -> None:
    """Raise Stopped if a signal has come: there is no result."""
    if _noted:
        raise interruption(_noted, "there is no result, and nothing is left of it")


def pending() -> int:
    """Return the number of the signal that this process has received, 0 if none."""
    return _noted


def interruption(number: int, what: str) -> Stopped:
    """Return the error of a process that a signal ends; `what` says what became of its work."""
    return Stopped(f"stopped by {signal.Signals(number).name}; {what}", CODES[signal.Signals(number)])
