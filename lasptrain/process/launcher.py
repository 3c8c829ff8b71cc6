"""Processes: one per GPU through torch's elastic agent, or this one where torchrun or Slurm has already started them.

The launcher prepares the data, holds the run folder, starts the ranks, and answers with the exit code of the rank that
failed first. A rank that fails leaves a record, `ranks/RANK.json`, and ends; whoever only lost its peer says so with
code 7 and is not the cause.
"""

import errno
import importlib
import json
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Timer
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from data_tools.dataset import left_out, open_dataset
from lasptrain import recipe as recipes
from lasptrain.console.progress import preparing
from lasptrain.errors import (
    INTERNAL,
    INTERRUPTED,
    STOPPED,
    TERMINATED,
    LaspError,
    NumericalError,
    RankLostError,
    ResourceError,
    SetupError,
    Stopped,
)
from lasptrain.parallel import mesh
from lasptrain.process import signals as stop
from lasptrain.process import watchdog as watch
from lasptrain.recipe import Recipe
from lasptrain.run import folder as runs
from lasptrain.run.metrics import STATUS

TRAIN = "lasptrain.train:train"
AGAIN = 0.05  # seconds until a signal that was lost comes again

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Place(NamedTuple):
    """Which run folder is asked for: `folder` instead of runs/NAME; `fresh`: one that does not exist yet."""

    folder: Path | None = None
    fresh: bool = False


USUAL = Place()


class Nodes(NamedTuple):
    """Several machines with a launcher each; all name the same `rendezvous`, host:port on the machine of rank 0."""

    total: int
    rank: int
    rendezvous: str


class Failure(NamedTuple):
    """How a rank ended: its exit code, the kind of error, its message (for code 70 a traceback), when (Unix time)."""

    rank: int
    code: int
    kind: str
    message: str
    time: float


def launch(
    recipe: Recipe,
    place: Place = USUAL,
    nproc: int | None = None,
    nodes: Nodes | None = None,
    target: str = TRAIN,
    max_restarts: int = 0,
) -> int:
    """Trains a recipe and returns the exit code; what went wrong in a rank has been printed, once.

    A run that has lost a rank is started again up to `max_restarts` times. Raises LaspError for what is wrong before
    any process starts. `target` names the function `(recipe, run)` that every rank calls inside an initialised process
    group.
    """
    joined = _joined()
    if joined is not None:
        stop.listen()
        recipes.resolve_mesh(recipe, int(joined["WORLD_SIZE"]))
        os.environ.update(joined)
        rank_process(recipe, target, place=place)
    _stop_at_once()
    with _no_signal_lost():
        nproc = _processes(nproc)
        recipe = resolve(recipe, nproc * (nodes.total if nodes else 1))
        with _adopted(recipe, place) if nodes is None or nodes.rank == 0 else nullcontext() as run:
            failure = _attempts(recipe, run, nproc, nodes, target, max_restarts)
    return report(failure) if failure else 0


def _attempts(
    recipe: Recipe, run: Path | None, nproc: int, nodes: Nodes | None, target: str, max_restarts: int
) -> Failure | None:
    """Starts the ranks, again where one was lost; how they failed in the end, if they did."""
    restarts = 0
    while True:
        failure = _attempt(recipe, run, nproc, nodes, target)
        if run is not None:
            conclude(run, failure, restarts)
        if failure is None or failure.code != RankLostError.code or restarts >= max_restarts:
            return failure
        restarts += 1
        sys.stderr.write(f"{failure.message}; restart {restarts} of {max_restarts}\n")


def _stop_at_once() -> None:
    """Until there are ranks, signals end this process by an exception: nothing has been done that could be lost."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise stop.stopped(number, "training had not begun")

    for number in stop.CODES:
        signal.signal(number, leave)


@contextmanager
def _no_signal_lost() -> Iterator[None]:
    """Within, a signal comes again whose exception was raised in a finalizer, of which Python only prints it."""
    usual = sys.unraisablehook

    def again(lost: "sys.UnraisableHookArgs") -> None:
        match lost.exc_value:
            case SignalException():
                number = int(lost.exc_value.sigval)
            case Stopped():
                number = signal.SIGINT if lost.exc_value.code == INTERRUPTED else signal.SIGTERM
            case _:
                usual(lost)
                return
        Timer(AGAIN, os.kill, (os.getpid(), number)).start()

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = usual


def _attempt(recipe: Recipe, run: Path | None, nproc: int, nodes: Nodes | None, target: str) -> Failure | None:
    """Starts the ranks of this machine and waits for them; how they failed, if they did."""
    with tempfile.TemporaryDirectory(prefix="lasptrain-") as name:
        folder = Path(name)
        records = folder if run is None else run / runs.RANKS
        for record in records.glob("*.json"):
            record.unlink()
        runs.write(folder / runs.RECIPE, recipes.dump(recipe))
        return _agent(folder, run, records, nproc, nodes, target, recipe.launch.grace)


def resolve(recipe: Recipe, world: int) -> Recipe:
    """The recipe with its mesh and vocabulary as numbers; prepares the data, which knows the vocabulary."""
    dp, sp = recipes.resolve_mesh(recipe, world)
    with preparing() as progress:
        recipe = recipes.with_vocabulary(recipe, open_dataset(recipe.data, progress).vocab_size)
    for line in left_out(recipe.data):
        sys.stderr.write(f"{line}\n")
    return recipe.model_copy(update={"mesh": recipe.mesh.model_copy(update={"dp": dp, "sp": sp})})


@contextmanager
def _adopted(recipe: Recipe, place: Place) -> Iterator[Path]:
    """The run folder, locked, holding the recipe and no records of failures past."""
    run = runs.choose(recipe.name, place.folder, place.fresh).absolute()
    with runs.lock(run):
        runs.adopt(run, recipe)
        (run / runs.RANKS).mkdir(exist_ok=True)
        yield run


def _processes(nproc: int | None) -> int:
    gpus = torch.cuda.device_count()
    if nproc is not None and gpus and nproc > gpus:
        raise SetupError(f"--nproc: {nproc} processes for {gpus} visible GPUs; expected at most {gpus}")
    return nproc or gpus or 1


def _joined() -> dict[str, str] | None:
    """What torchrun or Slurm says of this process, as torchrun's variables; None if nobody has started ranks."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return {"LOCAL_RANK": env["RANK"], **{key: value for key, value in env.items() if key in _TORCHRUN}}
    tasks = env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1"))
    if "SLURM_PROCID" not in env or tasks == "1":
        return None
    hosts = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": env.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": env.get("MASTER_ADDR", first_host(hosts)),
        "MASTER_PORT": env.get("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000)),
    }


def first_host(hosts: str) -> str:
    """The first of a Slurm list of hosts: `node[07-12,20],login` is node07."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)", hosts)
    return "".join(part or "" for part in match.groups()) if match else hosts


def _agent(
    folder: Path, run: Path | None, records: Path, nproc: int, nodes: Nodes | None, target: str, grace: int
) -> Failure | None:
    """Runs this machine's ranks under the elastic agent."""
    _silence("torch.distributed.elastic")
    mesh.quiet()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc)))
    if nodes is None and Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    here = sys.path[0] in ("", str(Path.cwd()))
    entry = ["-m", "lasptrain.process.worker"] if here else ["-P", "-m", "lasptrain.process.worker"]
    arguments = [str(os.getpid()), str(folder / runs.RECIPE), str(run or ""), str(records), target]
    watching = watch.Watch(folder, partial(_record_ended, records))
    watching.start()
    try:
        elastic_launch(_config(folder, nproc, nodes, grace), sys.executable)("-u", *entry, *arguments)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        return cause(codes, records)
    except SignalException as error:
        began = any(folder.glob(f"{watch.PULSE}*"))
        return _stopped_by(stop.stopped(error.sigval, "training had not begun"), began, records)
    except (RendezvousError, dist.DistError, TimeoutError, OSError) as error:
        place = nodes.rendezvous if nodes else "this machine"
        raise SetupError(
            f"--rdzv: no rendezvous at {place}: {_first_line(error)}; expected a free, open port"
        ) from None
    finally:
        _ignore_signals()  # what is left to do takes no time
        watching.end()
    return None


def _ignore_signals() -> None:
    for number in stop.CODES:
        signal.signal(number, signal.SIG_IGN)


def _record_ended(records: Path, rank: int, kind: str, what: str) -> None:
    """Leaves the word that a rank which the watch ends cannot leave."""
    if not (records / f"{rank}.json").exists():
        name = f"rank {rank} on {socket.gethostname()}"
        _record(records, Failure(rank, RankLostError.code, kind, f"{name} {what}", time.time()))


def _stopped_by(stopped: Stopped, began: bool, records: Path) -> Failure:
    """How a run ended that a signal to the launcher has ended: as its ranks say, where they had begun."""
    if not began:
        return Failure(0, stopped.code, type(stopped).__name__, str(stopped), time.time())
    found = sorted(_read_records(records), key=lambda failure: (failure.code == RankLostError.code, failure.time))
    if found and found[0].code != RankLostError.code:
        return found[0]._replace(code=stopped.code) if found[0].kind == type(stopped).__name__ else found[0]
    return Failure(0, TERMINATED, "Killed", "stopped before the newest step could be saved", time.time())


def conclude(run: Path, failure: Failure | None, restarts: int = 0) -> None:
    """Adds to status.json how the run has ended, for schedulers and people."""
    file = run / STATUS
    try:
        status: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        status = {}
    status |= {"state": "finished", "code": 0, "restarts": restarts, "time": round(time.time(), 3)}
    if failure is not None:
        state = "stopped" if failure.code in (STOPPED, INTERRUPTED) else "failed"
        status |= {"state": state, "code": failure.code, "rank": failure.rank, "last_error": failure.message.strip()}
    with suppress(OSError):  # the disk may be what has failed
        runs.write(file, json.dumps(status))


def _silence(package: str) -> None:
    """Turns off a package's loggers, which set levels of their own: we say what happened, once."""
    for name in [package, *logging.root.manager.loggerDict]:
        if name.startswith(package):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def _config(folder: Path, nproc: int, nodes: Nodes | None, grace: int) -> LaunchConfig:
    common: dict[str, Any] = {
        "nproc_per_node": nproc,
        "max_restarts": 0,
        "logs_specs": DefaultLogsSpecs(log_dir=str(folder)),
        "metrics_cfg": {},
        "signals_to_handle": ",".join(number.name for number in stop.CODES),
    }
    if "shutdown_timeout" in LaunchConfig.__dataclass_fields__:  # from PyTorch 2.12 on; before, it is 30 s
        common["shutdown_timeout"] = grace
    if nodes is None:
        return LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            rdzv_configs={"is_host": True, "timeout": 60},
            local_addr="127.0.0.1",
            **common,
        )
    return LaunchConfig(
        min_nodes=nodes.total,
        max_nodes=nodes.total,
        run_id="lasptrain",
        rdzv_backend="static",
        rdzv_endpoint=nodes.rendezvous,
        rdzv_configs={"rank": nodes.rank, "timeout": 300},
        **common,
    )


def cause(codes: dict[int, int], records: Path) -> Failure:
    """Who failed first: the earliest record of one that did not just lose a peer, else a rank killed by a signal."""
    found = sorted(_read_records(records), key=lambda failure: failure.time)
    # The agent asks the others to stop when one has failed, so having been stopped is a cause only if it came first.
    own = [f for f in found if f.code != RankLostError.code and f.kind != Stopped.__name__]
    if own:
        return own[0]
    if hung := [failure for failure in found if failure.kind == watch.HUNG]:
        return hung[0]
    recorded = {failure.rank for failure in found}
    silent = {rank: code for rank, code in codes.items() if rank not in recorded}
    if forced := [rank for rank, code in silent.items() if code == TERMINATED]:
        return Failure(forced[0], TERMINATED, "Killed", f"rank {forced[0]} was told twice to stop: not saved", 0.0)
    killed = {rank: -code for rank, code in silent.items() if code < 0}
    # The agent ends the others by SIGTERM, NCCL by SIGABRT, so a rank that died of anything else comes first.
    late = (0, signal.SIGABRT, signal.SIGTERM)
    for rank, number in sorted(killed.items(), key=lambda item: late.index(item[1] if item[1] in late else 0)):
        if number != signal.SIGTERM or not found:
            name = signal.Signals(number).name
            hint = ": out of host memory?" if number == signal.SIGKILL else ""
            return Failure(rank, RankLostError.code, "killed", f"rank {rank} was killed by {name}{hint}", 0.0)
    if found:
        return found[0]
    rank, code = min(silent.items(), default=(0, INTERNAL))
    return Failure(rank, INTERNAL, "ended", f"rank {rank} ended with exit code {code}, see above", 0.0)


def _read_records(folder: Path) -> Iterator[Failure]:
    for file in folder.glob("*.json"):
        try:
            yield Failure(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue


def report(failure: Failure) -> int:
    """Prints a failure on stderr and returns its code."""
    if failure.kind != KeyboardInterrupt.__name__:
        end = "" if failure.message.endswith("\n") else "\n"
        plain = failure.code in (STOPPED, INTERRUPTED) or (failure.code == INTERNAL and failure.kind != "ended")
        prefix = "" if plain else "error: "
        sys.stderr.write(f"{prefix}{failure.message}{end}")
    return failure.code


def rank_process(
    recipe: Recipe, target: str, *, run: Path | None = None, records: Path | None = None, place: Place = USUAL
) -> NoReturn:
    """Joins the process group, calls the target and ends the process with its code.

    Without `records` no launcher of ours is there to print what happens: rank 0 takes the run folder itself.
    """
    launched = records is not None
    folders = {records} if records else set()
    code, failure = 0, None
    try:
        digest = runs.digest(recipe)
        with ExitStack() as stack:
            if not launched and os.environ["LOCAL_RANK"] == "0":
                recipe = resolve(recipe, int(os.environ["WORLD_SIZE"]))
            _join_group(recipe)
            _agree(digest)
            run, recipe = _share(run, recipe, lambda: stack.enter_context(_adopted(recipe, place)))
            folders.add(run / runs.RANKS)  # other machines' launchers look there too
            _function(target)(recipe, run)
            dist.destroy_process_group()
    except BaseException as error:
        failure = failure_of(int(os.environ["RANK"]), error)
        code = failure.code
        for folder in folders:
            _record(folder, failure)
        if not launched:
            report(failure)
    if not launched and run is not None and os.environ["RANK"] == "0":
        conclude(run, failure)
    sys.stdout.flush()
    sys.stderr.flush()
    if code in (0, STOPPED, INTERRUPTED, NumericalError.code):  # all ranks end so, and rank 0 may have more to do
        watch.leave()
    os._exit(code)  # an interpreter that takes down a group which others still hold may abort


def _join_group(recipe: Recipe) -> None:
    """The process group of all ranks: NCCL for what is on GPUs, gloo for the rest."""
    device = mesh.device()
    timeout = timedelta(seconds=recipe.launch.timeout)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timeout)


def _agree(digest: str) -> None:
    """SetupError on every rank, naming those that were given another recipe than rank 0."""
    digests = mesh.told_by_all(digest)
    others = [str(rank) for rank, other in enumerate(digests) if other != digests[0]]
    if others:
        raise SetupError(
            f"recipe: rank {', '.join(others)} has another one than rank 0; give all the same file and --set"
        )


def _share(run: Path | None, recipe: Recipe, find: Callable[[], Path]) -> tuple[Path, Recipe]:
    """Rank 0's run folder and recipe, on every rank. Where rank 0 fails, the others raise RankLostError."""
    box: list[Any] = [None]
    try:
        if dist.get_rank() == 0:
            run = run or find()
            box = [(str(run), recipe.model_dump())]
    finally:
        dist.broadcast_object_list(box, src=0)
    if box[0] is None:
        raise RankLostError("rank 0 could not open the run folder")
    folder, values = box[0]
    return Path(folder), Recipe.model_validate(values)


def _function(target: str) -> Callable[[Recipe, Path], None]:
    module, _, name = target.partition(":")
    function: Callable[[Recipe, Path], None] = getattr(importlib.import_module(module), name)
    return function


_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed? ?out waiting", re.IGNORECASE)
_NO_MEMORY = re.compile(r"can't allocate memory|out of memory", re.IGNORECASE)


def failure_of(rank: int, error: BaseException) -> Failure:
    """What kind of end an exception is."""
    name = f"rank {rank} on {socket.gethostname()}"
    kind = type(error).__name__
    match error:
        case LaspError():
            code, message = error.code, str(error)
        case KeyboardInterrupt():
            code, message = INTERRUPTED, "interrupted"
        case _ if isinstance(error, MemoryError | torch.OutOfMemoryError) or _NO_MEMORY.search(str(error)):
            hint = "lower train.segment, or set parallel.recompute to full"
            code, message = ResourceError.code, f"{name}: out of memory: {_first_line(error)}; {hint}"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            code, message = ResourceError.code, f"{name}: {error.filename or 'a file'}: no space left; expected some"
        case RuntimeError() if isinstance(error, dist.DistError) or _LOST.search(str(error)):
            code, message = RankLostError.code, f"{name}: lost the other ranks: {_first_line(error)}"
        case _:
            code, message = INTERNAL, f"{name}: {''.join(traceback.format_exception(error))}"
    return Failure(rank, code, kind, message, time.time())


def _first_line(error: BaseException) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(
        r"^\[\S+\] |\. This is typically .*", "", line
    )  # where in torch it was raised, and what torch guesses


def _record(folder: Path, failure: Failure) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        runs.write(folder / f"{failure.rank}.json", json.dumps(failure._asdict()))
    except OSError:
        report(failure)  # nobody could read it there
