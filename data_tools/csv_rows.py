"""A reader of comma-separated values, RFC 4180: rows below the line that names the columns; nothing is guessed."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import BinaryIO

LARGEST = 1 << 27  # characters of a line, or of a value in quotes; each takes 4 bytes in memory


def rows(stream: BinaryIO, field: str, largest: int = LARGEST) -> Iterator[tuple[int, dict[str, str] | str]]:
    """Read (number of its first line, values by column) of each row, or what is wrong with a row; blank lines are none.

    Bytes that are not UTF-8 become lone surrogates. Raises ValueError, also after it has given rows, where it is no
    such text, has two columns `field`, or a line is above `largest` or LARGEST characters.
    """
    largest = min(largest, LARGEST)
    csv.field_size_limit(largest)
    content = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
    lines = csv.reader(_short(content, largest), strict=True)
    end = 0
    try:
        names = next(lines, [])
        if names.count(field) > 1:
            raise ValueError(f"line 1: two columns {field!r}; expected one")
        end = lines.line_num
        for values in lines:
            begin, end = end + 1, lines.line_num
            if len(values) == len(names):
                yield begin, dict(zip(names, values, strict=True))
            elif values:
                yield begin, f"{len(values)} values for {len(names)} columns"
    except csv.Error as error:
        raise ValueError(f"line {end + 1}: {error}") from None
    finally:
        content.detach()


def _short(content: io.TextIOWrapper, largest: int) -> Iterator[str]:
    for line in iter(lambda: content.readline(largest + 1), ""):
        if len(line) > largest:
            raise csv.Error(f"more than {largest:,} characters")
        yield line
