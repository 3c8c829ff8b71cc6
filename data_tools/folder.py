"""Folders of datasets: hidden and locked while they are written, there when they are complete."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lasptrain import files
from lasptrain.data.manifest import FILE
from lasptrain.errors import DataError, ResourceError, SetupError


def checked(out: Path) -> Path:
    """Return the path of a new dataset's folder. SetupError where it is a link, or not empty."""
    if out.is_symlink():
        raise SetupError(f"{out} -> {out.readlink()}: is a symbolic link; expected a new folder")
    out = out if out.name not in ("", "..") else out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SetupError(f"{out}: it is not empty; a dataset is written to a new folder")
    return out


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a hidden folder that becomes `out` if all goes well. SetupError where another process writes it."""
    with building(out, wait=False) as hidden:
        if hidden is None:
            raise SetupError(f"{out}: another process has just written it")
        yield hidden


@contextmanager
def building(final: Path, wait: bool) -> Iterator[Path | None]:
    """Lock and yield a hidden folder that becomes `final` if all goes well; None if `final` was made meanwhile.

    Of a process that was killed the finished units are used (see `Spool`), not the shards.
    """
    hidden, lock = final.with_name(f".{final.name}.partial"), final.with_name(f".{final.name}.lock")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with _locked(lock, final, wait):
            if (final / FILE).exists():
                yield None
                return
            hidden.mkdir(exist_ok=True)
            for path in hidden.glob("*.ltok"):
                path.unlink()
            try:
                yield hidden
                hidden.rename(final)
            except DataError:  # units that were finished are of use once the text is mended
                ids = hidden / "ids"
                if wait or not ids.exists() or not ids.stat().st_size:
                    shutil.rmtree(hidden, ignore_errors=True)
                raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"{final}: the disk is full") from error
        raise SetupError(f"{error.filename or final}: {error.strerror or error}") from error


@contextmanager
def _locked(lock: Path, final: Path, wait: bool) -> Iterator[None]:
    """Hold a lock whose file is there only as long. SetupError where another process holds it, unless told to wait."""
    while True:
        with lock.open("w") as held:
            try:
                files.lock(held.fileno(), wait=wait)
            except BlockingIOError as error:
                raise SetupError(f"{final}: another process is writing it") from error
            if not _is_there(lock, held.fileno()):
                continue  # whoever held it has removed it, and the next one makes another
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _is_there(path: Path, descriptor: int) -> bool:
    """Return True if an open file still has this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
