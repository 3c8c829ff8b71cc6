"""The learning rate has the shape its name says; sharded clipping and AdamW equal one process."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lasptrain.recipe.sections import Optim
from lasptrain.training.optimizer import (
    build_optimizer,
    clip_gradients,
    initialise_state,
    jump,
    learning_rate,
    set_learning_rate,
)
from tests.support.gloo import spawn

STEPS = 100


class _Net(nn.Module):
    """Three kinds of parameters: matrices, a vector, and a matrix of angles."""

    undecayed = ("theta",)

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6, dtype=dtype)
        self.norm = nn.RMSNorm(6, dtype=dtype)
        self.theta = nn.Parameter(torch.randn(2, 3, dtype=dtype))
        self.out = nn.Linear(6, 5, bias=False, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.out(self.norm(self.embed(tokens)) * self.theta.reshape(-1)).pow(2).sum()
        return out


def _rates(**keys: Any) -> list[float]:
    cfg = Optim(lr=2.0, **keys)
    return [learning_rate(cfg, STEPS, step) for step in range(STEPS + 1)]


def test_warmup_rises_linearly_to_the_peak() -> None:
    rates = _rates(schedule="constant", warmup=4)
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert set(rates[3:]) == {2.0}


def test_cosine_falls_to_the_fraction() -> None:
    rates = _rates(schedule="cosine", warmup=10, min_lr=0.1)
    assert rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx((2.0 + 0.2) / 2)
    assert rates[STEPS] == pytest.approx(0.2)
    assert rates[STEPS - 1] > rates[STEPS]
    assert all(a >= b for a, b in pairwise(rates[9:]))
    assert rates[40] == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi * 30 / 90)) / 2)


@pytest.mark.parametrize(("decay", "length"), [(None, 20), (50, 50), (1, 1)])
def test_wsd_is_stable_then_falls_linearly(decay: int | None, length: int) -> None:
    rates = _rates(schedule="wsd", warmup=5, decay=decay)
    start = STEPS - length
    assert set(rates[4 : start + 1]) == {2.0}
    assert rates[start:] == pytest.approx([2.0 * (1 - i / length) for i in range(length + 1)])
    assert rates[STEPS - 1] > 0


def test_after_the_last_step_the_rate_stays() -> None:
    cfg = Optim(lr=1.0, min_lr=0.25)
    assert learning_rate(cfg, STEPS, 10 * STEPS) == 0.25


def test_what_more_steps_do_to_the_learning_rate_is_told() -> None:
    """The rate that the next update has got, and the one it would have had; nothing where they are the same."""
    told = jump(Optim(lr=2.0, min_lr=0.1), 100, 200, 80)
    assert told is not None
    assert told.startswith("learning rate of step 81: 1.38e+00 with train.steps = 200, 3.72e-01 with the 100 before; ")
    wsd = Optim(lr=2.0, schedule="wsd", warmup=5)
    assert jump(wsd, 100, 200, 80) is None and jump(wsd, 100, 200, 81) is not None
    assert jump(Optim(lr=2.0, schedule="constant"), 100, 200, 100) is None
    assert jump(Optim(lr=2.0), 100, 100, 80) is None


def test_only_matrices_decay() -> None:
    net = _Net()
    net.norm.weight.requires_grad_(False)
    optimizer = build_optimizer(net, Optim(lr=1e-3, weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = {name: decay.get(id(p)) for name, p in net.named_parameters()}
    assert named == {"embed.weight": 0.3, "out.weight": 0.3, "theta": 0.0, "norm.weight": None}
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_initialised_state_is_the_state_of_the_first_step() -> None:
    """Steps from an initialised optimizer equal those from an empty one, and the state has the same form."""
    nets = _Net(), _Net()
    optimizers = [build_optimizer(net, Optim(lr=0.1)) for net in nets]
    initialise_state(optimizers[1])
    assert all(not t.any() for state in optimizers[1].state.values() for t in state.values())
    for net, optimizer in zip(nets, optimizers, strict=True):
        net(torch.arange(11)).backward()
        optimizer.step()
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(a, b)
        states = optimizers[0].state[a], optimizers[1].state[b]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("clip", [0.0, 1e-3, 1e9])
def test_clip_scales_to_the_norm_or_not_at_all(clip: float) -> None:
    net = _Net(torch.float64)
    net(torch.arange(11)).backward()
    before = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    expected = torch.cat([g.flatten() for g in before]).norm()
    norm = clip_gradients(net, clip)
    torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0.0)
    factor = 1.0 if clip in (0.0, 1e9) else clip / float(expected)
    for p, g in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(p.grad, g * factor, rtol=1e-6, atol=0.0)


def test_clip_reports_what_is_not_finite() -> None:
    net = _Net()
    net(torch.arange(11)).backward()
    assert net.theta.grad is not None
    net.theta.grad[0, 0] = math.inf
    assert not clip_gradients(net, 1.0).isfinite()


def _train(net: nn.Module) -> tuple[list[float], list[Tensor]]:
    """Return the gradient norm of each of three clipped steps and the parameters after them."""
    cfg = Optim(lr=0.05, clip=0.5, weight_decay=0.2)
    optimizer = build_optimizer(net, cfg)
    norms = []
    for step in range(3):
        set_learning_rate(optimizer, learning_rate(cfg, 3, step))
        net(torch.arange(step, 11)).backward()
        norm = clip_gradients(net, cfg.clip)
        assert type(norm) is Tensor
        norms.append(norm.item())
        optimizer.step()
        optimizer.zero_grad()
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in net.parameters()]
    return norms, [p.detach() for p in full]


def _train_sharded(rank: int, world: int) -> tuple[list[float], list[Tensor]]:
    """The same data on every rank, so that the mean of the gradients over ranks is the gradient of one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = _Net(torch.float64)
    fully_shard(net, mesh=init_device_mesh("cpu", (world,), mesh_dim_names=("dp_sp",)))
    return _train(net)


def test_sharded_training_equals_one_process() -> None:
    norms, parameters = _train(_Net(torch.float64))
    assert norms[0] > 0.5  # clipping did something
    for sharded_norms, sharded in spawn(3, _train_sharded):
        assert sharded_norms == pytest.approx(norms, rel=1e-12)
        for a, b in zip(sharded, parameters, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
