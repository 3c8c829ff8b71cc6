"""The delta rule, `S_t = (I − β_t k_t k_tᵀ) diag(a_t) S_{t-1} + β_t k_t v_tᵀ`, `o_t = q_t S_t`: a `Recurrence` of
k, v, β and log decays. The state decays; then what is stored under the key is replaced by the value, to a share of β.

| input | shape, dtype | meaning |
|---|---|---|
| `k` | [B, T, Hk, K] | keys, of length one or less; value head j has key head j // (H / Hk) |
| `v` | [B, T, H, V] | values; H a multiple of Hk |
| `beta` | None or [B, T, H] | nothing is erased, `S_t = diag(a_t) S_{t-1} + k_t v_tᵀ` · share replaced, 0 to 2 |
| `log_decay` | None or [H] | no decay · constant, no gradient |
| | [B, T, H] or [B, T, H, K] | −∞ to 0, with gradient: per token · per token and key channel |

A log decay of −∞, after which nothing is left of what came before, has a gradient of 0; the start of a document is such
a decay. A slice's transition `linear` acts on states from the left: [B, H, K, K] where something is erased, else
[B, H, K] of decays per channel, else [B, H]. Gradients have the dtypes of their inputs, states and sums at least fp32.

A kernel's module offers the operators below without `kernel`, and says by `blocks_like`, `kept_like`, `dblocks_like`
and `rest_like` what its lists hold: `delta_reference`, the definition; `delta_chunked`, plain PyTorch;
`delta_triton`, for GPUs, of β and a decay per head. What is not wanted is filled with NaN, and not computed.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TypeAlias, cast

import torch
from torch import Tensor

from lasptrain.ops import fake, operator
from lasptrain.ops.delta_reference import has_gradient, linear_like, state_like
from lasptrain.ops.recurrence import Gates, Inputs

MODULES = {"reference": "delta_reference", "chunked": "delta_chunked", "triton": "delta_triton"}
Given: TypeAlias = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
Summary: TypeAlias = tuple[Tensor, Tensor, list[Tensor]]
Kept: TypeAlias = tuple[Tensor, list[Tensor]]


def _module(kernel: str) -> ModuleType:
    """Import a kernel's module on first use, because Triton is not available everywhere."""
    return import_module(f"lasptrain.ops.{MODULES[kernel]}")


@operator
def _delta_summarize(
    kernel: str,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    doc_ids: Tensor | None,
    wanted: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    state, linear, blocks = _module(kernel).summarize(k, v, beta, log_decay, doc_ids, wanted)
    return state, linear, blocks


@operator
def _delta_attend(
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    doc_ids: Tensor | None,
    initial_state: Tensor | None,
    blocks: list[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    o, kept = _module(kernel).attend(q, k, v, beta, log_decay, doc_ids, initial_state, blocks)
    return o, kept


@operator
def _delta_grad_initial_state(
    kernel: str,
    q: Tensor,
    do: Tensor,
    k: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    doc_ids: Tensor | None,
    kept: list[Tensor],
    wanted: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    dinitial, linear, dblocks = _module(kernel).grad_initial_state(q, do, k, beta, log_decay, doc_ids, kept, wanted)
    return dinitial, linear, dblocks


@operator
def _delta_grad_query(
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    doc_ids: Tensor | None,
    kept: list[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    dq, rest = _module(kernel).grad_query(q, k, v, do, beta, log_decay, doc_ids, kept)
    return dq, rest


@operator
def _delta_grad_inputs(
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    doc_ids: Tensor | None,
    dfinal: Tensor | None,
    dblocks: list[Tensor],
    kept: list[Tensor],
    rest: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of inputs that have none are empty: an operator always returns tensors."""
    dk, dv, *others = _module(kernel).grad_inputs(q, k, v, do, beta, log_decay, doc_ids, dfinal, dblocks, kept, rest)
    dbeta, dlog = (dk.new_empty(0) if x is None else x for x in others)
    return dk, dv, dbeta, dlog


@fake("delta_summarize")
def _(
    kernel: str,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    doc_ids: Tensor | None,
    wanted: int,
) -> Summary:
    blocks = _module(kernel).blocks_like(k, v, beta, log_decay, wanted)
    return state_like(k, v), linear_like(k, v, beta, log_decay), blocks


@fake("delta_attend")
def _(kernel: str, q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None, *_: object) -> Kept:
    return _like(v), _module(kernel).kept_like(q, k, v, beta, log_decay)


@fake("delta_grad_initial_state")
def _(
    kernel: str,
    q: Tensor,
    do: Tensor,
    k: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    doc_ids: Tensor | None,
    kept: list[Tensor],
    wanted: int,
) -> Summary:
    dblocks = _module(kernel).dblocks_like(q, do, beta, log_decay, wanted)
    return state_like(k, do), linear_like(k, do, beta, log_decay), dblocks


@fake("delta_grad_query")
def _(
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    *_: object,
) -> Kept:
    return _like(q), _module(kernel).rest_like(q, v, beta, log_decay)


@fake("delta_grad_inputs")
def _(
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dlog = log_decay if has_gradient(log_decay) else None
    dbeta, dlog = (k.new_empty(0) if x is None else _like(x) for x in (beta, dlog))
    return _like(k), _like(v), dbeta, dlog


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


ATTEND = _delta_attend  # the operator whose results are kept where activations are selectively recomputed


def _given(inputs: Inputs) -> Given:
    """Return k, v, beta and the log decay. Raises ValueError for shapes that do not fit each other."""
    k, v, beta, log_decay = cast(Given, inputs)
    key_heads, heads = k.shape[2], v.shape[2]
    if heads % key_heads:
        below = heads // key_heads * key_heads
        nearest = ", ".join(str(count) for count in (below, below + key_heads) if count)
        raise ValueError(f"v: {heads} heads are no multiple of the {key_heads} of k; nearest: {nearest}")
    if beta is not None and beta.shape != v.shape[:3]:
        raise ValueError(f"beta: expected {list(v.shape[:3])}, found {list(beta.shape)}")
    if log_decay is not None and log_decay.shape not in ((heads,), v.shape[:3], (*v.shape[:3], k.shape[-1])):
        raise ValueError(f"log_decay: expected [H], [B, T, H] or [B, T, H, K], found {list(log_decay.shape)}")
    return k, v, beta, log_decay


def gates(inputs: Inputs) -> Gates:
    return Gates(inputs[3], inputs[2])


def summarize(kernel: str, inputs: Inputs, doc_ids: Tensor | None, wanted: int) -> Summary:
    """Return the final state of a slice that starts from zero, `linear` and `blocks`."""
    return _delta_summarize(kernel, *_given(inputs), doc_ids, wanted)


def attend(
    kernel: str,
    q: Tensor,
    inputs: Inputs,
    doc_ids: Tensor | None,
    initial_state: Tensor | None,
    blocks: list[Tensor],
) -> Kept:
    """Return the output [B, T, H, V] in the dtype of v, and `kept`."""
    return _delta_attend(kernel, q, *_given(inputs), doc_ids, initial_state, blocks)


def grad_initial_state(
    kernel: str, q: Tensor, do: Tensor, inputs: Inputs, doc_ids: Tensor | None, kept: list[Tensor], wanted: int
) -> Summary:
    """Return the gradient of the initial state from this slice's outputs alone, `linear` and `dblocks`."""
    k, _, beta, log_decay = _given(inputs)
    return _delta_grad_initial_state(kernel, q, do, k, beta, log_decay, doc_ids, kept, wanted)


def grad_query(kernel: str, q: Tensor, inputs: Inputs, do: Tensor, doc_ids: Tensor | None, kept: list[Tensor]) -> Kept:
    """Return dq and `rest`."""
    k, v, beta, log_decay = _given(inputs)
    return _delta_grad_query(kernel, q, k, v, do, beta, log_decay, doc_ids, kept)


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
    """Return a gradient for each input; None where it has none."""
    k, v, beta, log_decay = _given(inputs)
    dk, dv, dbeta, dlog = _delta_grad_inputs(kernel, q, k, v, do, beta, log_decay, doc_ids, dfinal, dblocks, kept, rest)
    return dk, dv, (None if beta is None else dbeta), (dlog if has_gradient(log_decay) else None)
