"""Signals of health are those of a plain computation, on every mesh, and nothing where they are not asked for."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lasptrain import train
from lasptrain.errors import SetupError
from lasptrain.models.language_model import LanguageModel
from lasptrain.models.mixer import Kinds
from lasptrain.models.softmax import Softmax
from lasptrain.ops import decay_rule, delta_rule
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.parallel.scan import SCANS
from lasptrain.parallel.shard import fill, parallelize
from lasptrain.recipe.sections import Parallel
from lasptrain.training.health import Health, kinds
from lasptrain.training.muon import matrices
from lasptrain.training.segments import backward
from tests.laws import test_delta_layouts, test_layouts
from tests.laws.test_layouts import BATCH, CPU, WINDOW, Layout, mesh_of, pieces, windows
from tests.support.gloo import spawn

EXACT = torch.float64
MODELS = ("tnl", "ssd", "retnet", "gdn, to two", "linear_transformer", "full hybrid", "kda, sliding", "gla, hybrid")
LAYOUTS = {
    1: [Layout(1, 1), Layout(1, 1, recompute="full", segments=3)],
    2: [Layout(2, 1, kind="zero3", recompute="selective", segments=2), Layout(1, 2, "ring", "ddp", "full", 5)],
    4: [Layout(2, 2, "ring", "hsdp", "selective", 2), Layout(1, 4, "all_gather", "zero3", "full", 3, always=True)],
}


def made(name: str, attention: ShardedRecurrence) -> tuple[LanguageModel, Iterator[tuple[str, Tensor]]]:
    """A model of one of the tests of layouts, in fp64, and its values."""
    if name in test_delta_layouts.MODELS:
        model = test_delta_layouts.made(name, EXACT, attention).to(EXACT)
        return model, test_delta_layouts.values(name, model)
    cfg = test_layouts.config(name)  # type: ignore[arg-type]
    model = LanguageModel(cfg, WINDOW, attention, dtype=EXACT, loss_chunk=32).to(EXACT)
    return model, test_layouts.values(model)


def taken(name: str, layout: Layout) -> dict[str, float]:
    """Signals of a step, taken as training takes them."""
    mesh = mesh_of(layout)
    with torch.device("meta"):
        model, values = made(name, ShardedRecurrence("chunked", SCANS[layout.scan](mesh.sp_group, CPU)))
    kind, blocks = layout.kind, model.blocks
    wrapped = parallelize(model, blocks, mesh, CPU, kind=kind, mode=layout.recompute, dtype=EXACT, values=values)
    mine = range(mesh.rank("dp"), BATCH, layout.dp)
    batch = [
        tuple(pieces(windows()[window : window + 1], layout.sp, mesh.rank("sp"), layout.segments)) for window in mine
    ]
    reduce = "segment" if layout.always else "step"
    parallel = Parallel.model_validate({"data_parallel": kind, "reduce": reduce})
    health = Health(len(blocks))
    train.gradients(wrapped, len(blocks), mesh, parallel, batch, signals=health.signals)
    health.gradients(model)
    found = health.read()
    for one in health.signals:  # each token once, though layers are recomputed
        assert float(one.sums.get("tokens", BATCH * WINDOW)) == BATCH * WINDOW
    return found


Seen = list[tuple[Any, tuple[Tensor, ...], Tensor]]


@cache
def plain(name: str) -> dict[str, float]:
    """The same of one process and one segment, each by its own definition, from what layers were seen to compute."""
    recurrences: Seen = []
    scores: list[tuple[Tensor, Tensor]] = []
    heads: list[Tensor] = []
    begin, rotated = ShardedRecurrence.begin, Softmax.rotated
    with pytest.MonkeyPatch.context() as patch:

        def seen(self: ShardedRecurrence, inputs: Any, doc_ids: Tensor, **named: Any) -> Any:
            recurrences.append((named.get("rule", decay_rule), inputs, doc_ids))
            return begin(self, inputs, doc_ids, **named)

        def turned(self: Softmax, tables: Any, *parts: Tensor) -> list[Tensor]:
            found = rotated(self, tables, *parts)
            scores.append((found[0].detach(), found[1].detach()))
            return found

        patch.setattr(ShardedRecurrence, "begin", seen)
        patch.setattr(Softmax, "rotated", turned)
        model, values = made(name, ShardedRecurrence("reference"))
        fill(model, values)
        model.norm.register_forward_hook(lambda _, __, x: heads.append((x @ model.head_weight.T).detach()))
        backward(model, len(model.blocks), pieces(windows(), 1, 0, 1), 1 / (BATCH * WINDOW))
    found: dict[str, float] = {"logit_max": float(heads[0].max())}
    for i, layer in enumerate(model.blocks):
        if isinstance(layer.token_mixer, Softmax):
            (q, k), scores = scores[0], scores[1:]
            k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
            bounds = q.norm(dim=-1).amax((0, 1)) * k.norm(dim=-1).amax((0, 1)) / q.shape[3] ** 0.5
            largest = torch.einsum("bthk,bshk->bhts", q, k).amax((0, 2, 3)) / q.shape[3] ** 0.5
            assert (largest <= bounds).all()
            found[f"logit_bound/{i}"] = float(bounds.max())
        else:
            (rule, inputs, doc_ids), recurrences = recurrences[0], recurrences[1:]
            found |= {f"{key}/{i}": value for key, value in by_definition(rule, inputs, doc_ids)}
    groups: dict[str, list[Tensor]] = {}
    for value, one in kinds(model).items():
        assert value.grad is not None
        groups.setdefault(one, []).append(value.grad.flatten())
    return found | {f"grad_norm/{kind}": float(torch.cat(parts).norm()) for kind, parts in groups.items()}


def by_definition(rule: Any, inputs: Any, doc_ids: Tensor) -> Iterator[tuple[str, float]]:
    """The signals of a recurrence, its state token by token."""
    k, v = inputs[0].detach(), inputs[1].detach()
    beta, log_decay = (
        x if x is None else x.detach() for x in (inputs[2:] if rule is delta_rule else (None, inputs[2]))
    )
    (b, t, h, _), width = v.shape, k.shape[-1]
    k = k.repeat_interleave(h // k.shape[2], 2)
    if log_decay is not None:
        rates = -log_decay.expand(b, t, h) if log_decay.dim() == 1 else -log_decay
        memory = 1 / rates.mean((0, 1)).flatten()
        yield from zip(
            ("memory_min", "memory", "memory_max"),
            memory.quantile(torch.tensor([0, 0.5, 1]).to(EXACT)).tolist(),
            strict=True,
        )
        decay = (-rates if rates.dim() == 4 else -rates[..., None]).exp().expand(b, t, h, width)
    else:
        decay = torch.ones(b, t, h, width, dtype=EXACT)
    if beta is not None:
        yield "beta", float(beta.mean())
        yield "beta_above_one", float((beta > 1).double().mean())
    state, before = torch.zeros(b, h, width, v.shape[-1], dtype=EXACT), torch.zeros(b)
    for i in range(t):
        state = state * (doc_ids[:, i] == before)[:, None, None, None] * decay[:, i, :, :, None]
        before, key = doc_ids[:, i], k[:, i, :, :, None]
        written = v[:, i, :, None, :] - (0 if beta is None else (key * state).sum(2, keepdim=True))
        state = state + key * written * (1 if beta is None else beta[:, i, :, None, None])
    yield "state_norm", float(state.square().sum((2, 3)).mean().sqrt())


def check(rank: int, world: int, wanted: dict[str, dict[str, float]]) -> int:
    for i, (name, want) in enumerate(wanted.items()):
        layout = LAYOUTS[world][i % 2]
        assert taken(name, layout) == pytest.approx(want, rel=1e-9, abs=1e-12), (name, layout)
    return len(wanted)


@pytest.mark.parametrize("world", LAYOUTS)
def test_every_mesh_takes_the_signals_of_a_plain_computation(world: int) -> None:
    wanted = {name: plain(name) for name in MODELS}
    assert spawn(world, check, wanted) == [len(wanted)] * world


def test_what_steers_the_state_is_declared_once() -> None:
    """A mixer of others says its kind, and is apart from Muon's matrices."""

    class Forgetful(nn.Module):
        elementwise: ClassVar[Kinds] = {"forget": "decays"}

        def __init__(self) -> None:
            super().__init__()
            self.forget, self.out = nn.Linear(4, 2), nn.Linear(4, 4, bias=False)

    mixer = Forgetful()
    found = kinds(nn.ModuleDict({"mixer": mixer}))
    assert found == {mixer.forget.weight: "decays", mixer.forget.bias: "decays", mixer.out.weight: "attention"}
    assert matrices(mixer) == {mixer.out.weight: ()}
    setattr(mixer, "elementwise", ("forget",))  # noqa: B010  as packages of 0.1.0 had it
    with pytest.raises(
        SetupError, match=r"Forgetful.elementwise: found \('forget',\); expected submodules with the kinds"
    ):
        matrices(mixer)


def test_every_kind_of_signal_is_among_them() -> None:
    wanted = {name: plain(name) for name in MODELS}
    keys = {key.partition("/")[0] for found in wanted.values() for key in found}
    assert keys == {
        "memory_min", "memory", "memory_max", "beta", "beta_above_one", "state_norm", "logit_bound", "logit_max",
        "grad_norm",
    }  # fmt: skip
    assert 0 < wanted["gdn, to two"]["beta_above_one/0"] < 1 < wanted["gdn, to two"]["memory/0"]
