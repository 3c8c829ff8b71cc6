"""Failures of ranks: their records, root cause and exit codes. No torch: a rank may fail before it is there."""

import errno
import json
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from lasptrain import files
from lasptrain.errors import (
    INTERNAL,
    INTERRUPTED,
    STOPPED,
    TERMINATED,
    LaspError,
    RankLostError,
    ResourceError,
    SetupError,
    Stopped,
)
from lasptrain.process import signals, watchdog

TOLD = {code for code in range(2, 10) if code != RankLostError.code}  # exit codes of ranks that say a cause


class Failure(NamedTuple):
    """The end of a rank: exit code, kind of error, message (for code 70 a traceback), Unix time in seconds."""

    rank: int
    code: int
    kind: str
    message: str
    time: float


def write_final_status(run: Path, failure: Failure | None, restarts: int = 0) -> None:
    """Add the outcome of the run to status.json, for schedulers and people."""
    from lasptrain.run.metrics import STATUS  # late: a rank that fails while it starts needs none of this

    file = run / STATUS
    status = _read_status(file)
    status |= {"state": "finished", "code": 0, "restarts": restarts, "time": round(time.time(), 3)}
    if failure is not None:
        state = "stopped" if failure.code in (STOPPED, INTERRUPTED) else "failed"
        status |= {"state": state, "code": failure.code, "rank": failure.rank, "last_error": failure.message.strip()}
    text = json.dumps(status)
    try:
        files.replace(file, text, lasting=False)
    except OSError:  # the disk may be what has failed: of a full one the old file's place is left
        with suppress(OSError):
            _overwrite(file, text)


def _overwrite(file: Path, text: str) -> None:
    """Replace what is in a small file, for which a full disk has room."""
    found = files.descriptor(file, os.O_WRONLY)
    try:
        os.pwrite(found, text.encode(), 0)
        os.ftruncate(found, len(text.encode()))
    finally:
        os.close(found)


def _read_status(file: Path) -> dict[str, Any]:
    try:
        status = json.loads(files.read(file, own=True))
    except (OSError, ValueError, RecursionError):
        return {}
    return status if isinstance(status, dict) else {}


def all_saved(run: Path) -> bool:
    """True where status.json says that the last step of all was committed."""
    from lasptrain.run.metrics import STATUS

    status = _read_status(run / STATUS)
    return bool(status.get("steps") is not None and status.get("committed") == status["steps"])


def root_cause(codes: dict[int, int], *records: Path) -> Failure:
    """The rank that failed first: the earliest record of one that did not just lose a peer, else a killed one.

    A rank without a record in any of the folders `records` may still have ended with a code that says what happened.
    """
    found = sorted(read_records(*records), key=lambda failure: failure.time)
    # The agent asks the others to stop when one has failed, so having been stopped is a cause only if it came first.
    own = [f for f in found if f.code != RankLostError.code and f.kind != Stopped.__name__]
    if own:
        return own[0]
    if hung := [failure for failure in found if failure.kind == watchdog.HUNG]:
        return hung[0]
    recorded = {failure.rank for failure in found}
    silent = {rank: code for rank, code in codes.items() if rank not in recorded}
    if forced := [rank for rank, code in silent.items() if code == TERMINATED]:
        return Failure(forced[0], TERMINATED, "Killed", f"rank {forced[0]} was told twice to stop: not saved", 0.0)
    if known := [rank for rank, code in silent.items() if code in TOLD]:
        rank = min(known, key=lambda rank: (codes[rank] != ResourceError.code, rank))
        return Failure(rank, codes[rank], "ended", f"rank {rank} ended with exit code {codes[rank]}, see above", 0.0)
    killed = {rank: -code for rank, code in silent.items() if code < 0}
    # The agent ends the others by SIGTERM, NCCL by SIGABRT, so a rank that died of anything else comes first.
    late = (0, signal.SIGABRT, signal.SIGTERM)
    for rank, number in sorted(killed.items(), key=lambda item: late.index(item[1] if item[1] in late else 0)):
        if number != signal.SIGTERM or not found:
            name = signal.Signals(number).name
            hint = ": out of host memory?" if number == signal.SIGKILL else ""
            return Failure(rank, RankLostError.code, "killed", f"rank {rank} was killed by {name}{hint}", 0.0)
    if found:
        return found[0]
    rank, code = min(silent.items(), default=(0, INTERNAL))
    known_code = code if code == RankLostError.code else INTERNAL
    return Failure(rank, known_code, "ended", f"rank {rank} ended with exit code {code}, see above", 0.0)


def stopped_by(number: int, began: bool, saved: bool, *records: Path) -> Failure:
    """The end of a run whose launcher got the signal `number`: as its ranks recorded it, if they had begun.

    `saved`: they had nothing left to save.
    """
    interruption = signals.interruption(number, signals.ALL_SAVED if began else "training had not begun")
    if not began:
        return failure_of(0, interruption)
    found = sorted(read_records(*records), key=lambda failure: (failure.code == RankLostError.code, failure.time))
    if found and found[0].code != RankLostError.code:
        return found[0]._replace(code=interruption.code) if found[0].kind == type(interruption).__name__ else found[0]
    if saved:
        return failure_of(0, interruption)
    return Failure(0, TERMINATED, "Killed", "stopped before the newest step could be saved", time.time())


def read_records(*folders: Path) -> Iterator[Failure]:
    """Yield a record of each rank that has one in any of the folders."""
    seen = set[str]()
    for file in (file for folder in folders for file in folder.glob("*.json")):
        try:
            failure = Failure(**json.loads(files.read(file, own=True)))
        except (OSError, ValueError, TypeError, RecursionError):
            continue
        if file.name not in seen:
            seen.add(file.name)
            yield failure


def report(failure: Failure) -> int:
    """Print a failure on stderr and return its exit code."""
    if failure.kind != KeyboardInterrupt.__name__:
        end = "" if failure.message.endswith("\n") else "\n"
        plain = failure.code in (STOPPED, INTERRUPTED) or (failure.code == INTERNAL and failure.kind != "ended")
        prefix = "" if plain else "error: "
        sys.stderr.write(f"{prefix}{failure.message}{end}")
    return failure.code


_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed? ?out waiting", re.IGNORECASE)
_NO_MEMORY = re.compile(r"can't allocate memory|out of memory", re.IGNORECASE)


def failure_of(rank: int, error: BaseException) -> Failure:
    """Classify an exception: its exit code and the message to print."""
    name = f"rank {rank} on {socket.gethostname()}"
    kind = type(error).__name__
    match error:
        case LaspError():
            code, message = error.code, str(error)
        case KeyboardInterrupt():
            code, message = INTERRUPTED, "interrupted"
        case _ if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or _NO_MEMORY.search(str(error)):
            hint = "lower train.segment, or set parallel.recompute to full"
            code, message = ResourceError.code, f"{name}: out of memory: {first_line(error)}; {hint}"
        case OSError() if error.errno in files.FULL:
            code, message = ResourceError.code, f"{name}: {error.filename or 'a file'}: {_no_room(error)}"
        case OSError() if error.filename is not None or error.errno in files.BROKEN:
            code, message = SetupError.code, f"{name}: {error.filename or 'a file'}: {error.strerror}"
        case RuntimeError() if kind.startswith("Dist") or _LOST.search(str(error)):  # DistError and its kinds, of torch
            code, message = RankLostError.code, f"{name}: lost the other ranks: {first_line(error)}"
        case _:
            code, message = INTERNAL, f"{name}: {''.join(traceback.format_exception(error))}"
    return Failure(rank, code, kind, message, time.time())


def _no_room(error: OSError) -> str:
    return f"{error.strerror}; expected room" if error.errno == errno.EFBIG else "no space left; expected some"


def first_line(error: BaseException) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    # without where in torch it was raised, and torch's guess
    return re.sub(r"^\[\S+\] |\. This is typically .*", "", line)


def record(failure: Failure, *folders: Path) -> None:
    """Write the record of a rank into each of the folders, or print it where none can be written."""
    if not recorded(failure, *folders):
        report(failure)


def recorded(failure: Failure, *folders: Path) -> bool:
    """Write the record of a rank into each of the folders; return whether any could be written."""
    written = 0
    for folder in folders:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            files.replace(folder / f"{failure.rank}.json", json.dumps(failure._asdict()), lasting=False)
            written += 1
    return written > 0
