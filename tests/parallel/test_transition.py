"""Transitions are linear maps that compose, and every scan is their composition, whatever kind they are."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from lasptrain.parallel import mesh
from lasptrain.parallel.scan import SCANS
from lasptrain.parallel.transition import FORGET, Transition
from tests.support.gloo import spawn

B, H, K, V = 2, 3, 6, 4
KINDS = ("number", "rotation", "rows", "diagonal", "matrix", "forget")
MIXED = ("number", "diagonal", "matrix", "forget")


def transition(kind: str, seed: int) -> Transition:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64) / 2 + 0.5

    match kind:
        case "number":
            return Transition(draw(B, H))
        case "rotation":
            return Transition(draw(B, H), angle=torch.linspace(0.1, 3.0, H * K // 2, dtype=torch.float64).view(H, -1))
        case "rows":
            return Transition((draw(B, H) > 0.6).double(), rows=2)
        case "diagonal":
            return Transition(draw(B, H, K))
        case "matrix":
            return Transition(draw(B, H, K, K) - 0.7)
    return FORGET


def state(seed: int) -> Tensor:
    return torch.randn(B, H, K, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def image(one: Transition, x: Tensor) -> Tensor:
    return one.apply(x, torch.zeros_like(x))


PAIRS = [*((kind, kind) for kind in KINDS), *((a, b) for a, b in product(MIXED, MIXED) if a != b)]


@pytest.mark.parametrize("first,second", PAIRS)
def test_a_composition_is_one_after_the_other(first: str, second: str) -> None:
    a, b = transition(first, 1), transition(second, 2)
    x, u, w = state(3), state(4), state(5)
    torch.testing.assert_close(b.after(a).apply(x, b.apply(u, w)), b.apply(a.apply(x, u), w))
    torch.testing.assert_close(image(b.after(a).transpose(), x), image(a.transpose().after(b.transpose()), x))


@pytest.mark.parametrize("kinds", [*zip(KINDS, KINDS, KINDS, strict=True), ("number", "matrix", "diagonal")])
def test_composition_is_associative(kinds: tuple[str, str, str]) -> None:
    a, b, c = (transition(kind, seed) for seed, kind in enumerate(kinds))
    x = state(3)
    torch.testing.assert_close(image(c.after(b).after(a), x), image(c.after(b.after(a)), x))


@pytest.mark.parametrize("kind", KINDS)
def test_the_transpose_is_the_adjoint(kind: str) -> None:
    one, x, y = transition(kind, 1), state(2), state(3)
    torch.testing.assert_close((image(one, x) * y).sum(), (x * image(one.transpose(), y)).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_a_transition_is_rebuilt_from_the_tensors_that_are_sent(kind: str) -> None:
    here, there = transition(kind, 1), transition(kind, 2)
    sent = [x.flatten() for x in there.tensors]
    rebuilt = here.like([x.view_as(like) for x, like in zip(sent, here.tensors, strict=True)])
    assert torch.equal(image(rebuilt, state(3)), image(there, state(3)))
    assert here.forgets is (kind == "forget")


def test_nothing_enters_where_there_is_no_state() -> None:
    nan = Transition(torch.full((B, H, K, K), float("nan")))
    assert torch.equal(nan.apply(None, state(1)), state(1))
    assert torch.equal(FORGET.apply(state(2), state(1)), state(1))


def test_a_matrix_acts_exactly_to_the_rounding_of_the_state() -> None:
    g = torch.Generator().manual_seed(0)
    matrix, x = torch.randn(1, 2, 64, 64, generator=g), torch.randn(1, 2, 64, 32, generator=g)
    assert torch.equal(image(Transition(matrix), x), (matrix.double() @ x.double()).float())


def scanned(rank: int, world: int) -> list[str]:
    """Scans, on this rank, that are not the composition of all maps before it; what they may not read is NaN."""
    group, wrong = mesh.world(), []
    choices = product((False, True), repeat=3)
    for (name, kind), (reverse, carried, final) in product(product(SCANS, KINDS), choices):
        scan = SCANS[name](group, torch.device("cpu"))
        maps = [(transition(kind, 10 + r), state(20 + r)) for r in range(world)]
        if reverse:
            maps = [(one.transpose(), added) for one, added in maps]
        want: list[Tensor | None] = [state(9) if carried else None]
        order = list(reversed(range(world))) if reverse else list(range(world))
        for r in order:
            want.append(maps[r][0].apply(want[-1], maps[r][1]))
        own, added = maps[rank]
        reads = scan.reads(carried=carried, output_final_state=final, reverse=reverse)
        if reads < 2 and own.linear is not None:
            own = own._replace(linear=torch.full_like(own.linear, float("nan")))
        if reads < 1:
            added = torch.full_like(added, float("nan"))
        got = scan.start(added, own, want[0], reverse=reverse, output_final_state=final).wait()
        found = [(got.initial_state, want[order.index(rank)])]
        if final and (rank == 0 or name == "all_gather"):
            found.append((got.final_state, want[-1]))
        if not all(a is b if a is None or b is None else torch.allclose(a, b) for a, b in found):
            wrong.append(f"{name}, {kind}, {reverse=}, {carried=}, {final=}")
    return wrong


@pytest.mark.parametrize("world", [1, 3])
def test_a_scan_is_the_composition_and_reads_no_more_than_it_says(world: int) -> None:
    assert spawn(world, scanned) == [[]] * world


def how_much(rank: int, world: int) -> dict[str, tuple[int, ...]]:
    choices = [(carried, final) for carried in (False, True) for final in (False, True)]
    return {
        name: tuple(
            scan(mesh.world(), torch.device("cpu")).reads(carried=carried, output_final_state=final)
            for carried, final in choices
        )
        for name, scan in SCANS.items()
    }


def test_a_transition_is_made_only_where_something_enters_and_leaves() -> None:
    first, between, last = spawn(3, how_much)
    for name in SCANS:
        assert first[name] == (1, 1, 2, 2)
        assert between[name] == (2, 2, 2, 2)
        assert last[name] == (0, 2, 0, 2)
