"""Checkpoints: the files of torch's distributed checkpoint (DCP) behind a manifest, and a protocol that commits them.

    RUN/checkpoints/step-1200/                 manifest.json  .metadata  __0_0.distcp  __1_0.distcp …
    RUN/checkpoints/.step-1500.tmp-1f2e3d4c/   being written
    RUN/checkpoints/.step-900.del/             being deleted
    RUN/checkpoints/step-1500.bad-1767225600/  damaged, then overtaken by a newer save; kept for a person

A step exists once `.step-N.tmp-*` has been renamed to `step-N`; whatever dies before that changes nothing else. The
manifest lists every file with its size and SHA-256, so damage is found before anything is loaded. Tensors are stored
under their global names and shapes (`model.NAME`, `optimizer.NAME.exp_avg`, …), so any mesh reads what any other wrote.

DCP alone does neither: it loads flipped bits, casts dtypes silently, executes pickles, and its exceptions escape
`except Exception`. Every rank brings its own error to a vote, so one rank's error becomes the same CheckpointError on
all of them. Ranks share one file system.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pickle  # noqa: TID251  only to restrict it
import platform
import re
import secrets
import shutil
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lasptrain import __version__
from lasptrain.errors import CheckpointError, ResourceError
from lasptrain.parallel.mesh import told_by_all
from lasptrain.recipe import Checkpoint
from lasptrain.training.optimizer import initial_state, initialise_state

FORMAT = 1
FOLDER = "checkpoints"
MANIFEST = "manifest.json"
METADATA = ".metadata"  # DCP's own table of tensors
TIMEOUT = timedelta(minutes=30)  # for which a rank that writes waits for another
SPARE = 1.1  # free space asked for, as a multiple of what is written
LAG = 60.0  # seconds for which a network file system may show one machine what another no longer sees

T = TypeVar("T")
Json = dict[str, Any]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """What was loaded besides tensors: the step, what `save` was given as `meta`, and the folder it came from."""

    step: int
    meta: Json
    folder: Path


def save(
    run: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    meta: Json,
    keep: int,
    group: dist.ProcessGroup | None = None,
    milestone: int = 0,
) -> None:
    """Commit the state after `step` updates as RUN/checkpoints/step-N, then delete all but the newest `keep` steps.

    Multiples of `milestone` stay too. Collective over `group` (default: all ranks); returns when the step is committed.
    `meta` is any JSON object. Raises the same CheckpointError on every rank if any failed; then nothing has changed on
    disk.
    """
    _save(run, step, _present(_tensors(model, optimizer)), meta, keep, milestone, group)


def _save(
    run: Path,
    step: int,
    tensors: dict[str, Tensor],
    meta: Json,
    keep: int,
    milestone: int,
    group: dist.ProcessGroup | None,
) -> None:
    rank = dist.get_rank(group)
    what = f"{run}: step {step} not saved"
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    name = _first(_vote(what, lambda: _begin(run, step, size) if rank == 0 else None, group))
    folder = run / FOLDER / name
    try:
        tables = _vote(what, lambda: _write(folder, tensors, rank, group), group)
        files = {name: entry for table in tables for name, entry in table.items()}
        _vote(what, lambda: _commit(folder, step, meta, files, len(tables)) if rank == 0 else None, group)
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if rank == 0:
        delete(run, surplus(run, keep, milestone, step))


class Saver:
    """Saves a run while it trains on: `save` copies the state to host memory, a thread writes and commits the copy.

    The thread has a group of its own to talk over. One save at a time: the next one, and `wait`, first let it end.
    Collective over all ranks; `patience` saves in a row may fail.
    """

    def __init__(
        self, run: Path, model: nn.Module, optimizer: Optimizer, checkpoint: Checkpoint, newest: int | None
    ) -> None:
        self.newest = newest  # the step that was committed last
        self._run, self._model, self._optimizer, self._cfg = run, model, optimizer, checkpoint
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[None]] | None = None
        self._stage = StateDictStager(pin_memory=torch.cuda.is_available(), share_memory=False)
        self._failed = 0
        self._stall = 0.0

    def save(self, step: int, meta: Json) -> None:
        """Begin to save `step` and return once its state may change. Raises ResourceError as `wait` does."""
        began = time.perf_counter()
        self.wait()
        tensors = self._stage.stage(_present(_tensors(self._model, self._optimizer)))
        cfg = self._cfg
        meta = json.loads(json.dumps(meta))  # may change too
        future = self._thread.submit(_save, self._run, step, tensors, meta, cfg.keep, cfg.milestone, self._group)
        self._pending = step, future
        self._stall += time.perf_counter() - began

    def stall(self) -> float:
        """Seconds for which `save` has held up training since this was asked last."""
        stall, self._stall = self._stall, 0.0
        return stall

    def wait(self, *, last: bool = False) -> None:
        """Let the save that is under way end. ResourceError where too many failed, or the `last` one did."""
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        try:
            future.result()
        except CheckpointError as error:
            self._failed += 1
            if last or self._failed > self._cfg.patience:
                times = f"{self._failed} saves in a row failed" if self._failed > 1 else "a save failed"
                raise ResourceError(f"{times}: {error}") from None
            if dist.get_rank() == 0:
                log.warning("%s; training goes on", error)
        else:
            self._failed, self.newest = 0, step

    def poll(self) -> None:
        """Set `newest` if a save has ended well. Local, so what failed is left to the next collective call."""
        if self._pending is not None and self._pending[1].done() and self._pending[1].exception() is None:
            self.newest = self._pending[0]

    def close(self) -> None:
        """End the thread; a save must not be under way."""
        self._thread.shutdown()


def load(
    run: Path,
    model: nn.Module,
    optimizer: Optimizer | None,
    expect: Json | None = None,
    group: dist.ProcessGroup | None = None,
    until: int | None = None,
) -> Loaded | None:
    """Load the newest intact step of RUN, not after `until`, into `model` and `optimizer`, on any mesh; None if none.

    Collective over `group` (default: all ranks). A damaged step is named in a warning and the next older one is taken.
    Without an optimizer only the model is read. Nothing on disk changes, and nothing in memory before all checks
    have passed. Raises CheckpointError if there are steps but none is intact, if what was saved as `meta` differs from
    `expect` in a key that `expect` has, or if names, shapes or dtypes of tensors differ.
    """
    rank = dist.get_rank(group)
    steps = _first(_vote(f"{run}: cannot list checkpoints", lambda: committed(run) if rank == 0 else None, group))
    steps = [step for step in steps if until is None or step <= until]
    for step in steps:
        folder = run / FOLDER / f"step-{step}"
        manifest, problems = _verify(folder, step, group)
        if not problems:
            _compare_meta(folder, expect or {}, manifest["meta"])
            _restore(folder, manifest["files"], model, optimizer, group)
            return Loaded(step, manifest["meta"], folder)
        if rank == 0:
            log.warning("%s is damaged and not used: %s", folder, "; ".join(problems))
    if steps:
        raise CheckpointError(
            f"{run / FOLDER}: none of the steps {steps} is intact; move the folder away to start over"
        )
    return None


def committed(run: Path) -> list[int]:
    """The steps in RUN/checkpoints, newest first, intact or not."""
    folder = run / FOLDER
    entries = list(folder.iterdir()) if folder.is_dir() else []
    matches = [re.fullmatch(r"step-(\d+)", path.name) for path in entries if path.is_dir() and not path.is_symlink()]
    return sorted((int(match[1]) for match in matches if match and match[1] == str(int(match[1]))), reverse=True)


def latest(run: Path) -> Path | None:
    """The folder of the newest step whose manifest is intact; its other files are not looked at."""
    for step in committed(run):
        folder = run / FOLDER / f"step-{step}"
        if not _read_manifest(folder, step)[1]:
            return folder
    return None


class Step(NamedTuple):
    """A step on disk: bytes of its files, ranks that wrote it, Unix time of its commit, what is wrong with it."""

    step: int
    size: int
    world: int | None
    time: float
    problems: list[str]


def inspect(run: Path, *, thorough: bool) -> Iterator[Step]:
    """The steps of RUN, newest first; `thorough` reads all their bytes, otherwise sizes are compared. One process."""
    for step in committed(run):
        folder = run / FOLDER / f"step-{step}"
        try:
            manifest, problem = _read_manifest(folder, step)
        except CheckpointError as error:
            manifest, problem = {}, str(error)
        files = manifest.get("files", {})
        problems = [problem] if problem else []
        for name, entry in files.items():
            problems += _problems(folder / name, entry, thorough=thorough)
        size = sum(path.lstat().st_size for path in folder.iterdir())
        yield Step(step, size, manifest.get("world"), folder.stat().st_mtime, problems)


def surplus(run: Path, keep: int, milestone: int = 0, newest: int | None = None) -> list[int]:
    """The steps up to `newest` (default: all) that neither the newest `keep` nor multiples of `milestone` are.

    A folder without a manifest of ours is not among them.
    """
    steps = [step for step in committed(run) if newest is None or step <= newest]
    doomed = [step for step in steps[max(keep, 1) :] if not (milestone and step % milestone == 0)]
    return [step for step in doomed if _ours(run / FOLDER / f"step-{step}", step)]


def _ours(folder: Path, step: int) -> bool:
    try:
        return _read_manifest(folder, step)[1] is None
    except CheckpointError:
        return False


def delete(run: Path, steps: list[int]) -> None:
    """Delete steps. For one process that alone may write RUN."""
    for step in steps:
        folder, gone = run / FOLDER / f"step-{step}", run / FOLDER / f".step-{step}.del"
        try:
            folder.rename(gone)
            _sync(run / FOLDER)  # or a power cut may show a half-deleted folder under its old name
            shutil.rmtree(gone)
        except OSError as error:
            log.warning("cannot delete %s: %s", folder, _reason(error))


def sweep(run: Path) -> None:
    """Delete what killed saves and deletions left. For one process that alone may write RUN."""
    folder = run / FOLDER
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if re.fullmatch(r"\.step-\d+\.(tmp-[0-9a-f]+|del)", path.name):
            try:
                shutil.rmtree(path)
            except OSError as error:  # such as a file that a network file system keeps for whoever has it open
                log.warning("cannot delete %s: %s", path, _reason(error))


# Voting


def _vote(what: str, action: Callable[[], T], group: dist.ProcessGroup | None) -> list[T]:
    """Run `action` on every rank and return all results by rank, or raise the same CheckpointError on every rank."""
    ballot: tuple[dict[int, str], T | None]
    try:
        ballot = {}, action()
    except CheckpointException as error:  # DCP has gathered it: every rank has the errors of all
        ballot = {rank: _reason(cause) for rank, (cause, _) in error.failures.items()}, None
    except Exception as error:
        ballot = {dist.get_rank(group): _reason(error)}, None
    ballots: list[Any] = told_by_all(ballot, group)
    ranks: dict[str, set[int]] = {}
    for reasons, _ in ballots:
        for rank, reason in reasons.items():
            ranks.setdefault(reason, set()).add(rank)
    if ranks:
        told = (f"rank {', '.join(map(str, sorted(who)))}: {reason}" for reason, who in ranks.items())
        raise CheckpointError(f"{what}: {'; '.join(told)}")
    return [value for _, value in ballots]


def _first(values: list[T | None]) -> T:
    """The value of rank 0, which alone has one."""
    assert values[0] is not None
    return values[0]


def _reason(error: BaseException) -> str:
    """One error in the words of a message: no class for what is plain without it."""
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"


# What is saved


def _tensors(model: nn.Module, optimizer: Optimizer | None) -> dict[str, Tensor]:
    """Every tensor of the state by its name in a checkpoint, sharing memory with the live state; tied ones once.

    What only another rank has is on the meta device: a name, a shape and a dtype.
    """
    module = model.module if isinstance(model, DistributedDataParallel) else model
    states = {} if optimizer is None else _states(optimizer)
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in module.state_dict(keep_vars=True).items():
        name = key.replace("_orig_mod.", "")  # put there by torch.compile
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        tensors[f"model.{name}"] = tensor.detach()
        tensors |= {f"optimizer.{name}.{part}": value for part, value in states.get(tensor, {}).items()}
    return tensors


def _states(optimizer: Optimizer) -> dict[Tensor, dict[str, Tensor]]:
    """AdamW's state by parameter; with ZeRO-1 that of most parameters is on other ranks, and here on meta."""
    own = getattr(optimizer, "optim", optimizer)  # a ZeroRedundancyOptimizer's, of the parameters that it updates here
    initialise_state(own)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        parameter: own.state[parameter]
        if parameter in own.state
        else initial_state(torch.empty_like(parameter, device="meta"))
        for parameter in parameters
    }


def _present(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those that this rank has. Every other one is present on some rank, and is saved and loaded there."""
    return {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}


# Saving


def _begin(run: Path, step: int, size: int) -> str:
    """Make the folder to write into and return its name."""
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    _sync(run)
    free = shutil.disk_usage(folder).free
    if free < SPARE * size:
        raise CheckpointError(f"{folder} has {free:,} bytes free, a checkpoint needs {int(SPARE * size):,}")
    name = f".step-{step}.tmp-{secrets.token_hex(4)}"
    (folder / name).mkdir()
    return name


def _write(folder: Path, tensors: dict[str, Tensor], rank: int, group: dist.ProcessGroup | None) -> Json:
    """Write this rank's files, synced, and return their sizes and digests by name."""
    save_state(tensors, storage_writer=_Writer(folder, thread_count=1, sync_files=True), process_group=group)
    own = list(folder.glob(f"__{rank}_*")) + ([folder / METADATA] if rank == 0 else [])
    return {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in own}


class _Writer(FileSystemWriter):
    """DCP's writer, which tells why the disk refused: its serialiser hides that behind an error of its own.

    To be used with one thread: errors of further ones would be lost.
    """

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise (cause or error) from None

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # the folder's name would be the temporary one


def _commit(folder: Path, step: int, meta: Json, files: Json, world: int) -> None:
    """Write the manifest, then give the folder its final name; everything is on disk when this returns."""
    if set(files) != (found := {path.name for path in folder.iterdir()}):
        raise CheckpointError(f"{folder} should hold {sorted(files)}, found {sorted(found)}")
    versions = {"lasptrain": __version__, "torch": torch.__version__, "python": platform.python_version()}
    meta = json.loads(json.dumps(meta, allow_nan=False))  # as a reader will see it
    manifest = {"format": FORMAT, "step": step, "meta": meta, "world": world, "versions": versions, "files": files}
    text = json.dumps(manifest | {"sha256": _digest(manifest)}, indent=1, sort_keys=True)
    with (folder / MANIFEST).open("x", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    _sync(folder)
    parent = folder.parent
    for other in committed(parent.parent):
        # Training starts from the newest intact step, so a step from here on belongs to a timeline that was given up.
        if other >= step:
            (parent / f"step-{other}").rename(parent / f"step-{other}.bad-{time.time_ns() // 10**6}")
    folder.rename(parent / f"step-{step}")
    _sync(parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(manifest: Json) -> str:
    """SHA-256 of a manifest without its own digest."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# Verifying


def _read_manifest(folder: Path, step: int) -> tuple[Json, str | None]:
    """Return (manifest, None), or ({}, what is wrong with it). Raises CheckpointError if a newer lasptrain wrote it."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        digest = manifest.pop("sha256", None)
    except FileNotFoundError:
        return {}, f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return {}, f"{MANIFEST}: {_reason(error)}"
    if digest != _digest(manifest):
        return {}, f"{MANIFEST} does not match its own SHA-256"
    if manifest["format"] > FORMAT:
        version = manifest["versions"]["lasptrain"]
        raise CheckpointError(
            f"{folder} has format {manifest['format']}, written by lasptrain {version}; {FORMAT} fits"
        )
    if manifest["step"] != step:
        return {}, f"{MANIFEST} is of step {manifest['step']}"
    if strange := [name for name in manifest["files"] if not _plain(name)]:
        return {}, f"{MANIFEST} lists {strange}, which are no plain file names"
    return manifest, None


def _plain(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name


def _verify(folder: Path, step: int, group: dist.ProcessGroup | None) -> tuple[Json, list[str]]:
    """Return (manifest, what is wrong with the step), the same on every rank; ranks share the hashing."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    what = f"{folder} cannot be read"
    manifest, problem, seen = _first(_vote(what, lambda: _look(folder, step) if rank == 0 else None, group))
    if problem:
        return manifest, [problem]
    _await(folder, seen)
    own = sorted(manifest["files"].items())[rank::world]
    found = _vote(what, lambda: [p for name, entry in own for p in _problems(folder / name, entry)], group)
    return manifest, [problem for problems in found for problem in problems]


def _look(folder: Path, step: int) -> tuple[Json, str | None, Json]:
    """`_read_manifest`, and those of its files that are here with their size."""
    manifest, problem = _read_manifest(folder, step)
    return manifest, problem, {n: e for n, e in manifest.get("files", {}).items() if _here(folder / n, e)}


def _await(folder: Path, seen: Json) -> None:
    """Until this rank sees what rank 0 has seen, which another machine may show later; not for longer than LAG."""
    deadline = time.monotonic() + LAG
    while not all(_here(folder / name, entry) for name, entry in seen.items()) and time.monotonic() < deadline:
        time.sleep(0.1)


def _here(path: Path, entry: Json) -> bool:
    try:
        return bool(path.stat(follow_symlinks=False).st_size == entry["size"])
    except OSError:
        return False


def _problems(path: Path, entry: Json, *, thorough: bool = True) -> Iterator[str]:
    """What is wrong with a file that the manifest describes as `entry`."""
    if path.is_symlink() or not path.is_file():
        yield f"{path.name} is missing"
    elif (size := path.stat().st_size) != entry["size"]:
        yield f"{path.name} has {size} bytes instead of {entry['size']}"
    elif thorough and _sha256(path) != entry["sha256"]:
        yield f"{path.name} does not match its SHA-256"


def _compare_meta(folder: Path, expect: Json, meta: Json) -> None:
    """Raise CheckpointError listing the keys of `expect` whose value in the checkpoint is another one."""
    saved, now = dict(_leaves(meta)), dict(_leaves(json.loads(json.dumps(expect))))
    lines = [f"{key}: {saved.get(key)!r}, now {value!r}" for key, value in now.items() if saved.get(key) != value]
    if lines:
        raise CheckpointError("\n  ".join([f"{folder} is of another run:", *lines]))


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value


# Loading


def _restore(
    folder: Path, files: Json, model: nn.Module, optimizer: Optimizer | None, group: dist.ProcessGroup | None
) -> None:
    """Compare the stored tensors with the live ones, then overwrite the live ones."""
    tensors = _tensors(model, optimizer)
    reader = _Reader(folder, files)
    what = f"{folder} not loaded"
    _vote(what, lambda: _compare_tensors(reader.read_metadata(), tensors, partial=optimizer is None), group)
    own = _present(tensors)
    _vote(what, lambda: load_state(own, storage_reader=reader, planner=_Planner(), process_group=group), group)


def _compare_tensors(table: Metadata, tensors: dict[str, Tensor], partial: bool) -> None:
    """Raise CheckpointError listing all names, shapes and dtypes that differ; `partial` leaves the optimizer out."""
    live = {key: _Form(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    stored = {
        key: _Form.of(entry)
        for key, entry in table.state_dict_metadata.items()
        if not (partial and key.startswith("optimizer."))
    }
    lines = [
        f"{key}: checkpoint {stored.get(key, 'has none')}, model {live.get(key, 'has none')}"
        for key in sorted(stored.keys() | live.keys())
        if stored.get(key) != live.get(key)
    ]
    if lines:
        raise CheckpointError("\n  ".join([f"{len(lines)} tensors differ:", *lines]))


class _Form(NamedTuple):
    """Shape and dtype of a tensor; what is no tensor has none."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None

    @classmethod
    def of(cls, entry: object) -> _Form:
        if isinstance(entry, TensorStorageMetadata):
            return cls(tuple(entry.size), entry.properties.dtype)
        return cls((), None)

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


class _Reader(FileSystemReader):
    """DCP's reader, which runs nothing it finds in the table of tensors and follows it to `files` only."""

    def __init__(self, folder: Path, files: Json) -> None:
        super().__init__(folder)
        self.table = folder / METADATA
        self.files = files

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        with self.table.open("rb") as stream:
            table = _Unpickler(stream).load()
        if not isinstance(table, Metadata):
            raise CheckpointError(f"{METADATA} holds {type(table).__name__} instead of a table of tensors")
        for place in table.storage_data.values():
            if place.relative_path not in self.files:
                raise CheckpointError(f"{METADATA} points at {place.relative_path!r}, which is not in the manifest")
        return table


class _Planner(DefaultLoadPlanner):
    """DCP's planner, which never unpickles objects: we store tensors only."""

    def load_bytes(self, read_item: Any, value: object) -> NoReturn:
        raise CheckpointError(f"{read_item.dest_index.fqn} is no tensor")


class _Unpickler(pickle.Unpickler):
    """Knows the classes that DCP's table of tensors consists of, and no other global."""

    CLASSES: tuple[type, ...] = (
        Metadata,
        metadata.MetadataIndex,
        TensorStorageMetadata,
        metadata.TensorProperties,
        metadata.ChunkStorageMetadata,
        metadata.BytesStorageMetadata,
        StorageMeta,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
        torch.Size,
        OrderedDict,
    )

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream)
        self.known: dict[tuple[str, str], Any] = {(cls.__module__, cls.__qualname__): cls for cls in self.CLASSES}
        self.known["torch.serialization", "_get_layout"] = torch.serialization._get_layout

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.known:
            return self.known[module, name]
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        raise CheckpointError(f"{METADATA} refers to {module}.{name}, which no checkpoint needs; refused")


# One process, one tensor at a time


class Opened:
    """The newest step of a run, read by one process tensor by tensor. CheckpointError where it is not intact."""

    def __init__(self, run: Path) -> None:
        steps = committed(run)
        if not steps:
            raise CheckpointError(f"{run / FOLDER}: holds no checkpoint; expected the folder of a run that has saved")
        self.step, self.folder = steps[0], run / FOLDER / f"step-{steps[0]}"
        manifest, problem = _read_manifest(self.folder, self.step)
        files: Json = manifest.get("files", {})
        problems = [problem] if problem else [p for name, e in files.items() for p in _problems(self.folder / name, e)]
        if problems:
            raise CheckpointError(f"{self.folder}: damaged, {'; '.join(problems)}")
        self.meta: Json = manifest["meta"]
        self._reader = _OnceRead(self.folder, files)
        table = self._reader.read_metadata().state_dict_metadata
        self._forms = {key.removeprefix("model."): _Form.of(e) for key, e in table.items() if key.startswith("model.")}
        self.shapes = {name: form.shape for name, form in self._forms.items()}

    def read(self, name: str) -> Tensor:
        """A tensor of the model by its name there."""
        tensor = torch.empty(self._forms[name].shape, dtype=self._forms[name].dtype)
        with _alone():
            load_state({f"model.{name}": tensor}, storage_reader=self._reader, planner=_Planner(), no_dist=True)
        return tensor


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """DCP warns where there is no process group, even if told so, and cloaks errors in one that is no Exception."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            raise error.failures[0][0] from None


class _OnceRead(_Reader):
    """Reads the table of tensors once."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        self.kept: Metadata = getattr(self, "kept", None) or super().read_metadata()
        return self.kept


def write(run: Path, step: int, model: nn.Module, read: Callable[[str], Tensor], meta: Json) -> None:
    """Commit a step of one process: fp32 tensors of `model`, which is on meta, as `read` gives them, no moments yet.

    Tensors are asked for one at a time; DCP holds what is in a file until it is whole, so each has a file of its own.
    """
    tensors = {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"optimizer.{name}.{part}": value for part, value in initial_state(parameter).items()}
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def value(name: str) -> Tensor:
        if name.startswith("model."):
            return read(name.removeprefix("model.")).to(tensors[name].dtype)
        return torch.zeros(tensors[name].shape, dtype=tensors[name].dtype)

    folder = run / FOLDER / _begin(run, step, size)
    try:
        with _alone():
            writer = _Writer(folder, single_file_per_rank=False, thread_count=1, sync_files=True)
            save_state(tensors, storage_writer=writer, planner=_Lazily(value), no_dist=True)
        files = {p.name: {"size": p.stat().st_size, "sha256": _sha256(p)} for p in folder.iterdir()}
        _commit(folder, step, meta, files, 1)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


class _Lazily(DefaultSavePlanner):
    """DCP's planner, which makes each tensor when its turn to be written comes."""

    def __init__(self, value: Callable[[str], Tensor]) -> None:
        super().__init__()
        self.value = value

    def lookup_object(self, index: metadata.MetadataIndex) -> Tensor:
        return self.value(index.fqn)
