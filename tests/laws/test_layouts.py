"""Laws 2 and 3: every layout of ranks and segments is one device, and a document never sees another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from datetime import timedelta
from functools import cache
from itertools import combinations, product
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode

from lasptrain import architectures, train
from lasptrain.architectures.base import Architecture
from lasptrain.data.loader import Slice
from lasptrain.models.language_model import LanguageModel, initial_values
from lasptrain.parallel import mesh as meshes
from lasptrain.parallel.autotune import fastest_scan
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.parallel.scan import SCANS, AllGather, Exchange, Ring, Scanned
from lasptrain.parallel.shard import fill, parallelize
from lasptrain.recipe.sections import Parallel
from lasptrain.training.segments import backward
from tests.support.clock import Clock
from tests.support.gloo import spawn

WINDOW, BATCH, VOCAB, BOS = 120, 2, 61, 0
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-12}
CPU = torch.device("cpu")
Arch = Literal["tnl", "linear_transformer", "ssd", "retnet", "sliding hybrid", "full hybrid", "minimax"]
Model = Arch | Architecture  # by name, or one of another test
HYBRIDS: dict[str, dict[str, object]] = {
    "sliding hybrid": {"arch": "ssd", "softmax": [0, 2], "kv_heads": 2, "sliding_window": 50},
    "full hybrid": {"arch": "ssd", "softmax": [1], "kv_heads": 1},
    "minimax": {"arch": "minimax", "softmax": [2], "sliding_window": 17, "rotary": None},
}


def config(arch: Model) -> Architecture:
    if isinstance(arch, Architecture):
        return arch
    if arch == "sliding hybrid" or arch == "full hybrid" or arch == "minimax":
        sizes = {"dim": 16, "layers": 3, "heads": 4, "mlp": 20, "vocab": VOCAB, "tie": False}
        return architectures.model(HYBRIDS[arch] | sizes)
    sizes = {"dim": 24, "layers": 3, "heads": 3, "key_dim": 8, "mlp": 20, "vocab": VOCAB, "tie": arch == "tnl"}
    own: dict[str, dict[str, object]] = {
        "tnl": {"value_dim": 4},
        "linear_transformer": {"value_dim": 4, "normalizer": True},
        "ssd": {"value_dim": 12, "data_dependent": True, "decay": "learned", "conv": 15},
        "retnet": {"value_dim": 12},
    }
    return architectures.model({"arch": arch, **sizes, **own[arch]})


@dataclass(frozen=True)
class Layout:
    dp: int
    sp: int
    scan: str = "all_gather"
    kind: str = "ddp"
    recompute: str = "none"
    segments: int = 1
    always: bool = False  # gradients are reduced in each backward
    apart: bool = False  # ranks that share a window are not neighbours


Case = tuple[Model, torch.dtype, Layout]
Reference = tuple[Tensor, dict[str, Tensor]]  # loss, and its gradients by name


def windows() -> Tensor:
    """Token ids [BATCH, WINDOW + 1]: one document over the whole first window, many edges in the second."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, VOCAB, (BATCH, WINDOW + 1), generator=g)
    for edge in (0, 1, 20, 39, 40, 59, 60, 61, 80, 119):
        tokens[1, edge] = BOS
    return tokens


def pieces(tokens: Tensor, sp: int, rank: int, segments: int) -> list[Slice]:
    length = (tokens.shape[1] - 1) // (sp * segments)
    result = []
    for m in range(segments):
        start = (m * sp + rank) * length
        part = tokens[:, start : start + length]
        result.append(Slice(part, tokens[:, start + 1 : start + length + 1], (part == BOS).cumsum(1).int()))
    return result


def values(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """Initial values, with larger matrices: rounding then stays small beside the activations. Not as large for ssd,
    where large ones make gradients of steps that cancel.
    """
    times = {"ssd": 3, "minimax": 2}.get(model.cfg.arch, 5)
    g = torch.Generator().manual_seed(7)
    for name, value in initial_values(model, 7, CPU):
        if ".dt." in name:
            value = value + torch.randn(value.shape, generator=g).double() / 20
        yield name, value * times if name.endswith("weight") else value


@cache
def single(arch: Model, dtype: torch.dtype) -> Reference:
    """Mean loss and its gradients of one process, one segment, from the token-by-token reference."""
    model = LanguageModel(config(arch), WINDOW, ShardedRecurrence("reference"), dtype=dtype, loss_chunk=32).to(dtype)
    fill(model, values(model))
    loss, _ = backward(model, 3, pieces(windows(), 1, 0, 1), 1 / (BATCH * WINDOW))
    return loss / (BATCH * WINDOW), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def mesh_of(layout: Layout) -> meshes.Mesh:
    if not layout.apart:
        return meshes.build(layout.dp, layout.sp)
    ranks = torch.arange(layout.dp * layout.sp).view(layout.sp, layout.dp).T  # sp groups {0, dp, 2·dp, …}, {1, …}, …
    grid = DeviceMesh("cpu", ranks, mesh_dim_names=("dp", "sp"))
    # The row is in order: a group sorts its ranks, and FSDP needs the mesh to agree.
    return meshes.Mesh(grid, DeviceMesh("cpu", list(range(layout.dp * layout.sp)), mesh_dim_names=("dp_sp",)))


def distributed(arch: Model, dtype: torch.dtype, layout: Layout) -> tuple[Tensor, dict[str, Tensor], Ring | AllGather]:
    mesh = mesh_of(layout)
    scan = SCANS[layout.scan](mesh.sp_group, CPU)
    with torch.device("meta"):
        model = LanguageModel(config(arch), WINDOW, ShardedRecurrence("chunked", scan), dtype=dtype, loss_chunk=32).to(
            dtype
        )
    called = parallelize(
        model, model.blocks, mesh, CPU, kind=layout.kind, mode=layout.recompute, dtype=dtype, values=values(model)
    )
    mine = range(mesh.rank("dp"), BATCH, layout.dp)
    batch = [  # one window each
        tuple(pieces(windows()[window : window + 1], layout.sp, mesh.rank("sp"), layout.segments)) for window in mine
    ]
    reduce = "segment" if layout.always else "step"
    parallel = Parallel.model_validate({"data_parallel": layout.kind, "reduce": reduce})
    loss, _ = train.gradients(called, 3, mesh, parallel, batch)
    grads = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        grads[name] = getattr(parameter.grad, "full_tensor", lambda p=parameter: p.grad)()
    return loss, grads, scan


def compare(arch: Model, dtype: torch.dtype, layout: Layout, reference: Reference) -> None:
    want_loss, want = reference
    loss, grads, _ = distributed(arch, dtype, layout)
    assert abs(float(loss) / float(want_loss) - 1) < BOUNDS[dtype], layout
    assert grads.keys() == want.keys()
    for name, grad in grads.items():
        error = float((grad - want[name]).norm() / want[name].norm())
        assert error < BOUNDS[dtype], (layout, name, error)


MESHES = [(1, 1), (2, 1), (1, 2), (1, 3), (2, 2), (1, 4)]
KINDS = ("ddp", "zero2", "zero3", "hsdp")
MODES = ("none", "full", "selective", "offload")
MODELS: list[tuple[Arch, torch.dtype]] = [
    ("tnl", torch.float32),
    ("tnl", torch.float64),
    ("linear_transformer", torch.float32),
    ("ssd", torch.float64),
    ("retnet", torch.float64),
    ("sliding hybrid", torch.float64),
    ("full hybrid", torch.float64),
    ("minimax", torch.float64),
]


@cache
def cases() -> list[Case]:
    """Every mesh with every scan and number of segments; and all pairs of values of any two of the other choices.

    For each the rest is chosen that has the most pairs no case before it has.
    """
    chosen: list[Case] = []
    seen: set[tuple[int, int, object, object]] = set()
    for (dp, sp), scan, segments in product(MESHES, SCANS, (1, 2, 3, 5)):
        if WINDOW % (sp * segments):
            continue
        rest = [
            (model, kind, mode, always)
            for model, kind, mode, always in product(MODELS, KINDS, MODES, (False, True))
            if not (always and kind == "ddp")
        ]
        pairs = {row: pairs_of((dp, sp), scan, segments, *row) for row in rest}
        best = max(rest, key=lambda row: len(pairs[row] - seen))
        seen |= pairs[best]
        (arch, dtype), kind, mode, always = best
        chosen.append((arch, dtype, Layout(dp, sp, scan, kind, mode, segments, always)))
    return chosen


def pairs_of(*choices: object) -> set[tuple[int, int, object, object]]:
    """Two of the choices each, and which they are."""
    return {(i, j, one, other) for (i, one), (j, other) in combinations(enumerate(choices), 2)}


def test_cases_hold_every_pair_of_choices() -> None:
    found = [(a, d, x.dp, x.sp, x.scan, x.kind, x.recompute, x.segments, x.always) for a, d, x in cases()]
    have = set[tuple[int, int, object, object]]().union(*(pairs_of(*row) for row in found))
    axes = {4: tuple(SCANS), 5: KINDS, 6: MODES, 7: (1, 2, 3, 5), 8: (False, True)}
    for (i, ones), (j, others) in combinations(axes.items(), 2):
        missing = {(i, j, one, other) for one, other in product(ones, others)} - have
        assert missing <= {(5, 8, "ddp", True)}
    for arch, dtype in MODELS:
        rows = [row for row in found if row[:2] == (arch, dtype)]
        for axis in (5, 6):
            assert {row[axis] for row in rows} == set(axes[axis]), arch
        assert {row[4] for row in rows} == set(SCANS) and len({row[2:4] for row in rows}) == len(MESHES), arch
        assert {row[7] for row in rows} == {1, 2, 3, 5}, arch


References = dict[tuple[Model, torch.dtype], Reference]


def references(cases: list[Case]) -> References:
    """Those of the cases, computed once and not by every rank."""
    return {(arch, dtype): single(arch, dtype) for arch, dtype, _ in cases}


def check_all(rank: int, world: int, cases: list[Case], references: References) -> int:
    for arch, dtype, layout in cases:
        compare(arch, dtype, layout, references[arch, dtype])
    return len(cases)


@cache
def few() -> list[Case]:
    """Some of the cases, for daily work: every model on ranks that share a window, and every other choice once."""
    choices: dict[Case, set[object]] = {}
    for case in cases():
        arch, dtype, layout = case
        choices[case] = {(arch, dtype, layout.sp > 1), (layout.dp, layout.sp), *enumerate(astuple(layout)[2:])}
    missing = set[object]().union(*choices.values()) - {(*model, False) for model in MODELS}
    chosen: list[Case] = []
    while missing:
        chosen.append(max(cases(), key=lambda case: len(choices[case] & missing)))
        missing -= choices[chosen[-1]]
    return chosen


@pytest.mark.parametrize("daily", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["few", "rest"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_layout_is_one_device(world: int, daily: bool) -> None:
    mine = [case for case in cases() if case[2].dp * case[2].sp == world and (case in few()) is daily]
    assert spawn(world, check_all, mine, references(mine)) == [len(mine)] * world


def check_apart(rank: int, world: int, cases: list[Case], references: References) -> list[int]:
    layout = cases[0][2]
    assert check_all(rank, world, cases, references) == len(cases)
    return dist.get_process_group_ranks(mesh_of(layout).sp_group)


@pytest.mark.slow
def test_ranks_of_a_window_need_not_be_neighbours() -> None:
    cases: list[Case] = [
        ("tnl", dtype, Layout(2, 2, scan, kind, segments=segments, apart=True))
        for scan in SCANS
        for dtype, kind, segments in (
            (torch.float64, "ddp", 1),
            (torch.float64, "hsdp", 3),
            (torch.float32, "zero3", 2),
        )
    ]
    assert spawn(4, check_apart, cases, references(cases)) == [[0, 2], [1, 3], [0, 2], [1, 3]]


def patience(rank: int, world: int) -> set[float]:
    """Seconds that groups of a mesh wait, when all ranks were told to wait 77."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=77))
    mesh = meshes.build(2, world // 2)
    groups = [*mesh.grid.get_all_groups(), mesh.flat.get_group()]
    assert dist.group.WORLD not in groups[:2]
    return {group._get_backend(meshes.device()).options._timeout.total_seconds() for group in groups}


def test_groups_of_a_mesh_wait_as_long_as_the_group_of_all_ranks() -> None:
    assert spawn(4, patience) == [{77.0}] * 4


class Operators(TorchDispatchMode):
    """Counts the operators that run, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def gathers(rank: int, world: int) -> dict[str, int]:
    """All-gathers of parameters in one update, by kind and segments of a window."""
    found = {}
    for kind in ("ddp", "zero2", "zero3"):
        for segments in (1, 2):
            with Operators() as ran:
                distributed("tnl", torch.float32, Layout(world, 1, "ring", kind, segments=segments))
            found[f"{kind}/{segments}"] = ran.counts["c10d._allgather_base_.default"]
    return found


@pytest.mark.slow
def test_zero2_gathers_parameters_once_per_update() -> None:
    units = 3 + 1 + 1  # blocks, what stays in full precision, the rest
    want = {"ddp/1": 0, "ddp/2": 0, "zero2/1": units, "zero2/2": units, "zero3/1": 2 * units, "zero3/2": 2 * units}
    assert spawn(2, gathers) == [want, want]


def noticed(rank: int, world: int) -> list[bool]:
    """Whether the comparison notices that a scan loses what comes from the left, or its gradient from the right."""
    start = AllGather.start
    found = []
    for lost in (False, True):

        def lossy(
            self: AllGather, *args: Any, reverse: bool = False, lost: bool = lost, **kwargs: Any
        ) -> Exchange[Scanned]:
            exchange = start(self, *args, reverse=reverse, **kwargs)
            if reverse != lost:
                return exchange
            initial_state, final_state = exchange.wait()
            return Exchange(
                lambda: Scanned(None if initial_state is None else initial_state * 0, final_state), None, ()
            )

        AllGather.start = lossy  # type: ignore[method-assign]
        try:
            compare("tnl", torch.float32, Layout(1, world), single("tnl", torch.float32))
            found.append(False)
        except AssertionError:
            found.append(True)
    return found


def test_an_exchange_that_is_skipped_or_whose_gradient_is_dropped_is_noticed() -> None:
    first, second = spawn(2, noticed)
    assert [a or b for a, b in zip(first, second, strict=True)] == [True, True]


def exchanges(rank: int, world: int) -> dict[str, tuple[int, int]]:
    """Scans started and bytes sent by one window, per layout."""
    found = {}
    for scan in ("ring", "all_gather"):
        for mode in ("none", "full", "selective"):
            for segments in (1, 2):
                arch: Arch = "sliding hybrid" if scan == "ring" and segments == 2 else "tnl"
                _, _, used = distributed(arch, torch.float32, Layout(1, world, scan, "ddp", mode, segments))
                found[f"{scan}/{mode}/{segments}"] = (used.calls, used.bytes_sent)
        for segments in (1, 2):
            _, _, used = distributed("full hybrid", torch.float32, Layout(1, world, scan, "ddp", "full", segments))
            assert used.calls == (3 * 2 + 1) * segments * BATCH
    return found


def test_recomputation_repeats_no_exchange() -> None:
    results = spawn(2, exchanges)
    for found in results:
        for scan in ("ring", "all_gather"):
            for segments in (1, 2):
                counts = {found[f"{scan}/{mode}/{segments}"] for mode in ("none", "full", "selective")}
                assert len(counts) == 1, found
                once = scan == "ring" and segments == 2  # softmax layers are told where documents began
                assert counts.pop()[0] == (3 * 2 + once) * BATCH * segments


def chosen(rank: int, world: int) -> list[str]:
    """The scan found the fastest when the other two are slow on one rank, for segments alone and in a row."""
    group, clock, found = meshes.build(1, world).sp_group, Clock(), []
    for best, carried, linear in zip(SCANS, (False, True, True), (None, (1, 2), (1, 2, 4, 4)), strict=True):
        with pytest.MonkeyPatch.context() as patch:
            for name, scan in SCANS.items():
                patch.setitem(SCANS, name, scan if name == best else slowed(scan, clock, rank == 1))
            found.append(fastest_scan(group, CPU, (1, 2, 4, 4), carried, clock, linear=linear))
    return found


def slowed(scan: type[Ring] | type[AllGather], clock: Clock, here: bool) -> type[Ring] | type[AllGather]:
    """The scan, where it is `here` a second late by that clock."""

    class Slow(scan):  # type: ignore[misc, valid-type]
        def start(self, *args: Any, **kwargs: Any) -> Any:
            clock.seconds += here
            return super().start(*args, **kwargs)

    return Slow


def test_auto_takes_the_scan_that_is_the_fastest_on_all_ranks() -> None:
    assert spawn(3, chosen) == [[*SCANS]] * 3


def bytes_by_window(rank: int, world: int) -> dict[tuple[str, int], tuple[int, int]]:
    """Bytes sent by one layer forward, and forward and backward, by every scan at two window lengths."""
    group = meshes.build(1, world).sp_group
    found = {}
    for scan, window in product(SCANS, (1024, 65536)):
        used = SCANS[scan](group, CPU)
        attention = ShardedRecurrence("chunked", used)
        q, k, v = (torch.randn(1, window // world, 2, 16, requires_grad=True) for _ in range(3))
        o, _ = attention.finish(attention.begin((k, v, torch.tensor([-0.1, -1e-5])), None), q)
        forward = used.bytes_sent
        o.sum().backward()
        found[scan, window] = (forward, used.bytes_sent - forward)
    return found


def test_bytes_sent_do_not_depend_on_the_window() -> None:
    state, decay = 2 * 16 * 16 * 4, 2 * 4
    for rank, found in enumerate(spawn(3, bytes_by_window)):
        for scan in SCANS:
            assert found[scan, 1024] == found[scan, 65536]
            if scan != "all_gather":  # a chain has ends that do not send
                assert found[scan, 1024] == (state * (rank < 2), state * (rank > 0))
            else:
                assert found[scan, 1024] == (state + decay, state + decay)


def gradients_of(rank: int, world: int, last_of_a: int, segments: int, arch: Model) -> tuple[Tensor, Tensor]:
    """Losses of a window of documents A and B per token, and the gradient of B's loss at each token's embedding."""
    mesh = meshes.build(1, world)
    model = LanguageModel(
        config(arch), WINDOW, ShardedRecurrence("chunked", AllGather(mesh.sp_group, CPU)), loss_chunk=32
    )
    fill(model, values(model))
    tokens = windows()[:1]
    edge = 61
    tokens[0, edge] = BOS
    tokens[0, edge - 1] = last_of_a
    captured = []
    model.embed.weight.requires_grad_(False)
    hook = model.layers[0].register_forward_pre_hook(
        lambda _, args: captured.append(args[0].requires_grad_()) if torch.is_grad_enabled() else None
    )
    mine = pieces(tokens, world, rank, segments)
    masked = []
    for m, piece in enumerate(mine):
        length = piece.tokens.shape[1]
        position = (m * world + rank) * length + torch.arange(length)
        masked.append(piece._replace(labels=torch.where(position >= edge, piece.labels, -100)))
    backward(model, 3, masked, 1.0)
    hook.remove()
    carry, losses = None, []
    with torch.no_grad():
        for piece in mine:
            out = model(piece.tokens, piece.labels, piece.doc_ids, carry, output_final_state=True, per_token=True)
            carry = out.final_state
            losses.append(out.loss)
    return torch.cat(losses), torch.cat([x.grad[0] for x in reversed(captured)])


TEXTS: tuple[tuple[Arch, int], ...] = (
    ("tnl", 1), ("tnl", 2), ("tnl", 4), ("sliding hybrid", 4), ("full hybrid", 1), ("full hybrid", 4),
)  # fmt: skip


def two_texts(rank: int, world: int) -> list[list[tuple[Tensor, Tensor]]]:
    """For each of TEXTS, with each of two last tokens of A."""
    return [[gradients_of(rank, world, last, segments, arch) for last in (5, 9)] for arch, segments in TEXTS]


@pytest.mark.parametrize("world", [1, 2])
def test_a_document_never_sees_another(world: int) -> None:
    ranks = spawn(world, two_texts)
    for number, (_, segments) in enumerate(TEXTS):
        length = WINDOW // (world * segments)
        for rank in range(world):
            first, second = ranks[rank][number]
            position = torch.cat([(m * world + rank) * length + torch.arange(length) for m in range(segments)])
            in_b = position >= 61
            assert torch.equal(first[0][in_b], second[0][in_b])
            assert torch.equal(first[1][in_b], second[1][in_b])
            assert not first[1][~in_b].any()
