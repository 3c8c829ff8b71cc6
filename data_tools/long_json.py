"""A line of JSON too long for memory: the text under one of its keys, a part at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import NoReturn

DEEPEST = 200  # nested values
LONGEST_KEY, LONGEST_SCALAR = 1 << 16, 1 << 12  # characters
_BLANK = re.compile(r"[ \t\r\n]*+")
_UNITS = re.compile(r'(?:[^"\\\x00-\x1f]++|\\u[0-9a-fA-F]{4}|\\["\\/bfnrt])*+')
_ESCAPE = 6  # characters of the longest one, \u0000
_SCALAR = re.compile(
    r"(?:true|false|null|NaN|-?Infinity|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)(?=[ \t\r\n,\]}]|$)"
)


def text_under(field: str, parts: Iterator[str]) -> Iterator[str]:
    """The string under the key `field` of the object that `parts` spell, a part at a time; holds one part.

    Raises ValueError, also after it has given text, where the parts are no JSON object with one such string.
    """
    return _Line(parts).text_under(field)


class _Line:
    """What is left of a line; the start of it is in memory."""

    def __init__(self, parts: Iterator[str]) -> None:
        self._parts, self._held, self._at, self._before = parts, "", 0, 0

    def text_under(self, field: str) -> Iterator[str]:
        found = False
        if self._next() != "{":
            self._fail("expected an object")
        for key in self._keys():
            if key != field:
                self._skip(1)
            elif found or self._next() != '"':
                self._fail(f"{field!r} stands there twice" if found else f"no text under {field!r}")
            else:
                found = True
                yield from self._string()
        if self._next():
            self._fail("expected nothing more")
        if not found:
            self._fail(f"no text under {field!r}")

    def _keys(self) -> Iterator[str]:
        """Every key of an object whose { is behind; at each the caller passes over the value."""
        mark = self._next()
        while mark != "}":
            if mark != '"':
                self._fail("expected a key")
            key = self._key()
            if self._next() != ":":
                self._fail("expected a colon")
            yield key
            mark = self._next_member("}", "a key")

    def _key(self) -> str:
        key = ""
        for part in self._string():
            key += part
            if len(key) > LONGEST_KEY:
                self._fail(f"expected a key of at most {LONGEST_KEY:,} characters")
        return key

    def _next_member(self, end: str, what: str) -> str:
        """After a member: the first character of another one, or the `end`."""
        mark = self._next()
        if mark == end:
            return mark
        if mark != ",":
            self._fail(f"expected a comma or {end}")
        mark = self._next()
        if mark in (end, ""):
            self._fail(f"expected {what}")
        return mark

    def _skip(self, depth: int) -> None:
        """Pass over a value."""
        if depth > DEEPEST:
            self._fail(f"nested more than {DEEPEST} deep")
        mark = self._next()
        if mark == '"':
            for _ in self._string():
                pass
        elif mark == "{":
            for _ in self._keys():
                self._skip(depth + 1)
        elif mark == "[":
            self._skip_items(depth)
        else:
            self._at -= len(mark)
            self._need(LONGEST_SCALAR)
            scalar = _SCALAR.match(self._held, self._at)
            if not scalar:
                self._fail("expected a value")
            self._at = scalar.end()

    def _skip_items(self, depth: int) -> None:
        mark = self._next()
        while mark != "]":
            self._at -= len(mark)
            self._skip(depth + 1)
            mark = self._next_member("]", "a value")

    def _string(self) -> Iterator[str]:
        """The parts of a string whose opening quote is behind, its closing one behind at the end."""
        high = ""  # half of a character, whose other half may begin the next part
        while True:
            units = _UNITS.match(self._held, self._at)
            assert units
            if units.end() > self._at:
                text = json.loads(f'"{units[0]}"')
                if high:
                    text = (high + text).encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
                high = text[-1] if "\ud800" <= text[-1] <= "\udbff" else ""
                self._at = units.end()
                if len(text) > len(high):
                    yield text[: len(text) - len(high)]
            if self._held[self._at : self._at + 1] == '"':
                self._at += 1
                if high:
                    yield high
                return
            if len(self._held) - self._at >= _ESCAPE or not self._more():
                self._fail("expected the end of a string, or an escape that exists")

    def _next(self) -> str:
        """The next character that is not blank, which is then behind; empty at the end."""
        while True:
            blank = _BLANK.match(self._held, self._at)
            assert blank
            self._at = blank.end()
            if self._at < len(self._held):
                self._at += 1
                return self._held[self._at - 1]
            if not self._more():
                return ""

    def _need(self, count: int) -> None:
        """Have so many characters in memory, if there are so many left."""
        while len(self._held) - self._at < count and self._more():
            pass

    def _more(self) -> bool:
        """Take another part into memory, if there is one, and forget what is behind."""
        part = next(self._parts, None)
        if part is None:
            return False
        self._before += self._at
        self._held, self._at = self._held[self._at :] + part, 0
        return True

    def _fail(self, problem: str) -> NoReturn:
        raise ValueError(f"{problem}: character {self._before + self._at}")
