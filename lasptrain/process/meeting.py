"""Meeting of machines, and of ranks, before anything needs them all: signals are heard meanwhile, and waiting is told.

torch waits for others inside C++, where Python hears no signal. So here all look for each other in Python first,
through a store, and what must wait in C++ does so in a thread.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from lasptrain.errors import SetupError

T = TypeVar("T")
TELL = 15.0  # seconds between lines about what is waited for
LOOK = 0.05  # seconds between looks
HANDSHAKE = timedelta(seconds=60)  # of a store that is there


class Waiting:
    """Waits for `whom()` in small steps: tells it every 15 s, unless `quiet`; SetupError after `timeout` seconds."""

    def __init__(self, whom: Callable[[], str], timeout: float, *, quiet: bool = False) -> None:
        self._whom, self._timeout, self._quiet = whom, timeout, quiet
        self._began = self._told = time.monotonic()

    def step(self) -> None:
        """Wait for a moment. Signals are heard in it."""
        time.sleep(LOOK)
        now = time.monotonic()
        waited = now - self._began
        if waited > self._timeout:
            raise SetupError(f"waited {waited:.0f} s for {self._whom()} in vain (launch.timeout); expected all to come")
        if now - self._told >= TELL:
            self._told = now
            if not self._quiet:
                sys.stderr.write(f"waiting for {self._whom()}: {waited:.0f} s of {self._timeout:.0f} s\n")


def patiently(act: Callable[[], T], waiting: Waiting) -> T:
    """Call `act`, which waits in C++, in a thread; return what it returns, or raise what it raises."""
    found: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            found.append(act())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="meeting")
    thread.start()
    while thread.is_alive():
        waiting.step()
    if errors:
        raise errors[0]
    return found[0]


def connect(host: str, port: int, first: str, *, hosts: bool, timeout: float, quiet: bool = False) -> TCPStore:
    """Return the store at host:port, which `first` hosts: this process if `hosts`. Raises SetupError after `timeout` s.

    torch's DistNetworkError where the port is taken, or somebody else listens there.
    """
    if hosts:
        return TCPStore(host, port, None, True, timedelta(seconds=timeout), wait_for_workers=False, multi_tenant=True)
    reason: str | None = ""
    waiting = Waiting(lambda: f"{first} at {host}:{port}{f' ({reason})' if reason else ''}", timeout, quiet=quiet)
    while (reason := patiently(lambda: _refusal(host, port), waiting)) is not None:
        waiting.step()
    store = patiently(lambda: TCPStore(host, port, None, False, HANDSHAKE, wait_for_workers=False), waiting)
    store.set_timeout(timedelta(seconds=timeout))
    return store


def _refusal(host: str, port: int) -> str | None:
    """The reason why nobody is heard at host:port, such as a name that is not known; None where somebody listens."""
    try:
        socket.create_connection((host, port), 5).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def meet(store: Store, kind: str, me: int, total: int, place: str, timeout: float, *, quiet: bool = False) -> None:
    """Wait until number 0 to `total` − 1 of a `kind` have come to the store. Raises SetupError after `timeout` s."""
    here = PrefixStore(f"here/{kind}", store)
    here.set(str(me), "")
    missing = list(range(total))

    def whom() -> str:
        late = [str(number) for number in missing if not here.check([str(number)])]
        return f"{kind} {', '.join(late)} of {total} at {place}"

    waiting = Waiting(whom, timeout, quiet=quiet)
    while missing:
        if here.check([str(missing[0])]):
            del missing[0]
        else:
            waiting.step()
