"""Temporary folders that nothing outlives: what a process leaves that is killed, the next one removes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from lasptrain import files
from lasptrain.errors import SetupError

PREFIX = "lasptrain-scratch-"


@contextmanager
def scratch() -> Iterator[Path]:
    """Yield a new temporary folder, in which this process and those that it starts make theirs; it is removed after.

    As long as this process lives the folder is locked: one that is not, is of a process that was killed, and removed.
    On a disk without locks it keeps a name that is never taken for one of those. SetupError where there is no room.
    """
    try:
        remove_abandoned()
    except FileNotFoundError as error:  # of tempfile, which has tried to write
        raise SetupError(f"TMPDIR: {error.strerror}; expected a folder that can be written and has room") from None
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # is of use to the next process
    hidden = Path(tempfile.mkdtemp(prefix=f".{PREFIX}"))  # until it is locked
    lock = _lock(hidden)
    folder = hidden if lock is None else hidden.rename(hidden.with_name(hidden.name[1:]))
    before, environment = tempfile.tempdir, os.environ.get("TMPDIR")
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
    try:
        yield folder
    finally:
        tempfile.tempdir = before
        del os.environ["TMPDIR"]
        if environment is not None:
            os.environ["TMPDIR"] = environment
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        remove_abandoned()


def remove_abandoned() -> None:
    """Remove the folders of processes that were killed, as far as they are this user's."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        lock = _lock(folder)
        if lock is not None:
            if os.fstat(lock).st_uid == os.getuid():
                shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Return a descriptor that holds a folder's lock; None if another one does, or it is no folder of ours to open."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        files.lock(descriptor)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
