"""The program: `lasptrain`, or `python -m lasptrain`."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from lasptrain.errors import INTERRUPTED, STOPPED

STOPS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]  # not on Windows


def main() -> NoReturn:
    """Run the command line; a signal while it loads, which takes a moment, ends it as at any other time."""
    heard = [number for number in STOPS if signal.getsignal(number) is signal.SIG_DFL]
    for number in heard:
        signal.signal(number, _leave)
    try:
        from lasptrain.cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    for number in heard:  # the command line listens itself
        signal.signal(number, signal.SIG_DFL)
    run()


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    os._exit(STOPPED)  # nothing has begun


if __name__ == "__main__":
    main()
