"""Linear attention as a function, for programs that have their own models."""

from __future__ import annotations

import torch
from torch import Tensor

from lasptrain.ops import decay_rule, select, state_dtype
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.parallel.shapes import check


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    doc_ids: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    output_final_state: bool = False,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Return o [B, T, H, V] of `S_t = a_t S_{t-1} + k_tᵀ v_t`, `o_t = q_t S_t`, and S_T if `output_final_state`.

    Differentiable in every floating argument and in both results. Checking log decays waits for the device;
    `ShardedRecurrence` does not, and runs over ranks.

    Args:
        q, k: [B, T, H, K].
        v: [B, T, H, V], in the dtype of q and k.
        log_decay: log a, −∞ to 0: a number per head [H] or per head and token [B, T, H]; None: nothing decays.
        doc_ids: [B, T] int32 or int64, documents that have started up to and including a token; document 0 goes on
            from the initial state. None: all is document 0.
        initial_state: S_0 [B, H, K, V], at least fp32; None is zero.
        kernel: auto, reference, chunked or triton, which needs a GPU.

    Raises:
        ValueError: for shapes, dtypes, devices or log decays that do not fit.
    """
    if kernel != "auto" and kernel not in decay_rule.MODULES:
        raise ValueError(f"kernel: expected auto, {', '.join(decay_rule.MODULES)}, found {kernel}")
    if kernel == "triton" and not q.is_cuda:
        raise ValueError(f"kernel: triton needs a CUDA device, found {q.device}; use chunked or auto")
    _check(q, k, v, log_decay, doc_ids, initial_state)
    if log_decay is not None and log_decay.dim() == 1 and log_decay.requires_grad:
        log_decay = log_decay.expand(*k.shape[:3])  # kernels have gradients of a decay per token only
    recurrence = ShardedRecurrence(select(kernel, q.device))
    numbers = None if doc_ids is None else doc_ids.to(torch.int32)
    pending = recurrence.begin((k, v, log_decay), numbers, carry=initial_state, output_final_state=output_final_state)
    return recurrence.finish(pending, q)


def _check(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, doc_ids: Tensor | None, initial_state: Tensor | None
) -> None:
    if q.dim() != 4 or 0 in q.shape:
        raise ValueError(f"q: expected [B, T, H, K], none of them 0, found {list(q.shape)}")
    if not q.dtype.is_floating_point:
        raise ValueError(f"q: expected a floating dtype, found {q.dtype}")
    b, t, h, key_dim = q.shape
    check("k", k, (b, t, h, key_dim))
    if v.dim() != 4 or v.shape[:3] != (b, t, h) or not v.shape[3]:
        raise ValueError(f"v: expected [{b}, {t}, {h}, V], found {list(v.shape)}")
    _check_kind("k", k, q, q.dtype)
    _check_kind("v", v, q, q.dtype)
    if doc_ids is not None:
        check("doc_ids", doc_ids, (b, t))
        _check_kind("doc_ids", doc_ids, q, torch.int32, torch.int64)
    if initial_state is not None:
        check("initial_state", initial_state, (b, h, key_dim, v.shape[3]))
        _check_kind("initial_state", initial_state, q, state_dtype(q))
    if log_decay is not None:
        if log_decay.shape != (h,):
            check("log_decay", log_decay, (b, t, h))
        _check_kind("log_decay", log_decay, q, torch.float32, torch.float64, q.dtype)
        _check_sign(log_decay)


def _check_kind(name: str, x: Tensor, beside: Tensor, *dtypes: torch.dtype) -> None:
    if x.dtype not in dtypes:
        raise ValueError(f"{name}: expected {' or '.join(map(str, dict.fromkeys(dtypes)))}, found {x.dtype}")
    if x.device != beside.device:
        raise ValueError(f"{name}: expected on {beside.device} beside q, found on {x.device}")


def _check_sign(log_decay: Tensor) -> None:
    """Raise ValueError for the first log decay that is positive or NaN."""
    wrong = ~(log_decay <= 0)
    if wrong.any():
        at = wrong.nonzero()[0].tolist()
        raise ValueError(f"log_decay{at}: expected at most 0, found {log_decay[tuple(at)].item():g}")
