"""A parser of JSON that is not in lines, row by row: one list, or objects one after another."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

LARGEST = 1 << 30  # characters of a row
_BLANK = re.compile(r"[ \t\r\n]*+")


def rows(parts: Iterator[str], largest: int = LARGEST) -> Iterator[Any]:
    """Parse the rows of a JSON text that comes in parts, one row in memory at a time.

    Raises ValueError, also after it has given rows, where the parts are no such JSON or a row is above `largest` or
    LARGEST characters.
    """
    text = _Text(parts, min(largest, LARGEST))
    if text.mark() != "[":
        while text.mark():
            yield text.value()
        return
    text.at += 1
    if text.mark() != "]":
        yield text.value()
        while text.mark() == ",":
            text.at += 1
            yield text.value()
    if text.mark() != "]":
        raise ValueError("expected a comma or the end of the list")
    text.at += 1
    if text.mark():
        raise ValueError("expected nothing after the list")


class _Text:
    """The unparsed rest of a text; its beginning is in memory."""

    def __init__(self, parts: Iterator[str], largest: int) -> None:
        self._parts, self._largest, self._held, self.at = parts, largest, "", 0
        self._decoder = json.JSONDecoder()

    def mark(self) -> str:
        """The next character that is not blank; empty at the end."""
        while True:
            blank = _BLANK.match(self._held, self.at)
            assert blank
            self.at = blank.end()
            if self.at < len(self._held) or not self._more():
                return self._held[self.at : self.at + 1]

    def value(self) -> Any:
        """Parse the next value and move behind it."""
        self.mark()
        while True:
            try:
                found, end = self._decoder.raw_decode(self._held, self.at)
            except RecursionError:
                raise ValueError("nested too deep") from None
            except ValueError as error:
                if not self._more():
                    raise ValueError(error.msg if isinstance(error, json.JSONDecodeError) else error) from None
            else:
                if end < len(self._held) or not self._more():
                    self.at = end
                    return found

    def _more(self) -> bool:
        """Read as much again as is held, so that a row of n characters is parsed log n times; drop the parsed part."""
        held = [self._held[self.at :]]
        size = len(held[0])
        if size > self._largest:
            raise ValueError(f"expected rows of at most {self._largest:,} characters")
        wanted = 2 * size
        for part in self._parts:
            held.append(part)
            size += len(part)
            if size > wanted:
                break
        self._held, self.at = "".join(held), 0
        return len(held) > 1
