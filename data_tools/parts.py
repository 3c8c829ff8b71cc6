"""Parts of a preparation, for many machines: the files that each reads, and what it leaves for `merge`."""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import quote, unquote_to_bytes

from pydantic import BaseModel, ConfigDict, FailFast, ValidationError

from data_tools.sources import Source, digest
from lasptrain.data.manifest import Manifest, Sha256, SourceEntry
from lasptrain.data.shard import Count, misfit
from lasptrain.errors import DataError, RecipeError
from lasptrain.files import read

FILE = "part.json"
LARGEST = 1 << 30  # bytes of it: the lines of some millions of files


@dataclass(frozen=True)
class Part:
    """Part `number`, from 1, of a preparation in `of` parts."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Parse `2/8`. Raises RecipeError for anything else."""
        found = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", text)
        if not found or int(found[1]) > int(found[2]):
            raise RecipeError(f"--part: found {text!r}; expected a number and how many there are, such as 2/8")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def of_sources(self, sources: Sequence[Source]) -> list[tuple[int, Source]]:
        """Choose this part's files, which follow one another: as many bytes in each part as whole files allow.

        Returns the sources that it reads, each with its number among all. RecipeError where there are more parts than
        files.
        """
        for source in sources:
            if source.dataset:
                fits = "expected one that reads a share, such as hf:NAME@train[:50%], for each, and data merge"
                raise RecipeError(f"--part: found {self} with {source.name}, which is not read by files; {fits}")
        units = [(i, files) for i, source in enumerate(sources) for files in source.units]
        if len(units) < self.of:
            raise RecipeError(
                f"--part: found {self}; the sources have {len(units):,} files, so at most that many parts"
            )
        ends = list(accumulate(replace(sources[i], files=files).bytes for i, files in units))
        first, last = _bounds(ends, self.of)[self.number - 1 : self.number + 1]
        chosen = groupby(units[first:last], key=lambda unit: unit[0])
        return [
            (i, replace(sources[i], files=tuple(path for _, unit in group for path in unit))) for i, group in chosen
        ]


def _bounds(ends: Sequence[int], of: int) -> list[int]:
    """Cut units that end at these bytes into parts: each has a unit at least, and about the same bytes."""
    middles = [(begin + end) / 2 for begin, end in pairwise([0, *ends])]
    bounds = [0]
    for number in range(1, of):
        found = bisect_left(middles, ends[-1] * number / of)
        bounds.append(max(bounds[-1] + 1, min(found, len(ends) - (of - number))))
    return [*bounds, len(ends)]


class PartEntry(BaseModel):
    """The whole of `part.json`. `plan` is the same for all parts that belong together; `fingerprint` is that of the
    dataset beside it. A file is the number of its source, its name, bytes, and SHA-256.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    format: Literal[1] = 1
    number: Count
    of: Count
    plan: Sha256
    fingerprint: Sha256
    sources: tuple[str, ...]
    files: Annotated[tuple[tuple[Count, str, Count, Sha256], ...], FailFast()]

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def save(self, folder: Path) -> None:
        """Write `part.json`."""
        (folder / FILE).write_text(self.model_dump_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, manifest: Manifest) -> PartEntry | None:
        """Read `part.json` of a dataset; None where it is no part. Raises DataError for a file that does not fit."""
        path = folder / FILE
        try:
            content = read(path, LARGEST)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error
        try:
            entry = cls.model_validate_json(content)
        except ValidationError as error:
            raise DataError(f"{path}: {misfit(error)}") from error
        if entry.fingerprint != manifest.fingerprint:
            raise DataError(f"{path}: is of another dataset than the one beside it; prepare the part again")
        if not 1 <= entry.number <= entry.of or any(i >= len(entry.sources) for i, *_ in entry.files):
            raise DataError(f"{path}: is part {entry} of {len(entry.sources)} sources; expected numbers within them")
        return entry


def plan(sources: Sequence[Source], part: Part, options: Sequence[object]) -> str:
    """SHA-256 of all that parts have in common: the files of all of them by name and size, and the options."""
    listing = [
        [source.name, source.repositories, [quote(name) for name in source.names], source.sizes] for source in sources
    ]
    return hashlib.sha256(json.dumps([part.of, list(options), listing]).encode()).hexdigest()


def files_of(numbered: Sequence[tuple[int, Source]]) -> tuple[tuple[int, str, int, str], ...]:
    """List the files of sources with their numbers, as `PartEntry` has them."""
    return tuple(
        (i, quote(name), size, content)
        for i, source in numbered
        for name, size, content in zip(source.names, source.sizes, source.contents, strict=True)
    )


def merged(parts: Sequence[PartEntry]) -> list[SourceEntry]:
    """Describe the sources as if they had been prepared at once, from all parts in their order."""
    entries = []
    for i, name in enumerate(parts[0].sources):
        files = [file for part in parts for file in part.files if file[0] == i]
        whole = digest((unquote_to_bytes(name), content) for _, name, _, content in files)
        entries.append(
            SourceEntry(name=name, files=len(files), bytes=sum(size for _, _, size, _ in files), sha256=whole)
        )
    return entries
