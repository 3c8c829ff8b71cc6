"""Rivals are the same function as the scan, outputs and gradients, on every rank; and they send the bytes they say."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lasptrain.bench.left_product import LeftProduct
from lasptrain.bench.ring_attention import RingAttention
from lasptrain.bench.ulysses import Ulysses
from lasptrain.errors import SetupError
from lasptrain.parallel.attention import Attention
from lasptrain.parallel.scan import Ring
from tests.gloo import spawn
from tests.kernel_cases import error

B, T, H, K, V = 2, 24, 6, 8, 5  # T of a slice


def gradients(attention: Attention | Ulysses | RingAttention, rank: int, turned: bool, decayed: bool) -> list[Tensor]:
    """Output, gradients of q, k, v and, summed over ranks, of the angle."""
    generator = torch.Generator().manual_seed(rank)
    q, k = (torch.randn(B, T, H, K, generator=generator, dtype=torch.float64) for _ in range(2))
    v, do = (torch.randn(B, T, H, V, generator=generator, dtype=torch.float64) for _ in range(2))
    angle = torch.linspace(0.1, 1.0, H * K // 2, dtype=torch.float64).view(H, K // 2) if turned else None
    log_decay = -torch.linspace(0.01, 0.3, H) if decayed else None
    inputs = [x.requires_grad_() for x in (q, k, v, angle) if x is not None]
    pending = attention.begin(k, v, log_decay, None, angle=angle)
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
            scan = Attention("chunked", Ring(group, torch.device("cpu")))
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


def refused(rank: int, world: int) -> str:
    assert dist.group.WORLD is not None
    x = torch.zeros(1, 4, 3, 2)
    try:
        Ulysses("chunked", dist.group.WORLD).begin(x, x, None, None)
    except SetupError as refusal:
        return str(refusal)
    return ""


def test_rivals_are_the_scan() -> None:
    for world in (2, 3):
        for worst in spawn(world, compare):
            assert max(worst.values()) < 1e-12, worst


def test_heads_that_do_not_divide_are_refused() -> None:
    assert spawn(2, refused) == ["ulysses: 3 heads do not go to 2 ranks; expected a multiple"] * 2
