"""Linear attention with decay on one device: `S_t = a_t S_{t-1} + k_tᵀ v_t`, `o_t = q_t S_t`.

Letters used in every shape of this project: B batch, T tokens in the slice, H heads, K key dim, V value dim, D model
dim, C tokens of a chunk (channels, where rows are convolved, gathered or carried), N window; n chunks of a slice (rows
before it, in a convolution or halo), NB blocks of a slice, L tokens of a block; J keys and G key heads of softmax.

Arguments common to the five functions below, which every kernel offers:

| name | shape, dtype | meaning |
|---|---|---|
| `q`, `k` | [B, T, H, K] | |
| `v`, `do` | [B, T, H, V] | values · gradient of the output |
| `log_decay` | None, [H] or [B, T, H] fp32, −∞ to 0 | no decay · constant, no gradient · per token, with gradient |
| `doc_ids` | None or [B, T] int32 | number of documents that have started in the slice up to and including t |
| `initial_state`, `final_state` | [B, H, K, V] | states, at least fp32 |

A log decay of −∞, after which nothing is left of what came before, has a gradient of 0. A document boundary is such a
decay: only document 0, which continues from the left, reads the initial state, and only the last one writes the final
state. `blocks`, `prefix` and `row` are a kernel's own intermediates, in a private layout: states at the edges of its
blocks and sums per token.

The functions are registered as PyTorch operators, so that selective activation checkpointing and `torch.compile` treat
each as one.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import ParamSpec, TypeGuard, TypeVar

import torch
from torch import Tensor
from torch.library import Library, infer_schema, register_fake

from lasptrain.errors import SetupError

MODULES = {"reference": "reference", "chunked": "chunked", "triton": "triton_launch"}

LIBRARY = Library("lasptrain", "FRAGMENT")

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]
P = ParamSpec("P")
R = TypeVar("R")


def select(name: str, device: torch.device) -> str:
    """Return the kernel that `train.kernel: name` stands for on this device. Raises SetupError where it cannot run."""
    if name == "auto":
        return "triton" if device.type == "cuda" else "chunked"
    if name == "triton" and device.type != "cuda":
        raise SetupError(f"train.kernel: triton needs a CUDA device, found {device.type}; use chunked or auto")
    return name


def state_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of states and accumulation for inputs like x: at least fp32."""
    return torch.promote_types(x.dtype, torch.float32)


def _module(kernel: str) -> ModuleType:
    """Import a kernel's module on first use, because Triton is not available everywhere."""
    return import_module(f"lasptrain.ops.{MODULES[kernel]}")


def per_token(log_decay: Tensor | None) -> TypeGuard[Tensor]:
    """Return True if the decay is per head and token, and so has a gradient."""
    return log_decay is not None and log_decay.dim() == 3


def operator(function: Callable[P, R]) -> Callable[P, R]:
    """Register a function as a PyTorch operator; the checks of `torch.library.custom_op` outlast a kernel launch."""
    name = function.__name__
    LIBRARY.define(name + infer_schema(function, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    registered: Callable[P, R] = getattr(torch.ops.lasptrain, name).default
    return registered


def fake(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register the fake of an operator: a function that returns outputs of the right shapes and dtypes without data."""

    def register(function: Callable[P, R]) -> Callable[P, R]:
        register_fake(f"lasptrain::{name}", function, lib=LIBRARY)
        return function

    return register


@operator
def summarize(
    kernel: str, k: Tensor, v: Tensor, log_decay: Tensor | None, doc_ids: Tensor | None, wanted: bool
) -> Triple:
    """Return the final state of the slice when it starts from zero, its decay [B, H], and its block states.

    The first two are undefined unless `wanted`.
    """
    state, decay, blocks = _module(kernel).summarize(k, v, log_decay, doc_ids, wanted)
    return state, decay, blocks


@operator
def attend(
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    doc_ids: Tensor | None,
    initial_state: Tensor | None,
    blocks: Tensor | None,
) -> Pair:
    """Return the output [B, T, H, V] in the dtype of `v`, and each block's initial state, which the backward needs."""
    o, prefix = _module(kernel).attend(q, k, v, log_decay, doc_ids, initial_state, blocks)
    return o, prefix


@operator
def grad_initial_state(
    kernel: str, q: Tensor, do: Tensor, log_decay: Tensor | None, doc_ids: Tensor | None, wanted: bool
) -> Pair:
    """Return the gradient of the initial state from this slice's outputs alone, and the slice's block states.

    The first is undefined unless `wanted`.
    """
    dinitial, dblocks = _module(kernel).grad_initial_state(q, do, log_decay, doc_ids, wanted)
    return dinitial, dblocks


@operator
def grad_query(
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    log_decay: Tensor | None,
    doc_ids: Tensor | None,
    prefix: Tensor,
) -> Pair:
    """Return `dq` and, where the decay is per token, the fp32 sums that its gradient needs (else empty)."""
    dq, row = _module(kernel).grad_query(q, k, v, do, log_decay, doc_ids, prefix)
    return dq, row


@operator
def grad_key_value(
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    log_decay: Tensor | None,
    doc_ids: Tensor | None,
    dfinal: Tensor | None,
    dblocks: Tensor | None,
    prefix: Tensor,
    row: Tensor,
) -> Triple:
    """Return `dk`, `dv`, and the gradient of a per-token `log_decay` [B, T, H] in fp32 (else empty)."""
    dk, dv, dlog = _module(kernel).grad_key_value(q, k, v, do, log_decay, doc_ids, dfinal, dblocks, prefix, row)
    return dk, dv, (row.new_empty(0) if dlog is None else dlog)


@fake("summarize")
def _(kernel: str, k: Tensor, v: Tensor, *_: object) -> Triple:
    b, _t, h, kdim = k.shape
    dtype = state_dtype(k)
    state, decay = k.new_empty((b, h, kdim, v.shape[-1]), dtype=dtype), k.new_empty((b, h), dtype=dtype)
    return state, decay, k.new_empty(_module(kernel).block_shape(k, v), dtype=dtype)


@fake("attend")
def _(kernel: str, q: Tensor, k: Tensor, v: Tensor, *_: object) -> Pair:
    blocks = q.new_empty(_module(kernel).block_shape(k, v), dtype=state_dtype(q))
    return torch.empty_like(v, memory_format=torch.contiguous_format), blocks


@fake("grad_initial_state")
def _(kernel: str, q: Tensor, do: Tensor, *_: object) -> Pair:
    b, _t, h, kdim = q.shape
    dtype = state_dtype(q)
    blocks = q.new_empty(_module(kernel).block_shape(q, do), dtype=dtype)
    return q.new_empty((b, h, kdim, do.shape[-1]), dtype=dtype), blocks


@fake("grad_query")
def _(kernel: str, q: Tensor, k: Tensor, v: Tensor, do: Tensor, log_decay: Tensor | None, *_: object) -> Pair:
    shape = _module(kernel).row_shape(k, v) if per_token(log_decay) else (0,)
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(shape, dtype=state_dtype(q))


@fake("grad_key_value")
def _(kernel: str, q: Tensor, k: Tensor, v: Tensor, do: Tensor, log_decay: Tensor | None, *_: object) -> Triple:
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    return dk, dv, q.new_empty(q.shape[:3] if per_token(log_decay) else (0,), dtype=state_dtype(q))
