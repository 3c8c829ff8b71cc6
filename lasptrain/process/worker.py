"""Entry point of a rank started by the launcher's elastic agent. Light, so that it can end quietly from the start."""

import ctypes
import faulthandler
import os
import signal
import sys
from pathlib import Path

from lasptrain.console import stdio
from lasptrain.errors import RankLostError
from lasptrain.process import signals, watchdog
from lasptrain.process.failure import failure_of, record


def main(launcher: str, recipe: str, run: str, records: str, target: str) -> None:
    """Run `target` on the recipe for the launcher with that process id; does not return. See `ranks.run_worker`."""
    stdio.ignore_broken_pipe()
    rank, folders = int(os.environ["RANK"]), (Path(records), Path(recipe).parent)  # one may have no room
    faulthandler.register(signal.SIGUSR2)  # prints the stacks of all threads and goes on
    signals.listen(lambda by: record(failure_of(rank, signals.interruption(by, "nothing was unsaved")), *folders))
    watchdog.begin(Path(recipe).parent, rank)  # who has begun hears signals
    die_with(int(launcher))
    from lasptrain.process.ranks import run_worker
    from lasptrain.recipe.loading import load

    run_worker(load(recipe), target, run=Path(run) if run else None, records=folders)


def die_with(parent: int) -> None:
    """On Linux, have this process killed when its parent dies, so that no rank trains on without a launcher."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(RankLostError.code)


if __name__ == "__main__":
    main(*sys.argv[1:])
