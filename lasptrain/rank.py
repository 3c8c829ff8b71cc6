"""A rank's process, as the elastic agent of a launcher starts it. Light, so that it can end quietly from the start."""

import ctypes
import os
import signal
import sys
from pathlib import Path

from lasptrain.errors import RankLostError


def main(launcher: str, recipe: str, run: str, records: str, target: str) -> None:
    """Runs `target` on the recipe for the launcher with that process id; does not return. See `launch.rank_process`."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches the launcher, which speaks for all
    die_with(int(launcher))
    from lasptrain.launch import rank_process
    from lasptrain.recipe import load

    rank_process(load(recipe), target, run=Path(run) if run else None, records=Path(records))


def die_with(parent: int) -> None:
    """Linux: SIGKILL for this process when its parent dies, so that no rank trains on without a launcher."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(RankLostError.code)


if __name__ == "__main__":
    main(*sys.argv[1:])
