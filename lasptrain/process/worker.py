"""Entry point of a rank started by the launcher's elastic agent. Light, so that it can end quietly from the start."""

import ctypes
import faulthandler
import json
import os
import signal
import sys
import time
from pathlib import Path

from lasptrain import files
from lasptrain.console import stdio
from lasptrain.errors import RankLostError
from lasptrain.process import signals, watchdog


def main(launcher: str, recipe: str, run: str, records: str, target: str) -> None:
    """Run `target` on the recipe for the launcher with that process id; does not return. See `ranks.run_worker`."""
    stdio.ignore_broken_pipe()
    watchdog.begin(Path(recipe).parent, int(os.environ["RANK"]))
    faulthandler.register(signal.SIGUSR2)  # prints the stacks of all threads and goes on
    signals.listen(lambda number: record_stop(Path(records), number))
    die_with(int(launcher))
    from lasptrain.process.ranks import run_worker
    from lasptrain.recipe.loading import load

    run_worker(load(recipe), target, run=Path(run) if run else None, records=Path(records))


def record_stop(records: Path, number: int) -> None:
    """Record that a signal stopped this rank with nothing lost: a `failure.Failure`, written without torch."""
    end = signals.interruption(number, "nothing was unsaved")
    rank = int(os.environ["RANK"])
    told = {"rank": rank, "code": end.code, "kind": "Stopped", "message": str(end), "time": time.time()}
    files.replace(records / f"{rank}.json", json.dumps(told))


def die_with(parent: int) -> None:
    """On Linux, have this process killed when its parent dies, so that no rank trains on without a launcher."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(RankLostError.code)


if __name__ == "__main__":
    main(*sys.argv[1:])
