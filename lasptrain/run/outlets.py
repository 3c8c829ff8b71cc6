"""Files that are only looked at: where one cannot be written training goes on, tries again, and ends if it stays so."""

from __future__ import annotations

import io
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lasptrain import files
from lasptrain.errors import ResourceError, SetupError

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

PATIENCE = 300.0  # seconds for which a file may refuse

log = logging.getLogger(__name__)


class Outlet:
    """A place for people to look at. What is written to it may fail for `PATIENCE` seconds."""

    def __init__(self, path: Path, now: Callable[[], float] = time.monotonic) -> None:
        self._path, self._now = path, now
        self._since: float | None = None

    def __call__(self, act: Callable[[], None], *, last: bool = False) -> None:
        """Write by `act`. An OSError is told once; after a while, or the `last` time, ResourceError or SetupError."""
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
        else:
            if self._since is not None:
                log.warning("%s: written again", self._path)
            self._since = None


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


class Events:
    """TensorBoard events of one process; after an error a new file. Those of steps that failed are in no file.

    torch's SummaryWriter writes from a thread, in which an error is a traceback, and follows links.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        self._folder, self._purge_step = folder, purge_step
        self._open: int | None = None

    def add(self, step: int, values: dict[str, float]) -> None:
        """Write the values at a step. Raises OSError."""
        from tensorboard.compat.proto.event_pb2 import Event  # slow to import, and only one rank needs it
        from torch.utils.tensorboard.summary import scalar

        try:
            if self._open is None:
                self._open = self._begin()
            events = [Event(wall_time=time.time(), step=step, summary=scalar(k, v)) for k, v in values.items()]
            self._write(self._open, events)
        except OSError:
            self.close()
            raise

    def _begin(self) -> int:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._folder.mkdir(exist_ok=True)
        if self._folder.is_symlink():
            raise SetupError(f"{self._folder}: is a symbolic link; expected a folder of this run's own")
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        found = files.descriptor(self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)
        began = Event(wall_time=time.time(), file_version="brain.Event:2")
        if self._purge_step is None:
            self._write(found, [began])
        else:
            self._write(found, [began, Event(step=self._purge_step, session_log=SessionLog(status=SessionLog.START))])
            self._purge_step = None
        return found

    def _write(self, found: int, events: list[Event]) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        content = io.BytesIO()
        for event in events:
            RecordWriter(content).write(event.SerializeToString())
        if os.write(found, content.getvalue()) < len(content.getvalue()):
            raise OSError(files.FULL[0], os.strerror(files.FULL[0]), str(self._folder))

    def close(self) -> None:
        if self._open is not None:
            os.close(self._open)
        self._open = None


def write_scalars(folder: Path, step: int, values: dict[str, float]) -> None:
    """Write values as TensorBoard events, in a file of their own in the folder."""
    events = Events(folder)
    events.add(step, values)
    events.close()
