"""Write files and folders that are whole or not there, and tell them by their digests."""

import errno
import glob
import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from lasptrain.errors import SetupError


def at_home(path: str) -> str:
    """Expand a `~` that begins a path, also one behind a word such as `repositories:`, as a shell does."""
    word, found, rest = path.rpartition(":~")
    if found:
        return f"{word}:{at_home(f'~{rest}')}"
    return os.path.expanduser(path)  # noqa: PTH111  a Path would write other names in another way


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a disk, or of a quota, without room
BROKEN = (errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ESTALE)  # of a disk, or of the limit of files
SMALL = 1 << 24  # bytes that a file which is read whole may have
_NO_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)  # where there are
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_HIDDEN = re.compile(r"\.[a-z]+\.(json|yaml)\.\d+")  # names that `whole` gives to small files


def descriptor(path: Path, flags: int) -> int:
    """Open a file of our own. Raises OSError for a link, which is not followed, a FIFO, not waited for, or a device."""
    try:
        found = os.open(path, flags | _NO_LINK | _NO_WAIT, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise OSError(errno.EINVAL, "it is no regular file", str(path)) from None
        raise
    return _checked(found, path)


def _checked(found: int, path: Path) -> int:
    mode = os.fstat(found).st_mode
    if not stat.S_ISREG(mode):
        os.close(found)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return found


@contextmanager
def regular(path: Path, *, own: bool = False) -> Iterator[BufferedReader]:
    """Open a file for reading. Raises OSError for a FIFO or a device, as `descriptor` does; for a link if `own`."""
    if own:
        found = descriptor(path, os.O_RDONLY)
    else:
        found = _checked(os.open(path, os.O_RDONLY | _NO_WAIT), path)
    with open(found, "rb") as stream:  # noqa: PTH123
        yield stream


def lock(file: int, *, shared: bool = False, wait: bool = False) -> None:
    """Lock an open file until it is closed. Raises BlockingIOError where another process holds it, unless told to wait,
    OSError on a disk without locks, SetupError on a system without them.
    """
    try:
        import fcntl
    except ModuleNotFoundError:
        raise SetupError(f"found {sys.platform}, where this command does not run; expected Linux or macOS") from None
    fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))


def read(path: Path, most: int = SMALL, *, own: bool = False) -> bytes:
    """Read a file of at most `most` bytes. Raises OSError for a longer one, and as `regular` does."""
    with regular(path, own=own) as stream:
        content = stream.read(min(most, os.fstat(stream.fileno()).st_size) + 1)  # a buffer of that size is made first
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
    return content


def utf8(name: str) -> str:
    """Return a name with what is not UTF-8 in it replaced, so that it can be written."""
    return os.fsencode(name).decode("utf-8", "replace")


@contextmanager
def told_as(path: Path, hidden: Path) -> Iterator[None]:
    """Give an OSError the name of what is written: of a full disk, as writes do not know theirs, and of `hidden`."""
    try:
        yield
    except OSError as error:
        if (error.errno in FULL and error.filename is None) or str(error.filename) == str(hidden):
            error.filename = str(path)
        raise


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """A hidden path beside `file` that takes its name at the end; after an error nothing is left of it."""
    new = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with told_as(file, new):
            yield new
            new.replace(file)
    finally:
        new.unlink(missing_ok=True)


def replace(file: Path, text: str, *, lasting: bool = True) -> None:
    """Replace a small file in one step, so that nobody ever reads half of it; if `lasting`, after a power cut too."""
    with whole(file) as new:
        new.unlink(missing_ok=True)
        with open(descriptor(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "w", encoding="utf-8") as stream:
            stream.write(text)
        if lasting:
            sync(new)


def hidden(path: Path) -> bool:
    """True for what a killed `replace` may have left."""
    return _HIDDEN.fullmatch(path.name) is not None and path.is_file() and not path.is_symlink()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk. Raises OSError with its name."""
    found = os.open(path, os.O_RDONLY)
    try:
        os.fsync(found)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(found)


def sha256(path: Path) -> str:
    """SHA-256 of a whole file, in hexadecimal."""
    with regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def atomic_folder(out: Path, force: bool, mark: str) -> Iterator[Path]:
    """A temporary sibling that takes the name `out` at the end, synced; after an error nothing is left.

    SetupError where `out` exists and is no empty folder, unless `force`, which replaces it at the end if it holds the
    file `mark`, as what is written does; a link is never followed. What processes that were killed have left of such
    siblings is removed.
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
    for left in out.parent.glob(f".{glob.escape(out.name)}.tmp-*"):
        with _held(left) as held:
            if held:
                shutil.rmtree(left, ignore_errors=True)
    with _sibling(out) as new:
        with told_as(out, new):
            yield new
            for path in (*new.rglob("*"), new):
                sync(path)
        old = out.with_name(f".{out.name}.old-{secrets.token_hex(4)}")
        if out.exists():
            out.rename(old)
        new.rename(out)
        sync(out.parent)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _sibling(out: Path) -> Iterator[Path]:
    """A new hidden folder beside `out`, held, and removed at the end if it still has its name."""
    while True:
        new = out.with_name(f".{out.name}.tmp-{secrets.token_hex(4)}")
        with told_as(out, new):
            new.mkdir()
        with _held(new) as held:
            if held is False or not new.is_dir():
                continue  # another process has taken it for one that was left
            try:
                yield new
            finally:
                shutil.rmtree(new, ignore_errors=True)
            return


@contextmanager
def _held(folder: Path) -> Iterator[bool | None]:
    """Lock a folder. Yields False where another process holds it, None where it is not there, or cannot be locked."""
    try:
        found = os.open(folder, os.O_RDONLY | _NO_LINK | _NO_WAIT)
    except OSError:
        yield None
        return
    held: bool | None = True
    try:
        try:
            lock(found)
        except BlockingIOError:
            held = False
        except (OSError, SetupError):
            held = None
        yield held
    finally:
        os.close(found)
