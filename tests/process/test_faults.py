"""Runs that are stopped, poisoned or robbed of their disk end as they should, and lose no committed step."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

from data_tools import windows
from data_tools.tokenizer import load_tokenizer
from lasptrain import train
from lasptrain.bench import saving
from lasptrain.checkpoint import saver
from lasptrain.checkpoint import steps as checkpoint
from lasptrain.checkpoint.load import load
from lasptrain.checkpoint.saver import Saver, save
from lasptrain.checkpoint.tensors import present, tensors_of
from lasptrain.cli import main
from lasptrain.data.loader import SliceLoader
from lasptrain.errors import NumericalError, ReplicasError, ResourceError, Stopped
from lasptrain.parallel.replicas import outvoted
from lasptrain.process import signals as stop
from lasptrain.recipe import loading
from lasptrain.recipe.schema import Recipe
from lasptrain.recipe.sections import Checkpoint
from lasptrain.recipe.sections import Guard as Policy
from lasptrain.recipe.yaml12 import dump
from lasptrain.run.metrics import read_metrics
from lasptrain.training import segments, stragglers
from lasptrain.training.guard import ENOUGH, Guard
from lasptrain.training.job import Job
from tests.support.clock import Clock
from tests.support.gloo import PATIENCE, spawn
from tests.support.tables import cells

ROOT = Path(__file__).parents[2]
RECIPE = """
model: {arch: tnl, dim: 16, layers: 2, heads: 2, mlp: 24}
data: {source: SOURCE, tokenizer: bytes, window: 64, cache: CACHE, validation: 300000}
optim: {lr: 1e-2, schedule: constant}
train: {steps: 14, batch: 4, precision: fp32, segment: 32}
checkpoint: {every: 3, keep: 2}
eval: {every: 4, windows: 2, sample: 0}
launch: {timeout: 30}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "text").mkdir()
    for i in range(40):
        (folder / "text" / f"{i}.txt").write_text(f"Document {i} counts: " + " ".join(str(i * j) for j in range(i * 5)))
    text = RECIPE.replace("SOURCE", str(folder / "text")).replace("CACHE", str(folder / "cache"))
    (folder / "tiny.yaml").write_text(text)
    return folder / "tiny.yaml"


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run)]


# Signals, in the ranks


@contextmanager
def at_call(owner: Any, name: str, number: int, act: Callable[[], object]) -> Iterator[None]:
    """Within, `act` comes before call `number` (1 is the first) of the function `owner.name`."""
    function, calls = getattr(owner, name), iter(range(1, 10**6))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            act()
        return function(*args, **kwargs)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, function)


STOPS: tuple[tuple[str, Any, str, int, int], ...] = (
    # Where the signal comes: before call n of a function; the step that must be saved by it.
    ("forward without gradients", segments, "keep_states", 5, 2),
    ("backward", torch.autograd, "backward", 10, 4),
    ("evaluation", train, "validate", 1, 8),
    ("update", train, "set_learning_rate", 2, 10),
    ("saving", saver, "commit", 1, 12),
    ("the last save", train, "finish", 1, 14),
)


def stopped_everywhere(rank: int, world: int, file: Path, folder: Path, kind: str) -> list[tuple[str, str, int]]:
    """Train; one rank alone gets a signal at each place in turn. What was raised, and the newest step on disk."""
    stop.listen()
    recipe = loading.load(file, [f"parallel.data_parallel={kind}", "mesh.sp=2", "model.vocab=320", "train.batch=2"])
    ended = []
    for place, owner, name, number, _ in STOPS:
        stop._noted = 0
        mine = rank == (0 if name == "commit" else world - 1)
        signalled = signal.SIGUSR1 if name == "backward" else signal.SIGTERM
        with at_call(owner, name, number if mine else 0, partial(os.kill, os.getpid(), signalled)):
            try:
                train.train(recipe, folder / kind)
                end = "finished"
            except Stopped as error:
                end = f"{error.code} {error}"
        ended.append((place, end, checkpoint.committed(folder / kind)[0]))
        dist.barrier()
    stop._noted = 0
    train.train(recipe, folder / kind)
    train.train(recipe, folder / f"{kind}-undisturbed")
    if kind == "ddp":
        flipped(rank, recipe, folder / "flipped")
    return ended


def flipped(rank: int, recipe: Recipe, run: Path) -> None:
    """A bit of rank 1's parameters flips in step 5; step 6 is not saved."""
    train_step = train.train_step

    def flipping(job: Job, step: int) -> Any:
        values = train_step(job, step)
        if rank == 1 and step == 4:
            next(job.model.parameters()).detach().view(torch.int32).view(-1)[0] ^= 1
        return values

    train.train_step = flipping
    with pytest.raises(ReplicasError, match="step 6: the parameters of rank 0, 1 differ"):
        train.train(recipe, run)
    train.train_step = train_step


@pytest.mark.fault("a signal, wherever a run is", times=6)
@pytest.mark.parametrize("kind", ["ddp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_signal_to_one_rank_saves_the_newest_step_wherever_it_comes(recipe: Path, tmp_path: Path, kind: str) -> None:
    for run in (kind, f"{kind}-undisturbed", "flipped"):
        (tmp_path / run).mkdir()
    first, second = spawn(2, stopped_everywhere, recipe, tmp_path, kind)
    assert first == second
    for (place, end, step), (*_, saved) in zip(first, STOPS, strict=True):
        assert end.startswith("75 stopped by SIG"), place
        assert end.endswith("; every step is saved") is (saved == 14), place
        assert step == saved or (place == "saving" and step == 13), place
    assert losses(tmp_path / kind) == losses(tmp_path / f"{kind}-undisturbed")
    assert len(losses(tmp_path / kind)) == 14
    assert kind != "ddp" or checkpoint.committed(tmp_path / "flipped") == [3]
    assert outvoted([(0, 5), (0, 5), (0, 4)]) == [2] and outvoted([(0, 5), (1, 4), (0, 5), (1, 3)]) == [1, 3]


@pytest.mark.filterwarnings("ignore")  # the compiler itself does what warns
@pytest.mark.fault("a signal, wherever a run is")
def test_a_signal_while_the_first_step_is_compiled(
    group: None, signals: None, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo import convert_frame

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    stop.listen()
    compiled = loading.load(recipe, ["model.vocab=320", "model.layers=1", "train.compile=true"])
    with (
        at_call(convert_frame, "_compile", 1, partial(os.kill, os.getpid(), signal.SIGTERM)),
        pytest.raises(Stopped, match="the newest step is saved") as interruption,
    ):
        train.train(compiled, tmp_path)
    assert interruption.value.code == 75 and checkpoint.committed(tmp_path) == [0]


@pytest.mark.slow
@pytest.mark.fault("kill -9 or a signal at a random time of a whole run", times=4)
def test_a_run_that_is_killed_again_and_again_is_the_undisturbed_run(tmp_path: Path) -> None:
    """The short form of tests/support/soak.py, in a process of its own: it forks."""
    script = "from pathlib import Path; import sys; from tests.support.soak import soak; soak(Path(sys.argv[1]), 4)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr


# The guard


def test_what_the_guard_says() -> None:
    guard = Guard(Policy(nonfinite="skip", spike="warn", limit=2))
    assert [guard.judge(1.0, 1.0 + i / 100) for i in range(ENOUGH)] == ["accept"] * ENOUGH
    assert guard.judge(1.0, 9.0) == "accept"
    assert guard.judge(1.0, 20.0) == "warn" and "19 times the usual 1.08" in guard.reason
    assert [guard.judge(float("nan"), 1.0), guard.judge(1.0, float("inf"))] == ["skip", "skip"]
    again = Guard(Policy(nonfinite="skip", spike="warn", limit=2))
    again.restore(json.loads(json.dumps(guard.state())))
    for other in (guard, again):
        assert other.judge(float("nan"), 1.0) == "stop" and "guard.limit" in other.reason
    assert Guard().judge(1.0, float("nan")) == "stop"
    assert Guard().judge(1.0, 1e30) == "accept"


@contextmanager
def poisoned(steps: tuple[int, ...], loss: float, norm: float) -> Iterator[list[str]]:
    """Within, loss and gradient norm of these updates (0 is the first) are multiplied; yields what those read."""
    train_step, accumulate = train.train_step, train.accumulate
    now, read = [-1], list[str]()

    def poisoning(job: Job, micro_batches: Any) -> Any:
        found = accumulate(job, micro_batches)
        if now[0] not in steps:
            return found
        read.extend(bytes_of(row) for m in micro_batches for row in torch.cat([piece.tokens for piece in m], 1))
        return found[0] * loss, found[1] * norm

    def stepping(job: Job, step: int) -> Any:
        now[0] = step
        return train_step(job, step)

    train.train_step, train.accumulate = stepping, poisoning
    try:
        yield read
    finally:
        train.train_step, train.accumulate = train_step, accumulate


def bytes_of(tokens: torch.Tensor) -> str:
    return load_tokenizer("bytes").decode(tokens.tolist())


def trained(
    file: Path, run: Path, *overrides: str, bad: tuple[int, ...] = (), loss: float = float("nan"), norm: float = 1.0
) -> list[float | None]:
    """The losses of a run, with what its folder held before."""
    run.mkdir(exist_ok=True)
    whole = ("model.vocab=320", "train.micro_batch=4", "train.segment=64", "eval.every=0")
    with poisoned(bad, loss, norm) as read:
        train.train(loading.load(file, [*whole, *overrides]), run)
    if read:
        (run / "read").write_text(json.dumps(read))
    return [record["loss"] for record in read_metrics(run)]


def weights(run: Path, step: int) -> str:
    """The digest of a step's tensors."""
    manifest = json.loads((run / "checkpoints" / f"step-{step}" / "manifest.json").read_text())
    return str(manifest["files"]["__0_0.distcp"]["sha256"])


@pytest.mark.fault("a loss that is no number, or a spike", times=4)
def test_a_step_that_is_no_number_stops_is_left_out_or_rolled_back(group: None, recipe: Path, tmp_path: Path) -> None:
    skip = trained(recipe, tmp_path / "skip", "guard.nonfinite=skip", "train.steps=9", bad=(4,))
    assert skip[4] is None and None not in skip[:4] + skip[5:]
    (record,) = read_metrics(tmp_path / "skip", "skip")
    assert record["step"] == 5
    (tmp_path / "skip" / "recipe.yaml").write_text(dump(loading.load(recipe)))
    shown = [windows.show_windows(tmp_path / "skip", at=place)[0] for place in record["windows"]]
    texts = ["".join(text for _, _, text in one.documents) for one in shown]
    assert texts == json.loads((tmp_path / "skip" / "read").read_text()) and len(texts) == 4
    for asked in (["--step", "5"], *(["--at", str(place)] for place in record["windows"])):
        said = CliRunner().invoke(main.app, ["data", "inspect", str(tmp_path / "skip"), *asked]).output
        assert said in ("\n".join(map(str, shown)) + "\n", *(f"{one}\n" for one in shown)) and len(said) > 100

    with pytest.raises(NumericalError, match=r"step 5: loss nan.*windows of step 5 start at tokens"):
        trained(recipe, tmp_path / "stop", "train.steps=9", bad=(4,))
    assert checkpoint.committed(tmp_path / "stop")[0] == 4
    assert trained(recipe, tmp_path / "stop", "train.steps=9")[:4] == skip[:4]

    # Back to step 3 after step 7 is what leaves out steps 4 to 7: from then on the same windows, weights and losses.
    rolled = ("guard.nonfinite=rollback", "guard.back=2", "train.steps=9")
    back = trained(recipe, tmp_path / "back", *rolled, bad=(6,))
    without = ("guard.nonfinite=skip", "guard.limit=4", "train.steps=9")
    want = trained(recipe, tmp_path / "without", *without, bad=(3, 4, 5, 6))
    assert back[:3] == want[:3] == skip[:3] and back[3:6] != want[3:6]
    assert back[6:] == want[6:] and back[6] is None and None not in back[7:]
    assert weights(tmp_path / "back", 9) == weights(tmp_path / "without", 9) != weights(tmp_path / "skip", 9)
    (record,) = read_metrics(tmp_path / "back", "rollback")
    assert record["step"] == 7

    with pytest.raises(NumericalError, match="rollback found no checkpoint of step 1 or before"):
        trained(recipe, tmp_path / "young", *rolled, bad=(2,))


@pytest.mark.fault("a loss that is no number, or a spike", times=2)
def test_a_spike_is_told_or_left_out(group: None, recipe: Path, tmp_path: Path) -> None:
    """Also where the run was interrupted between the norms that a spike is measured by and the spike."""
    wanted = trained(recipe, tmp_path / "wanted", "guard.nonfinite=skip", "train.steps=19", bad=(17,))
    for policy, twice in (("warn", False), ("skip", True)):
        run, spike = tmp_path / policy, {"bad": (17,), "loss": 1.0, "norm": 100.0}
        if twice:
            trained(recipe, run, f"guard.spike={policy}", "train.steps=17")
        found = trained(recipe, run, f"guard.spike={policy}", "train.steps=19", **spike)  # type: ignore[arg-type]
        (record,) = read_metrics(run, policy)
        assert record["step"] == 18 and "times the usual" in record["reason"]
        assert found[:17] == wanted[:17] and (found[18] == wanted[18]) is (policy == "skip")


# Stragglers


def test_the_slowest_is_measured_by_the_median() -> None:
    even = [(1.0, 0.2)] * 4
    assert stragglers.slowest([*even, (1.1, 0.2)])[:2] == (4, 1.1)
    assert stragglers.slowest([(3.0, 0.0), (1.0, 0.0)])[:2] == (0, 3.0)
    rank, ratio, why = stragglers.slowest([*even, (1.0, 0.6), (1.0, 0.2)])
    assert rank == 4 and ratio == pytest.approx(2.0) and why == "it waits for data in 60% of the time"
    assert stragglers.slowest([(1.0, 0.9)] * 3).ratio == 1


LATE = {  # calls in which rank 1 loses so many seconds, while every look at the clock takes one
    "data": (SliceLoader, "step", 8.0, 5.0, "it waits for data in 90% of the time"),  # 9 s of 10, rank 0: 1 of 2
    "work": (torch, "mm", 2 / 64, 3.0, "matrix products take 3.0 times the median"),
}


def slowed(rank: int, world: int, file: Path, folder: Path) -> None:
    """Train while rank 1 reads slowly, then while it computes slowly, by a clock of its own."""
    clock = Clock(tick=1)
    patch = pytest.MonkeyPatch()  # for good: the process ends with this function
    patch.setattr(train, "time", SimpleNamespace(perf_counter=clock))
    patch.setattr(train, "StragglerDetector", partial(stragglers.StragglerDetector, now=clock))
    patch.setattr(stragglers, "PERIOD", 0)
    small = ["model.vocab=320", "train.micro_batch=2", "train.segment=64", "train.steps=3", "eval.every=0"]
    recipe = loading.load(file, small)
    for name, (owner, function, seconds, *_) in LATE.items():
        fast = getattr(owner, function)

        def slow(*args: Any, fast: Any = fast, seconds: float = seconds, **kwargs: Any) -> Any:
            clock.seconds += seconds
            return fast(*args, **kwargs)

        setattr(owner, function, slow if rank == 1 else fast)
        train.train(recipe, folder / name)
        setattr(owner, function, fast)


@pytest.mark.fault("a rank that dies, hangs, lags or fails; a launcher killed", times=2)
def test_a_slow_rank_is_named(recipe: Path, tmp_path: Path) -> None:
    for name in LATE:
        (tmp_path / name).mkdir()
    spawn(2, slowed, recipe, tmp_path)
    for name, (*_, ratio, why) in LATE.items():
        (told,) = read_metrics(tmp_path / name, "straggler")
        assert told["what"] == f"rank 1 on {socket.gethostname()} slows a step down {ratio} times: {why}"
        assert json.loads((tmp_path / name / "status.json").read_text())["straggler"] == told["what"]
        found = [(record["slowest_rank"], record["slowest_ratio"]) for record in read_metrics(tmp_path / name)]
        assert found == [(1, pytest.approx(ratio))] * 3


def looks(rank: int, world: int) -> list[tuple[int, float, float]]:
    """Steps of 2 s at which ranks are looked at, the seconds of their work, and the slowest's ratio; rank 2 is slow."""
    clock = Clock()

    def mm(*_: object, **__: object) -> None:
        clock.seconds += (3 if rank == 2 else 1) / 64

    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "mm", mm)
        detector = stragglers.StragglerDetector(torch.device("cpu"), clock)
        for step in range(1, 25):
            before = clock.seconds
            slowest = detector.observe(0.0, 2.0)
            worked = clock.seconds - before
            clock.seconds = before + 2
            if slowest is not None:
                found.append((step, worked, slowest.ratio))
    return found


def test_ranks_are_looked_at_every_20_seconds_of_training() -> None:
    for rank, found in enumerate(spawn(3, looks)):
        seconds = 3.0 if rank == 2 else 1.0
        assert found == [(step, seconds, 3.0) for step in (1, 11, 21)]


# Saving beside training


def small(seed: int) -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Linear(64, 64)
    return model, torch.optim.AdamW(model.parameters(), fused=True)


def test_a_save_holds_the_state_of_its_step_while_training_goes_on(group: None, tmp_path: Path) -> None:
    model, optimizer = small(0)
    torch.nn.init.zeros_(model.weight)
    saver = Saver(tmp_path, model, optimizer, Checkpoint(keep=1, keep_every=2), None)
    for step in range(1, 6):
        saver.save(step, {"step": step})
        with torch.no_grad():
            model.weight.add_(1.0)  # while the thread has not begun to write
    saver.wait(last=True)
    saver.close()
    assert saver.newest == 5
    assert checkpoint.committed(tmp_path) == [5, 4, 2]
    for step in (2, 4, 5):
        again, states = small(1)
        loaded = load(tmp_path, again, states, until=step)
        assert loaded is not None and (loaded.step, loaded.meta) == (step, {"step": step})
        assert bool((again.weight == step - 1).all())


def test_what_saving_costs_is_told(group: None, recipe: Path, tmp_path: Path) -> None:
    one = loading.load(recipe, ["model.vocab=320", "train.micro_batch=4", "train.segment=64"])
    facts, rows = saving._rank(one, tmp_path / "bench", 2)
    assert checkpoint.committed(tmp_path / "bench")[1] == saving.WARM + saving.QUIET
    assert all(0 < stall < written for stall, written, _ in rows) and len(rows) == 2
    (table,) = saving.result(facts | {"step": 2.0, "every": 50}, [saving.Save(0.5, 3.0, 1.5)]).tables
    assert cells(table) == [["0.500", "0.50%", "3.00", "1.50", "2.00%"]]
    assert str(table.title).startswith(f"{facts['size']:,} bytes")
    trained(recipe, tmp_path / "run", "train.steps=7")
    stalls = {record["step"]: record["checkpoint_stall"] for record in read_metrics(tmp_path / "run")}
    assert {step for step, stall in stalls.items() if stall > 0} == {4, 7}


@pytest.mark.fault("a disk that refuses to write", times=2)
def test_a_disk_that_refuses_ends_the_run_after_some_patience(group: None, tmp_path: Path) -> None:
    model, optimizer = small(0)
    saver = Saver(tmp_path, model, optimizer, Checkpoint(max_failures=1), None)
    saver.save(1, {})
    saver.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        saver.save(2, {})
        saver.save(3, {})
        with pytest.raises(ResourceError, match=r"2 saves in a row failed: .*step 3 not saved: rank 0: File too large"):
            saver.save(4, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saver.newest == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1"]
    saver.save(5, {})
    saver.wait(last=True)
    assert checkpoint.committed(tmp_path) == [5, 1]


def ckpt(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(main.app, ["ckpt", *arguments])
    return getattr(done.exception, "code", done.exit_code), done.output


@pytest.mark.fault("a damaged file of a checkpoint")
def test_checkpoints_are_listed_verified_and_pruned(group: None, tmp_path: Path) -> None:
    model, optimizer = small(0)
    for step in range(1, 5):
        save(tmp_path, step, present(tensors_of(model, optimizer)), {}, keep=9)
    (tmp_path / "recipe.yaml").touch()
    damaged = tmp_path / "checkpoints" / "step-4" / "__0_0.distcp"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    code, said = ckpt("verify", str(tmp_path))
    assert code == 4 and "__0_0.distcp does not match its SHA-256" in said and said.count("intact") == 3
    code, said = ckpt("prune", str(tmp_path), "--keep", "1", "--keep-every", "2", "--really")
    assert (code, said) == (0, "deleted step-1\n")  # 3 is the newest that is whole
    assert checkpoint.committed(tmp_path) == [4, 3, 2]
    assert ckpt("list", str(tmp_path / "nothing"))[0] == 4
