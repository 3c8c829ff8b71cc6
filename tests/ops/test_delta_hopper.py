"""Law 1 for the Hopper programs of the delta rule, run on the CPU by tests.support.gluon; on a GPU: test_gpu_delta.

The programs beside them run in Triton's interpreter. That each wait, fence and barrier of the Hopper programs is needed
and that the interpreter sees it is shown by leaving them out, one at a time.
"""

from __future__ import annotations

import ast
import copy
import inspect
import re
from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lasptrain.ops import delta_rule
from tests.ops.test_delta import Case, low, make, measured
from tests.ops.test_delta_compiles import HOPPER
from tests.ops.test_delta_triton import Scene, error
from tests.support.apart import leaks
from tests.support.gluon import Hazard, Programs
from tests.support.interpreted import inside, interpreted
from tests.support.program import ROOT

# of Triton 3.6's interpreter
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
FILE = ROOT / "lasptrain/ops/delta_hopper_kernels.py"
TEXT = FILE.read_text(encoding="utf-8")
LINES = TEXT.split("\n")
BOUND = 6e-3  # of bf16, as in test_gpu_delta
FEW = [
    Scene("gdn", 1, 128, 128, (0,), heads=(2, 1, 2)),
    Scene("delta", 1, 128, 128, heads=(1, 1, 1), edge=False),
    Scene("gdn", 63, 128, 128, (30,), "strong", heads=(1, 2, 2)),
    Scene("gdn_head", 64, 128, 128, (0,), beta=0.5, heads=(1, 1, 1)),
    Scene("delta", 65, 128, 128, (64,), beta=0.1, heads=(1, 1, 1), edge=False),
    Scene("gdn", 130, 128, 128, (1, 40, 64, 65, 70, 129), "strong", heads=(1, 1, 2)),
    Scene("gdn", 130, 128, 128, beta=0.0, heads=(1, 1, 1)),
    Scene("delta", 300, 128, 128, beta=0.0, heads=(1, 1, 1)),
    Scene("gdn", 300, 128, 128, (3, 290), beta=0.1, heads=(1, 1, 2)),
    Scene("gdn", 520, 128, 128, decays="strong", beta=0.05, heads=(1, 1, 1)),
]
REST = [
    Scene("gdn", 65, 128, 128, heads=(2, 2, 6)),
    Scene("gdn_head", 130, 128, 128, decays="strong", heads=(1, 2, 6)),
    Scene("delta", 200, 128, 128, (7,), heads=(1, 1, 4)),
    Scene("gdn", 200, 128, 128, tuple(range(0, 200, 7)), heads=(1, 1, 1)),
    Scene("gdn", 777, 128, 128, (3, 100, 500), "strong", beta=0.3, heads=(2, 1, 2)),
    Scene("gdn", 1025, 128, 128, beta=0.05, edge=False),
    Scene("delta", 1500, 128, 128, (700,), beta=0.02, heads=(1, 1, 1)),
]


class Call(NamedTuple):
    """A launch of a program, with its arguments as they were before."""

    program: str
    programs: int
    arguments: dict[str, Any]

    def copy(self) -> Call:
        return self._replace(arguments={name: copied(x) for name, x in self.arguments.items()})

    def tensors(self) -> list[Tensor]:
        """All tensors of the arguments."""
        found = (getattr(x, "base", x) for x in self.arguments.values())
        return [x for x in found if isinstance(x, Tensor)]

    def outcome(self, text: str) -> list[Tensor]:
        """What the program of a text leaves in the tensors."""
        call = self.copy()
        Programs(text, FILE.name).run(*call)
        return call.tensors()


def copied(x: Any) -> Any:
    """A copy of a tensor, or of a descriptor and its tensor."""
    if isinstance(x, Tensor):
        return x.clone()
    if not hasattr(x, "base"):
        return x
    x = copy.copy(x)
    x.base = x.base.clone()
    return x


@cache
def programs() -> Programs:
    return Programs(TEXT, FILE.name)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Call]]:
    """The first call of each Hopper program; they run on the CPU wherever they would be launched."""
    from lasptrain.ops import delta_hopper, delta_triton_back, delta_triton_forward, delta_triton_slice, triton_launch

    made: dict[str, Call] = {}

    def run(program: Any, like: Tensor, grid: tuple[int, int, int], launch: Any, constants: Any, *args: Any) -> None:
        name = program.__name__
        ours = programs().names.get(name) is program
        if not ours:
            triton_launch.run(program, like, grid, launch, constants, *args)
            return
        names = [*inspect.signature(program).parameters]
        assert [*constants] == names[len(args) :]
        call = Call(name, grid[0], dict(zip(names, args, strict=False)) | constants)
        made.setdefault(name, call.copy())
        programs().run(*call)

    for module in (delta_triton_slice, delta_triton_forward, delta_triton_back, delta_hopper):
        monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(delta_hopper, "fits", lambda s, like: True)
    monkeypatch.setattr(delta_hopper, "_programs", lambda: SimpleNamespace(**programs().names))
    yield made


@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["few", "rest"])
def test_in_the_interpreter(few: bool) -> None:
    told = interpreted(__file__, "not rest and not in_the_interpreter" if few else "rest and not in_the_interpreter")
    assert " passed" in told and "skipped" not in told


def in_bf16(x: Case) -> Case:
    """The same in bf16, its states in fp32."""
    x = x.map(lambda y: y.to(torch.bfloat16))
    return x._replace(initial_state=low(x.initial_state), dfinal=low(x.dfinal))


def compare(x: Case) -> None:
    x = in_bf16(x)
    bound = 2 * BOUND if x.q.shape[1] == 1 else BOUND  # gradients of two numbers: their roundings do not average out
    want = measured("chunked", x.map(lambda y: y.double()))
    for handed_on in (True, False):
        got = measured("triton", x, handed_on)
        assert got.keys() == want.keys()
        for name in want:
            assert error(got[name], want[name]) < bound, (name, handed_on)


@inside
@pytest.mark.parametrize("scene", FEW, ids=str)
def test_programs_are_the_recurrence(scene: Scene, calls: dict[str, Call]) -> None:
    compare(scene.case())
    assert {*calls} == {*HOPPER}


@inside
@pytest.mark.parametrize("scene", REST, ids=str)
def test_rest_of_the_scenes(scene: Scene, calls: dict[str, Call]) -> None:
    compare(scene.case())


@inside
@pytest.mark.parametrize("kind", ["gdn", "delta"])
def test_some_beta_are_zero(kind: str, calls: dict[str, Call]) -> None:
    x = make(kind, 140, begins=(50,), sizes=(1, 1, 1, 128, 128))
    assert x.beta is not None
    x.beta[:, ::5] = 0.0
    x.beta[:, 64:128] = 0.0
    compare(x)


@inside
def test_two_runs_give_the_same_bits(calls: dict[str, Call]) -> None:
    x = in_bf16(make("gdn", 130, begins=(50,), sizes=(1, 1, 2, 128, 128)))
    first, second = measured("triton", x), measured("triton", x)
    assert all(torch.equal(y, second[name]) for name, y in first.items())


@inside
def test_documents_do_not_see_each_other(calls: dict[str, Call]) -> None:
    begins = (1, 20, 64, 100)
    x = in_bf16(make("gdn", 130, begins=begins, sizes=(1, 1, 1, 128, 128)))
    assert not leaks(lambda given: measured("triton", given), x, begins)


@inside
@pytest.mark.parametrize("tokens", [64, 300])
def test_a_state_is_the_same_without_its_map(tokens: int, calls: dict[str, Call]) -> None:
    """Of slices of one block and of several."""
    x = in_bf16(make("gdn", tokens, begins=(30,), sizes=(1, 1, 1, 128, 128)))
    inputs = (x.k, x.v, x.beta, x.log_decay)
    alone, with_map = (delta_rule.summarize("triton", inputs, x.doc_ids, wanted)[0] for wanted in (1, 2))
    assert torch.equal(alone, with_map)


@inside
def test_rest_more_than_256_chunks_in_a_block(calls: dict[str, Call], monkeypatch: pytest.MonkeyPatch) -> None:
    """Decays over chunks are loaded 256 at a time; of about 50 of these chunks nothing is left at the other end."""
    monkeypatch.setattr("lasptrain.ops.delta_triton_slice.PROGRAMS", 1)
    x = make("gdn", 258 * 64 + 5, beta=0.05, sizes=(1, 1, 1, 128, 128))
    assert x.log_decay is not None
    compare(x._replace(log_decay=0.03 * x.log_decay))


class Mutant(NamedTuple):
    """The programs with other lines in one of them."""

    line: str
    instead: str
    text: str

    @classmethod
    def of(cls, changes: dict[int, str]) -> Mutant:
        """The programs with these lines, whose numbers are from 1, indented as those they replace."""
        lines = LINES.copy()
        old = [lines[number - 1].strip() for number in changes]
        for number, instead in changes.items():
            line = lines[number - 1]
            lines[number - 1] = line[: -len(line.lstrip())] + instead
        return cls("; ".join(old), "; ".join(changes.values()), "\n".join(lines))

    def caught(self, call: Call, right: list[Tensor]) -> bool:
        """Whether the interpreter refuses it, or the program leaves something else than it should."""
        try:
            found = call.outcome(self.text)
        except Hazard:
            return True
        return not all(torch.equal(x, y) for x, y in zip(found, right, strict=True))


def body(function: str) -> Iterator[tuple[int, str]]:
    """Numbers and text of the lines of a function."""
    (found,) = (x for x in ast.parse(TEXT).body if isinstance(x, ast.FunctionDef) and x.name == function)
    assert found.end_lineno is not None
    for number in range(found.lineno, found.end_lineno + 1):
        yield number, LINES[number - 1].strip()


def without_one(function: str) -> Iterator[Mutant]:
    """A function without one of its barriers, fences and waits; or a wait for products that waits for one less."""
    for number, line in body(function):
        if line.startswith("_published()"):
            yield Mutant.of({number: "_barrier()"})
            yield Mutant.of({number: "fence_async_shared()"})
        elif re.match(r"_barrier\(|fence_async_shared\(|tma\.store_wait\(|mbarrier\.wait\(", line):
            yield Mutant.of({number: "pass"})
        elif found := re.search(r"warpgroup_mma_wait\((\d)", line):
            yield Mutant.of({number: line.replace(found[0], f"warpgroup_mma_wait({int(found[1]) + 1}")})


NEEDLESS: set[tuple[str, str]] = set()  # programs and lines that they could do without; say why


@pytest.fixture
def whole(calls: dict[str, Call]) -> dict[str, tuple[Call, list[Tensor]]]:
    """A call of each program for four chunks, and what it leaves: enough for both stages to be used again."""
    measured("triton", in_bf16(make("gdn", 256, sizes=(1, 1, 1, 128, 128))))
    return {name: (call, call.outcome(TEXT)) for name, call in calls.items()}


@inside
def test_every_wait_is_needed(whole: dict[str, tuple[Call, list[Tensor]]]) -> None:
    tried, missed = 0, set()
    for name in HOPPER:
        assert not Mutant("", "", TEXT).caught(*whole[name])
        for mutant in (*without_one(name), *without_one("_barriers")):
            tried += 1
            if not mutant.caught(*whole[name]):
                missed.add((name, mutant.line))
    assert tried > 90
    assert missed == NEEDLESS


CHANGES = [  # of a function's only line that holds the first text; run by the program
    ("walk_delta", "walk_delta", "mbarrier.wait(bars.index(stage), phase)", "phase)", "phase ^ 1)"),
    ("walk_delta", "walk_delta", "phase ^= stage", "stage", "1"),
    ("query_gradients", "query_gradients", "turn ^= 1", "1", "0"),
    ("input_gradients", "input_gradients", "mbarrier.wait(of_inverse.index(0), turn)", "turn", "turn ^ 1"),
    ("input_gradients", "input_gradients", "phase ^= stage", "phase ^= stage", "phase = phase"),
    ("summarize_delta", "summarize_delta", "sk = keys.index(stage)", "stage", "stage ^ 1"),
    ("walk_gradients", "walk_gradients", "_transformed(inverses.index(stage)", "index(stage)", "index(stage ^ 1)"),
    ("input_gradients", "input_gradients", "of_keys, stage ^ 1,", "stage ^ 1", "stage"),
    ("walk_delta", "_fetch_walk", "mbarrier.expect(", "3 * D", "2 * D"),
    ("walk_delta", "_fetch_walk", "mbarrier.expect(", "3 * D", "4 * D"),
]


@inside
def test_wrong_phases_stages_and_sizes_are_seen(whole: dict[str, tuple[Call, list[Tensor]]]) -> None:
    for name, function, line, old, new in CHANGES:
        ((number, found),) = ((number, found) for number, found in body(function) if line in found)
        mutant = Mutant.of({number: found.replace(old, new)})
        assert mutant.caught(*whole[name]), mutant[:2]


def too_early(function: str) -> Iterator[Mutant]:
    """A program with one of its loads for later chunks before the barrier that frees what is written to."""
    looping, barrier = False, 0
    for number, line in body(function):
        looping = looping or line.startswith("while ")
        if line.startswith(("_published()", "_barrier()")):
            barrier = number
        elif looping and line.startswith("_fetch_"):
            yield Mutant.of({barrier: f"{line}; {LINES[barrier - 1].strip()}", number: "pass"})


@inside
def test_loads_that_are_issued_too_early_are_seen(whole: dict[str, tuple[Call, list[Tensor]]]) -> None:
    mutants = [(name, mutant) for name in HOPPER for mutant in too_early(name)]
    assert len(mutants) == 9
    for name, mutant in mutants:
        assert mutant.caught(*whole[name]), mutant.line
