"""Softmax layers over windows in segments: the prefix is a state, exact on every layout, and nothing of it is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain, combinations, product
from typing import Any, NamedTuple

import mpmath  # type: ignore[import-untyped]
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lasptrain import architectures
from lasptrain.data.loader import Slice
from lasptrain.eval.generate import decode
from lasptrain.eval.inference import Reader
from lasptrain.models.language_model import LanguageModel, initial_values
from lasptrain.models.layers import Rotary
from lasptrain.models.softmax import Softmax
from lasptrain.ops import softmax
from lasptrain.parallel import mesh as meshes
from lasptrain.parallel import shard
from lasptrain.parallel.block import Block, Rows
from lasptrain.parallel.prefix import Prefix
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.parallel.scan import SCANS, Exchange
from lasptrain.training.segments import backward, keep_states
from tests.laws.test_layouts import BOUNDS, CPU, pairs_of
from tests.support.gloo import spawn

VOCAB, HEADS, DIM = 31, 4, 4
RANKS = SEGMENTS = (1, 2, 3, 5)
DOCUMENTS = ("none", "long", "of one token", "on every edge")
MODES = ("none", "full", "selective", "offload")
REACHES = (None, 17)  # longer than a slice
KEY_HEADS = (1, 2, 4)
STORAGE = ("gathered", "sharded", "host")
SCAN = {1: "ring", 2: "ring", 3: "all_gather", 5: "all_scan"}


class Case(NamedTuple):
    """A layout of a window, and what lies in it."""

    sp: int
    segments: int
    documents: str = "none"
    mode: str = "none"
    reach: int | None = None
    key_heads: int = 2
    dtype: torch.dtype = torch.float64
    storage: str = "gathered"
    outputs: bool = True

    @property
    def window(self) -> int:
        """Tokens; slices have at least three."""
        parts = self.sp * self.segments
        return parts * max(3, 60 // parts)


@cache
def cases() -> list[Case]:
    """All numbers of ranks and segments, and every pair of values of two of the other choices."""
    chosen: list[Case] = []
    seen: set[tuple[int, int, object, object]] = set()
    for sp, segments in (*product(RANKS, SEGMENTS), *product((1, 2), (3, 5))):
        rest = [
            Case(sp, segments, *row)
            for row in product(DOCUMENTS, MODES, REACHES, KEY_HEADS, BOUNDS, STORAGE, (True, False))
        ]
        best = max(rest, key=lambda case: len(pairs_of(*case[2:]) - seen))
        seen |= pairs_of(*best[2:])
        chosen.append(best)
    return chosen


def test_cases_hold_every_pair_of_choices() -> None:
    axes = enumerate((DOCUMENTS, MODES, REACHES, KEY_HEADS, tuple(BOUNDS), STORAGE, (True, False)))
    have = set[tuple[int, int, object, object]]().union(*(pairs_of(*case[2:]) for case in cases()))
    for (i, ones), (j, others) in combinations(axes, 2):
        assert {(i, j, *pair) for pair in product(ones, others)} <= have, (i, j)


def documents(case: Case) -> Tensor | None:
    """Numbers of the documents of two windows, as if each were one slice [2, N]; those of the second are two."""
    begins = torch.zeros(2, case.window, dtype=torch.int32)
    begins[1, case.window * 3 // 5] = 1
    match case.documents:
        case "none":
            return None
        case "long":  # over several segments, from the middle of a slice to that of another
            begins[0, case.window // 8] = begins[0, case.window * 7 // 8] = 1
        case "of one token":
            begins[0, case.window // 3 :: 2] = begins[0, case.window * 2 // 3 :] = 1
        case _:
            begins[0, :: case.window // (case.sp * case.segments)] = 1
    return begins.cumsum(1).int()


def made(case: Case, attention: ShardedRecurrence) -> LanguageModel:
    sizes = {"dim": HEADS * DIM, "layers": 2, "heads": HEADS, "mlp": 12, "vocab": VOCAB, "tie": False}
    keys = {"softmax": [0, 1], "kv_heads": case.key_heads, "sliding_window": case.reach, "rotary": 40.0}
    cfg = architectures.model({"arch": "linear_transformer", **sizes, **keys})
    model = LanguageModel(cfg, case.window, attention, dtype=case.dtype, loss_chunk=32).to(case.dtype)
    shard.fill(model, ((name, value * (4 if "weight" in name else 1)) for name, value in initial_values(model, 7, CPU)))
    return model


def text(case: Case) -> Tensor:
    return torch.randint(VOCAB, (2, case.window + 1), generator=torch.Generator().manual_seed(3))


def slices(case: Case, rank: int) -> list[Slice]:
    tokens, numbers, length = text(case), documents(case), case.window // (case.sp * case.segments)
    found = []
    for segment in range(case.segments):
        start = (segment * case.sp + rank) * length
        own = slice(start, start + length)
        before = 0 if numbers is None or start == 0 else numbers[:, start - 1 : start]
        doc_ids = None if numbers is None else numbers[:, own] - before
        found.append(Slice(tokens[:, own], tokens[:, start + 1 : start + length + 1], doc_ids))
    return found


def attention(layer: Softmax, h: Tensor, numbers: Tensor | None, base: float) -> Tensor:
    """The definition: every query over every key that it sees, rotated as a complex number."""
    count = len(h)
    q, k, v = ((h @ getattr(layer, name).weight.T).view(count, -1, DIM) for name in "qkv")
    angle = torch.arange(count).double()[:, None, None] * base ** (-torch.arange(DIM // 2).double() * 2 / DIM)
    turn = torch.polar(torch.ones_like(angle), angle)
    q, k = (torch.complex(*x.double().chunk(2, dim=-1)) * turn for x in (q, k))
    share = HEADS // k.shape[1]
    score = torch.einsum("ihc,jhc->hij", q, k.repeat_interleave(share, 1).conj()).real / DIM**0.5
    lag = torch.arange(count)[:, None] - torch.arange(count)
    seen = (lag >= 0) & (lag < (layer.sliding_window or count))
    if numbers is not None:
        seen &= numbers[:, None] == numbers
    weight = score.masked_fill(~seen, -torch.inf).softmax(-1).to(v.dtype)
    return torch.einsum("hij,jhc->ihc", weight, v.repeat_interleave(share, 1)).flatten(1) @ layer.out.weight.T


Found = tuple[float, dict[str, Tensor]]  # loss, and its gradients by name


@cache
def definition(case: Case) -> Found:
    """Loss and gradients of one device, one segment and the plain definition, in fp64."""
    model = made(case._replace(dtype=torch.float64), ShardedRecurrence("reference"))
    tokens, numbers = text(case), documents(case)
    loss = torch.zeros((), dtype=torch.float64)
    for row in range(2):
        x = model.embed.weight[tokens[row, :-1]] * model.scale
        for block in model.blocks:
            assert isinstance(block.token_mixer, Softmax) and model.cfg.rotary is not None
            own = None if numbers is None else numbers[row]
            x = x + attention(block.token_mixer, block.norm1(x), own, model.cfg.rotary)
            h, w = block.norm2(x), dict(block.mlp.named_parameters())
            x = x + (F.silu(h @ w["gate.weight"].T) * (h @ w["up.weight"].T)) @ w["down.weight"].T
        logits = model.norm(x) @ model.head_weight.T
        loss = loss + F.cross_entropy(logits, tokens[row, 1:], reduction="sum")
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def error(case: Case, rank: int = 0, group: Any = None) -> float:
    """The largest relative error of the gradients, summed over ranks, and of the loss."""
    scan = SCANS[SCAN[case.sp]](group, CPU) if group is not None else None
    model = made(case, ShardedRecurrence("chunked", scan, case.storage, case.outputs))
    shard.recompute(model.blocks, case.mode)
    loss, _ = backward(model, 2, slices(case, rank), 1.0)
    want, wanted = definition(case)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"": loss}
    if group is not None:
        for part in found.values():
            torch.distributed.all_reduce(part)
    assert found.keys() == {*wanted, ""}
    errors = [abs(float(found.pop("")) / want - 1)]
    return max(errors + [float((grad - wanted[name]).norm() / wanted[name].norm()) for name, grad in found.items()])


def test_segments_in_one_graph_have_the_gradient_of_the_window() -> None:
    case = Case(1, 3, "long")
    model = made(case, ShardedRecurrence("chunked"))
    carry, total = None, torch.zeros((), dtype=case.dtype)
    for piece in slices(case, 0):
        out = model(piece.tokens, piece.labels, piece.doc_ids, carry, output_final_state=True)
        carry, total = out.final_state, total + out.loss
    total.backward()
    _, wanted = definition(case)
    for name, p in model.named_parameters():
        assert p.grad is not None and float((p.grad - wanted[name]).norm() / wanted[name].norm()) < 1e-12, name


def errors(rank: int, world: int, mine: list[Case]) -> list[float]:
    group = meshes.build(1, world).sp_group
    return [error(case, rank, group) for case in mine]


@pytest.mark.parametrize("sp", RANKS)
def test_every_layout_is_the_definition(sp: int) -> None:
    mine = [case for case in cases() if case.sp == sp]
    for found in spawn(sp, errors, mine):
        wrong = [(case, off) for case, off in zip(mine, found, strict=True) if off > BOUNDS[case.dtype]]
        assert not wrong, wrong


def forgetful(self: Block, grads: Rows) -> Exchange[None]:
    """Add nothing to the gradient of a block."""
    return Exchange(lambda: None, None, ())


MUTANTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "gradient of the prefix lost": (Block, "add", forgetful),
    "prefix lost": (Prefix, "then", lambda self, own, link, **_: Prefix((own,), link)),
    "parts not weighed": (softmax, "merge", lambda o, lse, other_o, other_lse: ((o + other_o) / 2, lse)),
    "turned by the place in the slice": (
        Rotary,
        "__call__",
        lambda self, *args, of=Rotary.__call__: of(self, *args[:3]),
    ),
}


@pytest.mark.parametrize("broken", MUTANTS)
def test_what_is_broken_is_noticed(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    case = Case(1, 3, "long", "full")
    assert error(case) < BOUNDS[case.dtype]
    monkeypatch.setattr(*MUTANTS[broken])
    assert error(case) > 1e-4


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Positions of the blocks that queries attended to, forward, in order."""
    found: list[int] = []
    forward = softmax.forward

    def counted(q: Tensor, k: Tensor, v: Tensor, documents: Any, query: int, key: int, *rest: Any, **named: Any) -> Any:
        found.append(key)
        return forward(q, k, v, documents, query, key, *rest, **named)

    monkeypatch.setattr(softmax, "forward", counted)
    yield found


@pytest.mark.parametrize("outputs", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_no_attention_is_repeated(calls: list[int], mode: str, outputs: bool) -> None:
    case = Case(1, 3, mode=mode)
    backward(made(case, ShardedRecurrence("chunked", outputs=outputs)), 2, slices(case, 0), 1.0)
    first, second = 1 + 2, 1 + 2 + 3  # blocks in all segments but the last, whose last layer makes keys only; in all
    assert len(calls) == 2 * second + (0 if outputs else first)


def test_blocks_of_documents_that_have_ended_are_not_read(calls: list[int]) -> None:
    case = Case(1, 5, "on every edge")
    first = [Slice(x[:1], y[:1], None if n is None else n[:1]) for x, y, n in slices(case, 0)]  # of two windows
    backward(made(case, ShardedRecurrence("chunked", outputs=False)), 2, first, 1.0)
    reads = [[0], [0, 12], [12, 24], [24, 36], [36, 48]]  # of segments, which begin in the last document before them
    assert calls == [*chain(*reads[:4]), *chain(*(2 * blocks for blocks in reversed(reads)))]


def test_a_prefix_is_not_copied() -> None:
    case = Case(1, 5)
    model = made(case, ShardedRecurrence("chunked"))
    kept, carry = keep_states(model, 2, slices(case, 0)[:-1])
    assert carry is not None
    for layer in range(2):
        prefix = carry[layer][0]
        assert [block.start for block in prefix.blocks] == [0, 12, 24, 36]
        for segment, saved in enumerate(kept):
            read = saved[layer].read
            assert read is not None and read.own is prefix.blocks[segment]
            assert read.before.blocks == prefix.blocks[:segment]
            assert (read.output is None) == (layer == 1)  # which makes its state only


def test_angles_are_exact_at_the_end_of_four_million_tokens() -> None:
    mpmath.mp.dps = 40
    start, length, base, dim = (1 << 22) - 300, 300, 10000.0, 64
    for dtype, bound in ((torch.float64, 2e-9), (torch.float32, 3e-7)):
        tables = Rotary(dim, base)(length, CPU, dtype, start)
        one = torch.cat([torch.ones(dim // 2), torch.zeros(dim // 2)]).to(dtype).expand(1, length, 1, dim)
        turned = tables.rotated(one)[0, :, 0]
        for t, channel in product((0, 255, 256, 299), (0, 1, 7, 31)):
            angle = (start + t) * mpmath.mpf(10000) ** (-mpmath.mpf(2 * channel) / dim)
            assert abs(float(turned[t, channel]) - mpmath.cos(angle)) < bound
            assert abs(float(turned[t, channel + dim // 2]) - mpmath.sin(angle)) < bound


def test_blocks_of_a_text_that_is_read_are_few() -> None:
    case = Case(1, 1)
    model = made(case, ShardedRecurrence("chunked"))
    past = Reader(model, segment=7).read(text(case)[:1])
    assert len(past.carry[0][0].blocks) <= 5
    for _ in range(40):
        past = Reader(model).read(torch.ones(1, 1, dtype=torch.int64), past)
    (prefix, edge), lengths = past.carry[0], [block.length for block in past.carry[0][0].blocks]
    assert edge.position == sum(lengths) == case.window + 41 and len(lengths) <= 7
    assert prefix.blocks[-1].stop == edge.position and decode(model, past, 3)
