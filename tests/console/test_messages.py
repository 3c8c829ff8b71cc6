"""Messages through memory that ranks share, by kernels in Triton's interpreter; `test_gpu_layouts` has real ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import gloo
from tests.support.interpreted import inside, interpreted

BOX = 1 << 16  # bytes
SHAPES = ((2, 2048), (3, 5, 7), (1,), (4100,))  # numbers that fill parts and that do not


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    assert "6 passed" in interpreted(__file__, "interpreted")


class Host:
    """Memory of a few ranks: a file that their processes map."""

    def __init__(self, folder: Path, ranks: int):
        from lasptrain.ops.triton_p2p import parts
        from lasptrain.parallel.p2p_symmetric import BUFFERS

        self.parts = parts(BOX)
        boxes, flags = ranks * BUFFERS * BOX, ranks * 2 * BUFFERS * self.parts
        self.boxes = _mapped(folder / "boxes", boxes, torch.uint8).view(ranks, BUFFERS, BOX)
        self.flags = _mapped(folder / "flags", flags, torch.int32).view(ranks, 2, BUFFERS, self.parts)

    def buffer(self, rank: int, slot: int, dtype: torch.dtype) -> Tensor:
        return self.boxes[rank, slot].view(dtype)

    def full(self, rank: int, slot: int) -> Tensor:
        return self.flags[rank, 0, slot]

    def busy(self, rank: int, slot: int) -> Tensor:
        return self.flags[rank, 1, slot]


def _mapped(file: Path, size: int, dtype: torch.dtype) -> Tensor:
    return torch.from_file(str(file), shared=True, size=size, dtype=dtype)


def message(source: int, n: int, side: int) -> Tensor:
    dtype = (torch.float32, torch.bfloat16, torch.float64)[n % 3]
    x = torch.arange(torch.Size(SHAPES[n % 4]).numel()).reshape(SHAPES[n % 4]) % 100
    return (x + 40 * side + 10 * source + n).to(dtype)


def exchanged(rank: int, ranks: int, folder: Path) -> bool:
    """Whether messages from both sides are whole, in the order in which they are expected."""
    from lasptrain.parallel.p2p_symmetric import SLOTS, SymmetricP2P

    ends = SymmetricP2P(Host(folder, ranks), rank, ranks)
    after, before = (rank + 1) % ranks, (rank - 1) % ranks
    right = True
    for n in range(2 * SLOTS + 1):
        ends.send(message(rank, n, 0), after)()
        back = message(rank, n, 1)
        ends.send(back if back.dim() < 2 else back.mT, before)()
        for side, source in ((0, before), (1, after)):
            want = message(source, n, side)
            want = want if side == 0 or want.dim() < 2 else want.mT
            got = ends.recv(want, source)()
            right = right and got.dtype == want.dtype and torch.equal(got, want) and got.is_contiguous()
    return right


def out_of_order(rank: int, ranks: int, folder: Path) -> bool:
    """Whether what was expected early may be taken late, and what was expected late, early."""
    from lasptrain.parallel.p2p_symmetric import SLOTS, SymmetricP2P

    ends = SymmetricP2P(Host(folder, ranks), rank, ranks)
    if rank == 0:
        for n in range(SLOTS):
            ends.send(message(0, n, 0), 1)()
        return True
    arrivals = [ends.recv(message(0, n, 0), 0) for n in range(SLOTS)]
    return all(torch.equal(arrivals[n](), message(0, n, 0)) for n in (5, 2, 7, 0, 1, 3, 4, 6))


@contextmanager
def at_look(number: int, act: Callable[[], object]) -> Iterator[None]:
    """Within, `act` comes before programs look at a flag for that time (1 is the first)."""
    from triton.runtime.interpreter import InterpreterBuilder

    look, looks = InterpreterBuilder.create_atomic_cas, iter(range(1, 10**9))

    def counted(*args: Any) -> Any:
        if next(looks) == number:
            act()
        return look(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_atomic_cas", counted)
        yield


def one_too_many(rank: int, ranks: int, folder: Path) -> bool:
    """Whether a message for which there is no box left is not sent before one was taken, and then is.

    Its sender has been seen to wait: a flag is looked at again and again, which needs no time to be certain.
    """
    from lasptrain.parallel.p2p_symmetric import SLOTS, SymmetricP2P

    host, sent, waits = Host(folder, ranks), folder / "sent", folder / "waits"
    ends = SymmetricP2P(host, rank, ranks)
    if rank == 0:
        for n in range(SLOTS):
            ends.send(message(0, n, 0), 1)()
        with at_look(100, waits.touch):
            ends.send(message(0, SLOTS, 0), 1)()
        sent.touch()
        return True
    while not (waits.exists() or sent.exists()):
        time.sleep(0.01)
    early = sent.exists()
    arrivals = [ends.recv(message(0, n, 0), 0) for n in range(SLOTS + 1)]
    return not early and all(torch.equal(arrival(), message(0, n, 0)) for n, arrival in enumerate(arrivals))


def scanned(rank: int, ranks: int, folder: Path) -> list[str]:
    """Scans that do not give the same through this memory as through the process group."""
    from lasptrain.parallel import mesh, p2p, scan
    from lasptrain.parallel.p2p_symmetric import SymmetricP2P
    from lasptrain.parallel.transition import Transition

    ends, world, monkeypatch = SymmetricP2P(Host(folder, ranks), rank, ranks), mesh.world(), pytest.MonkeyPatch()
    generator = torch.Generator().manual_seed(rank)
    state, carry = (torch.randn(1, 2, 8, 13, generator=generator) for _ in range(2))
    decay = torch.rand(1, 2, generator=generator)
    wrong = []
    for name, (reverse, carried, output_final_state, fades) in product(
        ("ring", "all_scan"), product((False, True), repeat=4)
    ):
        transition = Transition(decay if fades else None)
        found = []
        for way in (p2p.ProcessGroupP2P(world), ends):
            monkeypatch.setattr(scan, "between", lambda *_, way=way: way)
            one = scan.SCANS[name](world, torch.device("cpu"))
            got = one.start(
                state, transition, carry if carried else None, reverse=reverse, output_final_state=output_final_state
            ).wait()
            found.append((got.initial_state, got.final_state if output_final_state and rank == 0 else None))
        if not all(a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(*found, strict=True)):
            wrong.append(f"{name}, {reverse=}, {carried=}, {output_final_state=}, {fades=}")
    return wrong


def empty(folder: Path, ranks: int) -> bool:
    return not Host(folder, ranks).flags.any()


@inside
@pytest.mark.parametrize("ranks", [2, 3])
def test_interpreted_messages_arrive_whole_and_in_order_from_both_sides(ranks: int, tmp_path: Path) -> None:
    assert gloo.spawn(ranks, exchanged, tmp_path) == [True] * ranks
    assert empty(tmp_path, ranks)


@inside
def test_interpreted_messages_are_taken_when_they_are_needed(tmp_path: Path) -> None:
    assert gloo.spawn(2, out_of_order, tmp_path) == [True] * 2
    assert empty(tmp_path, 2)


@inside
def test_an_interpreted_message_waits_for_an_empty_box(tmp_path: Path) -> None:
    assert gloo.spawn(2, one_too_many, tmp_path) == [True] * 2
    assert empty(tmp_path, 2)


@inside
@pytest.mark.parametrize("ranks", [2, 4])
def test_interpreted_scans_are_those_of_the_process_group(ranks: int, tmp_path: Path) -> None:
    assert gloo.spawn(ranks, scanned, tmp_path) == [[]] * ranks
    assert empty(tmp_path, ranks)
