"""Launching: ranks agree, the cause of a failure is told once, and nothing outlives its launcher."""

import errno
import fcntl
import json
import os
import pwd
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch._C._distributed_c10d import HashStore

from data_tools.prepared import cache_folder, manifests
from lasptrain.errors import CheckpointError, LaspError, NumericalError, SetupError, Stopped
from lasptrain.process import meeting
from lasptrain.process.environment import first_host, joined_ranks
from lasptrain.process.failure import Failure, all_saved, failure_of, root_cause, stopped_by
from lasptrain.process.launcher import _no_signal_lost, launch
from lasptrain.process.location import resolve
from lasptrain.process.signals import ECHO
from lasptrain.process.watchdog import HUNG, ORPHANED, PULSE, all_left
from lasptrain.recipe.loading import dump_saved, load
from lasptrain.recipe.schema import Recipe
from lasptrain.run import folder as runs
from tests.support import program
from tests.support.clock import Clock
from tests.support.gloo import PATIENCE
from tests.support.program import Started

RECIPE = """\
model: {arch: tnl, dim: 8, layers: 1, heads: 1, mlp: 8}
data: {source: text.txt, tokenizer: bytes, window: 64, cache: cache, validation: 0}
optim: {lr: 1e-3}
train: {steps: 2, batch: 2, precision: fp32}
eval: {windows: 0}
launch: {timeout: 20}
"""

Start = Callable[..., Started]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 100)
    return tmp_path


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Starts `python -m MODULE ARGUMENTS…` in the folder, torch imported; nothing of it is left at the end."""
    started: list[Started] = []

    def start(*arguments: str, module: str = "tests.support.fake_train", **environment: str) -> Started:
        started.append(program.start(module, *arguments, folder=folder, logs=folder / "logs", **environment))
        return started[-1]

    yield start
    for one in started:
        one.kill()


def end(started: Started) -> tuple[int, str]:
    """Its exit code and what it said on stderr."""
    code, _, said = started.end()
    return code, said


def until(what: Callable[[], bool]) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ranks(folder: Path) -> list[dict[str, object]]:
    return [json.loads(file.read_text()) for file in sorted((folder / "runs" / "tiny").glob("rank-*.json"))]


def record(folder: Path, rank: int) -> dict[str, object]:
    """The last word of a rank, or of who has ended it."""
    found: dict[str, object] = json.loads((folder / "runs" / "tiny" / "ranks" / f"{rank}.json").read_text())
    return found


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def test_ranks_get_the_resolved_recipe(folder: Path, start: Start) -> None:
    assert end(start("agree", "tiny.yaml", "2")) == (0, "")
    cores = len(os.sched_getaffinity(0))
    told = {"world": 2, "dp": 2, "sp": 1, "vocab": 320, "threads": str(max(1, cores // 2))}
    assert ranks(folder) == [told, told]
    stored = load(folder / "runs" / "tiny" / "recipe.yaml")
    assert (stored.name, stored.mesh.dp, stored.model.vocab) == ("tiny", 2, 320)
    assert not list((folder / "runs" / "tiny" / "ranks").iterdir())


@pytest.mark.parametrize(
    ("target", "code", "message"),
    [
        ("refuse", 6, "error: step 3: loss nan; expected a number\n"),
        ("full", 8, f"error: rank 1 on {socket.gethostname()}: metrics: no space left; expected some\n"),
        pytest.param("deaf", 7, "error: rank 1 was killed by SIGKILL: out of host memory?\n", marks=pytest.mark.slow),
    ],
)
@pytest.mark.fault("a rank that dies, hangs, lags or fails; a launcher killed")
def test_the_cause_is_told_once_with_its_code(folder: Path, start: Start, target: str, code: int, message: str) -> None:
    assert end(start(target, "tiny.yaml", "2")) == (code, message)
    assert status(folder)["code"] == code
    if target == "deaf":  # by the watchdog, not by the agent half a minute later; `test_watchdog` says when
        assert record(folder, 0)["kind"] == ORPHANED


gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.gpu
@gpus
@pytest.mark.parametrize("target", ["die_in_nccl", "die_in_a_message"])
def test_ranks_that_wait_in_a_kernel_are_ended(folder: Path, start: Start, target: str) -> None:
    code, said = end(start(target, "tiny.yaml", "2"))
    assert code == 7 and said.endswith("error: rank 1 was killed by SIGKILL: out of host memory?\n"), said
    assert since_the_fault(folder) < 5


@pytest.mark.gpu
@gpus
@pytest.mark.parametrize("target", ["pause_in_nccl", "pause_in_a_message"])
def test_a_stopped_rank_for_which_others_wait_in_a_kernel_is_named_and_ended(
    folder: Path, start: Start, target: str
) -> None:
    (folder / "tiny.yaml").write_text(RECIPE.replace("timeout: 20", "timeout: 60, hang: 2"))
    code, said = end(start(target, "tiny.yaml", "2"))
    assert code == 7 and f"error: rank 1 on {socket.gethostname()} hung after" in said and "it is stopped" in said, said
    assert since_the_fault(folder) < 2 + 5


def since_the_fault(folder: Path) -> float:
    """Seconds from what a rank has done to itself to the end of the run."""
    time = status(folder)["time"]
    assert isinstance(time, float)
    return time - (folder / "runs" / "tiny" / "fault").stat().st_mtime


@pytest.mark.slow
@pytest.mark.fault("a rank that dies, hangs, lags or fails; a launcher killed")
def test_a_bug_in_a_rank_shows_one_traceback(folder: Path, start: Start) -> None:
    code, said = end(start("bug", "tiny.yaml", "1"))
    assert code == 70
    assert said.count("Traceback") == 1
    assert said.startswith("rank 0 on ")
    assert said.endswith("ZeroDivisionError: an accident\n")
    left = record(folder, 0)
    assert (left["rank"], left["code"], left["kind"]) == (0, 70, "ZeroDivisionError")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (NumericalError("step 3: loss nan"), 6, "step 3: loss nan"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nto"), 8, "rank 2 .*: out of memory: .* train.segment"),
        (MemoryError(), 8, "rank 2 on .*: out of memory: MemoryError"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 8, "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "a.bin"), 8, "rank 2 on .*: a.bin: no space left"),
        (RuntimeError("[/x/gloo/pair.cc:1] Connection closed by peer [a]:1. This is typically your fault"), 7,
         r"rank 2 on .*: lost the other ranks: Connection closed by peer \[a\]:1"),
        (dist.DistBackendError("watchdog"), 7, "rank 2 on .*: lost the other ranks: watchdog"),
        (RuntimeError("shapes differ"), 70, "RuntimeError: shapes differ"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)  # fmt: skip
def test_what_an_exception_means(error: BaseException, code: int, message: str) -> None:
    failure = failure_of(2, error)
    assert failure.code == code
    assert re.search(message, failure.message)
    assert code == 70 or "\n" not in failure.message


def _pids(folder: Path, count: int) -> list[int]:
    """The ranks of the target `wait`, once all are there."""

    def told() -> list[str]:
        return [text for file in (folder / "runs" / "tiny").glob("pid-*") if (text := file.read_text())]

    until(lambda: len(told()) == count)
    return [int(pid) for pid in told()]


def _gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def status(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "runs" / "tiny" / "status.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.fault("a signal, wherever a run is")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 75), (signal.SIGKILL, -9)])
def test_a_signal_to_the_launcher_ends_all(folder: Path, start: Start, number: int, code: int) -> None:
    """Ranks that have nothing to save leave at once, the others (`heed`) as soon as they have saved."""
    launcher = start("heed" if number == signal.SIGUSR1 else "wait", "tiny.yaml", "2")
    pids = _pids(folder, 2)
    if number == signal.SIGINT:
        busy, said = end(start("agree", "tiny.yaml", "1"))
        assert busy == 5
        assert f"in use by process {launcher.process.pid} on {socket.gethostname()} since 2" in said
    launcher.send(number)
    told = f"stopped by {signal.Signals(number).name}; " if code > 0 else ""
    ended, said = end(launcher)
    assert ended == code and said.startswith(told) and said.count("\n") == bool(told), said
    until(lambda: all(map(_gone, pids)))  # no rank outlives its launcher
    if code > 0:
        assert (status(folder)["state"], status(folder)["code"]) == ("stopped", code)
    assert len(list(folder.glob("runs/tiny/saving-*"))) == (2 if number == signal.SIGUSR1 else 0)


@pytest.mark.fault("a signal, wherever a run is")
def test_a_signal_while_data_is_prepared_ends_at_once(
    folder: Path, signals: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    stages: list[str] = []

    @contextmanager
    def preparing() -> Iterator[Callable[[str, int, int], None]]:
        def progress(stage: str, done: int, total: int) -> None:
            stages.append(stage)
            if stage == "write":
                os.kill(os.getpid(), signal.SIGTERM)

        yield progress

    monkeypatch.setattr("lasptrain.process.location.preparing", preparing)
    with pytest.raises(Stopped, match="stopped by SIGTERM; training had not begun") as interruption:
        launch(load("tiny.yaml"), nproc=1)
    assert interruption.value.code == 75 and stages == ["encode", "write"]
    assert not list((folder / "cache").rglob("dataset.json")) and not (folder / "runs").exists()
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert resolve(load("tiny.yaml"), 1, folder / "runs").recipe.model.vocab == 320
    assert len(list((folder / "cache").rglob("dataset.json"))) == 1


def test_a_signal_is_not_lost_in_a_finalizer(signals: None) -> None:
    """Python prints what is raised there and goes on; here the handler is called again, and raises again."""

    class Finalized:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)  # the handler is called

    with pytest.raises(Stopped, match="stopped by SIGINT; training had not begun"), _no_signal_lost():
        one = Finalized()
        del one
        time.sleep(30)


@pytest.mark.slow
@pytest.mark.fault("a signal, wherever a run is")
def test_a_second_signal_leaves_at_once(folder: Path, start: Start) -> None:
    (folder / "slow.yaml").write_text("name: tiny\n" + RECIPE.replace("steps: 2", "steps: 600"))
    launcher = start("heed", "slow.yaml", "2")
    _pids(folder, 2)
    launcher.send(signal.SIGTERM)
    until(lambda: len(list(folder.glob("runs/tiny/saving-*"))) == 2)
    time.sleep(ECHO + 0.1)
    launcher.send(signal.SIGTERM)
    code, _ = end(launcher)
    assert code == 143 and not list(folder.glob("runs/tiny/saved-*"))
    assert status(folder)["code"] == 143


@pytest.mark.slow
@pytest.mark.fault("a rank that dies, hangs, lags or fails; a launcher killed")
def test_a_lost_rank_is_started_again_where_asked(folder: Path, start: Start) -> None:
    code, said = end(start("die_once", "tiny.yaml", "2", RESTARTS="1"))
    assert code == 0
    assert said == "rank 1 was killed by SIGKILL: out of host memory?; restart 1 of 1\n"
    assert [told["world"] for told in ranks(folder)] == [2, 2]
    assert (status(folder)["state"], status(folder)["restarts"]) == ("finished", 1)


@pytest.mark.slow
@pytest.mark.fault("a rank that dies, hangs, lags or fails; a launcher killed")
def test_a_stopped_rank_is_named_and_ended(folder: Path, start: Start) -> None:
    (folder / "tiny.yaml").write_text(RECIPE.replace("timeout: 20", "timeout: 60, hang: 2"))
    code, said = end(start("pause", "tiny.yaml", "2"))
    assert code == 7
    assert f"error: rank 1 on {socket.gethostname()} hung after" in said and "it is stopped" in said
    assert "fake_train.py" in said  # the stack of the rank that waits
    assert record(folder, 1)["kind"] == HUNG  # `test_watchdog` says when
    assert status(folder)["rank"] == 1 and "hung" in str(status(folder)["last_error"])


@pytest.mark.fault("no rendezvous, or ranks that do not belong together")
def test_a_port_that_is_taken_is_told(start: Start) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        place = f"127.0.0.1:{other.getsockname()[1]}"
        code, said = end(start("agree", "tiny.yaml", "1", "2", "0", place, "mesh.sp=2"))
    assert code == 5 and said.startswith(f"error: --rdzv: no rendezvous at {place}: ") and said.count("\n") == 1, said


ALONE: dict[str, tuple[list[str], dict[str, str]]] = {  # in a job of two machines, or a step of four tasks
    "machine 0": (["agree", "tiny.yaml", "1", "2", "0", "127.0.0.1:PORT"], {}),
    "machine 1": (["agree", "tiny.yaml", "1", "2", "1", "127.0.0.1:PORT"], {}),
    "rank 0": (["agree", "tiny.yaml", "0"], {"SLURM_PROCID": "0"}),
    "rank 2": (["agree", "tiny.yaml", "0"], {"SLURM_PROCID": "2"}),
}


@pytest.mark.parametrize(("who", "number"), list(zip(ALONE, [signal.SIGINT, signal.SIGTERM] * 2, strict=True)))
@pytest.mark.fault("a signal, wherever a run is")
def test_a_signal_is_heard_while_others_are_waited_for(folder: Path, start: Start, who: str, number: int) -> None:
    arguments, variables = ALONE[who]
    port = str(free_port())
    slurm = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = slurm | variables if variables else {}
    alone = start(*(argument.replace("PORT", port) for argument in arguments), **environment)
    if who.endswith("0"):  # it listens
        until(lambda: _listens(int(port)) or not alone.process.is_alive())
    else:  # somebody listens, who is no store, so that it is known to have come
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", int(port)))
            listening.listen()
            listening.settimeout(PATIENCE / 10)
            listening.accept()[0].close()
    time.sleep(0.2)
    alone.send(number)
    began = time.monotonic()
    code, said = end(alone)
    assert time.monotonic() - began < 10  # torch would wait for 20 s, `launch.timeout`
    assert code == (130 if number == signal.SIGINT else 75), said
    why = "nothing was unsaved" if "rank" in who else "training had not begun"
    assert said == ("" if who == "rank 2" else f"stopped by {signal.Signals(number).name}; {why}\n")


def _listens(port: int) -> bool:
    with socket.socket() as trying:
        return trying.connect_ex(("127.0.0.1", port)) == 0


def test_who_is_waited_for_is_told_every_15_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    come = {20.0: "3", 40.0: "1"}
    store = HashStore()

    def sleep(seconds: float) -> None:
        clock.seconds += 0.5
        if clock.seconds in come:
            store.set(f"here/rank/{come[clock.seconds]}", "")

    monkeypatch.setattr(meeting, "time", SimpleNamespace(monotonic=clock, sleep=sleep))
    for rank in ("2", "0"):
        store.set(f"here/rank/{rank}", "")
    meeting.meet(store, "rank", 0, 4, "a:1", 100)
    whom = "of 4 at a:1"
    told = [f"rank 1, 3 {whom}: 15 s of 100 s", f"rank 1 {whom}: 30 s of 100 s"]
    assert capsys.readouterr().err == "".join(f"waiting for {line}\n" for line in told)
    with pytest.raises(SetupError, match=r"waited 30 s for rank 4 of 5 at a:1 in vain \(launch.timeout\)"):
        meeting.meet(store, "rank", 1, 5, "a:1", 29.6, quiet=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("variables", "options", "code", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, {}, 5, "RANK=0, WORLD_SIZE=2: found in the environment without LOCAL_RANK, "
         "MASTER_ADDR, MASTER_PORT; expected all five as torchrun sets them, or none: unset RANK WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1", "LOCAL_RANK": "0"}, {}, 5,
         "WORLD_SIZE=2: found in the environment without RANK; .* unset WORLD_SIZE$"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1", "LOCAL_RANK": "0"}, {}, 5,
         "RANK=2, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR=a, MASTER_PORT=1: no rank of a job; .*"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1", "LOCAL_RANK": "0"}, {"nproc": 2}, 2,
         "--nproc: found where 2 ranks are already started .RANK, .* by torchrun.; expected one of both"),
        ({"SLURM_STEP_ID": "1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}, {"nproc": 2, "max_restarts": 1}, 2,
         "--nproc, --max-restarts: found where 4 ranks are already started .SLURM_STEP_ID, .* by srun."),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_NUM_NODES": "2"}, {}, 5,
         "SLURM_NTASKS=8, SLURM_JOB_NUM_NODES=2: found without SLURM_STEP_ID, .* expected srun lasptrain pretrain"),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "4294967291"}, {}, 5,
         "SLURM_NTASKS=8: found without SLURM_STEP_ID.*or --nproc N, for N ranks on this machine alone"),
    ],
)  # fmt: skip
def test_ranks_that_nobody_has_started_are_not_joined(
    folder: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], options: dict[str, int], code: int,
    message: str,
) -> None:  # fmt: skip
    for name in program.FOREIGN:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaspError, match=message) as refused:
        launch(load(folder / "tiny.yaml"), **options)  # type: ignore[arg-type]
    assert refused.value.code == code and "\n" not in str(refused.value)


def test_inside_an_allocation_ranks_of_its_own_are_started_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in program.FOREIGN:
        monkeypatch.delenv(name, raising=False)
    batch = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
    one = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    for variables, alone in ((batch, True), (batch | {"SLURM_NTASKS": "1"}, False), (one, False), ({}, False)):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            assert joined_ranks(alone) is None


@pytest.mark.slow
def test_under_torchrun_it_joins(folder: Path, start: Start) -> None:
    arguments = ["--standalone", "--nproc-per-node", "2", "-m", "tests.support.fake_train", "agree", "tiny.yaml", "0"]
    code, said = end(start(*arguments, module="torch.distributed.run", OMP_NUM_THREADS="1"))
    assert code == 0, said
    assert [told["world"] for told in ranks(folder)] == [2, 2]


def slurm(start: Start, target: str, *recipes: str) -> list[tuple[int, str]]:
    """How the tasks of a Slurm step end, one for each recipe."""
    common = {"SLURM_STEP_NUM_TASKS": str(len(recipes)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"SLURM_STEP_ID": "3", "OMP_NUM_THREADS": "1"}
    tasks = [
        start(target, recipe, "0", SLURM_PROCID=str(task), SLURM_LOCALID=str(task), **common)
        for task, recipe in enumerate(recipes)
    ]
    return [end(task) for task in tasks]


@pytest.mark.slow
def test_under_slurm_it_joins(start: Start) -> None:
    first, second = slurm(start, "refuse", "tiny.yaml", "tiny.yaml")
    assert first[0] == 7
    assert second == (6, "error: step 3: loss nan; expected a number\n")


@pytest.mark.slow
@pytest.mark.fault("no rendezvous, or ranks that do not belong together")
def test_ranks_with_different_recipes_are_refused(folder: Path, start: Start) -> None:
    (folder / "other.yaml").write_text(RECIPE.replace("1e-3", "2e-3"))
    message = "error: recipe: rank 1 has another one than rank 0; give all the same file and --set\n"
    assert slurm(start, "agree", "tiny.yaml", "other.yaml") == [(5, message), (5, message)]
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("a", "a"), ("a,b", "a"), ("node[07-12,20],login", "node07"), ("n-[3]", "n-3"), ("c1n[08,09]x", "c1n08x")],
)
def test_first_host_of_a_slurm_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def _records(folder: Path, *failures: Failure) -> Path:
    for failure in failures:
        (folder / f"{failure.rank}.json").write_text(json.dumps(failure._asdict()))
    return folder


def test_the_cause_is_the_earliest_that_did_not_just_lose_a_peer(tmp_path: Path) -> None:
    lost = Failure(0, 7, "RuntimeError", "lost", 1.0)
    own = Failure(1, 3, "DataError", "own", 3.0)
    later = Failure(2, 70, "KeyError", "later", 4.0)
    assert root_cause({0: 7, 1: 3, 2: 70}, _records(tmp_path, lost, own, later)) == own
    (tmp_path / "9.json").write_text("{")
    assert root_cause({0: 7}, tmp_path) == own


def test_a_killed_rank_is_the_cause_and_one_that_the_agent_ended_is_not(tmp_path: Path) -> None:
    lost = Failure(0, 7, "RuntimeError", "lost", 1.0)
    assert root_cause({2: -15, 1: -9}, tmp_path).rank == 1
    assert root_cause({2: -15, 0: 7}, _records(tmp_path, lost)) == lost
    assert root_cause({2: -11, 0: 7}, tmp_path)[:2] == (2, 7)
    assert root_cause({0: -6, 1: -9, 2: -15}, tmp_path)[:2] == (1, 7)


def test_a_hung_rank_is_the_cause_and_one_that_was_forced_to_leave_says_so(tmp_path: Path) -> None:
    assert root_cause({1: 143, 0: 7}, _records(tmp_path, Failure(0, 7, "RuntimeError", "lost", 1.0)))[:2] == (1, 143)
    interruption = Failure(0, 75, "Stopped", "stopped by SIGTERM", 1.0)
    assert root_cause({0: 75, 1: -9}, _records(tmp_path, interruption))[:2] == (1, 7)
    assert root_cause({0: 75, 1: 7}, _records(tmp_path, Failure(1, 7, "RuntimeError", "lost", 2.0))) == interruption
    (tmp_path / "1.json").unlink()
    hung = Failure(1, 7, "hung", "rank 1 hung", 2.0)
    assert root_cause({1: -9, 0: 7}, _records(tmp_path, hung)) == hung


def test_a_signal_behind_the_last_save_says_that_every_step_is_saved(tmp_path: Path) -> None:
    """Whatever has become of the ranks: they have left in order, or were killed while they showed the summary."""
    pulse = tmp_path / f"{PULSE}0"
    pulse.write_text("17 9 123.0")
    assert not all_left(tmp_path) and not all_saved(tmp_path)
    lost = stopped_by(signal.SIGTERM, True, False, tmp_path)
    assert (lost.code, lost.message) == (143, "stopped before the newest step could be saved")
    pulse.write_text("0 9 inf".ljust(64))
    (tmp_path / "status.json").write_text('{"steps": 4, "committed": 2}')
    assert all_left(tmp_path) and not all_saved(tmp_path)
    (tmp_path / "status.json").write_text('{"steps": 4, "committed": 4}')
    assert all_saved(tmp_path)
    for number, code in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
        found = stopped_by(number, True, True, tmp_path)
        assert (found.code, found.message) == (code, f"stopped by {number.name}; every step is saved")


def test_a_user_without_home_is_told_what_to_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> NoReturn:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    data = load(folder / "tiny.yaml").data.model_copy(update={"cache": None})
    with pytest.raises(SetupError, match=r"data.cache: user \d+ has no account and HOME is not set.*XDG_CACHE_HOME"):
        cache_folder(data)
    assert manifests(data) is None  # so `check` needs none
    assert cache_folder(data.model_copy(update={"cache": "there"})) == Path("there")


def test_a_rank_that_left_no_record_is_a_bug(tmp_path: Path) -> None:
    assert root_cause({3: 1}, tmp_path).code == 70
    assert root_cause({0: 7, 1: -15, 2: 8, 3: 5}, tmp_path)[:2] == (2, 8)
    assert root_cause({0: 7}, tmp_path).code == 7


# The run folder


@pytest.fixture
def recipe(folder: Path) -> Recipe:
    return load(folder / "tiny.yaml", ["model.vocab=320"])


@pytest.mark.parametrize(
    ("there", "usual", "fresh"),
    [
        ([], "tiny", "tiny"),
        (["tiny"], "tiny", "tiny-2"),
        (["tiny", "tiny-2"], "tiny-2", "tiny-3"),
        (["tiny", "tiny-2", "tiny-10"], "tiny-10", "tiny-11"),
        (["tiny-7"], "tiny-7", "tiny-8"),
        (["tiny", "tiny-x", "tiny-01", "tiny-1", "tinyx-3", "other-4"], "tiny", "tiny-2"),
    ],
)
def test_the_newest_run_goes_on_and_fresh_takes_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: list[str], usual: str, fresh: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in there:
        (tmp_path / "runs" / name / "checkpoints").mkdir(parents=True)
    assert runs.choose("tiny") == Path("runs") / usual
    assert runs.choose("tiny", fresh=True) == Path("runs") / fresh
    assert runs.choose("other", Path("runs/tiny")) == Path("runs/tiny")
    assert runs.choose("other", Path("runs/tiny"), fresh=True) == Path("runs") / fresh


@pytest.mark.fault("two runs in one folder")
def test_a_run_folder_is_held_by_one(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with (
        runs.lock(run),
        pytest.raises(SetupError, match=f"in use by process {os.getpid()} on .* since"),
        runs.lock(run),
    ):
        pass
    with runs.lock(run), (run / runs.LOCK).open() as file, pytest.raises(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with runs.lock(run):
        pass


def test_folders_that_are_no_runs_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(SetupError, match=r"holds files but no recipe\.yaml"), runs.lock(tmp_path):
        pass
    with pytest.raises(SetupError, match="expected a run folder"), runs.lock(tmp_path / "thesis.tex"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.tex"}


def test_a_run_of_a_different_recipe_is_refused_with_the_keys(tmp_path: Path, recipe: Recipe) -> None:
    runs.adopt(tmp_path, recipe)
    other = recipe.replace(model={"dim": 16}, data={"seed": 7})
    runs.adopt(tmp_path, other)  # nothing was saved yet
    runs.adopt(tmp_path, recipe)
    (tmp_path / "checkpoints" / "step-2").mkdir(parents=True)
    before = (tmp_path / "recipe.yaml").read_text()
    with pytest.raises(
        CheckpointError, match=r"model.dim: 8 there, 16 here; data.seed: 0 there, 7 here; use .* --from"
    ):
        runs.adopt(tmp_path, other)
    assert (tmp_path / "recipe.yaml").read_text() == before == dump_saved(recipe)


@pytest.mark.parametrize(
    "free",
    ["mesh.sp=2", "mesh.scan=ring", "parallel.recompute=full", "train.steps=9", "train.segment=32", "eval.every=0",
     "checkpoint.keep=9", "launch.timeout=5", "train.kernel=chunked", "data.cache=elsewhere",
     "data.source=moved/text.txt", "optim.lr=1e-4", "guard.spike=skip"],
)  # fmt: skip
def test_how_a_run_is_computed_may_change(folder: Path, recipe: Recipe, free: str) -> None:
    assert not runs.differences(recipe, load(folder / "tiny.yaml", ["model.vocab=320", free]), 1)


@pytest.mark.parametrize(
    "fixed",
    ["model.dim=16", "data.window=32", "data.seed=1", "data.mix_block=8", "train.batch=4",
     "train.seed=1", "train.precision=bf16", "data.reset_at_documents=false", "data.validation=5"],
)  # fmt: skip
def test_what_a_run_computes_may_not_change(folder: Path, recipe: Recipe, fixed: str) -> None:
    other = load(folder / "tiny.yaml", ["model.vocab=320", fixed])
    (changed,) = runs.differences(recipe, other, 1)
    assert changed.startswith(f"{fixed.partition('=')[0]}: ")
    assert runs.digest(recipe) != runs.digest(other)


@given(st.integers(2, 10**8))
def test_any_number_of_runs(tmp_path_factory: pytest.TempPathFactory, number: int) -> None:
    base = tmp_path_factory.mktemp("runs") / "tiny"
    base.with_name(f"tiny-{number}").mkdir()
    assert runs.choose("tiny", base, fresh=True).name == f"tiny-{number + 1}"
