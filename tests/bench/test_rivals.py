"""Rivals are the same function as the scan, outputs and gradients, on every rank; and they send the bytes they say."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasptrain.bench.rivals.local import LeftProduct, Local, softmax
from lasptrain.bench.rivals.megatron import reduce_gradients, share, shares, split_model
from lasptrain.bench.rivals.ring_attention import RingAttention
from lasptrain.bench.rivals.traffic import Traffic
from lasptrain.bench.rivals.ulysses import Ulysses
from lasptrain.errors import SetupError
from lasptrain.models.language_model import initial_values
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.parallel.scan import Ring
from lasptrain.parallel.shard import fill
from lasptrain.recipe.loading import load
from lasptrain.recipe.schema import Recipe
from lasptrain.training import job
from tests.recipe.test_recipe import RECIPES
from tests.support.gloo import spawn
from tests.support.kernel_cases import error

B, T, H, K, V = 2, 24, 6, 8, 5  # T of a slice

WORLDS = (2, pytest.param(3, marks=pytest.mark.slow))


def gradients(
    attention: ShardedRecurrence | Ulysses | RingAttention, rank: int, turned: bool, decayed: bool
) -> list[Tensor]:
    """Output, gradients of q, k, v and, summed over ranks, of the angle."""
    generator = torch.Generator().manual_seed(rank)
    q, k = (torch.randn(B, T, H, K, generator=generator, dtype=torch.float64) for _ in range(2))
    v, do = (torch.randn(B, T, H, V, generator=generator, dtype=torch.float64) for _ in range(2))
    angle = torch.linspace(0.1, 1.0, H * K // 2, dtype=torch.float64).view(H, K // 2) if turned else None
    log_decay = -torch.linspace(0.01, 0.3, H) if decayed else None
    inputs = [x.requires_grad_() for x in (q, k, v, angle) if x is not None]
    pending = attention.begin((k, v, log_decay), None, angle=angle)
    o, _ = attention.finish(pending, q)  # type: ignore[arg-type]
    found = list(torch.autograd.grad(o, inputs, do, materialize_grads=True))
    if turned:
        dist.all_reduce(found[-1])
    return [o.detach(), *found]


def compare(rank: int, world: int) -> dict[str, float]:
    group, worst = dist.group.WORLD, {}
    assert group is not None
    numbers = B * T * H * (K + V)
    traded, shifted = 2 * 8 * 2 * numbers * (world - 1) // world, 8 * numbers * (2 * (world - 1) + world)
    for turned in (False, True):
        for decayed in (False, True):
            scan = ShardedRecurrence("chunked", Ring(group, torch.device("cpu")))
            want = gradients(scan, rank, turned, decayed)
            rivals: dict[str, tuple[Ulysses | RingAttention, int, int]] = {
                "ulysses": (Ulysses("chunked", group), traded, 8),
                "ulysses, left": (Ulysses("chunked", group, LeftProduct(tile=7)), traded, 8),
                "ring": (RingAttention("chunked", group), shifted, 3 * world - 2),
                "ring, left": (RingAttention("chunked", group, left=True), shifted, 3 * world - 2),
            }
            for name, (rival, sent, calls) in rivals.items():
                found = gradients(rival, rank, turned, decayed)
                worst[f"{name} {turned} {decayed}"] = max(error(a, b) for a, b in zip(found, want, strict=True))
                assert (rival.scan.bytes_sent, rival.scan.calls) == (sent, calls), name
    return worst


def recipe(arch: str) -> Recipe:
    """A model whose window of 24 tokens, heads and MLP go to two and to three ranks."""
    changes = ["dim=24", "layers=2", "heads=6", "key_dim=4", "value_dim=4", "mlp=12", "vocab=31", f"arch={arch}"]
    if arch == "linear_transformer":
        changes += ["decay=none", "normalizer=true"]
    precise = ["train.precision=fp64", "data.window=24"]
    return load(RECIPES / "quickstart.yaml", [f"model.{change}" for change in changes] + precise)


def split(rank: int, world: int) -> dict[str, float]:
    """How far a model that is split over ranks is from the whole one, by part."""
    assert dist.group.WORLD is not None
    tokens, labels = torch.randint(31, (2, 2, 24), generator=torch.Generator().manual_seed(1))
    worst: dict[str, float] = {}
    forms: dict[str, Local | None] = {"kernel": None, "left": LeftProduct(tile=7), "softmax": softmax}
    for arch, (form, local) in ((a, f) for a in ("tnl", "linear_transformer") for f in forms.items()):
        traffic = Traffic(dist.group.WORLD)
        of = recipe(arch)
        part = split_model(of, traffic, "chunked", local).to_empty(device="cpu")
        whole = job.language_model(of, ShardedRecurrence("chunked")).to_empty(device="cpu")
        if form == "softmax":
            whole = split_model(of, Traffic(None), "chunked", softmax).to_empty(device="cpu")
        with torch.no_grad():
            fill(part, shares(of, traffic, torch.device("cpu")))
            fill(whole, initial_values(job.language_model(of, ShardedRecurrence("chunked")), 0, torch.device("cpu")))
        want = whole(tokens, labels).loss
        want.backward()
        mine = slice(rank * 24 // world, (rank + 1) * 24 // world)
        loss = part(tokens[:, mine], labels[:, mine]).loss
        before = traffic.bytes_sent
        assert before == (2 * 2 * 4 * (24 // world) * 24 * 8 + squares(arch, world)) * (world - 1)
        loss.backward()
        norm = reduce_gradients(part, traffic)
        worst[f"{arch} {form} loss"] = float(abs(traffic.sum(loss.detach()) / want.detach() - 1))
        gradients = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
        total = torch.stack([g.norm() for g in gradients.values()]).norm()
        worst[f"{arch} {form} norm"] = float(abs(norm - total) / total)
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None
            worst[f"{arch} {form} {name}"] = error(parameter.grad, share(name, gradients[name], traffic))
    return worst


def squares(arch: str, world: int) -> int:
    """Bytes per other rank by which TransNormer's norm over all heads is summed, in two layers of 2 × 24 tokens."""
    return 2 * 2 * 2 * 24 * 8 // world if arch == "tnl" else 0


def test_megatron_refuses_what_it_does_not_split() -> None:
    for arch in ("ssd", "retnet", "minimax"):
        with pytest.raises(SetupError, match=f"model.arch = {arch} is not split; expected tnl or linear_transformer"):
            split_model(recipe(arch), Traffic(None), "chunked")


@pytest.mark.parametrize("world", WORLDS)
def test_rivals_are_the_scan(world: int) -> None:
    for worst in spawn(world, compare):
        assert max(worst.values()) < 1e-12, worst


@pytest.mark.parametrize("world", WORLDS)
def test_a_split_model_is_the_whole_one(world: int) -> None:
    for worst in spawn(world, split):
        assert max(worst.values()) < 1e-11, max(worst.items(), key=lambda item: item[1])
