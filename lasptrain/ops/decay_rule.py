"""Linear attention with decay, `S_t = a_t S_{t-1} + k_tᵀ v_t`, `o_t = q_t S_t`: a `Recurrence` of k, v and log decays.

| input | shape, dtype | meaning |
|---|---|---|
| `k`, `v` | [B, T, H, K], [B, T, H, V] | keys, values |
| `log_decay` | None, [H] or [B, T, H] fp32, −∞ to 0 | no decay · constant, no gradient · per token, with gradient |

A log decay of −∞, after which nothing is left of what came before, has a gradient of 0. A slice's transition is its
decay, a number per head. A kernel's module offers the operators below without `kernel`: `reference`, the definition;
`chunked`, plain PyTorch; `triton_launch`. Its lists hold the states at the edges of its blocks (`blocks`, `kept`,
`dblocks`) and sums per token where the decay is (`rest`).
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from lasptrain.ops import fake, operator, per_token, state_dtype
from lasptrain.ops.recurrence import Gates, Inputs

MODULES = {"reference": "reference", "chunked": "chunked", "triton": "triton_launch"}
Given = tuple[Tensor, Tensor, Tensor | None]


@cache
def _module(kernel: str) -> ModuleType:
    """Import a kernel's module on first use, because Triton is not available everywhere."""
    return import_module(f"lasptrain.ops.{MODULES[kernel]}")


@operator
def _summarize(
    kernel: str, k: Tensor, v: Tensor, log_decay: Tensor | None, doc_ids: Tensor | None, wanted: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    state, decay, blocks = _module(kernel).summarize(k, v, log_decay, doc_ids, wanted)
    return state, decay, blocks


@operator
def _attend(
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    doc_ids: Tensor | None,
    initial_state: Tensor | None,
    blocks: list[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    o, kept = _module(kernel).attend(q, k, v, log_decay, doc_ids, initial_state, blocks)
    return o, kept


@operator
def _grad_initial_state(
    kernel: str, q: Tensor, do: Tensor, log_decay: Tensor | None, doc_ids: Tensor | None, wanted: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    dinitial, decay, dblocks = _module(kernel).grad_initial_state(q, do, log_decay, doc_ids, wanted)
    return dinitial, decay, dblocks


@operator
def _grad_query(
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    log_decay: Tensor | None,
    doc_ids: Tensor | None,
    kept: list[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    dq, rest = _module(kernel).grad_query(q, k, v, do, log_decay, doc_ids, kept)
    return dq, rest


@operator
def _grad_inputs(
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    log_decay: Tensor | None,
    doc_ids: Tensor | None,
    dfinal: Tensor | None,
    dblocks: list[Tensor],
    kept: list[Tensor],
    rest: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of a log decay that is not per token is empty: an operator always returns a tensor."""
    dk, dv, dlog = _module(kernel).grad_inputs(q, k, v, do, log_decay, doc_ids, dfinal, dblocks, kept, rest)
    return dk, dv, (dk.new_empty(0) if dlog is None else dlog)


@fake("summarize")
def _(
    kernel: str, k: Tensor, v: Tensor, log_decay: Tensor | None, doc_ids: Tensor | None, wanted: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return _summary(kernel, k, v)


@fake("attend")
def _(kernel: str, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, list[Tensor]]:
    blocks = q.new_empty(_module(kernel).block_shape(k, v), dtype=state_dtype(q))
    return _like(v), [blocks]


@fake("grad_initial_state")
def _(
    kernel: str, q: Tensor, do: Tensor, log_decay: Tensor | None, doc_ids: Tensor | None, wanted: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return _summary(kernel, q, do)


@fake("grad_query")
def _(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, do: Tensor, log_decay: Tensor | None, *_: object
) -> tuple[Tensor, list[Tensor]]:
    if not per_token(log_decay):
        return _like(q), []
    return _like(q), [q.new_empty(_module(kernel).sums_shape(k, v), dtype=state_dtype(q))]


@fake("grad_inputs")
def _(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, do: Tensor, log_decay: Tensor | None, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    dlog = k.new_empty(k.shape[:3], dtype=state_dtype(k)) if per_token(log_decay) else k.new_empty(0)
    return _like(k), _like(v), dlog


def _summary(kernel: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return a state, a decay and blocks made of x [B, T, H, K] and y [B, T, H, V], without data."""
    b, _, h, kdim = x.shape
    dtype = state_dtype(x)
    state, decay = x.new_empty((b, h, kdim, y.shape[-1]), dtype=dtype), x.new_empty((b, h), dtype=dtype)
    return state, decay, [x.new_empty(_module(kernel).block_shape(x, y), dtype=dtype)]


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _given(inputs: Inputs) -> Given:
    """Return k, v and the log decay. Raises ValueError for what only another recurrence takes."""
    k, v, log_decay = cast(Given, inputs)
    if k.size(2) != v.size(2):
        raise ValueError(f"v: expected {k.size(2)} heads as in k, found {v.size(2)}")
    if log_decay is not None and log_decay.dim() not in (1, 3):
        raise ValueError(f"log_decay: expected [H] or [B, T, H], found {list(log_decay.shape)}")
    return k, v, log_decay


def gates(inputs: Inputs) -> Gates:
    return Gates(inputs[2])


ATTEND = _attend  # the operator whose results are kept where activations are selectively recomputed


def summarize(kernel: str, inputs: Inputs, doc_ids: Tensor | None, wanted: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    return _summarize(kernel, *_given(inputs), doc_ids, wanted)


def attend(
    kernel: str,
    q: Tensor,
    inputs: Inputs,
    doc_ids: Tensor | None,
    initial_state: Tensor | None,
    blocks: list[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    return _attend(kernel, q, *_given(inputs), doc_ids, initial_state, blocks)


def grad_initial_state(
    kernel: str, q: Tensor, do: Tensor, inputs: Inputs, doc_ids: Tensor | None, kept: list[Tensor], wanted: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return _grad_initial_state(kernel, q, do, inputs[2], doc_ids, wanted)


def grad_query(
    kernel: str, q: Tensor, inputs: Inputs, do: Tensor, doc_ids: Tensor | None, kept: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    k, v, log_decay = cast(Given, inputs)
    return _grad_query(kernel, q, k, v, do, log_decay, doc_ids, kept)


def grad_inputs(
    kernel: str,
    q: Tensor,
    inputs: Inputs,
    do: Tensor,
    doc_ids: Tensor | None,
    dfinal: Tensor | None,
    dblocks: list[Tensor],
    kept: list[Tensor],
    rest: list[Tensor],
) -> Inputs:
    k, v, log_decay = cast(Given, inputs)
    dk, dv, dlog = _grad_inputs(kernel, q, k, v, do, log_decay, doc_ids, dfinal, dblocks, kept, rest)
    return dk, dv, (dlog if per_token(log_decay) else None)
