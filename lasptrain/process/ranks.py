"""The life of one rank inside the process group."""

import importlib
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from lasptrain.errors import INTERRUPTED, STOPPED, NumericalError, RankLostError, SetupError
from lasptrain.parallel import mesh
from lasptrain.parallel.collectives import all_gather_object
from lasptrain.process import interface, watchdog
from lasptrain.process.failure import failure_of, recorded, report, write_final_status
from lasptrain.process.location import DEFAULT, RunLocation, choose, open_run, resolve
from lasptrain.process.meeting import Waiting, connect, meet, patiently
from lasptrain.recipe.schema import Recipe
from lasptrain.run import folder as runs


def run_worker(
    recipe: Recipe,
    target: str,
    *,
    run: Path | None = None,
    records: tuple[Path, ...] = (),
    place: RunLocation = DEFAULT,
) -> NoReturn:
    """Join the process group, call the target and end the process with its exit code.

    Without `records` there is no launcher of ours: rank 0 opens the run folder, and ranks print their own failures.
    """
    launched, folders = bool(records), dict.fromkeys(records)
    code, failure = 0, None
    try:
        digest = runs.digest(recipe)
        with ExitStack() as stack:
            opening: AbstractContextManager[Path] = nullcontext(run or Path())
            if not launched and os.environ["LOCAL_RANK"] == "0":
                there = choose(recipe, place)
                prepared = resolve(recipe.named(there.name), int(os.environ["WORLD_SIZE"]), there)
                recipe, opening = prepared.recipe, open_run(prepared, there, place)
            _join_others(recipe.launch.timeout)
            _agree(digest)
            run, recipe = _share(recipe, lambda: stack.enter_context(opening))
            folders[run / runs.RANKS] = None  # other machines' launchers look there too
            _function(target)(recipe, run)
            dist.destroy_process_group()
    except BaseException as error:
        failure = failure_of(int(os.environ["RANK"]), error)
        code = failure.code
        if not recorded(failure, *folders) or not launched:
            report(failure)
    if not launched and run is not None and os.environ["RANK"] == "0":
        write_final_status(run, failure)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # such as a log on a disk that is full
            stream.flush()
    if code in (0, STOPPED, INTERRUPTED, NumericalError.code):  # all ranks end so, and rank 0 may take longer
        watchdog.leave()
    os._exit(code)  # tearing down a group that others still hold may abort the interpreter


def _join_others(timeout: int) -> None:
    """Meet the other ranks where the launcher says and initialise their process group; rank 0 tells of waiting."""
    env = os.environ
    rank, total, host, port = int(env["RANK"]), int(env["WORLD_SIZE"]), env["MASTER_ADDR"], int(env["MASTER_PORT"])
    interface.choose(host, port, quiet=env["LOCAL_RANK"] != "0")
    hosts = rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = connect(host, port, "rank 0", hosts=hosts, timeout=timeout)
    meet(store, "rank", rank, total, f"{host}:{port}", timeout, quiet=rank > 0)
    waiting = Waiting(lambda: f"the process group of {total} ranks", timeout, quiet=rank > 0)
    options = {"store": store, "rank": rank, "world_size": total, "timeout": timedelta(seconds=timeout)}
    patiently(lambda: join_group(**options), waiting)
    _use_device()  # each thread has a current one of its own


def join_group(**options: Any) -> None:
    """Initialise the process group of all ranks: NCCL for tensors on GPUs, gloo for the rest."""
    device = _use_device()
    if device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, **options)
    else:
        dist.init_process_group("gloo", **options)


def _use_device() -> torch.device:
    device = mesh.device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _agree(digest: str) -> None:
    """Raise SetupError on every rank, naming those that were given another recipe than rank 0."""
    digests = all_gather_object(digest)
    others = [str(rank) for rank, other in enumerate(digests) if other != digests[0]]
    if others:
        found = f"recipe: rank {', '.join(others)} has another one than rank 0"
        raise SetupError(f"{found}; give all the same file and --set")


def _share(recipe: Recipe, find: Callable[[], Path]) -> tuple[Path, Recipe]:
    """Return rank 0's run folder and recipe. Where rank 0 fails, the others raise RankLostError."""
    found = None
    try:
        if dist.get_rank() == 0:
            found = (find(), recipe)
    finally:
        found = all_gather_object(found)[0]
    if found is None:
        raise RankLostError("rank 0 could not open the run folder")
    return found


def _function(target: str) -> Callable[[Recipe, Path], None]:
    module, _, name = target.partition(":")
    function: Callable[[Recipe, Path], None] = getattr(importlib.import_module(module), name)
    return function
