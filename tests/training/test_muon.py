"""Muon: each matrix moves along its own momentum, orthogonalised, on any layout as in one process."""

from __future__ import annotations

import re
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Muon as TorchMuon

from lasptrain import train
from lasptrain.checkpoint.tensors import present, tensors_of
from lasptrain.cost import plan
from lasptrain.models.language_model import LanguageModel, on_meta
from lasptrain.models.mixer import Kinds
from lasptrain.ops.orthogonal import COEFFICIENTS, STEPS, orthogonalised
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.parallel.scan import SCANS
from lasptrain.parallel.shard import fill, full_tensor, parallelize, shard_optimizer
from lasptrain.recipe.loading import load
from lasptrain.recipe.sections import Optim, Parallel
from lasptrain.training.muon import Muon
from lasptrain.training.optimizer import build_optimizer, initialise_state
from lasptrain.training.segments import backward
from tests.laws import test_delta_layouts, test_layouts
from tests.laws.test_layouts import BATCH, CPU, WINDOW, Layout, Model, config, mesh_of, pieces, values, windows
from tests.recipe.test_recipe import RECIPES
from tests.support.gloo import spawn

MATRIX = re.compile(r"layers\.\d+\.((mixer|attn)\.(q|k|v|gate|out)|mlp\.(gate|up|down))(\.up|\.down)?\.weight")
CFG = Optim(kind="muon", lr=0.02, weight_decay=0.1)
Z_LOSS = 0.01


def definition(x: Tensor) -> Tensor:
    """The iterated polynomial of the singular values, in fp64."""
    a, b, c = COEFFICIENTS
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(STEPS):
        s = a * s + b * s**3 + c * s**5
    found: Tensor = u * s @ v
    return found


def apart(found: Tensor, want: Tensor) -> float:
    return float((found.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16), (1, 9)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_each_matrix_of_a_stack_is_orthogonalised(shape: tuple[int, int], dtype: torch.dtype, bound: float) -> None:
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x *= torch.logspace(-6, 6, 5, dtype=torch.float64)[:, None, None]
    found = orthogonalised(x.to(dtype))
    assert found.dtype == dtype
    for one, matrix in zip(found, x, strict=True):
        assert apart(one, definition(matrix)) < bound
        assert (torch.linalg.svdvals(one.double()) - 0.95).abs().max() < 0.35
    assert torch.equal(orthogonalised(torch.zeros(2, *shape, dtype=dtype)), torch.zeros(2, *shape, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(512, 2048), (2048, 512), (1024, 1024)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_matrices_are_orthogonalised_on_the_gpu(shape: tuple[int, int], dtype: torch.dtype, bound: float) -> None:
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    for one, matrix in zip(orthogonalised(x.to("cuda", dtype)).cpu(), x, strict=True):
        assert apart(one, definition(matrix)) < bound


class _Net(nn.Module):
    """Matrices of two shapes, one of which packs three, and what is none."""

    elementwise: ClassVar[Kinds] = {"head": "head"}

    def __init__(self, parts: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.wide, self.again = (nn.Linear(6, 10) for _ in range(2))
        self.packed, self.head = nn.Linear(6, 14, bias=False), nn.Linear(6, 5)
        setattr(self.packed, "parts", parts)  # noqa: B010


def _moved(net: nn.Module, optimizer: Any, steps: int = 3) -> dict[str, Tensor]:
    """Weights after some steps along random gradients."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    for _ in range(steps):
        for parameter in net.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_updates_are_those_of_torch(dtype: torch.dtype) -> None:
    """torch iterates in bf16; the momenta are the same to the bit, and what is no matrix moves as with AdamW."""
    nets = _Net(), _Net(), _Net()
    ours = build_optimizer(nets[0], CFG, dtype)
    weights = [net.weight for net in (nets[1].wide, nets[1].again, nets[1].packed)]
    theirs = TorchMuon(weights, lr=CFG.lr, weight_decay=CFG.weight_decay, adjust_lr_fn="match_rms_adamw")
    found, want = _moved(nets[0], ours), _moved(nets[1], theirs)
    adamw = _moved(nets[2], build_optimizer(nets[2], Optim(lr=CFG.lr, weight_decay=CFG.weight_decay)))
    begun = _moved(_Net(), theirs, steps=0)
    assert isinstance(ours, Muon)
    for name in ("wide", "again", "packed"):
        mine, other = (getattr(net, name).weight for net in nets[:2])
        buffers = ours.state[mine]["momentum_buffer"], theirs.state[other]["momentum_buffer"]
        assert torch.equal(*buffers) and ours.state[mine].keys() == theirs.state[other].keys()
        start = begun[f"{name}.weight"]
        assert apart(found[f"{name}.weight"] - start, want[f"{name}.weight"] - start) < 0.02
    for name in ("wide.bias", "head.weight", "head.bias"):
        assert torch.equal(found[name], adamw[name])


def test_parts_of_a_packed_matrix_move_each_by_itself() -> None:
    rows = (4, 1, 9)
    found = _moved(net := _Net(rows), optimizer := build_optimizer(net, CFG))["packed.weight"]
    whole = _moved(net := _Net(), build_optimizer(net, CFG))
    begun = _moved(net, build_optimizer(net, CFG), steps=0)["packed.weight"]
    assert [group["parts"] for group in optimizer.param_groups if "parts" in group] == [(), rows]
    assert apart(found - begun, whole["packed.weight"] - begun) > 0.1
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():
        torch.randn(parameter.shape, generator=generator)
    gradients = [[torch.randn(p.shape, generator=generator) for p in net.parameters()] for _ in range(3)]
    index = [name for name, _ in net.named_parameters()].index("packed.weight")
    for mine, start, *seeds in zip(
        found.split(rows), begun.split(rows), *(each[index].split(rows) for each in gradients), strict=True
    ):
        layer = nn.Linear(start.shape[1], start.shape[0], bias=False)
        optimizer = build_optimizer(layer, CFG)
        with torch.no_grad():
            layer.weight.copy_(start)
        for seed in seeds:
            layer.weight.grad = seed.clone()
            optimizer.step()
        torch.testing.assert_close(layer.weight.detach(), mine, rtol=1e-5, atol=1e-5)


ALL = [*(config(arch) for arch, _ in test_layouts.MODELS), *map(test_delta_layouts.config, test_delta_layouts.MODELS)]


@pytest.mark.parametrize("cfg", ALL, ids=lambda cfg: cfg.arch)
def test_matrices_of_layers_have_a_momentum_and_all_else_adamw(cfg: Any) -> None:
    """Not embedding and head, nor what steers decays and beta; `plan` counts what the optimizer keeps."""
    model = on_meta(cfg, WINDOW, ShardedRecurrence("chunked"))
    optimizer = build_optimizer(model, CFG)
    initialise_state(optimizer)
    for name, parameter in model.named_parameters():
        want = {"momentum_buffer"} if MATRIX.fullmatch(name) else {"step", "exp_avg", "exp_avg_sq"}
        assert optimizer.state[parameter].keys() == want, name
    kept = sum(x.numel() for state in optimizer.state.values() for x in state.values() if x.ndim)
    recipe = load(RECIPES / "quickstart.yaml", ["optim.kind=muon", "parallel.data_parallel=ddp"])
    counted = plan.fixed_bytes(recipe.model_copy(update={"model": cfg}), cfg.vocab, 1, 1)["optimizer"]
    decay = sum(p.numel() for name, p in model.named_parameters() if re.search(r"decay_proj\.(up|down)", name))
    assert counted + 4 * decay == 4 * kept  # a decay's bottleneck counts as a matrix there


# Any layout

LAYOUTS: dict[int, list[tuple[Model, torch.dtype, Layout]]] = {
    1: [("tnl", torch.float32, Layout(1, 1, segments=3)), ("ssd", torch.float64, Layout(1, 1, kind="zero3"))],
    2: [
        ("tnl", torch.float32, Layout(1, 2, "ring", "ddp", segments=2)),
        ("tnl", torch.float32, Layout(1, 2, "all_gather", "zero3", segments=3)),
        ("tnl", torch.float64, Layout(2, 1, "ring", "zero1")),
        ("ssd", torch.float64, Layout(2, 1, "ring", "zero2", segments=2)),
    ],
    3: [("tnl", torch.float64, Layout(1, 3, "all_scan", "zero3", segments=2, always=True))],
    4: [
        ("tnl", torch.float32, Layout(2, 2, "ring", "hsdp", segments=2)),
        ("tnl", torch.float64, Layout(1, 4, "ring", "zero3")),
        ("ssd", torch.float64, Layout(2, 2, "all_gather", "ddp")),
    ],
}
MOVES = {torch.float64: 1e-10, torch.float32: 1e-4}  # five iterations multiply small singular values by up to 485
UPDATES = 2
State = dict[str, Tensor]


def updates(arch: Model, dtype: torch.dtype, layout: Layout) -> tuple[list[Tensor], list[State]]:
    """Losses of some updates, and the state after each as a checkpoint holds it, whole."""
    mesh = mesh_of(layout)
    scan = SCANS[layout.scan](mesh.sp_group, CPU)
    with torch.device("meta"):
        model = _model(arch, dtype, ShardedRecurrence("chunked", scan))
    called = parallelize(
        model, model.blocks, mesh, CPU, kind=layout.kind, mode="none", dtype=dtype, values=values(model)
    )
    optimizer = shard_optimizer(build_optimizer(model, CFG, dtype), mesh, layout.kind)
    mine = range(mesh.rank("dp"), BATCH, layout.dp)
    batch = [tuple(pieces(windows()[w : w + 1], layout.sp, mesh.rank("sp"), layout.segments)) for w in mine]
    keys = {"data_parallel": layout.kind, "reduce": "segment" if layout.always else "step"}
    losses, states = [], []
    for _ in range(UPDATES):
        losses.append(train.gradients(called, 3, mesh, Parallel.model_validate(keys), batch))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tensors = present(tensors_of(called, optimizer))
        states.append({name: full_tensor(x).clone() for name, x in tensors.items()})
    return losses, states


def _model(arch: Model, dtype: torch.dtype, attention: ShardedRecurrence) -> LanguageModel:
    return LanguageModel(config(arch), WINDOW, attention, dtype=dtype, loss_chunk=32, z_loss=Z_LOSS).to(dtype)


@cache
def single(arch: Model, dtype: torch.dtype) -> tuple[list[Tensor], list[State]]:
    """The same of one process by definition, weights and momenta only; before them, the weights at the start."""
    model = _model(arch, dtype, ShardedRecurrence("reference"))
    fill(model, values(model))
    states = [{f"model.{name}": x.detach().clone() for name, x in model.named_parameters()}]
    rest = build_optimizer(model, CFG.model_copy(update={"kind": "adamw"}))
    named = {name: parameter for name, parameter in model.named_parameters() if MATRIX.fullmatch(name)}
    momenta = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    losses = []
    for _ in range(UPDATES):
        window = pieces(windows(), 1, 0, 1)
        losses.append(backward(model, 3, window, 1 / (BATCH * WINDOW)) / (BATCH * WINDOW))
        for name, parameter in named.items():
            assert parameter.grad is not None
            momenta[name] = 0.95 * momenta[name] + 0.05 * parameter.grad
            ahead = 0.05 * parameter.grad + 0.95 * momenta[name]
            with torch.no_grad():
                parameter.mul_(1 - CFG.lr * CFG.weight_decay)
                parameter.sub_(CFG.lr * 0.2 * max(parameter.shape) ** 0.5 * definition(ahead))
            parameter.grad = None
        rest.step()
        rest.zero_grad(set_to_none=True)
        kept = {f"optimizer.{name}.momentum_buffer": x for name, x in momenta.items()}
        states.append(kept | {f"model.{name}": x.detach().clone() for name, x in model.named_parameters()})
    return losses, states


def on_ranks(rank: int, world: int, references: Any) -> int:
    for arch, dtype, layout in LAYOUTS[world]:
        want_losses, (begun, *want) = references[arch, dtype]
        losses, found = updates(arch, dtype, layout)
        bounds = test_layouts.BOUNDS[dtype], MOVES[dtype]  # the second update's gradients are of moved weights
        for bound, loss, want_loss, state, want_state in zip(bounds, losses, want_losses, found, want, strict=True):
            assert apart(loss, want_loss) < bound, layout
            momenta = {name for name in want_state if name.endswith("momentum_buffer")}
            assert layout.kind == "zero1" or momenta == {name for name in state if name.endswith("momentum_buffer")}
            for name in want_state.keys() & state.keys():
                one, other = state[name], want_state[name]
                if name in momenta:
                    assert apart(one, other) < bound, (layout, name)
                else:
                    assert apart(one - begun[name], other - begun[name]) < MOVES[dtype], (layout, name)
    return len(LAYOUTS[world])


@pytest.mark.parametrize("world", LAYOUTS)
def test_updates_on_every_layout_are_those_of_one_process(world: int) -> None:
    references = {(arch, dtype): single(arch, dtype) for arch, dtype, _ in LAYOUTS[world]}
    assert spawn(world, on_ranks, references) == [len(LAYOUTS[world])] * world
