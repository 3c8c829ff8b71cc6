"""Run a function on several ranks of a real gloo group, one process each, on this machine."""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle  # noqa: TID251  of bytes that this run's own processes wrote
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

CONTEXT = mp.get_context("forkserver")  # torch is imported once, not by every rank
CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "lasptrain.train", "lasptrain.ops.chunked"])
PATIENCE = 300.0  # seconds that a busy machine may take for what has no limit of its own
GRACE = 5.0  # seconds the other ranks get to end by themselves after one has failed


def serve() -> None:
    """Start the process that ranks are forked from, before `prepare` starts one that has not imported torch."""
    forkserver.ensure_running()


def spawn(world: int, fn: Callable[..., T], *args: Any, timeout: float = PATIENCE) -> list[T]:
    """Return `[fn(rank, world, *args) for rank in range(world)]`, each rank in a process of its own.

    The default process group is gloo over a file, so no port is taken; a world of one has a real group too.
    `fn` lives at module level; its arguments and results are pickled. Raises AssertionError with the traceback of
    the rank that failed first, or naming the ranks that were still running after `timeout` seconds.
    No process outlives the call.
    """
    deadline, given = time.monotonic() + timeout, pickle.dumps(args)
    with tempfile.TemporaryDirectory(prefix="gloo-") as name:
        folder = Path(name)
        processes: list[BaseProcess] = [
            CONTEXT.Process(target=_rank, args=(rank, world, folder, timeout, fn, given), daemon=True)
            for rank in range(world)
        ]
        try:
            for process in processes:
                process.start()
            late = _wait(processes, deadline)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
        _raise_failure(folder, processes, late, timeout)
        return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(world)]  # noqa: S301


def _wait(processes: list[BaseProcess], deadline: float) -> list[int]:
    """Wait until every process ended, `deadline`, or GRACE after a failure; return the ranks still running."""
    running = {process.sentinel: rank for rank, process in enumerate(processes)}
    while running and (left := deadline - time.monotonic()) > 0:
        for sentinel in wait(list(running), timeout=left):
            assert isinstance(sentinel, int)
            process = processes[running.pop(sentinel)]
            process.join()
            if process.exitcode != 0:
                deadline = min(deadline, time.monotonic() + GRACE)
    return sorted(running.values())


def _raise_failure(folder: Path, processes: list[BaseProcess], late: list[int], timeout: float) -> None:
    """Raise AssertionError with the earliest recorded traceback, else naming dead, else late ranks."""
    if records := sorted(pickle.loads(path.read_bytes()) for path in folder.glob("*.error")):  # noqa: S301
        _, rank, text = records[0]
        raise AssertionError(f"rank {rank} of {len(processes)} failed:\n{text}")
    dead = {r: p.exitcode for r, p in enumerate(processes) if p.exitcode != 0 and r not in late}
    if dead:
        raise AssertionError(f"ranks ended without a result (rank: exit code): {dead}")
    if late:
        raise AssertionError(f"ranks {late} of {len(processes)} still ran after {timeout:g} s")


def _rank(rank: int, world: int, folder: Path, timeout: float, fn: Callable[..., Any], given: bytes) -> None:
    """Run `fn` on one rank and leave its pickled result, or (time, rank, traceback), in `folder`."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        store = f"file://{folder}/store"
        limit = timedelta(seconds=timeout)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=limit)
        result = pickle.dumps(fn(rank, world, *pickle.loads(given)))  # noqa: S301
        dist.barrier()  # no rank takes its group down while another still talks
    except BaseException:  # SystemExit too: the parent reports whatever ended the rank
        record = pickle.dumps((time.monotonic_ns(), rank, traceback.format_exc()))
        (folder / f"{rank}.error").write_bytes(record)
        os._exit(1)
    (folder / f"{rank}.result").write_bytes(result)
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)
