"""The streams that this process prints to, and the bytes that it was called with."""

import io
import os
import sys

from lasptrain.errors import RecipeError


def forgive() -> None:
    """Print `?` for what a stream's encoding lacks, such as the lines of a table in locale C, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def argument(name: str, given: str) -> str:
    """An argument as UTF-8, whatever the locale takes it for; RecipeError naming it where it is none."""
    try:
        return os.fsencode(given).decode("utf-8")
    except ValueError:
        raise RecipeError(f"{name}: found bytes that are not UTF-8; expected text") from None
