"""Law 1 for the delta rule: every kernel is the recurrence in outputs and all gradients, however a window is cut."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lasptrain.ops import delta_chunked, delta_gates, delta_rule
from lasptrain.ops.delta_reference import recurrence
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.parallel.transition import Transition

KERNELS = ["reference", "chunked"]
KINDS = {  # whether something is erased, and the shape of log decays
    "delta": (True, "none"),
    "gdn_head": (True, "head"),
    "gdn": (True, "token"),
    "kda": (True, "channel"),
    "linear": (False, "none"),
    "ssd_head": (False, "head"),
    "ssd": (False, "token"),
    "gla": (False, "channel"),
}
STRONG = torch.tensor([0.0, -1e-4, -1.0, -50.0, -1e4, float("-inf")], dtype=torch.float64)


class Case(NamedTuple):
    """A slice and the gradients of what it makes."""

    q: Tensor  # [B, T, Hk, K]
    k: Tensor
    v: Tensor  # [B, T, H, V]
    beta: Tensor | None
    log_decay: Tensor | None
    doc_ids: Tensor | None
    initial_state: Tensor | None
    do: Tensor
    dfinal: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> Case:
        return Case._make(None if x is None or not x.is_floating_point() else change(x) for x in self)._replace(
            doc_ids=self.doc_ids
        )

    def cut(self, start: int, end: int) -> Case:
        """Tokens start to end; their documents counted from what is before them."""
        doc_ids, log_decay = self.doc_ids, self.log_decay
        if doc_ids is not None:
            passed = doc_ids[:, start - 1 : start] if start else torch.zeros_like(doc_ids[:, :1])
            doc_ids = doc_ids[:, start:end] - passed
        if log_decay is not None and log_decay.dim() > 1:
            log_decay = log_decay[:, start:end]
        beta = None if self.beta is None else self.beta[:, start:end]
        q, k, v, do = (x[:, start:end] for x in (self.q, self.k, self.v, self.do))
        return self._replace(q=q, k=k, v=v, do=do, beta=beta, log_decay=log_decay, doc_ids=doc_ids)


def make(
    kind: str,
    length: int,
    *,
    beta: float = 1.0,
    one_key: bool = False,
    decays: str = "mild",
    begins: tuple[int, ...] = (),
    sizes: tuple[int, int, int, int, int] = (2, 2, 4, 8, 5),
    seed: int = 0,
) -> Case:
    """Random inputs in float64.

    Args:
        beta: the largest.
        one_key: make all keys the same, and beta 1.
        decays: `mild`, or `strong`: none, weak, strong and −∞ mixed.
        begins: first tokens of documents, of batch element 0; −1 is the last token.
        sizes: B, Hk, H, K and V.
    """
    b, key_heads, h, kdim, vdim = sizes
    erases, shape = KINDS[kind]
    g = torch.Generator().manual_seed(1000 * seed + length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    shapes = {"none": None, "head": (h,), "token": (b, length, h), "channel": (b, length, h, kdim)}
    log_decay = None
    if (of := shapes[shape]) is not None:
        log_decay = -0.2 * uniform(*of) ** 2
        if decays == "strong":
            strong = STRONG[torch.randint(len(STRONG), of, generator=g)]
            log_decay = torch.where(uniform(*of) < 0.3, strong, log_decay)
    k = F.normalize(normal(b, length, key_heads, kdim), dim=-1)
    betas = None
    if erases:
        betas = beta * uniform(b, length, h)
        if one_key:
            k, betas = k[:, :1].expand_as(k).contiguous(), torch.ones_like(betas)
    doc_ids = None
    if begins:
        doc_ids = torch.zeros(b, length, dtype=torch.int32)
        doc_ids[0, [t for t in begins if t < length]] = 1
        doc_ids = doc_ids.cumsum(1, dtype=torch.int32)
    return Case(
        q=F.normalize(normal(b, length, key_heads, kdim), dim=-1),
        k=k,
        v=normal(b, length, h, vdim),
        beta=betas,
        log_decay=log_decay,
        doc_ids=doc_ids,
        initial_state=normal(b, h, kdim, vdim),
        do=normal(b, length, h, vdim),
        dfinal=normal(b, h, kdim, vdim),
    )


def expected(x: Case) -> dict[str, Tensor]:
    """Autograd of the definition."""
    given = {"q": x.q, "k": x.k, "v": x.v, "beta": x.beta, "log_decay": x.log_decay, "initial": x.initial_state}
    if x.log_decay is not None and x.log_decay.dim() == 1:
        del given["log_decay"]
    leaves = {name: y.clone().requires_grad_() for name, y in given.items() if y is not None}
    of = {**given, "log_decay": x.log_decay, **leaves}
    q, k, v = leaves["q"], leaves["k"], leaves["v"]
    o, final = recurrence(q, k, v, of["beta"], of["log_decay"], x.doc_ids, of["initial"])
    made = {o: x.do} if x.dfinal is None else {o: x.do, final: x.dfinal}
    gradients = torch.autograd.grad(list(made), list(leaves.values()), list(made.values()), allow_unused=True)
    return {"o": o.detach(), "final": final.detach()} | {
        f"d{name}": torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), gradients, strict=True)
    }


def measured(kernel: str, x: Case, handed_on: bool = True) -> dict[str, Tensor]:
    """All five functions on one slice; `handed_on`: whether intermediates go from the first two to the others."""
    inputs = (x.k, x.v, x.beta, x.log_decay)
    state, linear, blocks = delta_rule.summarize(kernel, inputs, x.doc_ids, 2)
    o, kept = delta_rule.attend(kernel, x.q, inputs, x.doc_ids, x.initial_state, blocks if handed_on else [])
    dinitial, backward, dblocks = delta_rule.grad_initial_state(kernel, x.q, x.do, inputs, x.doc_ids, kept, 2)
    assert error(backward, linear) < (1e-12 if linear.dtype == torch.float64 else 1e-5)
    dq, rest = delta_rule.grad_query(kernel, x.q, inputs, x.do, x.doc_ids, kept)
    grads = delta_rule.grad_inputs(
        kernel, x.q, inputs, x.do, x.doc_ids, x.dfinal, dblocks if handed_on else [], kept, rest
    )
    final = Transition(linear).apply(x.initial_state, state)
    dinitial = Transition(linear).transpose().apply(x.dfinal, dinitial)
    named = zip(("dk", "dv", "dbeta", "dlog_decay"), grads, strict=True)
    found = {"o": o, "final": final, "dq": dq, "dinitial": dinitial}
    return found | {name: grad for name, grad in named if grad is not None}


def error(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖; infinite where a is not finite."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp(min=1e-12)) if bool(torch.isfinite(a).all()) else float("inf")


def worst(found: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    assert found.keys() == want.keys()
    return max((error(found[name], want[name]), name) for name in want)


MANY = (0, 1, 2, 40, 64, 65, 128, -1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "length,begins", [(1, ()), (1, (0,)), (63, (30,)), (64, (0,)), (65, (-1,)), (130, ()), (130, MANY)]
)
def test_kernels_are_the_recurrence(kind: str, length: int, begins: tuple[int, ...]) -> None:
    for decays in ("mild", "strong") if KINDS[kind][1] != "none" else ("mild",):
        x = make(kind, length, begins=begins, decays=decays, beta=2.0 if length == 64 else 1.0)
        want = expected(x)
        for kernel, handed_on in (("reference", True), ("chunked", True), ("chunked", False)):
            if kernel == "chunked" or length <= 65:  # the definition is slow and does not depend on the length
                assert worst(measured(kernel, x, handed_on), want) < (1e-12, ""), (kernel, handed_on, decays)


@pytest.mark.parametrize("kind", ["delta", "gdn", "kda"])
@pytest.mark.parametrize("beta,one_key", [(0.0, False), (2.0, False), (1.0, True)])
def test_nothing_everything_and_more_is_replaced(kind: str, beta: float, one_key: bool) -> None:
    x = make(kind, 500, beta=beta, one_key=one_key, begins=(100, 130, 300), decays="strong", sizes=(1, 1, 2, 8, 12))
    assert worst(measured("chunked", x), expected(x)) < (1e-12, "")


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("decays", ["mild", "strong"])
@pytest.mark.parametrize("kind", ["delta", "gdn", "kda", "gla"])
def test_low_precision_inputs_keep_fp32_states(kind: str, decays: str, dtype: torch.dtype, bound: float) -> None:
    x = make(kind, 500, decays=decays, begins=MANY, sizes=(1, 1, 2, 16, 8)).map(lambda y: y.to(dtype))
    x = x._replace(initial_state=low(x.initial_state), dfinal=low(x.dfinal))
    want, found = expected(x.map(lambda y: y.double())), measured("chunked", x)
    assert worst(found, want) < (bound, "")
    dtypes = dict.fromkeys(found, dtype) | dict.fromkeys(("final", "dinitial"), torch.float32)
    assert {name: y.dtype for name, y in found.items()} == dtypes


def low(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()


@pytest.mark.parametrize("kind", ["gdn", "kda", "gla"])
def test_decay_gradient_does_not_cancel_at_64k_tokens(kind: str) -> None:
    length = 65536
    x = make(kind, length, beta=0.02, sizes=(1, 1, 1, 8, 8))
    assert x.log_decay is not None
    decay = 5e-3 * x.log_decay
    decay[:, length // 2], decay[:, length // 4] = -50.0, float("-inf")
    x = x._replace(log_decay=decay, initial_state=None, dfinal=None)

    def grad(x: Case) -> Tensor:
        inputs = (x.k, x.v, x.beta, x.log_decay)
        _, kept = delta_rule.attend("chunked", x.q, inputs, None, None, [])
        _, rest = delta_rule.grad_query("chunked", x.q, inputs, x.do, None, kept)
        dlog = delta_rule.grad_inputs("chunked", x.q, inputs, x.do, None, None, [], kept, rest)[3]
        assert dlog is not None and not dlog[:, length // 4].any()
        return dlog

    assert error(grad(x.map(lambda y: y.float())), grad(x)) < 1e-5


Change = Callable[[Tensor, Case], Tensor]
Turn = Callable[[Transition], Transition]


def unchanged(linear: Tensor, _: Case) -> Tensor:
    return linear


def chained(
    x: Case,
    edges: list[int],
    change: Change = unchanged,
    turn: Turn = Transition.transpose,
    kernel: str = "chunked",
) -> dict[str, Tensor]:
    """Slices between edges, one by one: states from the left, then gradients from the right.

    `change` replaces what slices do to states, `turn` makes of that what they do to gradients of states.
    """
    slices = [x.cut(start, end) for start, end in pairwise(edges)]
    state, entering = x.initial_state, []
    for s in slices:
        made, linear, _ = delta_rule.summarize(kernel, (s.k, s.v, s.beta, s.log_decay), s.doc_ids, 2)
        entering.append(state)
        state = Transition(change(linear, s)).apply(state, made)
    grad, parts = x.dfinal, []
    for s, initial_state in zip(reversed(slices), reversed(entering), strict=True):
        inputs = (s.k, s.v, s.beta, s.log_decay)
        o, kept = delta_rule.attend(kernel, s.q, inputs, s.doc_ids, initial_state, [])
        dinitial, linear, dblocks = delta_rule.grad_initial_state(kernel, s.q, s.do, inputs, s.doc_ids, kept, 2)
        dq, rest = delta_rule.grad_query(kernel, s.q, inputs, s.do, s.doc_ids, kept)
        grads = delta_rule.grad_inputs(kernel, s.q, inputs, s.do, s.doc_ids, grad, dblocks, kept, rest)
        grad = turn(Transition(change(linear, s))).apply(grad, dinitial)
        parts.append((o, dq, *grads))
    names = ("o", "dq", "dk", "dv", "dbeta", "dlog_decay")
    whole = {
        name: torch.cat([y for y in reversed(part) if y is not None], dim=1)
        for name, part in zip(names, zip(*parts, strict=True), strict=True)
        if part[0] is not None
    }
    assert state is not None and grad is not None
    return whole | {"final": state, "dinitial": grad}


@pytest.mark.parametrize("kind", ["delta", "gdn_head", "gdn", "kda", "ssd", "gla"])
@pytest.mark.parametrize("seed", range(3))
def test_a_window_in_slices_is_the_window(kind: str, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    length = (200, 261, 330)[seed]
    begins = ((), (0, 7, 150), tuple(range(3, length, 17)))[seed]
    # random keys erase a state within a few tokens where β is large: then nothing is left of transitions
    x = make(kind, length, beta=(1.0, 2.0, 0.1)[(seed + len(kind)) % 3], begins=begins, seed=seed)
    inner = (torch.randperm(length - 1, generator=g)[: 3 + 2 * seed] + 1).sort().values.tolist()
    assert worst(chained(x, [0, 1, *inner[1:], length]), expected(x)) < (1e-12, "")


EDGES = [0, 70, 131, 132, 200, 240, 300]


def with_boundary_kept(linear: Tensor, s: Case) -> Tensor:
    return delta_rule.summarize("chunked", (s.k, s.v, s.beta, s.log_decay), None, 2)[1]


def only_decays(linear: Tensor, s: Case) -> Tensor:
    assert s.log_decay is not None
    return torch.diag_embed(s.log_decay.sum(1).exp())


MUTATIONS: dict[str, tuple[Change, Turn]] = {
    "left out": (lambda m, s: torch.eye(8).to(m).expand_as(m) if s.k.shape[1] == 61 else m, Transition.transpose),
    "not transposed": (unchanged, lambda transition: transition),
    "rounded": (lambda m, _: m.bfloat16().double(), Transition.transpose),
    "boundary kept": (with_boundary_kept, Transition.transpose),
    "only decays": (only_decays, Transition.transpose),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_slices_notice_a_wrong_transition(mutation: str) -> None:
    x = make("kda", 300, beta=0.1, begins=(150,))
    assert x.log_decay is not None
    x = x._replace(log_decay=0.1 * x.log_decay)
    want = expected(x)
    assert worst(chained(x, EDGES), want) < (1e-12, "")
    assert worst(chained(x, EDGES, *MUTATIONS[mutation]), want) > (1e-4, "")


def test_a_transform_without_decays_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make("gdn", 130)
    want = expected(x)
    transform = delta_chunked.Chunks.transform

    def undecayed(chunks: delta_chunked.Chunks) -> list[Tensor]:
        gates = chunks.gates
        chunks.gates = delta_gates.gates(torch.zeros_like(gates.each))
        matrix, _ = transform(chunks)
        chunks.gates = gates
        assert chunks.beta is not None
        return [matrix, matrix @ (-chunks.beta * gates.lead * chunks.k)]

    monkeypatch.setattr(delta_chunked.Chunks, "transform", undecayed)
    assert worst(measured("chunked", x), want) > (1e-3, "")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ["gdn", "kda", "gla"])
def test_what_is_not_wanted_is_not_there(kind: str, kernel: str) -> None:
    x = make(kind, 65)
    inputs = (x.k, x.v, x.beta, x.log_decay)
    _, kept = delta_rule.attend(kernel, x.q, inputs, None, x.initial_state, [])
    for wanted in range(3):
        forward = delta_rule.summarize(kernel, inputs, None, wanted)
        backward = delta_rule.grad_initial_state(kernel, x.q, x.do, inputs, None, kept, wanted)
        for state, linear, _ in (forward, backward):
            assert bool(state.isnan().all()) is (wanted < 1) and bool(state.isnan().any()) is (wanted < 1)
            assert bool(linear.isnan().all()) is (wanted < 2) and bool(linear.isnan().any()) is (wanted < 2)


@pytest.mark.parametrize("kind", ["gdn", "kda", "gla"])
def test_a_document_never_sees_another(kind: str) -> None:
    x = make(kind, 200, begins=(30, 64, 101))
    first = measured("chunked", x)
    for changed in (x.q, x.k, x.v, x.do):
        changed[0, 100] += 100.0
    second = measured("chunked", x)
    for name in ("o", "dq", "dk", "dv"):
        for seen, same in ((slice(0, 64), True), (slice(64, 101), False), (slice(101, None), True)):
            assert torch.equal(first[name][0, seen], second[name][0, seen]) is same, (name, seen)
    assert torch.equal(first["final"][0], second["final"][0])


@pytest.mark.parametrize("kind", ["gdn", "kda", "gla"])
def test_inputs_stay_as_they_are(kind: str) -> None:
    x = make(kind, 128, sizes=(1, 1, 1, 8, 8))
    before = x.map(torch.clone)
    measured("chunked", x)
    assert all(y is None or torch.equal(y, z) for y, z in zip(x, before, strict=True) if z is not None)


@pytest.mark.parametrize(
    "heads,beta,decay,message",
    [
        (3, None, None, "v: 3 heads are no multiple of the 2 of k; nearest: 2, 4"),
        (1, None, None, "v: 1 heads are no multiple of the 2 of k; nearest: 2"),
        (4, (1, 5, 2), None, "beta: expected [1, 5, 4], found [1, 5, 2]"),
        (4, None, (1, 5), "log_decay: expected [H], [B, T, H] or [B, T, H, K], found [1, 5]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    heads: int, beta: tuple[int, ...] | None, decay: tuple[int, ...] | None, message: str
) -> None:
    k, v = torch.zeros(1, 5, 2, 4), torch.zeros(1, 5, heads, 4)
    others = (None if shape is None else torch.zeros(shape) for shape in (beta, decay))
    with pytest.raises(ValueError) as refusal:
        delta_rule.summarize("chunked", (k, v, *others), None, 2)
    assert str(refusal.value) == message


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ["gdn_head", "gdn", "kda", "ssd", "gla"])
@pytest.mark.parametrize("whole", [False, True])
def test_operators_have_fakes_and_share_no_memory(kind: str, kernel: str, whole: bool) -> None:
    if whole:  # tokens that are a chunk as they lie
        x = make(kind, 64, sizes=(1, 1, 1, 8, 8)).map(lambda y: y.float())
    else:
        x = make(kind, 65, begins=(30,)).map(lambda y: y.bfloat16())
    x = x._replace(initial_state=low(x.initial_state), dfinal=low(x.dfinal))
    given = (x.beta, x.log_decay, x.doc_ids)
    ops = torch.ops.lasptrain
    blocks = ops.delta_summarize(kernel, x.k, x.v, *given, 2)[2]
    kept = ops.delta_attend(kernel, x.q, x.k, x.v, *given, x.initial_state, blocks)[1]
    dblocks = ops.delta_grad_initial_state(kernel, x.q, x.do, x.k, *given, kept, 2)[2]
    rest = ops.delta_grad_query(kernel, x.q, x.k, x.v, x.do, *given, kept)[1]
    four, none = (x.q, x.k, x.v, x.do), list[Tensor]()
    checks: list[tuple[Any, tuple[object, ...]]] = [
        *((ops.delta_summarize.default, (x.k, x.v, *given, wanted)) for wanted in range(3)),
        *((ops.delta_attend.default, (x.q, x.k, x.v, *given, x.initial_state, made)) for made in (none, blocks)),
        *((ops.delta_grad_initial_state.default, (x.q, x.do, x.k, *given, kept, wanted)) for wanted in range(3)),
        (ops.delta_grad_query.default, (*four, *given, kept)),
        *((ops.delta_grad_inputs.default, (*four, *given, x.dfinal, made, kept, rest)) for made in (none, dblocks)),
    ]
    for op, args in checks:
        torch.library.opcheck(op, (kernel, *args), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("kind", ["gdn", "kda", "gla"])
def test_no_graph_break(kind: str) -> None:
    x = make(kind, 70, begins=(5,)).map(lambda y: y.float())
    found = torch.compile(forward_and_backward, backend="aot_eager", fullgraph=True)(x)
    for got, want in zip(found, forward_and_backward(x), strict=True):
        assert error(got, want) < 1e-6


def forward_and_backward(x: Case) -> list[Tensor]:
    inputs = (x.k, x.v, x.beta, x.log_decay)
    state, linear, blocks = delta_rule.summarize("chunked", inputs, x.doc_ids, 2)
    o, kept = delta_rule.attend("chunked", x.q, inputs, x.doc_ids, x.initial_state, blocks)
    dinitial, _, dblocks = delta_rule.grad_initial_state("chunked", x.q, x.do, inputs, x.doc_ids, kept, 2)
    dq, rest = delta_rule.grad_query("chunked", x.q, inputs, x.do, x.doc_ids, kept)
    grads = delta_rule.grad_inputs("chunked", x.q, inputs, x.do, x.doc_ids, x.dfinal, dblocks, kept, rest)
    return [state, linear, o, dinitial, dq, *(grad for grad in grads if grad is not None)]


def test_selective_recomputation_does_not_attend_again(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make("kda", 130)._replace(initial_state=None, dfinal=None)
    want = expected(x)
    attends: list[int] = []
    attend = delta_chunked.attend

    def counted(*args: Any) -> tuple[Tensor, list[Tensor]]:
        attends.append(1)
        return attend(*args)

    monkeypatch.setattr(delta_chunked, "attend", counted)

    def policy(_: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op is delta_rule.ATTEND else CheckpointPolicy.PREFER_RECOMPUTE

    leaves = [y.clone().requires_grad_() for y in (x.q, x.k, x.v, x.beta, x.log_decay) if y is not None]
    sharded = ShardedRecurrence("chunked")

    def layer(q: Tensor, *inputs: Tensor) -> Tensor:
        return sharded.finish(sharded.begin(inputs, None, rule=delta_rule), q)[0]

    contexts = partial(create_selective_checkpoint_contexts, policy)
    o = checkpoint(layer, *leaves, use_reentrant=False, context_fn=contexts)
    grads = torch.autograd.grad(o, leaves, x.do)
    assert len(attends) == 1
    for name, grad in zip(("dq", "dk", "dv", "dbeta", "dlog_decay"), grads, strict=True):
        assert error(grad, want[name]) < 1e-12, name
