"""Files that are only looked at: where one cannot be written training goes on, tries again, and ends if it stays so."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from lasptrain import files
from lasptrain.errors import ResourceError, SetupError

PATIENCE = 300.0  # seconds for which a file may refuse

log = logging.getLogger(__name__)


class Outlet:
    """A place for people to look at. What is written to it may fail for `PATIENCE` seconds."""

    def __init__(self, path: Path, now: Callable[[], float] = time.monotonic) -> None:
        self._path, self._now = path, now
        self._since: float | None = None

    def __call__(self, act: Callable[[], None], *, last: bool = False) -> bool:
        """Write by `act`; return whether that went well.

        An OSError is told once; after a while, or the `last` time, ResourceError or SetupError.
        """
        try:
            act()
        except OSError as error:
            if self._since is None:
                self._since = self._now()
                log.warning("%s: %s; training goes on and tries again", self._path, error.strerror or error)
            if last or self._now() - self._since > PATIENCE:
                kind = ResourceError if error.errno in files.FULL else SetupError
                found = f"{self._path}: {error.strerror or error}, for {self._now() - self._since:.0f} s"
                raise kind(f"{found}; expected a file that can be written") from None
            return False
        if self._since is not None:
            log.warning("%s: written again", self._path)
        self._since = None
        return True


class Lines:
    """A file to which lines are appended; those that could not be written are kept for the next time."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._waiting: list[bytes] = []
        self._open: int | None = None
        self.begun = file.is_file() and file.stat().st_size > 0

    def add(self, line: str) -> None:
        self._waiting.append(f"{line}\n".encode())

    def flush(self) -> None:
        """Write what waits. OSError where that fails; a line that was torn is written again."""
        try:
            if self._open is None:
                self._open = _append(self._file)
            while self._waiting:
                if os.write(self._open, self._waiting[0]) < len(self._waiting[0]):
                    raise OSError(files.FULL[0], os.strerror(files.FULL[0]), str(self._file))
                del self._waiting[0]
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        if self._open is not None:
            os.close(self._open)
        self._open = None


def _append(file: Path) -> int:
    """Open for appending on a new line, even if the last one was torn."""
    found = files.descriptor(file, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    try:
        size = os.fstat(found).st_size
        if size and os.pread(found, 1, size - 1) != b"\n":
            os.write(found, b"\n")
    except OSError:
        os.close(found)
        raise
    return found
