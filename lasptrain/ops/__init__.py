"""Everything that depends on the processor: recurrences by several kernels, softmax, cross-entropy.

Letters used in every shape of this project: B batch, T tokens in the slice, H heads, K key dim, V value dim, D model
dim, C tokens of a chunk (channels, where rows are convolved, gathered or carried), N window; n chunks of a slice (rows
before it, in a convolution or halo), NB blocks of a slice, L tokens of a block; J keys and G key heads of softmax.

Arguments common to the recurrences:

| name | shape, dtype | meaning |
|---|---|---|
| `q`, `k` | [B, T, H, K] | |
| `v`, `do` | [B, T, H, V] | values · gradient of the output |
| `doc_ids` | None or [B, T] int32 | number of documents that have started in the slice up to and including t |
| `initial_state`, `final_state` | [B, H, K, V] | states, at least fp32 |

A document boundary is a decay of zero: only document 0, which continues from the left, reads the initial state, and
only the last one writes the final state.

A recurrence (`recurrence.py`) is five functions over operators registered with PyTorch, so that selective activation
checkpointing and `torch.compile` treat each as one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeGuard, TypeVar

import torch
from torch import Tensor
from torch.library import Library, infer_schema, register_fake

from lasptrain.errors import SetupError

LIBRARY = Library("lasptrain", "FRAGMENT")

P = ParamSpec("P")
R = TypeVar("R")


KERNELS = ("triton", "chunked", "reference")  # the fastest first


def select(name: str, device: torch.device, kernels: Sequence[str] = KERNELS) -> str:
    """Return the kernel, of those that a model has, that `train.kernel: name` stands for on this device.

    Raises SetupError where it cannot run.
    """
    other = not_for_triton(device)
    if name == "auto":
        return next(kernel for kernel in kernels if kernel != "triton" or other is None)
    if name == "triton" and other:
        raise SetupError(f"train.kernel: triton needs an NVIDIA GPU, found {other}; use chunked or auto")
    return name


def not_for_triton(device: torch.device) -> str | None:
    """Return a device's name if the Triton kernels are not for it: they are for GPUs of NVIDIA."""
    if device.type != "cuda":
        return device.type
    return "one of AMD" if torch.version.hip else None


def state_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of states and accumulation for inputs like x: at least fp32."""
    return torch.promote_types(x.dtype, torch.float32)


def per_token(log_decay: Tensor | None) -> TypeGuard[Tensor]:
    """Return True if the decay is per head and token, and so has a gradient."""
    return log_decay is not None and log_decay.dim() == 3


def operator(function: Callable[P, R]) -> Callable[P, R]:
    """Register a function as a PyTorch operator of its name, less a leading underscore.

    Not by `torch.library.custom_op`, whose checks outlast a kernel launch.
    """
    name = function.__name__.removeprefix("_")
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
