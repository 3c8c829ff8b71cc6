"""When a rank counts as hung or bereft, and when a signal as a second one: to the moment, by a clock that is set."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from lasptrain.errors import STOPPED, TERMINATED
from lasptrain.process import signals as stop
from lasptrain.process import watchdog
from lasptrain.process.watchdog import HUNG, LOST, ORPHANED, Watchdog
from tests.support.clock import Clock

SOON = 1e-3  # seconds


class Ranks:
    """Processes that stand for ranks, a watchdog that is told the time, and what that tells and sends to which rank."""

    def __init__(self, folder: Path) -> None:
        self.told: list[tuple[int, str, str]] = []
        self.sent: list[tuple[int, int]] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self._folder, self._clock = folder, Clock()
        self._watchdog = Watchdog(folder, lambda *what: self.told.append(what), self._clock)

    def add(self, signs: int, until: float, command: str = "exec sleep 600") -> None:
        """A rank that has given so many signs of life, and promised the next one by `until`."""
        process = subprocess.Popen(["sh", "-c", command])
        (self._folder / f"{watchdog.PULSE}{len(self.processes)}").write_text(f"{process.pid} {signs} {until}")
        self.processes.append(process)

    def kill(self, pid: int, number: int) -> None:
        self.sent.append(([process.pid for process in self.processes].index(pid), number))

    def look(self, seconds: float) -> bool:
        self._clock.seconds = seconds
        return self._watchdog.look()


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    found = Ranks(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watchdog, "PERIOD", 0)  # between stacks that are shown and the kill
        patch.setattr(os, "kill", found.kill)
        yield found
    for process in found.processes:
        process.kill()
        process.wait()


def test_the_rank_that_has_done_least_is_hung_once_any_has_broken_its_word(ranks: Ranks) -> None:
    ranks.add(signs=5, until=10)
    ranks.add(signs=3, until=99)
    assert not ranks.look(10) and (ranks.told, ranks.sent) == ([], [])
    assert not ranks.look(10 + SOON)
    assert ranks.told == [(1, HUNG, "hung after 3 signs of life; see its stack above")]
    assert ranks.sent == [(0, signal.SIGUSR2), (1, signal.SIGUSR2), (1, signal.SIGKILL)]


def test_ranks_that_have_done_as_much_are_all_hung(ranks: Ranks) -> None:
    for _ in range(2):
        ranks.add(signs=3, until=10)
    assert not ranks.look(10 + SOON)
    why = "hung after 3 signs of life, as all others here; see its stack above"
    assert ranks.told == [(0, HUNG, why), (1, HUNG, why)]
    assert ranks.sent[2:] == [(0, signal.SIGKILL), (1, signal.SIGKILL)]


def test_a_rank_that_is_stopped_is_hung_however_much_it_has_done(ranks: Ranks) -> None:
    ranks.add(signs=3, until=10)
    ranks.add(signs=5, until=10, command="kill -STOP $$")
    os.waitpid(ranks.processes[1].pid, os.WUNTRACED)
    assert not ranks.look(10) and ranks.told == []
    assert not ranks.look(10 + SOON)
    assert ranks.told == [(1, HUNG, "hung after 5 signs of life; it is stopped")]
    assert ranks.sent[2:] == [(1, signal.SIGKILL)]


def test_ranks_may_notice_by_themselves_that_one_has_died_and_are_ended_after_that(ranks: Ranks) -> None:
    """Also where they break their word meanwhile: they are not what hung."""
    ranks.add(signs=3, until=100)
    ranks.add(signs=5, until=100, command="exit 1")
    os.waitid(os.P_PID, ranks.processes[1].pid, os.WEXITED | os.WNOWAIT)
    assert not ranks.look(100) and not ranks.look(100 + LOST)
    assert (ranks.told, ranks.sent) == ([], [])
    assert ranks.look(100 + LOST + SOON)
    assert ranks.told == [(0, ORPHANED, "lost the other ranks and did not notice")]
    assert ranks.sent == [(0, signal.SIGKILL)]


def test_the_last_word_of_a_rank_that_leaves_binds_nobody(ranks: Ranks, tmp_path: Path) -> None:
    ranks.add(signs=3, until=10)
    (tmp_path / f"{watchdog.PULSE}0").write_text("0 3 inf")
    ranks.add(signs=3, until=1e6)
    assert not ranks.look(1000) and (ranks.told, ranks.sent) == ([], [])


def test_a_signal_within_the_echo_of_the_first_is_none(signals: None, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(100.0)

    def leave(code: int) -> NoReturn:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    left: list[int] = []
    stop.listen(left.append, now=clock)
    with pytest.raises(SystemExit) as last, stop.deferred():
        assert stop.pending() == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        clock.seconds += stop.ECHO
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.pending() == signal.SIGUSR1
        clock.seconds += SOON
        with pytest.raises(SystemExit) as end:
            os.kill(os.getpid(), signal.SIGTERM)
        assert end.value.code == TERMINATED and left == []
    assert last.value.code == STOPPED and left == [signal.SIGUSR1]  # what nobody asked for ends it then
