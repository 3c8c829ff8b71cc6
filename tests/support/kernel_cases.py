"""Inputs on which a kernel is compared with another, and one call of all its functions."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """A slice of `tokens` tokens; `boundaries` are the first tokens of documents in batch element 0."""

    tokens: int
    keys: int
    values: int
    decay: str  # none, head, closed (heads that remember nothing), token or closing
    boundaries: tuple[int, ...] = ()
    batch: int = 2
    heads: int = 3
    edges: bool = True


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    log_decay: Tensor | None
    doc_ids: Tensor | None
    initial_state: Tensor | None
    dfinal: Tensor | None

    def double(self) -> Inputs:
        """The same in float64."""
        return self.map(lambda x: x.double() if x.is_floating_point() else x)

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        return Inputs._make(None if x is None else change(x) for x in self)


def closing(small: Tensor) -> Tensor:
    """Per-token log decays [B, T, H] with heads that close, in turn: at single tokens and in runs at edges and in the
    middle of chunks, wherever a weak decay follows; a little, at half of all tokens; entirely, at every other token of
    the first half.
    """
    length, heads = small.shape[1:]
    log_decay = small.clone()
    strong = torch.tensor([-1e3, -1e4, float("-inf")]).to(small)
    for h in range(heads):
        match h % 3:
            case 0:
                tokens = [t for t in (0, 5, 20, 31, 32, 63, 64, 80, 81, 82, 127, 190, 255, 256) if t < length]
            case 1:
                log_decay[:, ::2, h] = small[:, ::2, h] * 300 - 5
                continue
            case _:
                tokens = [*range(0, length // 2, 2)]
        log_decay[:, tokens, h] = strong[torch.arange(len(tokens)) % 3]
    return log_decay


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Fresh normal inputs of `dtype`; decays from almost none to forgetting in a token, or closing."""
    b, t, h = case.batch, case.tokens, case.heads
    generator = torch.Generator(device).manual_seed(t)

    def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(kind)

    rates = torch.logspace(-3, 0.3, h, device=device)
    log_decay: Tensor | None = None
    match case.decay:
        case "head":
            log_decay = -rates
        case "closed":
            log_decay = -torch.tensor([1e3, 1e4, float("inf")], device=device)[torch.arange(h) % 3]
        case "token":
            log_decay = -torch.rand(b, t, h, generator=generator, device=device) * rates
        case "closing":
            log_decay = closing(-(10 ** (-1 - 3 * torch.rand(b, t, h, generator=generator, device=device))))
    doc_ids = None
    if case.boundaries:
        begin = torch.zeros(b, t, dtype=torch.int32, device=device)
        begin[0, list(case.boundaries)] = 1
        doc_ids = begin.cumsum(1).int()
    state = (b, h, case.keys, case.values)
    return Inputs(
        q=normal(b, t, h, case.keys),
        k=normal(b, t, h, case.keys),
        v=normal(b, t, h, case.values),
        do=normal(b, t, h, case.values),
        log_decay=log_decay,
        doc_ids=doc_ids,
        initial_state=normal(*state, kind=torch.float32) if case.edges else None,
        dfinal=normal(*state, kind=torch.float32) if case.edges else None,
    )


STATES = {"state", "decay", "dentering", "decay backwards"}
WAYS = {"blocks, states": (True, True), "blocks": (True, False), "nothing": (False, False)}


def backward(kernel: ModuleType, x: Inputs, with_blocks: bool = True, wanted: bool = True) -> dict[str, Tensor]:
    """Every output and gradient of the five functions of a kernel module.

    Args:
        with_blocks: whether the block states of the first two are handed to the others.
        wanted: whether states are asked of the first two.
    """
    asked = 2 if wanted else 0
    state, decay, blocks = kernel.summarize(x.k, x.v, x.log_decay, x.doc_ids, asked)
    o, kept = kernel.attend(x.q, x.k, x.v, x.log_decay, x.doc_ids, x.initial_state, blocks if with_blocks else [])
    dinitial, backwards, dblocks = kernel.grad_initial_state(x.q, x.do, x.log_decay, x.doc_ids, asked)
    dq, rest = kernel.grad_query(x.q, x.k, x.v, x.do, x.log_decay, x.doc_ids, kept)
    dk, dv, dlog = kernel.grad_inputs(
        x.q, x.k, x.v, x.do, x.log_decay, x.doc_ids, x.dfinal, dblocks if with_blocks else [], kept, rest
    )
    found = {"state": state, "decay": decay, "o": o, "dentering": dinitial, "dq": dq, "dk": dk, "dv": dv}
    found["decay backwards"] = backwards
    if dlog is not None:
        found["dlog_decay"] = dlog
    return found if wanted else {name: x for name, x in found.items() if name not in STATES}


def error(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖; infinite where a is not finite. A norm below 1e-6 counts as zero, the rounding of what cancels."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp(min=1e-6)) if bool(torch.isfinite(a).all()) else float("inf")
