"""Write files and folders that are whole or not there, and tell them by their digests."""

import errno
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lasptrain.errors import SetupError


def at_home(path: str) -> str:
    """Expand a `~` that begins a path, also one behind a word such as `repositories:`, as a shell does."""
    word, found, rest = path.rpartition(":~")
    if found:
        return f"{word}:{at_home(f'~{rest}')}"
    return os.path.expanduser(path)  # noqa: PTH111  a Path would write other names in another way


@contextmanager
def regular(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading. Raises OSError for a FIFO, which is not waited for, and for a device."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:  # noqa: PTH123
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        yield stream


def read(path: Path, most: int) -> bytes:
    """Read a file of at most `most` bytes. Raises OSError for a longer one, and as `regular` does."""
    with regular(path) as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
    return content


def utf8(name: str) -> str:
    """Return a name with what is not UTF-8 in it replaced, so that it can be written."""
    return os.fsencode(name).decode("utf-8", "replace")


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """A hidden path beside `file` that takes its name at the end; after an error nothing is left of it."""
    new = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield new
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)


def replace(file: Path, text: str) -> None:
    """Replace a small file in one step, so that nobody ever reads half of it."""
    with whole(file) as new:
        new.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 of a whole file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def atomic_folder(out: Path, force: bool, mark: str) -> Iterator[Path]:
    """A temporary sibling that takes the name `out` at the end, synced; after an error nothing is left.

    SetupError where `out` exists and is no empty folder, unless `force`, which replaces it at the end if it holds the
    file `mark`, as what is written does; a link is never followed.
    """
    if out.is_symlink():
        raise SetupError(f"{out}: is a symbolic link; expected a folder, or a name that is free")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not force:
            raise SetupError(f"{out}: exists; expected a new folder, or --force to replace it")
        if not out.is_dir():
            raise SetupError(f"{out}: is a file; expected a folder")
        if not (out / mark).is_file():
            raise SetupError(f"{out}: holds no {mark}; --force replaces only what was made like this")
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    new = out.with_name(f".{out.name}.tmp-{secrets.token_hex(4)}")
    new.mkdir()
    try:
        yield new
        for path in (*new.rglob("*"), new):
            sync(path)
        old = out.with_name(f".{out.name}.old-{secrets.token_hex(4)}")
        if out.exists():
            out.rename(old)
        new.rename(out)
        sync(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)
