"""Launcher of ranks: one process per GPU through torch's elastic agent, or this one if torchrun or Slurm started it.

The launcher prepares the data, locks the run folder, starts the ranks, and returns the exit code of the rank that
failed first. A rank that fails writes a record, `ranks/RANK.json`, and ends; one that only lost a peer ends with
code 7 and is not the cause.
"""

import logging
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from threading import Timer
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lasptrain import files
from lasptrain.errors import RankLostError, RecipeError, SetupError
from lasptrain.parallel import mesh
from lasptrain.process import signals, watchdog
from lasptrain.process.environment import joined_ranks
from lasptrain.process.failure import (
    Failure,
    all_saved,
    first_line,
    record,
    report,
    root_cause,
    stopped_by,
    write_final_status,
)
from lasptrain.process.location import DEFAULT, RunLocation, choose, open_run, resolve
from lasptrain.process.meeting import connect, meet
from lasptrain.process.ranks import run_worker
from lasptrain.process.scratch import scratch
from lasptrain.recipe.resolve import resolve_meshes
from lasptrain.recipe.schema import Recipe
from lasptrain.recipe.sections import Launch
from lasptrain.recipe.yaml12 import dump
from lasptrain.run import folder as runs

TRAIN = "lasptrain.train:train"
AGAIN = 0.05  # seconds until a lost signal is sent again


class Nodes(NamedTuple):
    """Several machines with a launcher each; all name the same `rendezvous`, host:port on the machine of rank 0."""

    total: int
    rank: int
    rendezvous: str


def launch(
    recipe: Recipe,
    place: RunLocation = DEFAULT,
    nproc: int | None = None,
    nodes: Nodes | None = None,
    target: str = TRAIN,
    max_restarts: int = 0,
) -> int:
    """Train a recipe and return the exit code; the failure that caused it has been printed, once.

    A run that has lost a rank is restarted up to `max_restarts` times. Raises LaspError for what is wrong before
    any process starts. `target` names the function `(recipe, run)` that every rank calls inside an initialised process
    group.
    """
    joined = joined_ranks(alone=nodes is not None)
    if joined is not None:
        _refuse_beside(joined, {"--nproc": nproc, "--nnodes": nodes, "--max-restarts": max_restarts})
        signals.listen(lambda by: _say_stopped(by, joined["RANK"]))
        resolve_meshes(recipe, int(joined["WORLD_SIZE"]))
        os.environ.update(joined)
        run_worker(recipe, target, place=place)
    with _no_signal_lost():
        nproc = _processes(nproc)
        there = choose(recipe, place)
        prepared = resolve(recipe.named(there.name), nproc * (nodes.total if nodes else 1), there)
        with open_run(prepared, there, place) if nodes is None or nodes.rank == 0 else nullcontext() as run:
            failure = _attempts(prepared.recipe, run, nproc, nodes, target, max_restarts)
    return report(failure) if failure else 0


def _say_stopped(number: int, rank: str) -> None:
    if rank == "0":
        sys.stderr.write(f"{signals.interruption(number, 'nothing was unsaved')}\n")


def _refuse_beside(joined: dict[str, str], options: dict[str, object]) -> None:
    """Raise RecipeError for options that start ranks, where torchrun or Slurm has started them."""
    if given := [option for option, value in options.items() if value]:
        found = f"{', '.join(given)}: found where {joined['WORLD_SIZE']} ranks are already started"
        by = "RANK, WORLD_SIZE, … by torchrun" if "RANK" in os.environ else "SLURM_STEP_ID, … by srun"
        raise RecipeError(f"{found} ({by}); expected one of both: leave it out, or start this without them")


def _attempts(
    recipe: Recipe, run: Path | None, nproc: int, nodes: Nodes | None, target: str, max_restarts: int
) -> Failure | None:
    """Run the ranks, again where one was lost; return the last failure, None if they finished."""
    restarts = 0
    while True:
        failure = _attempt(recipe, run, nproc, nodes, target)
        if run is not None:
            write_final_status(run, failure, restarts)
        if failure is None or failure.code != RankLostError.code or restarts >= max_restarts:
            return failure
        restarts += 1
        sys.stderr.write(f"{failure.message}; restart {restarts} of {max_restarts}\n")


@contextmanager
def _no_signal_lost() -> Iterator[None]:
    """Have signals raise Stopped until there are ranks: nothing has been done that could be lost.

    One whose exception is raised inside a finalizer, where Python only prints it, is sent again.
    """
    usual = sys.unraisablehook

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SignalException("", signal.Signals(number))

    def again(lost: "sys.UnraisableHookArgs") -> None:
        if isinstance(lost.exc_value, SignalException):
            Timer(AGAIN, os.kill, (os.getpid(), lost.exc_value.sigval)).start()
        else:
            usual(lost)

    sys.unraisablehook = again
    for number in signals.CODES:
        signal.signal(number, leave)
    try:
        yield
    except SignalException as error:
        raise signals.interruption(error.sigval, "training had not begun") from None
    finally:
        sys.unraisablehook = usual


def _attempt(recipe: Recipe, run: Path | None, nproc: int, nodes: Nodes | None, target: str) -> Failure | None:
    """Start this machine's ranks and wait for them; return their failure, None if they finished."""
    with scratch() as folder:
        records = folder if run is None else run / runs.RANKS
        for file in records.glob("*.json"):
            file.unlink()
        files.replace(folder / runs.RECIPE, dump(recipe))
        return _agent(folder, run, records, nproc, nodes, target, recipe.launch)


def _processes(nproc: int | None) -> int:
    gpus = torch.cuda.device_count()
    if nproc is not None and gpus and nproc > gpus:
        raise SetupError(f"--nproc: {nproc} processes for {gpus} visible GPUs; expected at most {gpus}")
    return nproc or gpus or 1


def _agent(
    folder: Path, run: Path | None, records: Path, nproc: int, nodes: Nodes | None, target: str, limits: Launch
) -> Failure | None:
    """Run this machine's ranks under the elastic agent; return their failure, None if they finished."""
    _silence("torch.distributed.elastic")
    mesh.silence_torch_logs()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, mesh.cores() // nproc)))
    if nodes is None and Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    here = sys.path[0] in ("", str(Path.cwd()))
    entry = ["-m", "lasptrain.process.worker"] if here else ["-P", "-m", "lasptrain.process.worker"]
    arguments = [str(os.getpid()), str(folder / runs.RECIPE), str(run or ""), str(records), target]
    watching = watchdog.Watchdog(folder, partial(_record_ended, records, folder))
    watching.start()
    try:
        # Kept until the end: torch's own store of that place shares its server.
        store = None if nodes is None else _meet(nodes, limits.timeout)
        elastic_launch(_config(folder, nproc, nodes, limits.grace), sys.executable)("-u", *entry, *arguments)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        return root_cause(codes, records, folder)
    except SignalException as error:
        began = any(folder.glob(f"{watchdog.PULSE}*"))
        saved = watchdog.all_left(folder) or (run is not None and all_saved(run))
        return stopped_by(error.sigval, began, saved, records, folder)
    except (RendezvousError, dist.DistError, TimeoutError, OSError) as error:
        if isinstance(error, OSError) and (error.filename is not None or error.errno in (*files.FULL, *files.BROKEN)):
            raise
        place = nodes.rendezvous if nodes else "this machine"
        raise SetupError(f"--rdzv: no rendezvous at {place}: {first_line(error)}; expected a free, open port") from None
    finally:
        signals.ignore()  # only quick clean-up is left
        watching.end()
    del store
    return None


def _meet(nodes: Nodes, timeout: float) -> TCPStore:
    """Wait for the launchers of the other machines; return the store through which they have found each other."""
    host, _, port = nodes.rendezvous.rpartition(":")
    store = connect(host, int(port), "machine 0", hosts=nodes.rank == 0, timeout=timeout)
    meet(store, "machine", nodes.rank, nodes.total, nodes.rendezvous, timeout)
    return store


def _record_ended(records: Path, folder: Path, rank: int, kind: str, what: str) -> None:
    """Write the record of a rank that the watchdog kills, which cannot write its own."""
    if not any((place / f"{rank}.json").exists() for place in (records, folder)):
        name = f"rank {rank} on {socket.gethostname()}"
        record(Failure(rank, RankLostError.code, kind, f"{name} {what}", time.time()), records, folder)


def _silence(package: str) -> None:
    """Turn off a package's loggers, which set levels of their own: the launcher prints a failure, once."""
    for name in [package, *logging.root.manager.loggerDict]:
        if name.startswith(package):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def _config(folder: Path, nproc: int, nodes: Nodes | None, grace: int) -> LaunchConfig:
    total, options = 1, dict[str, Any](run_id=uuid.uuid4().hex, rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0")
    options |= {"rdzv_configs": {"is_host": True, "timeout": 60}, "local_addr": "127.0.0.1"}
    if nodes is not None:
        total, options = nodes.total, {"run_id": "lasptrain", "rdzv_backend": "static"}
        options |= {"rdzv_endpoint": nodes.rendezvous, "rdzv_configs": {"rank": nodes.rank, "timeout": 300}}
    if "shutdown_timeout" in LaunchConfig.__dataclass_fields__:  # from PyTorch 2.12 on; before, it is 30 s
        options["shutdown_timeout"] = grace
    return LaunchConfig(
        min_nodes=total,
        max_nodes=total,
        nproc_per_node=nproc,
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
        metrics_cfg={},
        signals_to_handle=",".join(number.name for number in signals.CODES),
        **options,
    )
