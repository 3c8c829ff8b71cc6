"""Columns of ids in parquet and Arrow files, and the folders that `save_to_disk` of Hugging Face's datasets writes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.arrays import READ, Rows
from data_tools.fields import listed
from data_tools.files import IN_ALL, SMALLEST, naming, one_line
from lasptrain.console.stdio import printable
from lasptrain.data.shard import Int64s
from lasptrain.errors import DataError, SetupError
from lasptrain.files import read

STATE, SPLITS = "state.json", "dataset_dict.json"  # of a dataset, and of several
PLAIN = re.compile(r"[\w.-]+\.arrow", re.ASCII)  # names of files, without a path
MASK = "attention_mask"  # a column beside `input_ids`: 0 where an id is padding
MASKED = "input_ids"
WIDEST = 8  # bytes of an id in memory


def rows(path: Path, column: str) -> Iterator[Rows]:
    """Read the ids of each row; null is an empty row. Padding, where a mask beside `input_ids` is 0, is left out.

    Raises SetupError without pyarrow, DataError for a damaged file, and for a column that is not there or does not hold
    lists of integers.
    """
    try:
        from pyarrow import ArrowException
    except ImportError:
        raise SetupError(f"{path}: needs pyarrow: pip install 'lasptrain[data]'") from None
    number = 0
    try:
        with naming(path):
            for batch, done in _parquet(path, column) if path.suffix.lower() == ".parquet" else _arrow(path, column):
                yield _rows(path, batch, done, number, column)
                number += batch.num_rows
    except (ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: it cannot be read: {one_line(error)}") from error


def saved(folder: Path) -> list[Path] | None:
    """Find the files of a folder written by `save_to_disk`; None if it is no such folder.

    Of several splits each is a folder: DataError asks for one. So it does where rows were chosen, not written.
    """
    if (folder / SPLITS).is_file():
        found = _json(folder / SPLITS).get("splits")
        names = [str(name) for name in found] if isinstance(found, list) else []
        fits = f"{folder / names[0]}" if names else "one"
        raise DataError(f"{folder}: holds the splits {listed(names)}; expected the folder of one, such as {fits}")
    if not (folder / STATE).is_file():
        return None
    state = _json(folder / STATE)
    if state.get("_indices_data_files"):
        raise DataError(
            f"{folder / STATE}: rows were chosen, not written; expected flatten_indices() before save_to_disk"
        )
    try:
        names = [entry["filename"] for entry in state["_data_files"]]
        files = [folder / name for name in names if PLAIN.fullmatch(name)]
    except (KeyError, TypeError):
        files = []
    if not files or len(files) < len(names):
        raise DataError(f"{folder / STATE}: names no files; expected those of the folder under _data_files")
    return files


def _json(path: Path) -> dict[str, Any]:
    with naming(path):
        content = read(path)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise DataError(f"{path}: no JSON object; expected one, as save_to_disk writes it")
    return found


def _parquet(path: Path, column: str) -> Iterator[tuple[Any, int]]:
    """Read (batch of about READ ids, bytes of the file read)."""
    from pyarrow import parquet

    with parquet.ParquetFile(path, buffer_size=1 << 20) as file:
        names = _columns(path, file.schema_arrow, column)
        total, number, size = max(1, file.metadata.num_rows), 0, path.stat().st_size
        values = sum(_values(file.metadata.row_group(i), column) for i in range(file.metadata.num_row_groups))
        if WIDEST * values > max(SMALLEST, IN_ALL * size):
            raise DataError(f"{path}: {size:,} bytes unpack to {values:,} ids; expected fewer, ids shrink less")
        for batch in file.iter_batches(max(1, READ * total // max(values, total)), columns=names):
            number += batch.num_rows
            yield batch, size * number // total


def _values(group: Any, column: str) -> int:
    """Count the ids in a row group, as its metadata say."""
    parts = (group.column(i) for i in range(group.num_columns))
    return sum(part.num_values for part in parts if part.path_in_schema.split(".")[0] == column)


def _arrow(path: Path, column: str) -> Iterator[tuple[Any, int]]:
    """Read (batch, bytes of the file read) of an Arrow file, or of a stream of batches in one."""
    import pyarrow

    with pyarrow.OSFile(os.fspath(path)) as file:
        if file.size() == 0:
            raise DataError(f"{path}: 0 bytes; expected Arrow batches")
        if bytes(file.read(6)) == b"ARROW1":
            with pyarrow.ipc.open_file(file) as batches:
                names = _columns(path, batches.schema, column)
                for i in range(batches.num_record_batches):
                    done = file.size() * (i + 1) // batches.num_record_batches
                    yield from ((part, done) for part in _parts(batches.get_batch(i).select(names), column))
            return
        file.seek(0)
        with pyarrow.ipc.open_stream(file) as stream:
            names = _columns(path, stream.schema, column)
            for batch in stream:
                yield from ((part, file.tell()) for part in _parts(batch.select(names), column))


def _parts(batch: Any, column: str) -> Iterator[Any]:
    """Cut a batch, whose offsets are checked before they are followed, into parts of about READ ids."""
    batch.validate(full=True)
    ids = len(batch.column(column).flatten())
    step = max(1, READ * batch.num_rows // max(1, ids))
    yield from (batch.slice(start, step) for start in range(0, batch.num_rows, step))


def _columns(path: Path, schema: Any, column: str) -> list[str]:
    """Name the columns to read, ids and their mask. Raises DataError where there are none."""
    if schema.get_field_index(column) < 0:
        raise DataError(f"{path}: no column {column!r}; it has {listed(schema.names)}; name one with --column")
    kind = schema.field(column).type
    if not holds_ids(kind):
        raise DataError(
            f"{path}: column {column!r} holds {printable(str(kind)[:60])}; expected lists of integers; "
            f"it has {listed(schema.names)}"
        )
    masked = column == MASKED and schema.get_field_index(MASK) >= 0 and holds_ids(schema.field(MASK).type)
    return [column, MASK] if masked else [column]


def holds_ids(kind: Any) -> bool:
    """True for the type of a column of lists of integers."""
    from pyarrow import types

    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return bool(is_list and types.is_integer(kind.value_type))


def _rows(path: Path, batch: Any, done: int, number: int, column: str) -> Rows:
    """Take the ids out of a batch that begins with row `number`, and leave out padding."""
    ids, ends = _values_of(path, batch.column(column), number)
    if batch.num_columns == 1:
        return Rows(ids, ends, done)
    mask, mask_ends = _values_of(path, batch.column(MASK), number)
    if not np.array_equal(ends, mask_ends):
        i = int(np.argmax(ends != mask_ends))
        raise DataError(f"{path}: row {number + i + 1}: {column} and {MASK} have different lengths")
    kept = mask != 0
    before = np.concatenate(([0], np.cumsum(kept)))
    return Rows(ids[kept], before[ends], done, int(len(ids) - before[-1]))


def _values_of(path: Path, lists: Any, number: int) -> tuple[npt.NDArray[Any], Int64s]:
    """Return the values of lists, one after another, and where each list ends. Raises DataError for null among them."""
    from pyarrow import compute

    values = lists.flatten()
    lengths = compute.fill_null(compute.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    ends = np.cumsum(lengths.astype(np.int64))
    if values.null_count:
        at = int(np.argmax(values.is_null().to_numpy(zero_copy_only=False)))
        row = number + int(np.searchsorted(ends, at, "right")) + 1
        raise DataError(f"{path}: row {row}: null among its ids; expected integers")
    return values.to_numpy(zero_copy_only=False), ends
