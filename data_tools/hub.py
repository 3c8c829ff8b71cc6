"""Datasets of the Hugging Face Hub, or in a folder of that kind, one split of each, through the package `datasets`.

A dataset of the Hub is read at one commit, its `revision`. The package keeps what it has downloaded in its own caches
and obeys its own variables, such as HF_HOME and HF_HUB_OFFLINE. It runs no code of a dataset.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from data_tools import tables
from data_tools.fields import listed
from data_tools.files import one_line
from lasptrain.errors import DataError, LaspError, ResourceError, SetupError
from lasptrain.files import utf8

HUB = "hf:"
FIT = f"{HUB}NAME[:CONFIG][@SPLIT][#REVISION], NAME of the Hub or a folder"
SAVED = ("state.json", "dataset_dict.json")  # in a folder that `save_to_disk` wrote
CARDS = ("README.md", ".huggingface.yaml")  # which say how the files of a folder are read
COMMIT = re.compile("[0-9a-f]{40}")
NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)  # on the Hub
SPEC = re.compile(r"(?P<name>[^#]+?)(:(?P<config>[^:@#/]+))?(@(?P<split>[^@#/]+))?(#(?P<revision>[^#]+))?")


@dataclass(frozen=True)
class HubDataset:
    """One split. `files` of a folder hold all that is read; of the Hub it is all that the commit `revision` has.

    `identity`: which part of these is read.
    """

    name: str
    identity: str
    load: Callable[[], Any]
    folder: Path = Path()
    files: tuple[Path, ...] = ()
    revision: str | None = None

    @cached_property
    def _rows(self) -> Any:
        with _naming(self.name):
            return self.load()

    @property
    def size(self) -> int:
        """Bytes of all columns, unpacked. Downloads the dataset."""
        size: int = self._rows.data.nbytes
        return size

    def rows(self, field: str) -> Iterator[tuple[bytes | None, float]]:
        """Read each row's text, and the part of the rows read with it, as `tables.rows` does."""
        rows = self._rows
        keys = tables.column(self.name, rows.features.arrow_schema, field)
        batches = rows.select_columns(keys[:1]).with_format("arrow").iter(tables.ROWS)
        with _naming(self.name):
            for number, value in enumerate(tables.values(batches, keys), start=1):
                yield tables.content(value, f"{self.name}:{number}", sys.maxsize), number / len(rows)


class _Spec(NamedTuple):
    """Parts of the name of a source."""

    text: str
    path: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None

    def identity(self, name: str) -> str:
        return json.dumps([name, self.config, self.split])


def exists(text: str, of_hub: bool) -> bool:
    """True for a folder that is there, or if `of_hub` for any name of the Hub, which is not asked."""
    path = _parsed(text).path if text.startswith(HUB) else ""
    return bool(path) and (Path(path).is_dir() or (of_hub and bool(NAME.fullmatch(path))))


def without_folder(text: str) -> str:
    """Return the name of a source as it means something elsewhere: of a folder its last part."""
    path = _parsed(text).path
    return text if exists(text, of_hub=True) and not Path(path).is_dir() else text.replace(path, Path(path).name, 1)


def open_dataset(text: str, revision: str | None = None) -> HubDataset:
    """Open `hf:NAME[:CONFIG][@SPLIT][#REVISION]`, at `revision` where it names none. Of the Hub no data are read yet,
    and nothing is asked where the revision is a commit.

    Raises SetupError where the package or the Hub is needed and not there, DataError where there is no such dataset,
    configuration or split.
    """
    spec = _parsed(text)
    with _naming(text):
        folder = Path(spec.path)
        if not spec.path or not folder.is_dir():
            return _of_hub(spec._replace(revision=spec.revision or revision))
        if spec.revision:
            raise DataError(f"{text}: a folder has no revisions; expected none")
        return (_saved if any((folder / name).is_file() for name in SAVED) else _folder)(spec)


def _parsed(text: str) -> _Spec:
    named = text.removeprefix(HUB)
    match = None if Path(named).is_dir() else SPEC.fullmatch(named)
    return _Spec(text, *match.group("name", "config", "split", "revision")) if match else _Spec(text, named)


def _library(text: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise SetupError(f"{text}: needs the package datasets: pip install 'lasptrain[hf]'") from None
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets


def _of_hub(spec: _Spec) -> HubDataset:
    """Find the commit of a dataset of the Hub, unless it is known."""
    if not NAME.fullmatch(spec.path):
        raise DataError(f"{spec.text}: no such folder, and no name of the Hub; {FIT}, fits")
    if spec.revision is None or not COMMIT.fullmatch(spec.revision):
        builder = _builder(spec)
        if builder.repo_id is None:
            raise DataError(f"{spec.text}: names a format of the package datasets; expected a dataset, or a folder")
        _split(spec, builder)
        spec = spec._replace(revision=builder.hash)
    name = spec.text.partition("#")[0]
    return HubDataset(name, spec.identity(spec.path), lambda: _prepared(spec), revision=spec.revision)


def _folder(spec: _Spec) -> HubDataset:
    """Find the files of a split in a folder that `load_dataset` takes."""
    builder = _builder(spec)
    split = _split(spec, builder)
    root = Path(spec.path).resolve()
    held = builder.config.data_files
    files = [str(file) for part in _parts(split) for file in held[part]]
    files += [str(root / card) for card in CARDS if (root / card).is_file()]
    chosen = spec._replace(config=builder.config.name, split=split)
    return _in_folder(chosen, root, files, lambda: _prepared(chosen))


def _saved(spec: _Spec) -> HubDataset:
    """Open a folder that `save_to_disk` wrote; mapped, not read."""
    if spec.config:
        raise DataError(f"{spec.text}: no configuration {spec.config!r}; a dataset that was saved has none")
    library, root = _library(spec.text), Path(spec.path).resolve()
    found = library.load_from_disk(str(root))
    held = dict(found) if isinstance(found, library.DatasetDict) else {str(found.split or "train"): found}
    split = _chosen(spec, held)
    if split not in held:
        raise DataError(f"{spec.text}: no part of a split; a dataset that was saved has {listed(held)}")
    files = [file["filename"] for file in held[split].cache_files]
    return _in_folder(spec._replace(split=split), root, files, lambda: held[split])


def _in_folder(spec: _Spec, root: Path, files: Iterable[str], load: Callable[[], Any]) -> HubDataset:
    config = f":{spec.config}" if spec.config not in (None, "default") else ""
    of = f"{HUB}{utf8(root.name)}{config}@{spec.split}"
    paths = sorted({Path(os.path.normpath(file)) for file in files})
    if other := [path for path in paths if not path.is_relative_to(root)]:
        raise DataError(f"{spec.text}: {one_line(other[0])}: is read; expected files in the folder alone")
    return HubDataset(of, spec.identity(""), load, root, tuple(paths))


def _prepared(spec: _Spec) -> Any:
    """Download a split, unless it is in the caches, and open it. This may take hours, which a log is told."""
    builder = _builder(spec)
    split = _split(spec, builder)
    if not sys.stderr.isatty() and not Path(builder.cache_dir).is_dir():
        sys.stderr.write(f"{spec.text}: is read into {builder.cache_dir}\n")
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def _builder(spec: _Spec) -> Any:
    path = str(Path(spec.path).resolve()) if Path(spec.path).is_dir() else spec.path
    try:
        builder = _library(spec.text).load_dataset_builder(path, spec.config, revision=spec.revision)
        return _cached(spec, builder) if builder.name == "cache" and spec.revision else builder
    except ValueError as error:
        held = re.findall(r"'([^']*)'", str(error).partition("vailable")[2].partition("]")[0])
        if not held:
            raise
        asked = f"no configuration {spec.config!r}" if spec.config else "it has several configurations"
        raise DataError(f"{spec.text}: {asked}; expected one of {listed(held)}: {HUB}NAME:{held[0]}") from None


def _cached(spec: _Spec, newest: Any) -> Any:
    """Find a revision in the caches, where the Hub cannot be reached: the package itself takes the newest there."""
    commit = spec.revision or ""
    if not COMMIT.fullmatch(commit):
        raise SetupError(f"{spec.text}: the Hub knows which commit {commit} is, and cannot be reached")
    if not Path(newest.cache_dir).with_name(commit).is_dir():
        raise SetupError(f"{spec.text}: the Hub cannot be reached, and the caches have no revision {commit}")
    named = {"dataset_name": newest.dataset_name, "repo_id": newest.repo_id, "config_name": newest.config.name}
    return type(newest)(**named, version=str(newest.config.version), hash=commit)


def _split(spec: _Spec, builder: Any) -> str:
    return _chosen(spec, list(map(str, builder.config.data_files or builder.info.splits or ())))


def _chosen(spec: _Spec, held: Iterable[str]) -> str:
    """Return the split that is asked for, or the only one, or `train`. DataError where that is none of those held."""
    there = list(held)
    if spec.split is None and len(there) == 1:
        return there[0]
    split = spec.split or "train"
    if split not in there and (missing := [part for part in _parts(split) if part not in there]):
        raise DataError(f"{spec.text}: no split {missing[0]!r}; it has {listed(there)}: {HUB}NAME@SPLIT")
    return split


def _parts(split: str) -> list[str]:
    """Names of the splits in `train[:10%]+test`."""
    return [part.partition("[")[0].strip() for part in split.split("+")]


@contextmanager
def _naming(text: str) -> Iterator[None]:
    """Turn the errors of the package into ours, with the source that was named."""
    try:
        yield
    except LaspError:
        raise
    except Exception as error:  # the package, and those that it reads with, raise what they like
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, OSError) and cause.errno in (ENOSPC, EDQUOT):
            raise ResourceError(f"{text}: the disk is full, where the package datasets keeps it") from error
        if isinstance(error, ConnectionError):
            offline = "; only what is in the caches of the package datasets can be read without it"
            raise SetupError(f"{text}: the Hub cannot be reached: {one_line(error)}{offline}") from error
        raise DataError(f"{text}: it cannot be read: {one_line(error)}{_told(error, cause)}") from error


def _told(error: BaseException, cause: BaseException) -> str:
    return "" if cause is error else f": {one_line(cause)}"
