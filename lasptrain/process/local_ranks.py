"""Ranks of one machine for a measurement: a process each, one per GPU through NCCL, or on the CPU through gloo."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessContext, ProcessException, start_processes

from lasptrain import files
from lasptrain.errors import LaspError, RankLostError, ResourceError, SetupError
from lasptrain.parallel import mesh

SILENCE = 240.0  # seconds that a trial may take
GRACE = 30.0  # seconds that ranks get to leave when all is done
Args = tuple[Any, ...]


def on_ranks(ranks: int, measure: Callable[..., Any], *args: Any) -> Any:
    """What rank 0 gets from `measure(*args)`, which every rank calls inside a process group; plain JSON.

    Raises SetupError where there are GPUs, but fewer than ranks, or with what a rank has to say against its setup, and
    ResourceError where a rank is out of memory.
    """
    ((_, found),) = trials(ranks, measure, [args], silence=None)
    if not isinstance(found, Failure):
        return found
    if found.error is not None:
        raise found.error
    raise ResourceError(found.reason) if found.memory else SetupError(found.reason)


class Failure(NamedTuple):
    """Why a trial has no result: there was not enough memory, a rank refused, or there was an error."""

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
) -> Generator[tuple[Args, Any | Failure], None, None]:
    """Each of `given` with what rank 0 gets from `measure(*args)`, which all ranks call, or with why it got nothing.

    They are calls in one job. A rank that fails, or a call that takes longer than `silence` seconds, ends the job,
    since ranks that wait for a lost one never return; what follows is called in a new one. Others that are `skip_after`
    after a failed one fail untried. Raises SetupError where there are GPUs, but fewer than ranks.
    """
    gpus = torch.cuda.device_count()
    if 0 < gpus < ranks:
        raise SetupError(f"--nproc {ranks}: found {gpus} GPUs; expected at most as many ranks")
    waiting = list(given)
    while waiting:
        with tempfile.TemporaryDirectory(prefix="lasptrain-") as folder:
            for found in _job(ranks, Path(folder), measure, tuple(waiting), silence):
                args = waiting.pop(0)
                yield args, found
        if isinstance(found, Failure):
            for other in [other for other in waiting if skip_after(args, other)]:
                waiting.remove(other)
                yield other, found


def _job(
    ranks: int, folder: Path, measure: Callable[..., Any], given: Sequence[Args], silence: float | None
) -> Iterator[Any | Failure]:
    """Results as they come; the last may be why there are no more."""
    mesh.silence_torch_logs()
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # else it tells of each rank it ends
    # A process that was forked cannot use a GPU that its parent has touched; on the CPU forks import nothing.
    start = "spawn" if torch.cuda.is_available() else "forkserver"
    job = start_processes(
        _rank, (ranks, folder, os.getpid(), measure, given), nprocs=ranks, join=False, start_method=start
    )
    number, heard = 0, time.monotonic()
    try:
        while number < len(given):
            end = _end(job, folder)
            while (file := folder / f"{number}.result").exists():
                yield json.loads(file.read_text())
                number, heard = number + 1, time.monotonic()
            if silence is not None and time.monotonic() - heard > silence:
                end = Failure(f"took longer than {silence:.0f} s")
            if end is not None and number < len(given):
                yield end
                return
        while _end(job, folder) is None and time.monotonic() - heard < GRACE:
            pass
    finally:
        for process in job.processes:
            process.kill()
            process.join()


def _end(job: ProcessContext, folder: Path) -> Failure | None:
    """How the ranks have ended, if they have."""
    try:
        return Failure("ended early") if job.join(timeout=0.2) else None
    except ProcessException as error:
        refusals = sorted(folder.glob("*.refusal"))
        if refusals:
            return Failure(*json.loads(refusals[0].read_text()))
        return Failure(str(error).strip().splitlines()[-1], error=error)


def _leave_after(process: int) -> None:
    """End this rank soon after the process that measures: the server that forks ranks outlives it with them."""
    while Path(f"/proc/{process}").exists() or not Path("/proc/self").exists():
        time.sleep(1)
    os._exit(RankLostError.code)


def _rank(
    rank: int, ranks: int, folder: Path, measurer: int, measure: Callable[..., Any], given: Sequence[Args]
) -> None:
    Thread(target=_leave_after, args=(measurer,), daemon=True).start()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    device = mesh.device()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        device_id=device if cuda else None,
    )
    for number, args in enumerate(given):
        try:
            result = measure(*args)
        except (LaspError, RuntimeError) as error:
            _refuse(error, folder / f"{rank}.refusal")
        if rank == 0:
            files.replace(folder / f"{number}.result", json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def _refuse(error: LaspError | RuntimeError, file: Path) -> NoReturn:
    """End this rank with word of what it lacks. Raises an error that is none of ours and not for want of memory."""
    memory = isinstance(error, ResourceError) or "out of memory" in str(error)
    if not memory and not isinstance(error, LaspError):
        raise error
    file.write_text(json.dumps([str(error).splitlines()[0], memory]))
    os._exit(getattr(error, "code", ResourceError.code))  # a process group that has lost a rank may never let go
