"""Ulysses is the same function as the scan, outputs and gradients, on every rank; and it sends the bytes it says."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lasptrain.bench.left_product import LeftProduct
from lasptrain.bench.ulysses import Ulysses
from lasptrain.errors import SetupError
from lasptrain.parallel.attention import Attention
from lasptrain.parallel.scan import Ring
from tests.gloo import spawn
from tests.kernel_cases import error

B, T, H, K, V = 2, 24, 6, 8, 5  # T of a slice


def gradients(attention: Attention | Ulysses, rank: int, turned: bool, decayed: bool) -> list[Tensor]:
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
    worst = {}
    for turned in (False, True):
        for decayed in (False, True):
            ring = Attention("chunked", Ring(dist.group.WORLD, torch.device("cpu")))
            want = gradients(ring, rank, turned, decayed)
            assert dist.group.WORLD is not None
            ulysses = Ulysses("chunked", dist.group.WORLD)
            found = gradients(ulysses, rank, turned, decayed)
            worst[f"{turned} {decayed}"] = max(error(a, b) for a, b in zip(found, want, strict=True))
            slow = Ulysses("chunked", dist.group.WORLD, LeftProduct(tile=7))
            found = gradients(slow, rank, turned, decayed)
            worst[f"{turned} {decayed}, left"] = max(error(a, b) for a, b in zip(found, want, strict=True))
            sent = 2 * 8 * B * T * H * (2 * K + 2 * V) * (world - 1) // world
            assert ulysses.scan.bytes_sent == sent and ulysses.scan.calls == 8
    return worst


def refused(rank: int, world: int) -> str:
    assert dist.group.WORLD is not None
    x = torch.zeros(1, 4, 3, 2)
    try:
        Ulysses("chunked", dist.group.WORLD).begin(x, x, None, None)
    except SetupError as refusal:
        return str(refusal)
    return ""


def test_ulysses_is_the_scan() -> None:
    for world in (2, 3):
        for worst in spawn(world, compare):
            assert max(worst.values()) < 1e-12, worst


def test_heads_that_do_not_divide_are_refused() -> None:
    assert spawn(2, refused) == ["ulysses: 3 heads do not go to 2 ranks; expected a multiple"] * 2
