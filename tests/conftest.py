"""What several files of tests ask for by name."""

import signal
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from lasptrain import stop


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
