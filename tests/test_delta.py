"""Law 1 for the delta rule: every kernel is the recurrence in outputs and all gradients, however a window is cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lasptrain.ops import delta_chunked, delta_reference, delta_rule
from lasptrain.ops.delta_reference import recurrence

KERNELS = {"reference": delta_reference, "chunked": delta_chunked}
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
    beta: str | float = 1.0,
    decays: str = "mild",
    begins: tuple[int, ...] = (),
    sizes: tuple[int, int, int, int, int] = (2, 2, 4, 8, 5),
    seed: int = 0,
) -> Case:
    """Random inputs in float64.

    Args:
        beta: the largest, or `zero`, or `one key`: 1 for keys that are all the same.
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
        betas = {"zero": 0.0, "one key": 1.0}.get(beta, beta) * uniform(b, length, h)  # type: ignore[call-overload]
        if beta == "one key":
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
    final = apply(linear, x.initial_state, state)
    dinitial = apply(transpose(linear), x.dfinal, dinitial)
    named = zip(("dk", "dv", "dbeta", "dlog_decay"), grads, strict=True)
    found = {"o": o, "final": final, "dq": dq, "dinitial": dinitial}
    return found | {name: grad for name, grad in named if grad is not None}


def apply(linear: Tensor, state: Tensor | None, plus: Tensor) -> Tensor:
    if state is None:
        return plus
    if linear.dim() == 4:
        return linear @ state + plus
    return linear[(...,) + (None,) * (4 - linear.dim())] * state + plus


def transpose(linear: Tensor) -> Tensor:
    return linear.mT if linear.dim() == 4 else linear


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
