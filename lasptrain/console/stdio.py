"""The standard streams of this process, and the encoding of its arguments."""

import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from unicodedata import category

from lasptrain.errors import RecipeError


def replace_unencodable() -> None:
    """Print `?` for characters that a stream's encoding lacks, such as a table's lines in locale C, and do not fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


class _BestEffort(io.FileIO):
    """A file that ignores failed writes: its reader may have left, or its disk be full."""

    def write(self, data: Any) -> int:
        with suppress(OSError):
            return super().write(data) or 0
        return len(data)


def ignore_broken_pipe() -> None:
    """Go on when nobody reads this process's output any more: for work that matters more."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  open as long as this process
        elif isinstance(stream, io.TextIOWrapper):
            raw = io.BufferedWriter(_BestEffort(number, "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, "replace", line_buffering=True))


def printable(text: str, kept: str = "") -> str:
    """Return the text with characters spelt out that do not print, which a terminal might obey, but those `kept`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept or category(c) == "Zs" else repr(c)[1:-1] for c in text)


def escape_controls(text: str) -> str:
    """Return the text with control characters spelt out, where stdout is a terminal that would obey them."""
    return printable(text, "\n\t") if sys.stdout.isatty() else text


def argument(name: str, given: str) -> str:
    """Decode an argument as UTF-8, whatever the locale is; RecipeError naming it where it is not UTF-8."""
    try:
        return os.fsencode(given).decode("utf-8")
    except ValueError:
        raise RecipeError(f"{name}: found bytes that are not UTF-8; expected text") from None
