"""The program: `lasptrain`, or `python -m lasptrain`."""

import sys
from typing import NoReturn

from lasptrain.errors import INTERRUPTED


def main() -> NoReturn:
    """Run the command line; Ctrl-C while it loads, which takes a moment, ends it as at any other time."""
    try:
        from lasptrain.cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    run()


if __name__ == "__main__":
    main()
