"""Rows of parquet and Arrow files: one column of text, or of bytes, of which little is in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_tools.columns import holds_ids
from data_tools.fields import told
from data_tools.files import ARROW, at_once, check_unpacked, one_line
from lasptrain.console.stdio import printable
from lasptrain.errors import DataError, SetupError

ROWS, FEWEST_ROWS = 256, 16  # in memory at once
HELD = 1 << 27  # bytes of rows in memory, where they are not certain to be small
IPC = b"ARROW1"  # begins a file of Arrow, not a stream
USUAL = 20  # times that text shrinks when it is packed; with more, values may repeat


def rows(path: Path, field: str) -> Iterator[tuple[bytes | None, float]]:
    """Read each row's text as bytes, the lines of a list, None for null; and the part of the rows read with it.

    Raises SetupError without pyarrow, DataError for a bad file and for a column that is not there or holds no text.
    """
    try:
        from pyarrow import ArrowException
    except ImportError:
        raise SetupError(f"{path}: needs pyarrow: pip install 'lasptrain[data]'") from None
    size = path.stat().st_size
    limit, unpacked = at_once(size), 0
    read = _arrow if path.name.lower().endswith(ARROW) else _parquet
    try:
        for number, (value, part) in enumerate(read(path, field, size, limit), start=1):
            found = content(value, f"{path}:{number}", limit)
            unpacked += len(found or b"")
            check_unpacked(path, size, unpacked)
            yield found, part
    except (ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: it cannot be read: {one_line(error)}") from error


def _parquet(path: Path, field: str, size: int, limit: int) -> Iterator[tuple[Any, float]]:
    """Read each value of a column, and the part of the rows read with it."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        keys = column(path, file.schema_arrow, field)
        leaves = [leaf for leaf in _leaves(file) if f"{leaf}.".startswith(f"{'.'.join(keys)}.")]
    largest, repeats = _sizes(file.metadata, leaves)
    _check_largest(path, size, largest, limit)
    dictionaries = leaves if repeats else None  # of values that repeat, one of each is in memory
    with parquet.ParquetFile(path, read_dictionary=dictionaries, buffer_size=1 << 20) as file:
        total = max(1, file.metadata.num_rows)
        most = max(FEWEST_ROWS, min(ROWS, HELD // max(1, largest)))
        batches = file.iter_batches(most, columns=[".".join(keys)])
        for number, value in enumerate(values(batches, keys), start=1):
            yield value, number / total


def _arrow(path: Path, field: str, size: int, limit: int) -> Iterator[tuple[Any, float]]:
    """Read each value of a column as `_parquet` does, of either form of Arrow's IPC: a file, or a stream."""
    import pyarrow
    from pyarrow import ipc

    with pyarrow.memory_map(str(path)) as mapped:  # a batch may be as large as the file, and more than memory
        opened = ipc.open_file if mapped.read(len(IPC)) == IPC else ipc.open_stream
        mapped.seek(0)
        schema = opened(mapped).schema
        keys = column(path, schema, field)
        mapped.seek(0)
        file = opened(mapped, options=ipc.IpcReadOptions(included_fields=[schema.get_field_index(keys[0])]))
        for batch, part in _in_file(file) if opened is ipc.open_file else _in_stream(file, mapped, size):
            _check_largest(path, size, batch.nbytes, limit)
            batch.validate(full=True)  # it points into itself as the file says
            for value in values([batch], keys):
                yield value, part


def _in_file(file: Any) -> Iterator[tuple[Any, float]]:
    for number in range(file.num_record_batches):
        yield file.get_batch(number), (number + 1) / file.num_record_batches


def _in_stream(stream: Any, mapped: Any, size: int) -> Iterator[tuple[Any, float]]:
    for batch in stream:
        yield batch, mapped.tell() / size


def values(batches: Iterable[Any], keys: list[str]) -> Iterator[Any]:
    """Yield the values of the column that `keys` lead to in record batches, or in tables."""
    from pyarrow import compute

    for batch in batches:
        found = batch.column(keys[0])
        for key in keys[1:]:
            found = compute.struct_field(found, [key])
        yield from found


def _check_largest(path: Path, size: int, largest: int, limit: int) -> None:
    if largest > limit:
        raise DataError(f"{path}: {size:,} bytes unpack to {largest:,} at once; expected text, which shrinks less")


def column(path: object, schema: Any, field: str) -> list[str]:
    """Find the names that lead to a column of text. Raises DataError where there is none."""
    keys, kind = _found(schema, field)
    if kind is None:
        raise DataError(f"{path}: no column {field!r}; {told(_names(schema))}")
    if not _is_text(kind):
        raise DataError(
            f"{path}: column {field!r} holds {printable(str(kind)[:60])}; expected text, bytes or lists of them"
            f"; {told(_names(schema))}{'; lasptrain data import reads ids' if holds_ids(kind) else ''}"
        )
    return keys


def _found(fields: Any, name: str) -> tuple[list[str], Any]:
    """Find a column by its name, or by a path of names into structs: (names, type), the type None without any."""
    index = fields.get_field_index(name)
    if index >= 0:
        return [name], fields.field(index).type
    head, _, rest = name.partition(".")
    index = fields.get_field_index(head)
    if not rest or index < 0 or not hasattr(fields.field(index).type, "get_field_index"):
        return [], None
    keys, kind = _found(fields.field(index).type, rest)
    return [head, *keys], kind


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
        return _is_text(kind.value_type)
    tests = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "fixed_size_binary")
    return any(getattr(types, f"is_{test}")(kind) for test in tests)


def _names(fields: Any) -> Iterator[str]:
    for field in fields:
        if hasattr(field.type, "get_field_index"):
            yield from (f"{field.name}.{inner.name}" for inner in field.type)
        else:
            yield field.name


def _leaves(file: Any) -> list[str]:
    return [file.schema.column(i).path for i in range(len(file.schema))]


def _sizes(metadata: Any, leaves: list[str]) -> tuple[int, bool]:
    """Return the bytes of the largest part of a column, unpacked, and True if its values may repeat."""
    largest, repeats = 0, False
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema in leaves:
                unpacked = column.total_uncompressed_size
                largest = max(largest, unpacked)
                repeats |= unpacked > USUAL * column.total_compressed_size
    return largest, repeats


def content(value: Any, place: str, most: int) -> bytes | None:
    """Return the bytes of a scalar, of a list those of its values with newlines between them."""
    if not value.is_valid:
        return None
    if hasattr(value, "dictionary"):
        return content(value.value, place, most)
    if hasattr(value, "as_buffer"):
        found: bytes = value.as_buffer().to_pybytes()
        return found
    parts, size = [], 0
    for part in value.values:
        parts.append(content(part, place, most) or b"")
        size += len(parts[-1]) + 1
        if size > most:
            raise DataError(f"{place}: more than {most:,} bytes in a row, of a file that could not hold them")
    return b"\n".join(parts)
