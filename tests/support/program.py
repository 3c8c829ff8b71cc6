"""Programs as `python -m` starts them, but forked from a process that has imported torch already."""

from __future__ import annotations

import os
import runpy
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from tests.support.gloo import CONTEXT, PATIENCE

ROOT = Path(__file__).parents[2]
FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


class Started(NamedTuple):
    """A program that runs, and the files of what it prints and of what it says on stderr."""

    process: BaseProcess
    printed: Path
    said: Path

    def send(self, number: int) -> None:
        """A signal to this process alone."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self) -> tuple[int, str, str]:
        """Its exit code, what it printed, and what it said on stderr, once it has ended."""
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None, self.said.read_text()
        return self.process.exitcode, self.printed.read_text(), self.said.read_text()

    def kill(self) -> None:
        """End it, if it has not ended."""
        self.process.kill()
        self.process.join()


def start(module: str, *arguments: str, folder: Path, logs: Path, **environment: str) -> Started:
    """Starts `python -m MODULE ARGUMENTS…` in the folder, without what a launcher may have set; files go to `logs`."""
    logs.mkdir(exist_ok=True)
    number = len(list(logs.iterdir()))
    printed, said = logs / f"{number}.out", logs / f"{number}.err"
    printed.touch()
    process = CONTEXT.Process(target=_run, args=(module, arguments, folder, environment, printed, said))
    process.start()
    return Started(process, printed, said)


def _run(
    module: str, arguments: tuple[str, ...], folder: Path, environment: dict[str, str], printed: Path, said: Path
) -> None:
    os.chdir(folder)
    for name in FOREIGN:
        os.environ.pop(name, None)
    os.environ.update({"PYTHONPATH": str(ROOT), **environment})
    for number, file in ((1, printed), (2, said)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv, sys.path[:1] = [module, *arguments], [str(folder), *os.environ["PYTHONPATH"].split(os.pathsep)]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
