"""Law 2 over NCCL: a window that GPUs share is the window on one, on every rank, with nothing but streams to keep
messages and kernels in order.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lasptrain import ops
from lasptrain.cost.plan import PREFIXES
from lasptrain.ops import softmax
from lasptrain.parallel import mesh as meshes
from lasptrain.parallel import softmax as spread
from lasptrain.parallel.block import Storage
from lasptrain.parallel.collectives import all_reduce_max
from lasptrain.parallel.halo import halo
from lasptrain.parallel.p2p import ProcessGroupP2P, between
from lasptrain.parallel.place import enter
from lasptrain.parallel.recurrence import SavedStates, ShardedRecurrence
from lasptrain.parallel.scan import SCANS
from lasptrain.process.local_ranks import on_ranks
from tests.support.kernel_cases import error

GPUS = torch.cuda.device_count()
HEADS, DIM, LAYERS = 4, 64, 6
SLICE = 2048  # tokens of a rank in a segment
MESSAGES = 1600


def pass_through(attention: ShardedRecurrence, layers: list[list[Tensor]], segments: int) -> list[list[Tensor]]:
    """Outputs and gradients of layers that know nothing of each other, all begun before any is looked at."""
    found = []
    for q, k, v, log_decay, do in layers:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        decay = log_decay.clone().requires_grad_(log_decay.dim() == 3)
        cut = [x.chunk(segments, 1) for x in leaves]
        decays = decay.chunk(segments, 1) if decay.dim() == 3 else [decay] * segments
        outputs, carry = [], None
        for i in range(segments):
            pending = attention.begin(
                (cut[1][i], cut[2][i], decays[i]), None, carry=carry, output_final_state=i < segments - 1
            )
            o, carry = attention.finish(pending, cut[0][i])
            outputs.append(o)
        o = torch.cat(outputs, 1)
        found.append([o.detach(), *torch.autograd.grad(o, [*leaves, *([decay] if decay.dim() == 3 else [])], do)])
    return found


def drawn(tokens: int, per_token: bool, device: torch.device) -> list[list[Tensor]]:
    """q, k, v, log_decay and do of each layer; the same on every rank."""
    generator = torch.Generator().manual_seed(0)

    def layer() -> list[Tensor]:
        q, k, v, do = (torch.randn(1, tokens, HEADS, DIM, generator=generator).to(device) for _ in range(4))
        decay = torch.rand((1, tokens, HEADS) if per_token else (HEADS,), generator=generator)
        return [q, k, v, -decay.to(device) / 1000, do]

    return [layer() for _ in range(LAYERS)]


def shared(sp: int, kernel: str) -> dict[str, float]:
    """The largest error on any rank by scan, segments and kind of decay; the ranks are cut into groups of sp."""
    world = meshes.world_size()
    mesh, device = meshes.build(world // sp, sp), meshes.device()
    kernel = ops.select(kernel, device)
    rank = mesh.rank("sp")

    def mine(x: Tensor, segments: int) -> Tensor:
        return x if x.dim() == 1 else x.unflatten(1, (segments, sp, -1))[:, :, rank].flatten(1, 2)

    found = {}
    for per_token, segments in product((False, True), (1, 3)):
        layers = drawn(SLICE * sp * segments, per_token, device)
        want = pass_through(ShardedRecurrence(kernel), layers, 1)
        slices = [[mine(x, segments).contiguous() for x in layer] for layer in layers]
        for name, scan in SCANS.items():
            got = pass_through(ShardedRecurrence(kernel, scan(mesh.sp_group, device)), slices, segments)
            errors = [
                error(a, mine(b, segments))
                for one, whole in zip(got, want, strict=True)
                for a, b in zip(one, whole, strict=True)
            ]
            found[f"{name}, {segments} segments, {'token' if per_token else 'head'}"] = all_reduce_max(max(errors))
    return found


def reached() -> dict[str, float]:
    """The largest error on any rank of rows that lie several slices back, and of their gradients, by scan."""
    mesh, device = meshes.build(1, meshes.world_size()), meshes.device()
    sp, rank, segments, length, n = mesh.length("sp"), mesh.rank("sp"), 4, 3, 13
    tokens = sp * segments * length
    starts = [(m * sp + rank) * length for m in range(segments)]
    x = torch.randn(1, tokens, 8, generator=torch.Generator().manual_seed(0)).to(device)
    padded = F.pad(x, [0, 0, n, 0])
    readers = torch.ones(tokens + n, device=device)  # of a token: its own slice, and those it lies before
    for start in range(0, tokens, length):
        readers[start : start + n] += 1
    found = {}
    for name, scan in SCANS.items():
        used, carry, seen = scan(mesh.sp_group, device), None, []
        own = [x[:, start : start + length].clone().requires_grad_() for start in starts]
        for m, part in enumerate(own):
            rows, carry = halo((part,), n, None, carry, used, SavedStates(), m < segments - 1)
            seen.append(rows)
        grads = torch.autograd.grad(torch.cat([*seen, *own], 1).sum(), own)
        errors = [error(rows.detach(), padded[:, start : start + n]) for rows, start in zip(seen, starts, strict=True)]
        for grad, start in zip(grads, starts, strict=True):
            errors.append(float((grad[0, :, 0] - readers[n + start : n + start + length]).abs().max()))
        found[name] = all_reduce_max(max(errors))
    return found


def prefixed() -> dict[str, float]:
    """The largest error on any rank of softmax attention over a prefix in blocks, both ways, by where these lie."""
    mesh, device = meshes.build(1, meshes.world_size()), meshes.device()
    sp, rank, segments, length = mesh.length("sp"), mesh.rank("sp"), 4, 500
    generator = torch.Generator().manual_seed(0)

    def random(heads: int) -> Tensor:
        drawn = torch.randn(1, sp * segments * length, heads, DIM, generator=generator, dtype=torch.float64)
        return drawn.to(device)

    def mine(x: Tensor) -> Tensor:
        parts: Tensor = x.unflatten(1, (segments, sp, -1))
        return parts[:, :, rank].flatten(1, 2)

    whole, do = [random(heads).requires_grad_() for heads in (HEADS, 2, 2)], random(HEADS)
    q, k, v = whole
    o = softmax.attend(q, k, v, softmax.Documents(), 0, 0, None)
    want = [mine(x.detach()) for x in (o, *torch.autograd.grad(o, whole, do))]
    found = {}
    for kind in PREFIXES:
        scan = SCANS["all_gather"](mesh.sp_group, device)
        storage, outputs = Storage(scan, kind), []
        edge, carry = None, None
        own = [mine(x.detach()).clone().requires_grad_() for x in whole]
        for q, k, v in zip(*(x.chunk(segments, 1) for x in own), strict=True):
            place = enter(edge, None, length, scan)
            part, carry = spread.attend(q, k, v, place, carry, storage, SavedStates(), True)
            edge = place.after
            outputs.append(part)
        o = torch.cat(outputs, 1)
        got = [o.detach(), *torch.autograd.grad(o, own, mine(do))]
        found[kind] = all_reduce_max(max(error(a, b) for a, b in zip(got, want, strict=True)))
    return found


def exchanged() -> dict[str, float]:
    """How wrong messages are on any rank that come from both sides while GPUs compute, taken early and late."""
    mesh, device = meshes.build(1, meshes.world_size()), meshes.device()
    rank, ranks = mesh.rank("sp"), meshes.world_size()
    sizes = 1 << 18, 5000, 7  # numbers
    ends = between(mesh.sp_group, device, 4 * max(sizes))
    if isinstance(ends, ProcessGroupP2P):
        return {"Posted": 0.0}
    after, before = (rank + 1) % ranks, (rank - 1) % ranks
    likes = [torch.empty(size, dtype=dtype, device=device) for size in sizes for dtype in (torch.float32, torch.half)]
    side = torch.cuda.Stream(device)
    wrong = torch.zeros((), device=device)
    busy = torch.randn(2048, 2048, device=device)

    def check(coming: list[tuple[int, Callable[[], Tensor]]]) -> None:
        for n, arrived in coming:
            wrong.add_((arrived() != before + n % 100).sum())

    coming: list[tuple[int, Callable[[], Tensor]]] = []
    for n in range(MESSAGES):
        like = likes[n % len(likes)]
        x = torch.full_like(like, rank + n % 100)
        busy = busy @ busy / 2048
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            ends.send(x, after)()
            if ranks > 2:
                ends.send(x, before)()
        x.record_stream(side)
        coming.append((n, ends.recv(like, before)))
        if ranks > 2:
            wrong.add_((ends.recv(like, after)() != after + n % 100).sum())
        if len(coming) == 4:
            check(coming[::-1])
            coming = []
    check(coming)
    return {"Direct": all_reduce_max(float(wrong))}


def on(ranks: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(ranks > GPUS, reason=f"needs {ranks} CUDA devices")


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [pytest.param(n, marks=on(n)) for n in (2, 4)])
@pytest.mark.parametrize("disabled", ["0", "1"])
def test_messages_arrive_whole_in_the_memory_of_the_other_gpu(
    ranks: int, disabled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_P2P_DISABLE", disabled)
    assert on_ranks(ranks, exchanged) == {"Posted" if disabled == "1" else "Direct": 0.0}


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [pytest.param(n, marks=on(n)) for n in (2, 4)])
def test_rows_come_from_as_many_slices_as_it_takes(ranks: int) -> None:
    assert on_ranks(ranks, reached) == dict.fromkeys(SCANS, 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [pytest.param(n, marks=on(n)) for n in (1, 2, 4)])
def test_a_prefix_is_read_and_gets_its_gradient_wherever_it_lies(ranks: int) -> None:
    found = on_ranks(ranks, prefixed)
    assert found.keys() == set(PREFIXES) and max(found.values()) < 1e-12, found


@pytest.mark.gpu
@pytest.mark.parametrize("ranks,sp", [pytest.param(n, sp, marks=on(n)) for n, sp in ((2, 2), (4, 2), (4, 4))])
@pytest.mark.parametrize("disabled", ["0", "1"])
def test_a_window_that_gpus_share_is_the_window_on_one(
    ranks: int, sp: int, disabled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_P2P_DISABLE", disabled)
    found = on_ranks(ranks, shared, sp, "auto")
    assert len(found) == 4 * len(SCANS)
    assert max(found.values()) < 1e-5, found
