"""Linear attention and the delta rule as functions, for programs that have their own models."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lasptrain.ops import KERNELS, decay_rule, not_for_triton, select, state_dtype
from lasptrain.ops import delta_rule as delta
from lasptrain.ops.recurrence import Inputs, Recurrence
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.parallel.shapes import check

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # of q, k and v


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

    Differentiable in every floating argument and in both results; computed as if there were no autocast. Checking log
    decays and documents waits for the device; `ShardedRecurrence` does not, and runs over ranks.

    Args:
        q, k: [B, T, H, K].
        v: [B, T, H, V], in the dtype of q and k.
        log_decay: log a, −∞ to 0: a number per head [H] or per head and token [B, T, H]; None: nothing decays.
        doc_ids: [B, T] int32 or int64, documents that have started up to and including a token; document 0 goes on
            from the initial state. None: all is document 0.
        initial_state: S_0 [B, H, K, V], at least fp32; None is zero.
        kernel: auto, reference, chunked or triton, which needs a GPU.

    Raises:
        ValueError: for shapes, dtypes, devices, log decays or numbers of documents that do not fit.
    """
    _check_tensors(q=q, k=k, v=v, log_decay=log_decay, doc_ids=doc_ids, initial_state=initial_state)
    _check(q, k, v, doc_ids, initial_state)
    _check_log_decay(log_decay, v, q)
    log_decay = _per_token(log_decay, v)
    kernel = _chosen(kernel, decay_rule.MODULES, q)
    return _run(decay_rule, kernel, q, (k, v, log_decay), doc_ids, initial_state, output_final_state)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    log_decay: Tensor | None = None,
    doc_ids: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    output_final_state: bool = False,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Return o of `S_t = (I − β_t k_t k_tᵀ) diag(a_t) S_{t-1} + β_t k_t v_tᵀ`, `o_t = q_t S_t`, and S_T if asked for.

    As `linear_attention`, but:

    Args:
        q, k: [B, T, H_k, K]; H is a multiple of H_k, and neighbouring heads of v share a key. Keys are to have length
            one or less, or states grow.
        beta: [B, T, H], 0 to 2, the share of what a key holds that is replaced; None: nothing is taken out and all is
            added (gated linear attention).
        log_decay: also per key channel, [B, T, H, K].

    Raises:
        ValueError: for shapes, dtypes, devices, log decays, beta or numbers of documents that do not fit.
    """
    _check_tensors(q=q, k=k, v=v, beta=beta, log_decay=log_decay, doc_ids=doc_ids, initial_state=initial_state)
    _check(q, k, v, doc_ids, initial_state, shared=True)
    _check_log_decay(log_decay, v, q, k.shape[3])
    if beta is not None:
        check("beta", beta, tuple(v.shape[:3]))
        _check_kind("beta", beta, q, torch.float32, torch.float64, q.dtype)
        _check_within("beta", beta, (beta >= 0) & (beta <= 2), "0 to 2")
    per_head = beta is not None and (log_decay is None or log_decay.dim() < 4)
    kernel = _chosen(kernel, [name for name in delta.MODULES if per_head or name != "triton"], q)
    inputs = k, v, beta, _per_token(log_decay, v)
    return _run(delta, kernel, q, inputs, doc_ids, initial_state, output_final_state)


def _run(
    rule: Recurrence,
    kernel: str,
    q: Tensor,
    inputs: Inputs,
    doc_ids: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Run a recurrence on one device. A compiler runs one with states as it is, in a graph of its own."""
    states = output_final_state or initial_state is not None
    if states and torch.compiler.is_compiling():
        run: Callable[..., tuple[Tensor, Tensor | None]] = torch.compiler.disable(_run)
        return run(rule, kernel, q, inputs, doc_ids, initial_state, output_final_state)
    recurrence = ShardedRecurrence(kernel)
    numbers = None if doc_ids is None else doc_ids.to(torch.int32)
    pending = recurrence.begin(inputs, numbers, rule=rule, carry=initial_state, output_final_state=output_final_state)
    return recurrence.finish(pending, q)


def _chosen(kernel: str, known: Iterable[str], q: Tensor) -> str:
    """Return the kernel to use, of those known. Raises ValueError for another, or one that needs another device."""
    kernels = [name for name in KERNELS if name in known]
    if kernel not in ("auto", *kernels):
        raise ValueError(f"kernel: expected auto, {', '.join(kernels)}, found {kernel}")
    if kernel == "triton" and (other := not_for_triton(q.device)):
        raise ValueError(f"kernel: triton needs an NVIDIA GPU, found {other}; use chunked or auto")
    return select(kernel, q.device, kernels)


def _per_token(log_decay: Tensor | None, v: Tensor) -> Tensor | None:
    """Return the log decay in a shape in which it has a gradient, if it wants one."""
    if log_decay is not None and log_decay.dim() == 1 and log_decay.requires_grad:
        return log_decay.expand(*v.shape[:3])
    return log_decay


def _check_tensors(**given: object) -> None:
    for name, x in given.items():
        if not isinstance(x, Tensor) and (x is not None or name in ("q", "k", "v")):
            raise ValueError(f"{name}: expected a tensor, found {type(x).__name__}")


def _check(
    q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None, initial_state: Tensor | None, *, shared: bool = False
) -> None:
    """Check shapes and kinds; `shared`: several heads of v may have one key head."""
    if q.dim() != 4 or 0 in q.shape:
        raise ValueError(f"q: expected [B, T, H, K], none of them 0, found {list(q.shape)}")
    if q.dtype not in DTYPES:
        raise ValueError(f"q: expected {', '.join(map(str, DTYPES[:-1]))} or {DTYPES[-1]}, found {q.dtype}")
    b, t, key_heads, key_dim = q.shape
    check("k", k, (b, t, key_heads, key_dim))
    heads = v.shape[2] if v.dim() == 4 and shared and v.shape[2] and v.shape[2] % key_heads == 0 else key_heads
    if v.dim() != 4 or v.shape[:3] != (b, t, heads) or not v.shape[3]:
        expected = f"[{b}, {t}, {key_heads}{' or a multiple' if shared else ''}, V]"
        raise ValueError(f"v: expected {expected}, found {list(v.shape)}")
    _check_kind("k", k, q, q.dtype)
    _check_kind("v", v, q, q.dtype)
    if doc_ids is not None:
        check("doc_ids", doc_ids, (b, t))
        _check_kind("doc_ids", doc_ids, q, torch.int32, torch.int64)
        before = torch.cat([torch.zeros_like(doc_ids[:, :1]), doc_ids[:, :-1]], dim=1)
        _check_within("doc_ids", doc_ids, doc_ids >= before, "numbers from 0 on that never fall")
    if initial_state is not None:
        check("initial_state", initial_state, (b, v.shape[2], key_dim, v.shape[3]))
        _check_kind("initial_state", initial_state, q, state_dtype(q))


def _check_log_decay(log_decay: Tensor | None, v: Tensor, q: Tensor, key_dim: int | None = None) -> None:
    """Check a log decay, which may be per key channel where there is a `key_dim`."""
    if log_decay is None:
        return
    b, t, h, _ = v.shape
    if log_decay.shape not in ((h,), (b, t, h, key_dim)):
        check("log_decay", log_decay, (b, t, h))
    _check_kind("log_decay", log_decay, q, torch.float32, torch.float64, q.dtype)
    _check_within("log_decay", log_decay, log_decay <= 0, "at most 0")


def _check_kind(name: str, x: Tensor, beside: Tensor, *dtypes: torch.dtype) -> None:
    if x.dtype not in dtypes:
        raise ValueError(f"{name}: expected {' or '.join(map(str, dict.fromkeys(dtypes)))}, found {x.dtype}")
    if x.device != beside.device:
        raise ValueError(f"{name}: expected on {beside.device} beside q, found on {x.device}")


def _check_within(name: str, x: Tensor, fits: Tensor, expected: str) -> None:
    """Raise ValueError for the first number that does not fit, or is NaN."""
    if not fits.all():
        at = (~fits).nonzero()[0].tolist()
        raise ValueError(f"{name}{at}: expected {expected}, found {x[tuple(at)].item():.6g}")
