"""What several files of tests ask for by name; and `pytest --faults`, which counts the faults that were injected.

A test marked `fault(kind, times=1)` has survived so many if it passes, or `record_property("times", n)` if it says so.
"""

import os
import signal
from collections import Counter
from collections.abc import Iterator
from multiprocessing.util import get_temp_dir

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings

from lasptrain.process import local_ranks
from lasptrain.process import signals as stop
from tests.support import gloo

# What is computed here is small: more threads would wait for each other, and for those of the tests that run beside.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start
settings.register_profile("shared", deadline=None)  # how long an example takes says how busy the machine is
settings.load_profile("shared")
if not torch.cuda.is_available():
    local_ranks.START = "forkserver"  # whose server has imported torch
    get_temp_dir()  # of its socket, which outlives the temporary folders of tests
gloo.serve()  # now: a server that starts inside of a temporary folder gives it to all that it forks, after its end too


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def signals() -> Iterator[None]:
    """What this process does on signals is afterwards what it was."""
    before = {number: signal.getsignal(number) for number in stop.CODES}
    yield
    stop._noted = 0
    for number, handler in before.items():
        signal.signal(number, handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", action="store_true", help="count the faults that were injected and survived")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if mark := item.get_closest_marker("fault"):
            item.user_properties += [("fault", mark.args[0]), ("times", mark.kwargs.get("times", 1))]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not terminalreporter.config.getoption("--faults"):
        return
    told = {ending: Counter[str]() for ending in ("passed", "failed")}
    for ending, counts in told.items():
        for report in terminalreporter.stats.get(ending, ()):
            properties = dict(report.user_properties)
            counts[properties.get("fault", "")] += int(properties.get("times", 0))
    terminalreporter.write_line("\n| injected | survived | not |\n|---|---|---|")
    for kind in sorted({kind for counts in told.values() for kind in counts if kind}):
        terminalreporter.write_line(f"| {kind} | {told['passed'][kind]} | {told['failed'][kind]} |")
