"""Rows of parquet files: one column of text, or of bytes, of which little is in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.columns import holds_ids
from data_tools.fields import told
from data_tools.files import at_once, check_unpacked, one_line
from lasptrain.console.stdio import printable
from lasptrain.errors import DataError, SetupError

ROWS, FEWEST_ROWS = 256, 16  # in memory at once
HELD = 1 << 27  # bytes of rows in memory, where they are not certain to be small
USUAL = 20  # times that text shrinks when it is packed; with more, values may repeat


def rows(path: Path, field: str) -> Iterator[tuple[bytes | None, float]]:
    """Read each row's text as bytes, the lines of a list, None for null; and the part of the rows read with it.

    Raises SetupError without pyarrow, DataError for a bad file and for a column that is not there or holds no text.
    """
    try:
        from pyarrow import ArrowException, compute, parquet
    except ImportError:
        raise SetupError(f"{path}: needs pyarrow: pip install 'lasptrain[data]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            keys = _column(path, file.schema_arrow, field)
            leaves = [leaf for leaf in _leaves(file) if f"{leaf}.".startswith(f"{'.'.join(keys)}.")]
        size = path.stat().st_size
        limit = at_once(size)
        largest, repeats = _sizes(file.metadata, leaves)
        if largest > limit:
            raise DataError(f"{path}: {size:,} bytes unpack to {largest:,} at once; expected text, which shrinks less")
        dictionaries = leaves if repeats else None  # of values that repeat, one of each is in memory
        with parquet.ParquetFile(path, read_dictionary=dictionaries, buffer_size=1 << 20) as file:
            total, number, unpacked = max(1, file.metadata.num_rows), 0, 0
            most = max(FEWEST_ROWS, min(ROWS, HELD // max(1, largest)))
            for batch in file.iter_batches(most, columns=[".".join(keys)]):
                column = batch.column(0)
                for key in keys[1:]:
                    column = compute.struct_field(column, [key])
                for value in column:
                    number += 1
                    content = _bytes(value, f"{path}:{number}", limit)
                    unpacked += len(content or b"")
                    check_unpacked(path, size, unpacked)
                    yield content, number / total
    except (ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: it cannot be read: {one_line(error)}") from error


def _column(path: Path, schema: Any, field: str) -> list[str]:
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


def _bytes(value: Any, place: str, most: int) -> bytes | None:
    """Return the bytes of a scalar, of a list those of its values with newlines between them."""
    if not value.is_valid:
        return None
    if hasattr(value, "dictionary"):
        return _bytes(value.value, place, most)
    if hasattr(value, "as_buffer"):
        content: bytes = value.as_buffer().to_pybytes()
        return content
    parts, size = [], 0
    for part in value.values:
        parts.append(_bytes(part, place, most) or b"")
        size += len(parts[-1]) + 1
        if size > most:
            raise DataError(f"{place}: more than {most:,} bytes in a row, of a file that could not hold them")
    return b"\n".join(parts)
