"""Laws 1 to 4 for a package that is only installed beside lasptrain: `outsider/`, of which no file here knows.

Its transitions are matrices, which do not commute, and numbers per row. Copy this file to prove a mixer of your own.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
import tomllib
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib import import_module
from itertools import combinations, product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from lasptrain import architectures, train
from lasptrain.architectures import GROUP
from lasptrain.architectures.base import Architecture
from lasptrain.cost import plan
from lasptrain.errors import Stopped
from lasptrain.models.language_model import on_meta
from lasptrain.ops.recurrence import Recurrence
from lasptrain.parallel import recurrence
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.parallel.scan import SCANS
from lasptrain.parallel.transition import Transition
from lasptrain.process import signals as stop
from lasptrain.recipe.loading import load
from lasptrain.run.metrics import read_metrics
from tests.architectures import test_architectures as offered
from tests.laws.test_layouts import (
    VOCAB,
    WINDOW,
    Case,
    Layout,
    check_all,
    compare,
    gradients_of,
    pairs_of,
    references,
    single,
)
from tests.process.test_faults import at_call
from tests.support import program
from tests.support.gloo import PATIENCE, spawn
from tests.support.program import Started

INSTALLED = Path(__file__).parents[1] / "outsider"  # a folder as pip leaves it: a package and its .dist-info
KEYS = {"dim": 16, "layers": 3, "heads": 2, "key_dim": 4, "value_dim": 6, "mlp": 20}
MODELS = tuple(product(("slow_matrix", "slow_diagonal"), (False, True)))  # the second: with softmax layers


@pytest.fixture(scope="module", autouse=True)
def installed() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(INSTALLED)
        yield


@cache
def model(arch: str, hybrid: bool) -> Architecture:
    softmax = {"softmax": [1], "sliding_window": 50} if hybrid else {}
    return architectures.model({"arch": arch, **KEYS, "vocab": VOCAB, "tie": False, **softmax})


# Law 1


def times(transition: Tensor, state: Tensor) -> Tensor:
    return transition @ state if transition.dim() == 3 else transition[..., None] * state


def by_document(q: Tensor, k: Tensor, v: Tensor, a: Tensor, doc_ids: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and the final state of texts one after the other, each document alone."""
    outputs, final = [], []
    for text in range(len(q)):
        state, document = initial[text], 0
        for t in range(q.shape[1]):
            if doc_ids[text, t] != document:
                state, document = torch.zeros_like(state), int(doc_ids[text, t])
            state = times(a[text, t], state) + torch.einsum("hk,hv->hkv", k[text, t], v[text, t])
            outputs.append(torch.einsum("hk,hkv->hv", q[text, t], state))
        final.append(state)
    return torch.stack(outputs).view(v.shape), torch.stack(final)


@pytest.mark.parametrize("given", [True, False], ids=["states", "none"])
@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("matrix", [True, False], ids=["matrix", "diagonal"])
def test_five_functions_are_the_recurrence(matrix: bool, length: int, given: bool) -> None:
    """With every set of document starts, a text each."""
    rule: Recurrence = getattr(rules(), "MATRIX" if matrix else "DIAGONAL")
    starts = torch.tensor(list(product((0, 1), repeat=length)))
    doc_ids, count = starts.cumsum(1).int(), len(starts)
    g = torch.Generator().manual_seed(length)
    sizes = [(3,), (3,), (5,), (3, 3) if matrix else (3,)]
    leaves = [torch.randn(count, length, 2, *size, generator=g).double().requires_grad_() for size in sizes]
    initial, dfinal = (torch.randn(count, 2, 3, 5, generator=g).double() * given for _ in range(2))
    do = torch.randn(count, length, 2, 5, generator=g).double()
    q, k, v, a = leaves
    want = by_document(q, k, v, a, doc_ids, initial.requires_grad_())
    grads = torch.autograd.grad(want, [*leaves, initial], (do, dfinal))

    q, inputs = q.detach(), (k.detach(), v.detach(), a.detach())
    entering, leaving = (initial.detach(), dfinal) if given else (None, None)
    state, linear, blocks = rule.summarize("chunked", inputs, doc_ids, 2)
    final = Transition(linear).apply(entering, state)
    o, kept = rule.attend("chunked", q, inputs, doc_ids, entering, blocks)
    own, again, dblocks = rule.grad_initial_state("chunked", q, do, inputs, doc_ids, kept, 2)
    dinitial = Transition(again).transpose().apply(leaving, own)
    dq, rest = rule.grad_query("chunked", q, inputs, do, doc_ids, kept)
    dinputs = rule.grad_inputs("chunked", q, inputs, do, doc_ids, leaving, dblocks, kept, rest)
    for found, wanted in zip((o, final, dq, *dinputs, dinitial), (*want, *grads), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert not linear[starts.any(1)].any() and torch.equal(linear, again)
    for wanted_of in (0, 1):
        alone, unread, _ = rule.summarize("chunked", inputs, doc_ids, wanted_of)
        assert unread.isnan().all() and unread.shape == linear.shape and alone.shape == state.shape
        assert wanted_of == 0 or torch.equal(alone, state)


def rules() -> ModuleType:
    return import_module("outsider.recurrences")


# Law 2

MESHES = ((1, 1), (1, 2), (1, 3), (2, 2))
KINDS, MODES, SEGMENTS = ("ddp", "zero2", "zero3", "hsdp"), ("none", "full", "selective"), (1, 2, 3)
Row = tuple[tuple[str, bool], tuple[int, int], str, str, str, int]


@cache
def rows() -> list[Row]:
    """All pairs of values of any two choices, in as few rows as are found by taking the one with the most new pairs."""
    every = [
        row for row in product(MODELS, MESHES, SCANS, KINDS, MODES, SEGMENTS) if WINDOW % (row[1][1] * row[5]) == 0
    ]
    pairs = {row: pairs_of(*row) for row in every}
    missing, chosen = set[object]().union(*pairs.values()), list[Row]()
    while missing:
        chosen.append(max(every, key=lambda row: len(pairs[row] & missing)))
        missing -= pairs[chosen[-1]]
    return chosen


def test_rows_hold_every_pair_of_choices() -> None:
    have = set[object]().union(*(pairs_of(*row) for row in rows()))
    choices = (MODELS, MESHES, tuple(SCANS), KINDS, MODES, SEGMENTS)
    for (i, ones), (j, others) in combinations(enumerate(choices), 2):
        missing = {(i, j, one, other) for one, other in product(ones, others)} - have
        assert missing <= {(1, 5, (1, 3), 3)}  # 120 tokens are not nine slices


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_layout_is_one_device(mesh: tuple[int, int]) -> None:
    cases: list[Case] = [
        (model(*which), torch.float64, Layout(*mesh, scan, kind, mode, segments))
        for which, at, scan, kind, mode, segments in rows()
        if at == mesh
    ]
    world = mesh[0] * mesh[1]
    assert spawn(world, check_all, cases, references(cases)) == [len(cases)] * world


class Lost:
    """A rule that forgets its transition on rank 1: what the scan gets is `instead` of it."""

    def __init__(self, rule: Any, instead: Callable[[Tensor], Tensor]):
        self.rule, self.instead = rule, instead

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.rule, name)
        if name not in ("summarize", "grad_initial_state"):
            return function

        def called(*args: Any) -> Any:
            state, linear, blocks = function(*args)
            return state, self.instead(linear), blocks

        return called


def ones(linear: Tensor) -> Tensor:
    """The transition that leaves a state as it is."""
    return torch.eye(linear.shape[-1]).to(linear).expand_as(linear) if linear.dim() == 4 else torch.ones_like(linear)


def broken(rank: int, patch: pytest.MonkeyPatch, name: str, mixers: ModuleType) -> None:
    match name:
        case "not transposed":
            patch.setattr(Transition, "transpose", lambda self: self)
        case "own instead of the other's":
            patch.setattr(Transition, "like", lambda self, tensors: self)
        case "operators counted":
            patch.setattr(recurrence, "no_dispatch", lambda: pytest.MonkeyPatch.context())
        case _:
            for layer in (mixers.MatrixMixer, mixers.DiagonalMixer):
                instead = ones if name == "left out" else torch.zeros_like
                patch.setattr(layer, "rule", Lost(layer.rule, instead) if rank == 1 else layer.rule)


MISTAKES: tuple[tuple[str, str, Layout], ...] = (
    ("not transposed", "slow_matrix", Layout(1, 3, "ring")),
    ("not transposed", "slow_matrix", Layout(1, 3, "all_gather")),
    ("left out", "slow_matrix", Layout(1, 3, "ring")),
    ("left out", "slow_diagonal", Layout(1, 3, "all_gather")),
    ("zero", "slow_matrix", Layout(1, 3, "all_gather")),
    ("zero", "slow_diagonal", Layout(1, 3, "all_scan")),
    ("own instead of the other's", "slow_matrix", Layout(1, 3, "all_gather")),
    ("own instead of the other's", "slow_diagonal", Layout(1, 3, "all_gather")),
    ("operators counted", "slow_matrix", Layout(1, 3, "ring", recompute="selective")),
)


def noticed(rank: int, world: int, models: dict[str, Architecture], found: dict[str, Any]) -> list[bool]:
    """For each of MISTAKES, true if the comparison fails on this rank; and for none."""
    failed = []
    for name, arch, layout in (*MISTAKES, ("none", "slow_matrix", Layout(1, 3))):
        with pytest.MonkeyPatch.context() as patch:
            if name != "none":
                broken(rank, patch, name, import_module("outsider.mixers"))
            try:
                compare(models[arch], torch.float64, layout, found[arch])
                failed.append(False)
            except AssertionError:
                failed.append(True)
    return failed


def test_mistakes_about_transitions_are_noticed() -> None:
    models = {arch: model(arch, False) for arch in ("slow_matrix", "slow_diagonal")}
    found = {arch: single(one, torch.float64) for arch, one in models.items()}
    ranks = spawn(3, noticed, models, found)
    assert [any(failed) for failed in zip(*ranks, strict=True)] == [True] * len(MISTAKES) + [False]


# Law 3


def two_texts(rank: int, world: int, models: list[Architecture]) -> list[tuple[int, list[tuple[Tensor, Tensor]]]]:
    """For each model and number of segments, losses and gradients with each of two last tokens of document A."""
    return [
        (segments, [gradients_of(rank, world, last, segments, one) for last in (5, 9)])
        for one in models
        for segments in (1, 4)
    ]


@pytest.mark.parametrize("world", [1, 2])
def test_a_document_never_sees_another(world: int) -> None:
    for rank, found in enumerate(spawn(world, two_texts, [model(*which) for which in MODELS])):
        for segments, (first, second) in found:
            length = WINDOW // (world * segments)
            position = torch.cat([(m * world + rank) * length + torch.arange(length) for m in range(segments)])
            in_b = position >= 61
            assert torch.equal(first[0][in_b], second[0][in_b])
            assert torch.equal(first[1][in_b], second[1][in_b])
            assert first[1][in_b].any() or not in_b.any()
            assert not first[1][~in_b].any()


# Law 4, and the command line

RECIPE = """
model: {arch: slow_matrix, dim: 16, layers: 2, heads: 2, key_dim: 4, value_dim: 6, mlp: 24, mixing: 0.2}
data: {source: SOURCE, tokenizer: bytes, window: 72, cache: CACHE, validation: 300000}
mesh: {sp: 2}
optim: {lr: 1e-2, schedule: constant}
train: {steps: 6, batch: 2, precision: fp32, segment: 36}
checkpoint: {every: 2}
eval: {every: 3, windows: 2, sample: 0}
"""
HYBRID = ("model.softmax=[1]", "model.sliding_window=20")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outsider")
    (folder / "text").mkdir()
    for i in range(40):
        (folder / "text" / f"{i}.txt").write_text(f"Document {i} counts: " + " ".join(str(i * j) for j in range(i * 5)))
    text = RECIPE.replace("SOURCE", str(folder / "text")).replace("CACHE", str(folder / "cache"))
    (folder / "slow.yaml").write_text(text)
    return folder


def start(folder: Path, *arguments: str) -> Started:
    """The command in a folder, with the package where PYTHONPATH says, so that ranks find it."""
    path = os.pathsep.join([str(program.ROOT), str(INSTALLED)])
    return program.start(
        "lasptrain", *arguments, folder=folder, logs=folder / "logs", PYTHONPATH=path, GLOO_SOCKET_IFNAME="lo"
    )


def command(folder: Path, *arguments: str) -> str:
    code, printed, said = start(folder, *arguments).end()
    assert code == 0, printed + said
    return printed


def pretrain(run: str, *more: str) -> tuple[str, ...]:
    overrides = [word for one in (*HYBRID, *more) for word in ("--set", one)]
    return ("pretrain", "slow.yaml", "--run", run, "--nproc", "2", *overrides)


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run)]


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> list[float]:
    command(folder, *pretrain("undisturbed"))
    return losses(folder / "undisturbed")


@pytest.mark.slow
@pytest.mark.fault("kill -9 or a signal at a random time of a whole run")
def test_a_killed_run_continues_bitwise_and_a_moved_one_to_tolerance(folder: Path, undisturbed: list[float]) -> None:
    process = start(folder, *pretrain("killed"))
    metrics, deadline = folder / "killed" / "metrics.jsonl", time.monotonic() + PATIENCE
    while not (metrics.exists() and metrics.read_text().count('"grad_norm"') >= 3):
        assert time.monotonic() < deadline and process.process.is_alive()
        time.sleep(0.001)
    process.send(signal.SIGKILL)
    process.end()
    steps = folder / "killed" / "checkpoints"
    assert not (steps / "step-6").exists()
    shutil.copytree(folder / "killed", folder / "moved")
    command(folder, *pretrain("killed"))
    assert losses(folder / "killed") == undisturbed and len(undisturbed) == 6
    command(folder, *pretrain("moved", "mesh.sp=1", "mesh.dp=2", "parallel.data_parallel=zero3", "train.segment=72"))
    assert losses(folder / "moved") == pytest.approx(undisturbed, rel=2e-5)


def lives(rank: int, world: int, file: Path, folder: Path, archs: list[list[str]]) -> None:
    """Runs of the other models: undisturbed, stopped after a step by a signal to one rank, and moved between meshes."""
    stop.listen()
    for number, keys in enumerate(archs):
        small = ["data.window=36", "train.segment=18", "train.steps=4", "eval.every=0", "parallel.data_parallel=ddp"]
        keys = ["model.vocab=320", *small, *keys]
        recipe = load(file, keys)
        train.train(recipe, folder / f"undisturbed-{number}")
        signalled = at_call(train, "set_learning_rate", 3 if rank else 0, partial(os.kill, os.getpid(), signal.SIGTERM))
        with signalled, pytest.raises(Stopped):
            train.train(recipe, folder / f"stopped-{number}")
        stop._noted = 0
        train.train(recipe, folder / f"stopped-{number}")
        for move in (
            ["train.steps=2", "mesh.sp=1", "mesh.dp=2", "parallel.data_parallel=hsdp"],
            ["mesh.scan=all_gather", "train.segment=12", "parallel.recompute=selective"],
        ):
            train.train(load(file, [*keys, *move]), folder / f"moved-{number}")


def test_stopped_and_moved_runs_of_every_model_continue(folder: Path) -> None:
    archs = [["model.arch=slow_matrix"], *(["model.arch=slow_diagonal", *more] for more in ((), HYBRID))]
    file = folder / "each.yaml"
    file.write_text((folder / "slow.yaml").read_text().replace(", mixing: 0.2", ""))
    for run, number in product(("undisturbed", "stopped", "moved"), range(len(archs))):
        (folder / f"{run}-{number}").mkdir()
    spawn(2, lives, file, folder, archs)
    for number in range(len(archs)):
        want = losses(folder / f"undisturbed-{number}")
        assert len(want) == 4 and losses(folder / f"stopped-{number}") == want
        assert losses(folder / f"moved-{number}") == pytest.approx(want, rel=2e-5)


@pytest.mark.parametrize("which", MODELS, ids=str)
def test_numbers_are_those_of_the_layers(which: tuple[str, bool]) -> None:
    one = model(*which)
    made = on_meta(one, WINDOW, ShardedRecurrence("chunked"))
    assert sum(plan.parameters(one, VOCAB).values()) == sum(p.numel() for p in made.parameters())


def test_the_command_line_takes_it(folder: Path, undisturbed: list[float]) -> None:
    assert "key dim 4, value dim 6" in command(folder, "check", "slow.yaml")
    assert "states sent" in command(folder, "plan", "slow.yaml", "--gpus", "2")
    said = command(folder, "generate", "undisturbed", "--prompt", "Document", "--tokens", "8")
    assert said
    for key, message in (
        ("mixin=0.1", "model.mixin: no such key; did you mean mixing?"),
        ("mixing=2", "model.mixing: found 2; expected at most 1"),
        ("key_dim=17", "model.key_dim: found 17; expected at most 16, a matrix per token is large"),
    ):
        code, _, error = start(folder, "check", "slow.yaml", "--set", f"model.{key}").end()
        assert code == 2 and error == f"error: --set model.{key}: {message}\n"


# The page for those who write one

PAGE = Path(architectures.__file__).with_name("README.md")


def test_the_package_of_the_page_is_one_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in re.findall(r"^`([\w./]+)`[^\n]*\n\n```\w+\n(.*?)^```", PAGE.read_text(), re.M | re.S):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    offered.installed(
        tmp_path, tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]
    )
    monkeypatch.syspath_prepend(tmp_path)
    one = load(tmp_path / "forgetful.yaml").model
    assert one.arch == "forgetful"
    made = on_meta(one.model_copy(update={"vocab": VOCAB}), WINDOW, ShardedRecurrence("chunked"))
    assert sum(plan.parameters(one, VOCAB).values()) == sum(p.numel() for p in made.parameters())
    small = architectures.model({"arch": "forgetful", **KEYS, "vocab": VOCAB, "tie": False})
    layouts = (Layout(1, 2, "ring", "zero3", "selective", 2), Layout(2, 1, segments=3), Layout(1, 2, "all_gather"))
    cases: list[Case] = [(small, torch.float64, layout) for layout in layouts]
    assert spawn(2, check_all, cases, references(cases)) == [len(cases)] * 2
