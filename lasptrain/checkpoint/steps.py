"""Steps on disk: listed, verified, committed, deleted."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from lasptrain import __version__, architectures
from lasptrain.checkpoint.table import METADATA as METADATA
from lasptrain.checkpoint.table import Json, read_table
from lasptrain.checkpoint.votes import reason_of
from lasptrain.errors import CheckpointError, LaspError
from lasptrain.files import read, sha256, sync
from lasptrain.recipe.formats import FORMAT, is_format, upgraded
from lasptrain.run.folder import CHECKPOINTS
from lasptrain.run.folder import committed as committed

MANIFEST = "manifest.json"
SPARE = 1.1  # free space asked for, as a multiple of what is written
ASIDE = 2  # steps put aside that stay, for a person
LAG = 60.0  # seconds by which a network file system may show one machine changes later than another
log = logging.getLogger(__name__)


def folder_of(run: Path, step: int) -> Path:
    """The folder of a committed step."""
    return run / CHECKPOINTS / f"step-{step}"


def _plain(name: str) -> str:
    if Path(name).name != name or "\0" in name:
        raise ValueError("no plain file name")
    return name


class Step(NamedTuple):
    """A step on disk: bytes of its files, ranks that wrote it, Unix time of its commit, its problems."""

    step: int
    size: int
    world: int | None
    time: float
    problems: list[str]


def inspect(run: Path, *, thorough: bool) -> Iterator[Step]:
    """Yield the steps of RUN, newest first; `thorough` hashes files, otherwise sizes are compared. One process."""
    for step in committed(run):
        folder = folder_of(run, step)
        try:
            manifest, problem = read_manifest(folder, step)
        except CheckpointError as error:
            manifest, problem = {}, str(error)
        listed = manifest.get("files", {})
        problems = [problem] if problem else []
        for name, entry in listed.items():
            problems += problems_of(folder / name, entry, thorough=thorough)
        if thorough and not problems:
            try:
                read_table(folder, listed)
            except (CheckpointError, OSError) as error:
                problems = [reason_of(error)]
        size = sum(path.lstat().st_size for path in folder.iterdir())
        yield Step(step, size, manifest.get("world"), folder.stat().st_mtime, problems)


def expired(run: Path, keep: int, keep_every: int = 0, newest: int | None = None) -> list[int]:
    """Return the steps up to `newest` (default: all) but the newest `keep` of them and multiples of `keep_every`.

    A folder without a manifest of ours is not among them.
    """
    steps = [step for step in committed(run) if newest is None or step <= newest]
    doomed = [step for step in steps[max(keep, 1) :] if not (keep_every and step % keep_every == 0)]
    return [step for step in doomed if _ours(folder_of(run, step), step)]


def _ours(folder: Path, step: int) -> bool:
    try:
        return read_manifest(folder, step)[1] is None
    except CheckpointError:
        return False


def delete(run: Path, steps: list[int]) -> None:
    """Delete steps. For one process that alone may write RUN."""
    for step in steps:
        folder, gone = folder_of(run, step), run / CHECKPOINTS / f".step-{step}.del"
        try:
            folder.rename(gone)
            sync(run / CHECKPOINTS)  # or a power cut may show a half-deleted folder under its old name
            shutil.rmtree(gone)
        except OSError as error:
            log.warning("cannot delete %s: %s", folder, reason_of(error))


def remove_partial(run: Path) -> None:
    """Delete leftovers of killed saves and deletions. For one process that alone may write RUN."""
    folder = run / CHECKPOINTS
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if re.fullmatch(r"\.step-\d+\.(tmp-[0-9a-f]+|del)", path.name):
            try:
                shutil.rmtree(path)
            except OSError as error:  # such as a file that a network file system keeps for whoever has it open
                log.warning("cannot delete %s: %s", path, reason_of(error))


def begin(run: Path, step: int, size: int) -> str:
    """Make the folder to write into and return its name."""
    folder = run / CHECKPOINTS
    folder.mkdir(parents=True, exist_ok=True)
    sync(run)
    free = shutil.disk_usage(folder).free
    if free < SPARE * size:
        raise CheckpointError(f"{folder} has {free:,} bytes free, a checkpoint needs {int(SPARE * size):,}")
    name = f".step-{step}.tmp-{secrets.token_hex(4)}"
    (folder / name).mkdir()
    return name


def commit(folder: Path, step: int, meta: Json, files: Json, world: int) -> None:
    """Write the manifest, then give the folder its final name; everything is on disk when this returns."""
    if set(files) != (found := {path.name for path in folder.iterdir()}):
        raise CheckpointError(f"{folder} should hold {sorted(files)}, found {sorted(found)}")
    versions = {"lasptrain": __version__, "torch": torch.__version__, "python": platform.python_version()}
    meta = json.loads(json.dumps(meta, allow_nan=False))  # as a reader will see it
    manifest = {"format": FORMAT, "step": step, "meta": meta, "world": world, "versions": versions, "files": files}
    text = json.dumps(manifest | {"sha256": _digest(manifest)}, indent=1, sort_keys=True)
    with (folder / MANIFEST).open("x", encoding="utf-8") as stream:
        stream.write(text)
    sync(folder / MANIFEST)
    sync(folder)
    parent = folder.parent
    for other in committed(parent.parent):
        # Training starts from the newest intact step, so a step from here on belongs to a timeline that was given up.
        if other >= step:
            (parent / f"step-{other}").rename(parent / f"step-{other}.bad-{time.time_ns() // 10**6}")
    folder.rename(parent / f"step-{step}")
    sync(parent)
    for path in put_aside(parent.parent)[ASIDE:]:
        log.warning("%s: more than %d steps were put aside; the oldest is deleted", path, ASIDE)
        shutil.rmtree(path, ignore_errors=True)


def put_aside(run: Path) -> list[Path]:
    """Return the folders of steps that were overtaken by newer saves, the newest first."""
    folder = run / CHECKPOINTS
    paths = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()] if folder.is_dir() else []
    found = [(int(match[1]), path) for path in paths if (match := re.fullmatch(r"step-\d+\.bad-(\d+)", path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _digest(manifest: Json) -> str:
    """Return the SHA-256 of a manifest without its own digest."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class _Kept(BaseModel):
    """Base of what a manifest must hold; it may hold more."""

    model_config = ConfigDict(strict=True)


class _File(_Kept):
    size: NonNegativeInt
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Guard(_Kept):
    norms: list[float] = []
    left_out: NonNegativeInt = 0


class _Order(_Kept):
    window: PositiveInt = 1


class _Meta(_Kept):
    model: Json = {}
    recipe: Json = {}
    guard: _Guard = _Guard()
    order: _Order = _Order()
    dataset: str | None = None


class _Manifest(_Kept):
    format: PositiveInt
    step: NonNegativeInt
    meta: _Meta
    files: dict[Annotated[str, AfterValidator(_plain)], _File]
    world: PositiveInt | None = None


def read_manifest(folder: Path, step: int) -> tuple[Json, str | None]:
    """Return (manifest, None), or ({}, its problem). Raises CheckpointError if a newer lasptrain wrote it."""
    try:
        manifest = json.loads(read(folder / MANIFEST, own=True))
        digest = manifest.pop("sha256", None)
        if digest != _digest(manifest):
            return {}, f"{MANIFEST} does not match its own SHA-256"
    except FileNotFoundError:
        return {}, f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        return {}, f"{MANIFEST}: {reason_of(error)}"
    number = manifest.get("format")
    if is_format(number) and number > FORMAT:
        versions = manifest.get("versions")
        version = versions.get("lasptrain") if isinstance(versions, dict) else None
        raise CheckpointError(f"{folder} has format {number}, written by lasptrain {version!s:.99}; {FORMAT} fits")
    try:
        _Manifest.model_validate(manifest)
        meta = manifest["meta"]
        if model := meta.get("model"):
            meta["model"] = architectures.completed(upgraded("model", model, manifest["format"]))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        return {}, f"{MANIFEST}: {'.'.join(map(str, first['loc']))!s:.99}: {first['msg']}"
    except (LaspError, ValueError, TypeError, AttributeError) as error:
        return {}, f"{MANIFEST}: {reason_of(error).splitlines()[0]}"
    if manifest["step"] != step:
        return {}, f"{MANIFEST} is of step {manifest['step']}"
    return manifest, None


def survey(folder: Path, step: int) -> tuple[Json, str | None, Json]:
    """Return `read_manifest`, and those of its files that are present with their size."""
    manifest, problem = read_manifest(folder, step)
    return manifest, problem, {n: e for n, e in manifest.get("files", {}).items() if _present_on_disk(folder / n, e)}


def wait_visible(folder: Path, seen: Json) -> None:
    """Wait, at most LAG, until this rank sees what rank 0 has seen, which another machine may show later."""
    deadline = time.monotonic() + LAG
    while (
        not all(_present_on_disk(folder / name, entry) for name, entry in seen.items()) and time.monotonic() < deadline
    ):
        time.sleep(0.1)


def _present_on_disk(path: Path, entry: Json) -> bool:
    try:
        return bool(path.stat(follow_symlinks=False).st_size == entry["size"])
    except OSError:
        return False


def problems_of(path: Path, entry: Json, *, thorough: bool = True) -> Iterator[str]:
    """Yield the problems of a file that the manifest describes as `entry`."""
    try:
        if path.is_symlink() or not path.is_file():
            yield f"{path.name} is missing"
        elif (size := path.stat().st_size) != entry["size"]:
            yield f"{path.name} has {size} bytes instead of {entry['size']}"
        elif thorough and sha256(path) != entry["sha256"]:
            yield f"{path.name} does not match its SHA-256"
    except OSError as error:
        yield f"{path.name}: {error.strerror}"


def compare_meta(folder: Path, expect: Json, meta: Json) -> None:
    """Raise CheckpointError listing the keys of `expect` whose value in the checkpoint differs.

    Data are compared by `content`, or by `dataset` where the checkpoint is of before there was a `content`.
    """
    data, other = ("content", "dataset") if "content" in meta else ("dataset", "content")
    expect = {key: value for key, value in expect.items() if key != other}
    saved, now = dict(_leaves(meta)), dict(_leaves(json.loads(json.dumps(expect))))
    lines = [f"{key}: {saved.get(key)!r}, now {value!r}" for key, value in now.items() if saved.get(key) != value]
    if data in now and saved.get(data) != now[data]:
        lines.append("so the text of data.source, or the way it is prepared, has changed since")
    if any(key.endswith(".mixed") for key, value in now.items() if saved.get(key) != value):
        lines.append(
            "so it mixed its sources as lasptrain 0.1.0 did, in whose blocks windows of a source had another order; "
            "pretrain --from that run goes on with its weights, in a new one"
        )
    if lines:
        raise CheckpointError("\n  ".join([f"{folder} is of another run:", *lines]))


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value
