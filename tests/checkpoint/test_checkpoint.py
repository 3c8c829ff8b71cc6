"""A committed checkpoint loads on any mesh and equals what was saved; a damaged or unfinished one is never loaded."""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import logging
import os
import pickle  # noqa: TID251  to write what must be refused
import random
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lasptrain.checkpoint import saver as saving
from lasptrain.checkpoint import steps, table, tensors
from lasptrain.checkpoint.load import load
from lasptrain.checkpoint.saver import Saver
from lasptrain.checkpoint.steps import committed, remove_partial
from lasptrain.errors import CheckpointError
from lasptrain.files import sha256
from lasptrain.models.mixer import Kinds
from lasptrain.parallel import mesh as meshes
from lasptrain.parallel.shard import shard_optimizer
from lasptrain.recipe.formats import FORMAT
from lasptrain.recipe.sections import Checkpoint, Optim
from lasptrain.training.optimizer import build_optimizer, clip_gradients
from tests.support.disk import Disk, build, dark, killed, mixed
from tests.support.gloo import CONTEXT, PATIENCE, spawn

Record = Callable[[str, object], None]  # of pytest, see conftest.py
SAVED = ("fsdp", "zero1", "muon fsdp", "muon zero1")  # kinds that runs are saved under
KINDS = ("fsdp", "zero1", "ddp")
META = {"recipe": {"name": "small", "optim": {"lr": 0.01}}, "windows": 4}


class _Net(nn.Module):
    """Tied matrices whose rows do not divide by 2 or 4, vectors, a buffer, and fewer rows than ranks."""

    elementwise: ClassVar[Kinds] = {"embed": "embedding"}

    def __init__(self, width: int = 6, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width, dtype=dtype)
        self.block = nn.Linear(width, width, dtype=dtype)
        self.narrow = nn.Linear(width, 1, bias=False, dtype=dtype)
        self.head = nn.Linear(width, 11, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        self.register_buffer("angles", torch.arange(3.0))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.block(self.embed(tokens)).tanh()
        out: Tensor = nn.functional.cross_entropy(self.head(h * self.narrow(h)), tokens)
        return out


def save(run: Path, step: int, model: nn.Module, optimizer: Optimizer, meta: dict[str, Any], keep: int) -> None:
    saving.save(run, step, tensors.present(tensors.tensors_of(model, optimizer)), meta, keep)


def _build(kind: str, seed: int = 0, **shape: Any) -> tuple[nn.Module, Optimizer]:
    """A model and its optimizer; other seeds give other values, which loading must replace."""
    optim = Optim(kind="muon" if kind.startswith("muon") else "adamw", lr=0.01)
    kind = kind.removeprefix("muon ")
    torch.manual_seed(seed)
    net = _Net(**shape)
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp_sp",))
        fully_shard(net.block, mesh=mesh)
        fully_shard(net, mesh=mesh)
    model = DistributedDataParallel(net) if kind in ("ddp", "zero1") else net
    optimizer = build_optimizer(model, optim, next(model.parameters()).dtype)
    return model, shard_optimizer(optimizer, meshes.build(1, dist.get_world_size()), kind)


def _train(net: nn.Module, optimizer: Optimizer, steps: range) -> list[float]:
    """Train on 4 x 5 tokens a step, a function of the step; return the global loss of each step."""
    losses = []
    for step in steps:
        tokens = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(step))
        loss = net(tokens[dist.get_rank() :: dist.get_world_size()].flatten())
        loss.backward()
        clip_gradients(net, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / dist.get_world_size())
    return losses


def _full(net: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Every tensor of the state, whole, without going through the code under test."""
    net = net.module if isinstance(net, DistributedDataParallel) else net
    found: dict[str, Any] = dict(net.named_parameters()) | dict(net.named_buffers())
    own = getattr(optimizer, "optim", optimizer)
    for name, parameter in net.named_parameters():
        found |= {f"{name}/{key}": value for key, value in own.state.get(parameter, {}).items()}
    if own is not optimizer:
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, found)
        states = [name for one in ranks for name in one if "/" in name]
        assert len(set(states)) == len(states)  # one has each
        found = {name: value for one in ranks for name, value in one.items()}
    whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in found.items()}
    return {name: t.detach().clone() for name, t in whole.items()}


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Any mesh


def _save_on_four(rank: int, world: int, run: Path) -> list[tuple[dict[str, Tensor], list[float]]]:
    saved = []
    for kind in SAVED:
        net, optimizer = _build(kind)
        _train(net, optimizer, range(3))
        save(run / kind, 3, net, optimizer, META, keep=2)
        saved.append((_full(net, optimizer), _train(net, optimizer, range(3, 6))))
    return saved


def _load_and_continue(rank: int, world: int, run: Path, kinds: list[str]) -> list[tuple[Any, ...]]:
    results = []
    for saved in SAVED:
        for kind in kinds:
            if kind.startswith("muon") != saved.startswith("muon"):
                continue
            net, optimizer = _build(kind, seed=1)
            loaded = load(run / saved, net, optimizer, lambda step: {"recipe": META["recipe"]})
            assert loaded is not None
            state = _full(net, optimizer)
            results.append((saved, loaded.step, loaded.meta, state, _train(net, optimizer, range(3, 6))))
    return results


def _on_two(rank: int, world: int, run: Path, own: Path) -> list[tuple[Any, ...]]:
    _states_are_spread()
    _resume_is_bitwise(own / "resume")
    _one_rank_cannot_write(rank, own / "full")
    _one_rank_sees_a_hostile_table(rank, own / "hostile")
    return _load_and_continue(rank, world, run, [*KINDS, *(f"muon {kind}" for kind in KINDS)])


def _states_are_spread() -> None:
    """With zero1 every rank keeps states, and each is on one rank only."""
    net, optimizer = _build("zero1")
    _train(net, optimizer, range(1))
    kept = torch.tensor(sum(state["exp_avg"].numel() for state in getattr(optimizer, "optim").state.values()))  # noqa: B009
    assert kept > 0
    dist.all_reduce(kept)
    assert kept == sum(parameter.numel() for parameter in net.parameters())


def _resume_is_bitwise(run: Path) -> None:
    for kind in (*KINDS, "muon fsdp", "muon zero1"):
        net, optimizer = _build(kind)
        losses = _train(net, optimizer, range(20))
        first, first_optimizer = _build(kind)
        before = _train(first, first_optimizer, range(10))
        save(run / kind, 10, first, first_optimizer, META, keep=1)
        second, second_optimizer = _build(kind, seed=1)
        assert load(run / kind, second, second_optimizer) is not None
        assert before + _train(second, second_optimizer, range(10, 20)) == losses
        assert _same(_full(net, optimizer), _full(second, second_optimizer))


def _one_rank_cannot_write(rank: int, run: Path) -> None:
    """A real EFBIG on rank 1 is every rank's error; the step before stays and nothing else is left."""
    net, optimizer = _build("fsdp")
    save(run, 1, net, optimizer, META, keep=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"step 2 not saved: rank 1: File too large$"):
            save(run, 2, net, optimizer, META, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-1"]
    dist.barrier()  # the other rank has looked too, before one begins the next save
    save(run, 2, net, optimizer, META, keep=1)
    loaded = load(run, net, optimizer)
    assert loaded is not None
    assert loaded.step == 2


def _one_rank_sees_a_hostile_table(rank: int, run: Path) -> None:
    """What one rank refuses is refused by all, before any of them waits for another."""
    net, optimizer = _build("fsdp")
    save(run, 1, net, optimizer, META, keep=1)
    original = table._Unpickler.find_class
    if rank == 1:
        setattr(table._Unpickler, "find_class", _refuse)  # noqa: B010
    with pytest.raises(CheckpointError, match="rank 1: refused"):
        load(run, net, optimizer)
    setattr(table._Unpickler, "find_class", original)  # noqa: B010


def _refuse(*_: Any) -> Any:
    raise CheckpointError("refused")


@pytest.mark.fault("a disk that refuses to write")
def test_saved_on_four_loads_on_two_on_one_and_replicated(tmp_path: Path) -> None:
    run = tmp_path / "run"
    states = dict(zip(SAVED, spawn(4, _save_on_four, run)[0], strict=True))
    kinds = ["plain", *KINDS, "muon plain", "muon fsdp"]
    for other in (spawn(2, _on_two, run, tmp_path), spawn(1, _load_and_continue, run, kinds)):
        for rank in other:
            for saved, step, meta, loaded, continued in rank:
                state, losses = states[saved]
                assert (step, meta) == (3, META)
                assert _same(loaded, state), saved
                assert continued == pytest.approx(losses, rel=1e-5)


# One process


@pytest.fixture
def run(group: None, tmp_path: Path) -> Path:
    return tmp_path / "run"


def _save_steps(run: Path, steps: list[int], keep: int = 9) -> dict[int, dict[str, Tensor]]:
    """Train and save at each of `steps`; return the state at each."""
    net, optimizer = _build("plain")
    states = {}
    done = 0
    for step in steps:
        _train(net, optimizer, range(done, step))
        save(run, step, net, optimizer, META, keep=keep)
        states[step] = _full(net, optimizer)
        done = step
    return states


def _load_state(run: Path) -> tuple[int, dict[str, Tensor]] | None:
    net, optimizer = _build("plain", seed=1)
    loaded = load(run, net, optimizer, lambda step: META)
    return None if loaded is None else (loaded.step, _full(net, optimizer))


def _names(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


def test_no_checkpoint(run: Path) -> None:
    assert _load_state(run) is None
    remove_partial(run)


def test_state_before_the_first_step(run: Path) -> None:
    """A run that was stopped in its first step continues as if nothing had happened."""
    net, optimizer = _build("plain")
    save(run, 0, net, optimizer, META, keep=1)
    again, again_optimizer = _build("plain", seed=1)
    assert load(run, again, again_optimizer) is not None
    untouched, untouched_optimizer = _build("plain")
    for n, o in ((net, optimizer), (again, again_optimizer), (untouched, untouched_optimizer)):
        _train(n, o, range(3))
        assert _same(_full(n, o), _full(net, optimizer))


def test_weights_alone(run: Path) -> None:
    state = _save_steps(run, [2])[2]
    net, _ = _build("plain", seed=1)
    assert load(run, net, None) is not None
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.named_parameters())


def test_keep_prunes_only_our_own(run: Path) -> None:
    checkpoints = run / "checkpoints"
    for name in ("step-1", "step-01", "step-2.bak", "notes", ".step-7.tmp-0123abcd", ".step-8.del"):
        (checkpoints / name).mkdir(parents=True)
        (checkpoints / name / "file").touch()
    _save_steps(run, [2, 4, 6, 8], keep=2)
    strangers = {"step-1", "step-01", "step-2.bak", "notes"}
    assert _names(run) == strangers | {".step-7.tmp-0123abcd", ".step-8.del", "step-6", "step-8"}
    remove_partial(run)
    assert _names(run) == strangers | {"step-6", "step-8"}
    assert committed(run) == [8, 6, 1]


Damage = Callable[[Path], None]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _swap(path: Path) -> None:
    path.write_bytes((path.parent.parent / "step-2" / path.name).read_bytes())


@pytest.mark.parametrize("damage", [_flip, _shorten, _lengthen, _swap, Path.unlink])
@pytest.mark.fault("a damaged file of a checkpoint")
def test_damage_is_named_and_the_older_step_taken(
    run: Path, damage: Damage, caplog: pytest.LogCaptureFixture, record_property: Record
) -> None:
    states = _save_steps(run, [2, 4])
    folder = run / "checkpoints" / "step-4"
    intact = run / "intact"
    shutil.copytree(folder, intact)
    files = sorted(path.name for path in folder.iterdir())
    assert files == [".metadata", "__0_0.distcp", "manifest.json"]
    for name in files:
        caplog.clear()
        damage(folder / name)
        if damage is _swap and name == ".metadata":
            continue  # the table of tensors is the same in every step
        found = _load_state(run)
        assert found is not None
        assert found[0] == 2
        assert _same(found[1], states[2])
        warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == 1
        assert f"{folder} is damaged" in warnings[0]
        assert name in warnings[0]
        shutil.rmtree(folder)
        shutil.copytree(intact, folder)
    assert _load_state(run) is not None
    record_property("times", len(files) - (damage is _swap))


@pytest.mark.fault("a damaged file of a checkpoint", times=2)
def test_nothing_intact_is_an_error(run: Path) -> None:
    _save_steps(run, [2, 4])
    for step in (2, 4):
        _flip(run / "checkpoints" / f"step-{step}" / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"none of the steps \[4, 2\] is intact") as caught:
        _load_state(run)
    assert caught.value.code == 4


@pytest.mark.fault("a damaged file of a checkpoint")
def test_a_given_up_timeline_is_set_aside(run: Path) -> None:
    """Training went on from step 2 because 6 was damaged: neither keep=1 nor a later load may trust the old 6."""
    _save_steps(run, [2, 6])
    _flip(run / "checkpoints" / "step-6" / "__0_0.distcp")
    states = _save_steps(run, [4], keep=1)
    found = _load_state(run)
    assert found is not None
    assert found[0] == 4
    assert _same(found[1], states[4])
    assert committed(run) == [4]
    assert {name.rpartition("-")[0] for name in _names(run)} == {"step", "step-6.bad"}


def _rewrite(folder: Path, **changes: Any) -> None:
    """Change a manifest, and make it agree with the files and with itself, as an attacker would."""
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    del manifest["sha256"]
    for name, entry in manifest["files"].items():
        path = folder / name
        entry |= {"size": path.stat().st_size, "sha256": sha256(path)}
    manifest["sha256"] = steps._digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


class _Payload:
    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.args


@pytest.mark.fault("a hostile checkpoint")
@pytest.mark.parametrize("function", [os.mkdir, eval, getattr, torch.hub.load])
@pytest.mark.parametrize("protocol", [2, 4])
def test_hostile_table_is_refused(run: Path, function: Callable[..., Any], protocol: int) -> None:
    _save_steps(run, [2])
    folder = run / "checkpoints" / "step-2"
    proof = run / "proof"
    arguments = {os.mkdir: (str(proof),), eval: (f"__import__('os').mkdir({str(proof)!r})",)}
    payload = _Payload(function, *arguments.get(function, (str(proof), "parent")))
    (folder / ".metadata").write_bytes(pickle.dumps(payload, protocol=protocol))
    _rewrite(folder)
    with pytest.raises(CheckpointError, match=r"\.metadata refers to .*; refused"):
        _load_state(run)
    assert not proof.exists()


@pytest.mark.fault("a hostile checkpoint")
def test_table_pointing_outside_is_refused(run: Path) -> None:
    _save_steps(run, [2])
    folder = run / "checkpoints" / "step-2"
    table = pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301
    for place in table.storage_data.values():
        place.relative_path = "../../secret"
    (folder / ".metadata").write_bytes(pickle.dumps(table))
    _rewrite(folder)
    with pytest.raises(CheckpointError, match=r"points at '\.\./\.\./secret'"):
        _load_state(run)


@pytest.mark.fault("a hostile checkpoint")
def test_hostile_tensor_file_is_refused(run: Path) -> None:
    """Each tensor in a data file is a torch.save archive, whose pickle must not run either."""
    _save_steps(run, [2])
    folder = run / "checkpoints" / "step-2"
    table = pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301
    proof = run / "proof"
    data = folder / "__0_0.distcp"
    with data.open("wb") as stream:
        for place in table.storage_data.values():
            place.offset = stream.tell()
            archive = io.BytesIO()
            torch.save(_Payload(os.mkdir, str(proof)), archive)
            place.length = stream.write(archive.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(table))
    _rewrite(folder)
    with pytest.raises(CheckpointError, match="not loaded: rank 0: UnpicklingError"):
        _load_state(run)
    assert not proof.exists()


@pytest.mark.fault("a hostile checkpoint", times=2)
def test_manifest_names_must_be_plain_and_format_known(run: Path) -> None:
    _save_steps(run, [2])
    folder = run / "checkpoints" / "step-2"
    (run / "outside").touch()
    _rewrite(folder, files={"../../outside": {}})
    with pytest.raises(CheckpointError, match="none of the steps"):
        _load_state(run)
    _rewrite(folder, files={}, format=FORMAT + 1)
    with pytest.raises(CheckpointError, match=f"format {FORMAT + 1}, written by lasptrain"):
        _load_state(run)


def test_every_difference_of_tensors_is_listed_and_nothing_overwritten(run: Path) -> None:
    _save_steps(run, [2])
    net, optimizer = _build("plain", seed=1, width=8)
    net.register_buffer("angles", None)
    net.register_buffer("extra", torch.zeros(2))
    before = _full(net, optimizer)
    with pytest.raises(CheckpointError) as caught:
        load(run, net, optimizer)
    lines = str(caught.value).splitlines()
    assert caught.value.code == 4
    assert "tensors differ" in lines[0]
    assert "  model.embed.weight: checkpoint [11, 6] float32, model [11, 8] float32" in lines
    assert "  optimizer.block.bias.exp_avg: checkpoint [6] float32, model [8] float32" in lines
    assert "  model.angles: checkpoint [3] float32, model has none" in lines
    assert "  model.extra: checkpoint has none, model [2] float32" in lines
    after = _full(net, optimizer)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    half, half_optimizer = _build("plain", dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"block\.weight: checkpoint \[6, 6\] float32, model \[6, 6\] bfloat16"):
        load(run, half, half_optimizer)


def test_differences_of_the_recipe_are_listed(run: Path) -> None:
    _save_steps(run, [2])
    net, optimizer = _build("plain")
    expect = {"recipe": {"name": "small", "optim": {"lr": 0.02}}, "windows": 4, "seed": 7}
    with pytest.raises(CheckpointError) as caught:
        load(run, net, optimizer, lambda step: expect)
    assert str(caught.value).splitlines()[1:] == ["  recipe.optim.lr: 0.01, now 0.02", "  seed: None, now 7"]


# Killed while saving


class _Killed(BaseException):
    """Stands for the end of the process: nothing handles it."""


@pytest.mark.fault("an end before a call that changes the disk, while saving")
def test_a_save_that_dies_in_any_call_hurts_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    """Die before the n-th call that changes what is on disk, for every n, while step 4 replaces step 2."""
    states = _save_steps(run, [2])
    outcomes = []
    for n in range(100):
        trial = run.with_name(f"trial-{n}")
        shutil.copytree(run, trial)
        net, optimizer = _build("plain", seed=1)
        load(trial, net, optimizer)
        _train(net, optimizer, range(2, 4))
        states[4] = _full(net, optimizer)
        calls = iter(range(n + 1))

        def dying(function: Callable[..., Any], calls: Iterator[int] = calls) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                if next(calls, None) is None:
                    raise _Killed
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "mkdir"), (Path, "open"), (shutil, "rmtree")):
                patch.setattr(owner, name, dying(getattr(owner, name)))
            try:
                save(trial, 4, net, optimizer, META, keep=1)
                outcomes.append("saved")
            except (_Killed, CheckpointError):
                outcomes.append("died")
        found = _load_state(trial)
        assert found is not None
        assert _same(found[1], states[found[0]])
        remove_partial(trial)
        assert _names(trial) <= {"step-2", "step-4"}
        if outcomes[-1] == "saved":
            assert _names(trial) == {"step-4"}
            break
    assert outcomes[-1] == "saved"
    assert len(outcomes) > 10
    record_property("times", outcomes.count("died"))


def _survived(run: Path, unsynced: Callable[[Path], bool] = lambda path: False) -> tuple[int, bool]:
    """How many states a kill or a power cut may leave while steps replace each other, until in one something is amiss.

    Amiss is a visible step that is damaged, or an acknowledged one that is neither there nor replaced by a newer one.
    """
    run.mkdir()
    disk, chance, seen = Disk(run, unsynced), random.Random(0), set[str]()
    net, optimizer = _build("plain")
    acknowledged, good = 0, True

    def cut() -> None:
        nonlocal good
        for choose in (killed, dark, *[mixed(chance)] * 12):
            tree = disk.after(choose)
            state = f"{acknowledged} {hashlib.sha256(repr(tree).encode()).hexdigest()}"
            if good and state not in seen:
                seen.add(state)
                build(tree, run.parent / "state")
                found = list(steps.inspect(run.parent / "state", thorough=True))
                intact = [step.step for step in found if not step.problems]
                good = len(intact) == len(found) and max(intact, default=0) >= acknowledged
                shutil.rmtree(run.parent / "state")

    for step in (1, 2, 3):
        _train(net, optimizer, range(step, step + 1))
        with disk.recording(cut):
            save(run, step, net, optimizer, META, keep=1)
        acknowledged = step
        cut()
    return len(seen), good


@pytest.mark.fault("a kill or a power cut after such a call")
def test_no_power_cut_loses_what_was_acknowledged(group: None, tmp_path: Path, record_property: Record) -> None:
    """At every call that changes the disk. Without one kind of fsync it would be lost, so this test can fail."""
    states, good = _survived(tmp_path / "run")
    assert good and states > 80
    record_property("times", states)
    assert not _survived(tmp_path / "without-files", Path.is_file)[1]
    assert not _survived(tmp_path / "without-step", lambda path: path.name.startswith(".step"))[1]
    assert not _survived(tmp_path / "without-checkpoints", lambda path: path.name == "checkpoints")[1]


TRIALS = 25


def _rank_of_trial(rank: int, run: Path, store: Path, acknowledged: Path) -> None:
    """Save every step through a Saver, with values that are a function of the step, until killed.

    First load what the trial before has left: whole, and not older than the last step that was said to be committed.
    """
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=30)
    )
    net, optimizer = _build("plain")
    said = int(acknowledged.read_text())
    if rank == 0:
        remove_partial(run)
    loaded = load(run, net, optimizer)
    done = loaded.step if loaded else 0
    assert done >= said, f"step {done} is the newest, {said} was acknowledged"
    assert loaded is None or all(bool((part == done).all()) for part in _full(net, optimizer).values())
    saver = Saver(run, net, optimizer, Checkpoint(keep=2), done)
    state = [
        *net.parameters(),
        *net.buffers(),
        *(t for s in tensors._states(optimizer).values() for t in s.values()),
    ]
    for step in range(done + 1, 10**6):
        with torch.no_grad():
            for tensor in state:
                tensor.fill_(float(step))
        saver.save(step, META)
        if rank == 0 and saver.newest:
            _say(acknowledged, saver.newest)


def _say(acknowledged: Path, step: int) -> None:
    new = acknowledged.with_suffix(".new")
    new.write_text(str(step))
    new.replace(acknowledged)


def _fork(function: Callable[..., None], *args: Any) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function(*args)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def _kill_trials(folder: Path, trials: int) -> None:
    """Kill rank 0, rank 1 or both at a random time, over and over in one run folder; a quarter of the times in a save.

    Runs in a process of its own.
    """
    torch.set_num_threads(1)
    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT), 2)
    chance = random.Random(0)
    run, acknowledged = folder / "run", folder / "acknowledged"
    acknowledged.write_text("0")
    trial = caught = 0
    while trial < trials or caught < trials // 4:
        ranks = [_fork(_rank_of_trial, rank, run, folder / f"store-{trial}", acknowledged) for rank in (0, 1)]
        started = acknowledged.read_text()
        while acknowledged.read_text() == started:
            assert os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, f"trial {trial}"
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.1))
        victims = chance.choice([[0], [1], [0, 1]])
        for rank in victims:
            os.kill(ranks[rank], signal.SIGKILL)
        time.sleep(0.02)
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        caught += any(run.glob("checkpoints/.step-*"))
        trial += 1


@pytest.mark.slow
@pytest.mark.fault("kill -9 of a rank or two at a random time, while saving", times=25)
def test_kill_9_while_saving(tmp_path: Path) -> None:
    process = CONTEXT.Process(target=_kill_trials, args=(tmp_path, TRIALS + 1), daemon=True)
    process.start()
    process.join(PATIENCE)
    process.kill()
    assert process.exitcode == 0, (tmp_path / "stderr").read_text()
    assert int((tmp_path / "acknowledged").read_text()) > TRIALS


def _load_late(rank: int, world: int, run: Path) -> tuple[int, str]:
    """Rank 1 sees files later than rank 0, as over a network, and not at all; what is loaded, and what is said then."""
    net, optimizer = _build("ddp")
    save(run, 3, net, optimizer, META, keep=2)
    saved = _full(net, optimizer)
    net, optimizer = _build("ddp", seed=1)
    real, unseen = Path.stat, itertools.repeat(None, 8)  # looks at files

    def stat(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        if path.suffix == ".distcp" and next(unseen, True) is None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return real(path, follow_symlinks=follow_symlinks)

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(Path, "stat", stat)
        loaded = load(run, net, optimizer)
        assert loaded is not None and _same(_full(net, optimizer), saved)
        unseen = itertools.repeat(None)
        patch.setattr(steps, "LAG", 0.3)
        try:
            load(run, net, optimizer)
        except CheckpointError as error:
            return loaded.step, str(error)
    return loaded.step, ""


def test_files_may_show_up_late_on_other_machines(tmp_path: Path) -> None:
    for step, said in spawn(2, _load_late, tmp_path):
        assert step == 3 and ("none of the steps [3] is intact" in said or "Stale file handle" in said)


def test_a_leftover_that_cannot_be_deleted_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left = tmp_path / "checkpoints" / ".step-3.del"
    left.mkdir(parents=True)

    def rmtree(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path / ".nfs0001"))

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    remove_partial(tmp_path)
    assert "cannot delete" in caplog.text and ".nfs0001" in caplog.text
