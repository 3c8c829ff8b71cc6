"""The run folder: its path, its lock, and the recipe it belongs to. No torch."""

import contextlib
import hashlib
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lasptrain import files
from lasptrain.errors import CheckpointError, ResourceError, SetupError
from lasptrain.recipe.loading import dump_saved, load
from lasptrain.recipe.schema import Recipe

RECIPE, LOCK, RANKS, CHECKPOINTS = "recipe.yaml", "run.lock", "ranks", "checkpoints"
FOLDERS = (RANKS, CHECKPOINTS, "tensorboard", "wandb", "profile", "eval", "base")
FILES = (RECIPE, LOCK, "status.json", "metrics.jsonl", "auto.json", "data.json", "origin.json", "wandb.json")

# Keys that may change where a run goes on: how it is computed, how long, and what a person mends in it, all of the
# optimizer but its kind. Text and tokenizer are told by their content, where the data are opened; of stages
# see `_fixed`.
_FREE = re.compile(
    r"(name|mesh|parallel|guard|checkpoint|eval|track|launch)(\..*)?"
    r"|optim\.(lr|min_lr|schedule|warmup|decay|betas|eps|momentum|weight_decay|clip)"
    r"|train\.(segment|compile|kernel|micro_batch|steps|loss_chunk|z_loss|profile)|data\.(cache|tokenizer)"
)


def choose(name: str, folder: Path | None = None, fresh: bool = False) -> Path:
    """Return the run folder: `folder`, or the newest of runs/NAME, runs/NAME-2, …; if `fresh`, the next free one."""
    base = folder or Path("runs") / name
    numbers = [1] if _occupied(base) else []
    pattern = re.compile(re.escape(base.name) + r"-([2-9]|[1-9]\d{1,8})")
    if base.parent.is_dir():
        names = (pattern.fullmatch(path.name) for path in base.parent.iterdir() if path.is_dir())
        numbers += [int(match[1]) for match in names if match]
    if not numbers or (folder and not fresh):
        return base
    number = max(numbers) + fresh
    return base if number == 1 else base.with_name(f"{base.name}-{number}")


def _occupied(path: Path) -> bool:
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


@contextlib.contextmanager
def lock(run: Path) -> Iterator[None]:
    """Make the run folder and lock it. SetupError where it is in use, not writable, or not a run folder."""
    with _writable(run):
        run.mkdir(parents=True, exist_ok=True)
        if not (run / RECIPE).exists() and not all(map(_begun, run.iterdir())):
            raise SetupError(f"{run}: holds files but no {RECIPE}; expected a run folder or an empty one")
        refuse_links(run)
        file = files.descriptor(run / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        try:
            files.lock(file)
        except OSError:
            raise SetupError(f"{run}: in use by {_holder(run)}; expected it free, or use --fresh or --run") from None
        with _writable(run):
            for left in filter(files.hidden, run.iterdir()):
                left.unlink()
            since = datetime.now(UTC).isoformat(timespec="seconds")
            os.ftruncate(file, 0)
            os.write(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode())
        yield
    finally:
        os.close(file)


@contextlib.contextmanager
def _writable(run: Path) -> Iterator[None]:
    """Turn an OSError into SetupError, or into ResourceError where there is no room."""
    try:
        yield
    except OSError as error:
        where = error.filename or run
        if error.errno in files.FULL:
            raise ResourceError(f"{where}: {error.strerror}; expected some room") from None
        raise SetupError(f"{where}: {error.strerror}; expected a run folder that can be written, see --run") from None


def _begun(path: Path) -> bool:
    """True for what the start of a run may leave before there is a recipe: it is no stranger's."""
    return path.name == LOCK or files.hidden(path) or (path.name == RANKS and path.is_dir() and not any(path.iterdir()))


def refuse_links(run: Path) -> None:
    """Raise SetupError where what we would write through, append to or delete in is not what we have made."""
    for path in run.iterdir():
        folder = path.name in FOLDERS
        expected = "folder" if folder else "regular file"
        ours = folder or path.name in FILES
        if ours and (path.is_symlink() or not (path.is_dir() if folder else path.is_file())):
            found = "is a symbolic link" if path.is_symlink() else f"is no {expected}"
            raise SetupError(f"{path}: {found}; expected a {expected} of this run's own")


def in_use(run: Path) -> bool:
    """True where a process holds the lock of a run folder. Raises OSError where that cannot be told."""
    try:
        file = files.descriptor(run / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        files.lock(file, shared=True)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def _holder(run: Path) -> str:
    try:
        who = json.loads(files.read(run / LOCK, own=True))
        return f"process {who['pid']} on {who['host']} since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def committed(run: Path) -> list[int]:
    """Return the steps in RUN/checkpoints, newest first, intact or not. CheckpointError where that is a link."""
    folder = run / CHECKPOINTS
    if folder.is_symlink():
        raise CheckpointError(f"{folder}: is a symbolic link; expected a folder of this run's own")
    entries = list(folder.iterdir()) if folder.is_dir() else []
    matches = [re.fullmatch(r"step-(\d+)", path.name) for path in entries if path.is_dir() and not path.is_symlink()]
    return sorted((int(match[1]) for match in matches if match and match[1] == str(int(match[1]))), reverse=True)


def adopt(run: Path, recipe: Recipe) -> None:
    """Write the resolved recipe into the run. CheckpointError where the run has checkpoints of a different one."""
    file = run / RECIPE
    if file.exists() and committed(run):
        changed = differences(recipe_of(run), recipe, committed(run)[0])
        if changed:
            raise CheckpointError(f"{run}: belongs to a different recipe: {'; '.join(changed)}; {ways_out(run)}")
    files.replace(file, dump_saved(recipe))


def ways_out(run: Path) -> str:
    """Say how another recipe than the run's can be trained."""
    return f"use --fresh for a new run, or --from {run} for a new one that begins with its weights"


def recipe_of(run: Path) -> Recipe:
    """The recipe of a run of this or an earlier format.

    Raises CheckpointError where there is none, RecipeError where it is damaged or of a later format.
    """
    if not (run / RECIPE).is_file() or (run / RECIPE).is_symlink():
        raise CheckpointError(f"{run}: holds no {RECIPE}; expected the folder of a run")
    recipe = load(run / RECIPE, written=1)
    return recipe.named(run.resolve().name)


def differences(there: Recipe, here: Recipe, step: int) -> list[str]:
    """Return the keys that may not change after `step` but did, as `key: VALUE there, VALUE here`. Folders may move."""
    old, new = _fixed(there, step), _fixed(here, step)
    return [
        f"{key}: {old.get(key)} there, {new.get(key)} here"
        for key in dict.fromkeys((*old, *new))
        if _shares(key, old.get(key)) != _shares(key, new.get(key))
    ]


def _fixed(recipe: Recipe, step: int) -> dict[str, Any]:
    """Return the keys that must not change after `step`, with their values: of stages what those that have begun read,
    which says what is left for others.
    """
    flat = _flat(recipe.model_dump(exclude={"stages"}))
    found = {key: value for key, value in flat.items() if not _FREE.fullmatch(key)}
    for span in recipe.spans() if recipe.stages else ():
        if span.first < step:
            data = span.recipe.data.model_dump()
            read = {"steps": span.steps, "batch": span.recipe.train.batch, **{k: data[k] for k in ("window", "source")}}
            found |= {f"stages[{span.number}].{key}": value for key, value in read.items()}
    return found


def changes(there: Mapping[str, Any], here: Recipe) -> dict[str, tuple[Any, Any]]:
    """Return the keys of a recipe, as JSON, that have another value here, with both values."""
    old, new = _flat(dict(there)), _flat(here.model_dump(mode="json"))
    return {key: (old[key], value) for key, value in new.items() if key in old and old[key] != value}


def digest(recipe: Recipe) -> str:
    """SHA-256 of the keys that must be equal on every rank; folders may differ from machine to machine."""
    flat = {key: _identity(key, value) for key, value in _flat(recipe.model_dump()).items() if key != "data.cache"}
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    sections = {name: keys for name, keys in recipe.items() if isinstance(keys, dict)}
    sections |= {f"stages[{number}]": keys for number, keys in enumerate(recipe.get("stages", ()))}
    return {f"{name}.{key}": value for name, keys in sections.items() for key, value in keys.items()}


def _shares(key: str, value: Any) -> Any:
    """The part of a value that its content does not tell: of sources the weights."""
    if key.endswith(".source"):
        return value if value is None else isinstance(value, str) or [part["weight"] for part in value]
    return value


def _identity(key: str, value: Any) -> Any:
    if key.endswith(".source") and isinstance(value, tuple):
        return [{**part, "path": Path(part["path"]).name} for part in value]
    named = key.endswith(".source") or key == "data.tokenizer"
    return Path(value).name if named and value is not None else value
