"""TensorBoard: events of a run in RUN/tensorboard."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lasptrain import files
from lasptrain.errors import SetupError
from lasptrain.recipe.schema import Recipe
from lasptrain.recipe.yaml12 import dump
from lasptrain.run.tracker import Rows

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

FOLDER = "tensorboard"


class TensorBoard:
    """A tracker that writes events; after an error into a new file. Those of steps that failed are in no file.

    Events of later steps than the one a run goes on from are taken back. torch's SummaryWriter writes from a thread, in
    which an error is a traceback, and follows links.
    """

    def __init__(self, folder: Path, start: int | None = None) -> None:
        self._folder = folder
        self._purge_step = None if start is None else start + 1
        self._open: int | None = None

    def start(self, recipe: Recipe, run: Path) -> None:
        """Show the recipe. Raises OSError, as all that writes."""
        self.table((self._purge_step or 1) - 1, "recipe", [{"recipe": dump(recipe)}])

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write values at a step."""
        from torch.utils.tensorboard.summary import scalar  # slow to import, and only one rank needs it

        self._add(step, [scalar(name, value) for name, value in values.items()])

    def table(self, step: int, name: str, rows: Rows) -> None:
        """Write a table, as text."""
        self._add(step, [_table(name, rows)])

    def close(self, *, failed: bool = False) -> None:
        """Close the file."""
        if self._open is not None:
            os.close(self._open)
        self._open = None

    def _add(self, step: int, summaries: list[Summary]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        try:
            if self._open is None:
                self._open = self._begin()
            self._write(self._open, [Event(wall_time=time.time(), step=step, summary=one) for one in summaries])
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


def _table(name: str, rows: Rows) -> Summary:
    """Return rows as the text plugin shows them: a matrix of Markdown, its first row the names of the columns."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    cells = [list(rows[0]), *(list(map(_markdown, row.values())) for row in rows)]
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=n) for n in (len(cells), len(cells[0]))])
    text = [cell.encode() for row in cells for cell in row]
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    tensor = TensorProto(dtype=DT_STRING, tensor_shape=shape, string_val=text)
    return Summary(value=[Summary.Value(tag=f"{name}/text_summary", metadata=metadata, tensor=tensor)])


def _markdown(value: str | float) -> str:
    """Return a number to four digits, and text of several lines as it stands."""
    if not isinstance(value, str):
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return "\n".join(f"    {line}" for line in value.splitlines()) if "\n" in value else value


def write_results(folder: Path, step: int, values: Mapping[str, float], rows: Rows) -> None:
    """Write results as TensorBoard events, in a file of their own in the folder: values, and a table if it has rows."""
    events = TensorBoard(folder)
    events.scalars(step, values)
    if rows:
        events.table(step, "tasks", rows)
    events.close()
