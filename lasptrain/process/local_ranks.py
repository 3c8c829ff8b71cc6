"""Ranks on one machine for a measurement, a process each: one per GPU through NCCL, or on the CPU through gloo."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessContext, ProcessException, start_processes

from lasptrain import files
from lasptrain.errors import LaspError, ResourceError, SetupError
from lasptrain.parallel import mesh
from lasptrain.process import signals
from lasptrain.process.ranks import join_group
from lasptrain.process.scratch import scratch

SILENCE = 240.0  # seconds that a trial may take
GRACE = 30.0  # seconds that ranks get to exit when all is done
START = "spawn"  # of ranks: a forked process cannot use a GPU that its parent has touched
ENVIRONMENT = {
    "PYTHONWARNINGS": "ignore:resource_tracker",  # which tells what ended ranks leave, and removes it
    "THP_MEM_ALLOC_ENABLE": "1",  # large tensors on CPUs: a quarter of the time for their pages
}
Args = tuple[Any, ...]


def on_ranks(ranks: int, measure: Callable[..., Any], *args: Any) -> Any:
    """Call `measure(*args)` on every rank inside a process group; return rank 0's result, which must be plain JSON.

    Raises SetupError where there are GPUs, but fewer than ranks, or where a rank raises a LaspError, and ResourceError
    where a rank is out of memory.
    """
    ((_, found),) = trials(ranks, measure, [args], silence=None)
    if not isinstance(found, TrialFailure):
        return found
    if found.error is not None:
        raise found.error
    raise ResourceError(found.reason) if found.memory else SetupError(found.reason)


class TrialFailure(NamedTuple):
    """The reason why a trial has no result: not enough memory, a LaspError of a rank, or another error."""

    reason: str
    memory: bool = False
    error: ProcessException | None = None


def trials(
    ranks: int,
    measure: Callable[..., Any],
    given: Sequence[Args],
    *,
    skip_after: Callable[[Args, Args], bool] = lambda failed, other: False,
    silence: float | None = SILENCE,
) -> Generator[tuple[Args, Any | TrialFailure], None, None]:
    """Call `measure(*args)` on all ranks for each of `given`; yield those args with rank 0's result, or a TrialFailure.

    The calls share one job. A rank that fails, or a call that takes longer than `silence` seconds, ends the job, since
    ranks that wait for a lost one never return; the rest run in a new job. Args for which `skip_after(failed, args)` is
    true fail untried. Raises SetupError where there are GPUs, but fewer than ranks, and Stopped if a signal that is
    recorded has come. No process outlives the last call, and no temporary file.
    """
    check_gpus(ranks)
    waiting = list(given)
    while waiting:
        with scratch() as folder:
            for found in _job(ranks, folder, measure, tuple(waiting), silence):
                args = waiting.pop(0)
                yield args, found
        if isinstance(found, TrialFailure):
            for other in [other for other in waiting if skip_after(args, other)]:
                waiting.remove(other)
                yield other, found


def check_gpus(ranks: int) -> None:
    """Raise SetupError where there are GPUs, but fewer than ranks."""
    gpus = torch.cuda.device_count()
    if 0 < gpus < ranks:
        raise SetupError(f"--nproc {ranks}: found {gpus} GPUs; expected at most as many ranks")


def _job(
    ranks: int, folder: Path, measure: Callable[..., Any], given: Sequence[Args], silence: float | None
) -> Iterator[Any | TrialFailure]:
    """Yield results as they come; the last may be the TrialFailure that ended the job."""
    mesh.silence_torch_logs()
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # else it logs each rank it ends
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    others, job = multiprocessing.active_children(), None
    resource_tracker.ensure_running()  # which would unblock signals
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signals.CODES)  # in ranks until they lead groups of their own
    try:
        try:
            job = start_processes(_rank, (ranks, folder, measure, given), nprocs=ranks, join=False, start_method=START)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        number, heard = 0, time.monotonic()
        while number < len(given):
            end = _end(job, folder)
            signals.check()
            while (file := folder / f"{number}.result").exists():
                yield json.loads(file.read_text())
                number, heard = number + 1, time.monotonic()
            if silence is not None and time.monotonic() - heard > silence:
                end = TrialFailure(f"took longer than {silence:.0f} s")
            if end is not None and number < len(given):
                yield end
                return
        while _end(job, folder) is None and time.monotonic() - heard < GRACE:
            pass
    finally:
        started = job.processes if job else [one for one in multiprocessing.active_children() if one not in others]
        for process in started:
            _end_all_of(process)


def _end(job: ProcessContext, folder: Path) -> TrialFailure | None:
    """The failure with which the ranks have ended, None while they run."""
    try:
        return TrialFailure("ended early") if job.join(timeout=0.2) else None
    except ProcessException as error:
        if refusals := sorted(folder.glob("*.refusal")):
            return TrialFailure(*json.loads(refusals[0].read_text()))
        return TrialFailure(str(error).strip().splitlines()[-1], error=error)


def _end_all_of(process: BaseProcess) -> None:
    """End a rank and the processes that it has started, which are its group."""
    if process.pid is not None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _leave_with_parent() -> None:
    """End this rank, and the processes that it has started, when the one that measures is no more."""
    os.setsid()
    for number in signals.CODES:  # forget those that came to the group of the parent, which ends its ranks
        signal.signal(number, signal.signal(number, signal.SIG_IGN))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.CODES)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave() -> None:
        parent.join()
        os.killpg(0, signal.SIGKILL)

    Thread(target=leave, daemon=True).start()


def _rank(rank: int, ranks: int, folder: Path, measure: Callable[..., Any], given: Sequence[Args]) -> None:
    _leave_with_parent()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    if mesh.device().type == "cpu":
        torch.set_num_threads(max(1, min(torch.get_num_threads(), mesh.cores() // ranks)))
    join_group(init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    for number, args in enumerate(given):
        try:
            result = measure(*args)
        except (LaspError, RuntimeError) as error:
            _refuse(error, folder / f"{rank}.refusal")
        if rank == 0:
            files.replace(folder / f"{number}.result", json.dumps(result))
        dist.barrier()  # a rank that then fails in the next call does not end rank 0 before it has written this result
    dist.destroy_process_group()


def _refuse(error: LaspError | RuntimeError, file: Path) -> NoReturn:
    """Write the reason to `file` and end this rank. Raises the error if it is no LaspError and not out of memory."""
    memory = isinstance(error, ResourceError) or "out of memory" in str(error)
    if not memory and not isinstance(error, LaspError):
        raise error
    file.write_text(json.dumps([str(error).splitlines()[0], memory]))
    os._exit(getattr(error, "code", ResourceError.code))  # a process group that has lost a rank may hang on exit
