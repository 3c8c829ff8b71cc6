"""Files of text: names that are read, files below a folder, and a count of those left out."""

from __future__ import annotations

import os
import re
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from lasptrain.console.stdio import printable
from lasptrain.console.words import times
from lasptrain.errors import DataError

TEXT, CSV, PARQUET, ARROW = ".txt", ".csv", ".parquet", ".arrow"
TABLES = (PARQUET, ARROW)
JSON = (".jsonl", ".ndjson", ".json")
PACKED = (".gz", ".zst", ".zstd", ".bz2", ".xz")
FIT = f"{TEXT}, {', '.join(JSON)}, {CSV}, each also with {', '.join(PACKED)}, and {', '.join(TABLES)}"
LINKS = "repeated link", "upward link", "dangling link"
NOUNS = ("dot file", "other file", *LINKS, "FIFO", "socket", "device")  # kinds of what is left out, besides endings
SHOWN = 12  # of these kinds and endings
SMALLEST = 1 << 24  # bytes that a packed file may hold, however small it is
AT_ONCE, IN_ALL = 100, 1000  # times that a row of a packed file, and all of it, may be larger than the file

Found = tuple[Path, Path]  # where it really is, and the name under which it was found


def endings(name: str) -> tuple[str, str] | None:
    """Parse a file name, in any case, into content (TEXT, CSV, or one of JSON or TABLES) and compression (one of PACKED
    or ""); None if such a file is not read.
    """
    name = name.lower()
    packed = next((ending for ending in PACKED if name.endswith(ending)), "")
    name = name.removesuffix(packed)
    held = next((ending for ending in (TEXT, CSV, *JSON, *TABLES) if name.endswith(ending)), None)
    return None if held is None or (held in TABLES and packed) else (held, packed)


def at_once(size: int) -> int:
    """Return the bytes that a row of a packed file of `size` bytes may have: text shrinks less."""
    return max(SMALLEST, AT_ONCE * size)


def check_unpacked(path: Path, size: int, unpacked: int) -> None:
    """Raise DataError where a packed file of `size` bytes has given more than text does."""
    if unpacked > max(SMALLEST, IN_ALL * size):
        raise DataError(f"{path}: {size:,} bytes unpack to {unpacked:,} and more; expected text, which shrinks less")


def below(root: Path, without: Collection[str], left_out: Counter[str]) -> Iterator[Found]:
    """Walk a folder: everything below it but folders, except in folders named in `without`; each folder is read once.

    Links are followed, after all else, so that what stands below the folder itself keeps its own name. One to a folder
    that is read anyway, or that it stands in, is counted. Raises DataError with the name of what cannot be read.
    """
    read: set[Path] = set()
    links = [root]
    for link in links:
        real = _real(link)
        with naming(link):
            is_folder = link.is_dir()
        if not is_folder:
            yield real, link
            continue
        if link != root and (real in read or _real(link.parent).is_relative_to(real)):
            left_out["repeated link" if real in read else "upward link"] += 1
            continue
        folders = [(real, link)]
        for real, folder in folders:
            read.add(real)
            with naming(folder), os.scandir(folder) as scanned:
                entries = sorted((e.name, e.is_symlink(), e.is_dir(follow_symlinks=False)) for e in scanned)
            for name, is_link, is_folder in entries:
                found = real / name, folder / name
                if name in without and (is_folder or is_link):
                    left_out[f"{name}/"] += 1
                elif is_link:
                    links.append(found[1])
                elif not is_folder:
                    yield found
                elif found[0] not in read:
                    folders.append(found)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def choose(found: Iterable[Found], takes: Callable[[Path], bool], left_out: Counter[str]) -> list[Path]:
    """Choose the regular files that `takes` accepts, each once, under its first name; count the others in `left_out`.

    Opens none, so a FIFO is not waited for. Raises DataError with the name of a file, or of a link's end, that cannot
    be read.
    """
    chosen: dict[Path, Path] = {}
    for real, path in found:
        with naming(path):
            mode = path.stat().st_mode
            if not stat.S_ISREG(mode):
                left_out["FIFO" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"] += 1
            elif not takes(path):
                left_out[ending(path)] += 1
            elif real in chosen:
                left_out["repeated link"] += 1
            elif not os.access(path, os.R_OK):
                raise PermissionError("no permission")
            else:
                chosen[real] = path
    return list(chosen.values())


def ending(path: Path) -> str:
    """The kind under which a file that is not read is counted."""
    if path.name.startswith("."):
        return "dot file"
    suffixes = path.suffixes[-2:] if path.suffix.lower() in PACKED else path.suffixes[-1:]
    last = "".join(suffixes).lower()
    return last if re.fullmatch(r"(\.\w{1,12}){1,2}", last) else "other file"


def counted(left_out: Mapping[str, int]) -> str:
    """Format counts, the most frequent first: `3 .md, 2 dot files`; empty if nothing is left out."""
    kinds = sorted(left_out.items(), key=lambda kind: (-kind[1], kind[0]))
    rest = sum(count for _, count in kinds[SHOWN:])
    kinds = kinds[:SHOWN] + ([("of other endings", rest)] if rest else [])
    return ", ".join(times(count, kind, "s" if kind in NOUNS else "") for kind, count in kinds)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn errors of the file system and of decompression into DataError with the name of the file, and of its target
    if it is a link.
    """
    try:
        yield
    except Exception as error:
        of_library = type(error).__name__ == "LZMAError"  # which may not be there
        if not of_library and not isinstance(error, (EOFError, OSError, zlib.error)):
            raise
        found = error.strerror if isinstance(error, OSError) and error.strerror else error
        end = ""
        with suppress(OSError):
            end = f" -> {path.readlink()}"
        raise DataError(f"{path}{end}: it cannot be read: {one_line(found)}") from error


def one_line(found: object) -> str:
    """Format what a library says of a file, which may have lines and repeat bytes of the file."""
    return printable(" ".join(str(found).split()))[:300]
