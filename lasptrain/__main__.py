"""The program: `lasptrain`, or `python -m lasptrain`."""

import sys
from typing import NoReturn

from lasptrain.errors import INTERRUPTED


def main() -> NoReturn:
    """Runs the command line, which takes a moment to load; Ctrl-C in that moment ends it as at any other."""
    try:
        from lasptrain.cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    run()


if __name__ == "__main__":
    main()
