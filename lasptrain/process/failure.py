"""Failures of ranks: their records, root cause and exit codes. No torch: a rank may fail before it is there."""

import errno
import json
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
    Stopped,
)
from lasptrain.process import signals, watchdog


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
    try:
        status: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        status = {}
    status |= {"state": "finished", "code": 0, "restarts": restarts, "time": round(time.time(), 3)}
    if failure is not None:
        state = "stopped" if failure.code in (STOPPED, INTERRUPTED) else "failed"
        status |= {"state": state, "code": failure.code, "rank": failure.rank, "last_error": failure.message.strip()}
    with suppress(OSError):  # the disk may be what has failed
        files.replace(file, json.dumps(status))


def all_saved(run: Path) -> bool:
    """True where status.json says that the last step of all was committed."""
    from lasptrain.run.metrics import STATUS

    try:
        status = json.loads((run / STATUS).read_text(encoding="utf-8"))
        return bool(status["committed"] == status["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def root_cause(codes: dict[int, int], records: Path) -> Failure:
    """The rank that failed first: the earliest record of one that did not just lose a peer, else a killed one."""
    found = sorted(read_records(records), key=lambda failure: failure.time)
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
    return Failure(rank, INTERNAL, "ended", f"rank {rank} ended with exit code {code}, see above", 0.0)


def stopped_by(number: int, began: bool, records: Path, saved: bool) -> Failure:
    """The end of a run whose launcher got the signal `number`: as its ranks recorded it, if they had begun.

    `saved`: they had nothing left to save.
    """
    interruption = signals.interruption(number, signals.ALL_SAVED if began else "training had not begun")
    if not began:
        return failure_of(0, interruption)
    found = sorted(read_records(records), key=lambda failure: (failure.code == RankLostError.code, failure.time))
    if found and found[0].code != RankLostError.code:
        return found[0]._replace(code=interruption.code) if found[0].kind == type(interruption).__name__ else found[0]
    if saved:
        return failure_of(0, interruption)
    return Failure(0, TERMINATED, "Killed", "stopped before the newest step could be saved", time.time())


def read_records(folder: Path) -> Iterator[Failure]:
    for file in folder.glob("*.json"):
        try:
            yield Failure(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue


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
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            code, message = ResourceError.code, f"{name}: {error.filename or 'a file'}: no space left; expected some"
        case RuntimeError() if kind.startswith("Dist") or _LOST.search(str(error)):  # DistError and its kinds, of torch
            code, message = RankLostError.code, f"{name}: lost the other ranks: {first_line(error)}"
        case _:
            code, message = INTERNAL, f"{name}: {''.join(traceback.format_exception(error))}"
    return Failure(rank, code, kind, message, time.time())


def first_line(error: BaseException) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    # without where in torch it was raised, and torch's guess
    return re.sub(r"^\[\S+\] |\. This is typically .*", "", line)


def record(folder: Path, failure: Failure) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.replace(folder / f"{failure.rank}.json", json.dumps(failure._asdict()))
    except OSError:
        report(failure)  # the record cannot be written
