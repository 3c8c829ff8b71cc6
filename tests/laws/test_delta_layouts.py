"""Laws 2 and 3 of the architectures with gates of the data: every layout is one device, no document sees another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product

import pytest
import torch
from torch import Tensor

from lasptrain import architectures, train
from lasptrain.architectures.base import Architecture
from lasptrain.models.language_model import LanguageModel, initial_values
from lasptrain.ops import delta_rule
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.parallel.scan import SCANS
from lasptrain.parallel.shard import fill, parallelize
from lasptrain.parallel.transition import Transition
from lasptrain.recipe.sections import Parallel
from lasptrain.training.segments import backward
from tests.laws.test_layouts import (
    BATCH,
    BOUNDS,
    CPU,
    KINDS,
    MODES,
    VOCAB,
    WINDOW,
    Layout,
    mesh_of,
    pairs_of,
    pieces,
    windows,
)
from tests.support.gloo import spawn

SIZES = {"dim": 16, "layers": 3, "heads": 4, "key_dim": 6, "value_dim": 5, "mlp": 12, "vocab": VOCAB, "tie": False}
SOFTMAX = {"softmax": [1], "kv_heads": 2, "softmax_gate": True, "qk_norm": "whole", "softmax_norm": "after"}
SLIDING = {"softmax": "every 3rd", "qk_norm": "head", "rotary_fraction": 0.5, "sliding_window": 31}
MODELS: dict[str, dict[str, object]] = {
    "gdn": {"arch": "gdn", "key_heads": 2},
    "gdn, little erased": {"arch": "gdn", "conv": 0},
    "gdn, to two": {"arch": "gdn", "negative_eigenvalues": True, "gate": "sigmoid", "decay": "paper"},
    "gdn, hybrid": {"arch": "gdn", "rotary": None, "centred_norms": True, "output_norm_eps": 1e-3, **SOFTMAX},
    "kda": {"arch": "kda", "decay": "paper"},
    "kda, little erased": {"arch": "kda", "conv": 15},
    "kda, sliding": {"arch": "kda", "conv": 2, **SLIDING},
    "gla": {"arch": "gla", "conv": 3},
    "gla, hybrid": {"arch": "gla", **SOFTMAX, "softmax_norm": "before"},
}
MESHES = [(1, 1), (1, 2), (1, 3), (1, 4), (1, 5), (2, 2), (3, 2)]
SEGMENTS = (1, 2, 3, 5)
SMALL = [name for name in MODELS if "little" in name]  # else what lies before a slice is erased, and M is nothing


def config(name: str) -> Architecture:
    return architectures.model(SIZES | MODELS[name])


def values(name: str, model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """Initial values, with larger matrices and decays that depend on the text; beta in (0, 0.1) for those of SMALL.

    Every token's embedding then has a large first channel, which beta's weights are against.
    """
    g = torch.Generator().manual_seed(5)
    for part, value in initial_values(model, 7, CPU):
        if part.endswith("decay_proj.weight") or "decay_proj.up" in part:
            value = value + torch.randn(value.shape, generator=g) / 4
        elif part.endswith("weight") and value.dim() > 1 and ".conv." not in part:
            value = value * 6
        elif "norm" in part:
            value = value + torch.randn(value.shape, generator=g) / 4
        if name in SMALL and part == "embed.weight":
            value[:, 0] += 0.5
        if name in SMALL and part.endswith("beta.weight"):
            value[:, 0] -= 2.0
        yield part, value


def made(name: str, dtype: torch.dtype, attention: ShardedRecurrence) -> LanguageModel:
    return LanguageModel(config(name), WINDOW, attention, dtype=dtype, loss_chunk=32)


@cache
def single(name: str, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss and its gradients of one process, one segment, from the token-by-token definition."""
    model = made(name, dtype, ShardedRecurrence("reference")).to(dtype)
    fill(model, values(name, model))
    loss, _ = backward(model, 3, pieces(windows(), 1, 0, 1), 1 / (BATCH * WINDOW))
    return loss / (BATCH * WINDOW), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


Case = tuple[str, torch.dtype, Layout]


@cache
def cases() -> list[Case]:
    """Every mesh with every scan and number of segments; and all pairs of values of any two of the other choices."""
    chosen: list[Case] = []
    seen: set[tuple[int, int, object, object]] = set()
    for (dp, sp), scan, segments in product(MESHES, SCANS, SEGMENTS):
        if WINDOW % (sp * segments):
            continue
        rest = [
            (name, dtype, kind, mode)
            for name, dtype, kind, mode in product(MODELS, BOUNDS, KINDS, MODES)
            if dtype == torch.float64 or "two" not in name
        ]
        shared = scan if sp > 1 else None
        pairs = {row: pairs_of((dp, sp), shared, segments, *row) for row in rest}
        best = max(rest, key=lambda row: len(pairs[row] - seen))
        seen |= pairs[best]
        name, dtype, kind, mode = best
        chosen.append((name, dtype, Layout(dp, sp, scan, kind, mode, segments)))
    return chosen


def batches(layout: Layout) -> Tensor:
    """The windows, as many as a multiple of dp needs."""
    return windows().repeat(3, 1)[: 6 if layout.dp == 3 else BATCH]


def distributed(name: str, dtype: torch.dtype, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss and its gradients, as `pretrain` computes them on a mesh."""
    mesh = mesh_of(layout)
    scan = SCANS[layout.scan](mesh.sp_group, CPU)
    with torch.device("meta"):
        model = made(name, dtype, ShardedRecurrence("chunked", scan)).to(dtype)
    wrapped = parallelize(
        model, model.blocks, mesh, CPU, kind=layout.kind, mode=layout.recompute, dtype=dtype, values=values(name, model)
    )
    tokens = batches(layout)
    batch = [
        tuple(pieces(tokens[window : window + 1], layout.sp, mesh.rank("sp"), layout.segments))
        for window in range(mesh.rank("dp"), len(tokens), layout.dp)
    ]
    loss, _ = train.gradients(wrapped, 3, mesh, Parallel.model_validate({"data_parallel": layout.kind}), batch)
    grads = {}
    for part, parameter in model.named_parameters():
        assert parameter.grad is not None, part
        grads[part] = getattr(parameter.grad, "full_tensor", lambda p=parameter: p.grad)()
    return loss, grads


def error(found: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]]) -> float:
    """Return the largest relative error of loss and gradients."""
    (loss, grads), (want_loss, wanted) = found, want
    assert grads.keys() == wanted.keys()
    errors = [float((grad - wanted[part]).norm() / wanted[part].norm()) for part, grad in grads.items()]
    return max(abs(float(loss) / float(want_loss) - 1), *errors)


def check(rank: int, world: int, cases: list[Case], references: dict[tuple[str, torch.dtype], object]) -> int:
    for name, dtype, layout in cases:
        found = error(distributed(name, dtype, layout), references[name, dtype])  # type: ignore[arg-type]
        assert found < BOUNDS[dtype], (name, dtype, layout, found)
    return len(cases)


def references(cases: list[Case]) -> dict[tuple[str, torch.dtype], object]:
    return {(name, dtype): single(name, dtype) for name, dtype, _ in cases}


@cache
def few() -> list[Case]:
    """Some of the cases, for daily work: every model on ranks that share a window in segments, every mesh and scan."""
    chosen: list[Case] = []
    seen: set[object] = set()
    for case in sorted(cases(), key=lambda case: -case[2].segments * case[2].sp):
        name, _, layout = case
        keys = {name, (layout.dp, layout.sp), layout.scan, layout.kind, layout.recompute, layout.segments}
        if keys - seen:
            chosen.append(case)
            seen |= keys
    return chosen


@pytest.mark.parametrize("daily", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["few", "rest"])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 6])
def test_every_layout_is_one_device(world: int, daily: bool) -> None:
    mine = [case for case in cases() if case[2].dp * case[2].sp == world and (case in few()) is daily]
    assert spawn(world, check, mine, references(mine)) == [len(mine)] * world


def test_cases_hold_every_model_on_shared_windows_with_every_scan() -> None:
    for name in MODELS:
        rows = [layout for found, _, layout in cases() if found == name and layout.sp > 1]
        assert {layout.scan for layout in rows} == set(SCANS), name
        assert {layout.segments > 1 for layout in rows} == {False, True}
        assert len({layout.kind for layout in rows}) > 1 and len({layout.recompute for layout in rows}) > 1


Broken = Callable[[Tensor], Tensor]


def noticed(rank: int, world: int, name: str, reference: tuple[Tensor, dict[str, Tensor]]) -> dict[str, float]:
    """Return the errors of layouts that are broken in one place each."""
    layout = Layout(1, world, "ring", segments=2)
    eye = torch.eye(6, dtype=torch.float64)
    found = {"": error(distributed(name, torch.float64, layout), reference)}
    original, transpose = delta_rule.summarize, Transition.transpose

    def changed(change: Broken, only: int | None = None) -> float:
        def summarize(*args: object) -> tuple[Tensor, Tensor, list[Tensor]]:
            state, linear, blocks = original(*args)  # type: ignore[arg-type]
            return state, change(linear) if only in (None, rank) else linear, blocks

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(delta_rule, "summarize", summarize)
            return error(distributed(name, torch.float64, layout), reference)

    found["left out on one rank"] = changed(lambda m: eye.expand_as(m), only=1)
    found["rounded"] = changed(lambda m: m.bfloat16().to(m.dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transition, "transpose", lambda self: self)
        found["not transposed"] = error(distributed(name, torch.float64, layout), reference)
    assert Transition.transpose is transpose
    return found


@pytest.mark.parametrize("name", SMALL)
def test_a_matrix_that_is_wrong_is_noticed(name: str) -> None:
    for errors in spawn(3, noticed, name, single(name, torch.float64)):
        assert errors.pop("") < BOUNDS[torch.float64]
        assert all(found > 1e-6 for found in errors.values()), errors


def outputs(rank: int, world: int, name: str, segments: int) -> list[Tensor]:
    """Losses per token of this rank's slices, and the same with a token of the second window's first document moved."""
    found = []
    for moved in (False, True):
        tokens = windows()[1:].clone()
        if moved:
            tokens[0, 18] = (tokens[0, 18] + 1) % (VOCAB - 1) + 1  # the last but one of its document
        scan = SCANS["ring"](mesh_of(Layout(1, world)).sp_group, CPU)
        model = made(name, torch.float64, ShardedRecurrence("chunked", scan)).double()
        fill(model, values(name, model))
        carry, losses = None, []
        for piece in pieces(tokens, world, rank, segments):
            with torch.no_grad():
                out = model(piece.tokens, piece.labels, piece.doc_ids, carry, output_final_state=True, per_token=True)
            carry = out.final_state
            losses.append(out.loss)
        found.append(torch.stack(losses))
    return found


@pytest.mark.parametrize("name", ["gdn, little erased", "kda, little erased", "gla"])
def test_a_document_never_sees_another(name: str) -> None:
    segments, ranks = 3, 2
    found = spawn(ranks, partial(outputs, name=name, segments=segments))
    before, after = (torch.stack([own[i] for own in found], dim=1).flatten() for i in (0, 1))
    differs = (before != after).nonzero().flatten().tolist()
    assert set(differs) <= {17, 18, 19} and 18 in differs  # its own label, itself, and the token after it
