"""The recurrence, token by token: the definition by which every other kernel is judged.

The backward functions walk the same recurrence from the right. Signatures and shapes: `lasptrain.ops.decay_rule`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lasptrain.ops import per_token, state_dtype


def starts(doc_ids: Tensor) -> Tensor:
    """Return True [B, T] where a token is the first of its document."""
    before = torch.cat([torch.zeros_like(doc_ids[:, :1]), doc_ids[:, :-1]], dim=1)
    return doc_ids != before


def token_decay(like: Tensor, log_decay: Tensor | None, doc_ids: Tensor | None) -> Tensor:
    """a_t [B, T, H] of `like` [B, T, H, ·]; 0 where a document starts."""
    b, t, h, _ = like.shape
    dtype = state_dtype(like)
    if log_decay is None:
        a = torch.ones(b, t, h, dtype=dtype, device=like.device)
    else:
        a = log_decay.to(dtype).exp().expand(b, t, h)
    return a if doc_ids is None else a.masked_fill(starts(doc_ids)[..., None], 0.0)


def slice_decay(k: Tensor, log_decay: Tensor | None, doc_ids: Tensor | None) -> Tensor:
    """Decay [B, H] of the whole slice k [B, T, H, K]: Π a_t, zero where a document starts inside."""
    b, t, h, _ = k.shape
    dtype = state_dtype(k)
    if log_decay is None:
        total = torch.zeros(b, h, dtype=dtype, device=k.device)
    else:
        total = log_decay.to(dtype).sum(1) if log_decay.dim() == 3 else (log_decay.to(dtype) * t).expand(b, h)
    decay = total.exp()
    return decay if doc_ids is None else torch.where(doc_ids[:, -1:] == 0, decay, 0.0)


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, doc_ids: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return outputs [B, T, H, V] (at least fp32) and the final state; differentiable in every floating argument."""
    b, t, h, kdim = k.shape
    dtype = state_dtype(k)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    a = token_decay(k, log_decay, doc_ids)
    state = k.new_zeros(b, h, kdim, v.shape[-1]) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for i in range(t):
        state = a[:, i, :, None, None] * state + k[:, i, :, :, None] * v[:, i, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, i], state))
    return torch.stack(outputs, dim=1), state


def if_wanted(x: Tensor, wanted: bool) -> Tensor:
    """Return x if wanted, else NaNs, so that an unwanted read shows."""
    return x if wanted else torch.full_like(x, float("nan"))


def block_shape(k: Tensor, v: Tensor) -> tuple[int, ...]:
    """Shape of the states in `blocks` and `kept`: the whole slice is one block."""
    b, _, h, kdim = k.shape
    return b, h, 1, kdim, v.shape[-1]


def sums_shape(k: Tensor, v: Tensor) -> tuple[int, ...]:
    """Shape of the sums in `rest` where the decay is per token."""
    return tuple(k.shape[:3])


def summarize(
    k: Tensor, v: Tensor, log_decay: Tensor | None, doc_ids: Tensor | None, wanted: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    _, state = recurrence(k, k, v, log_decay, doc_ids, None)
    return state, slice_decay(k, log_decay, doc_ids), [state[:, :, None].clone()]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    doc_ids: Tensor | None,
    initial_state: Tensor | None,
    blocks: list[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    o, _ = recurrence(q, k, v, log_decay, doc_ids, initial_state)
    prefix = torch.zeros(block_shape(k, v), dtype=o.dtype, device=o.device)
    if initial_state is not None:
        prefix[:, :, 0] = initial_state
    return o.to(v.dtype), [prefix]


def _gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    log_decay: Tensor | None,
    doc_ids: Tensor | None,
    initial_state: Tensor,
    dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, initial_state and log_decay; G_t = q_tᵀ do_t + a_{t+1} G_{t+1} is the gradient of S_t."""
    a = token_decay(k, log_decay, doc_ids)
    q, k, v, do, state = (x.to(a.dtype) for x in (q, k, v, do, initial_state))
    states = [state]
    for i in range(k.shape[1]):
        state = a[:, i, :, None, None] * state + k[:, i, :, :, None] * v[:, i, :, None, :]
        states.append(state)
    dq, dk, dv, dlog = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(a)
    grad = torch.zeros_like(state) if dfinal is None else dfinal.to(a.dtype)
    for i in reversed(range(k.shape[1])):
        grad = grad + q[:, i, :, :, None] * do[:, i, :, None, :]
        dq[:, i] = torch.einsum("bhv,bhkv->bhk", do[:, i], states[i + 1])
        dk[:, i] = torch.einsum("bhv,bhkv->bhk", v[:, i], grad)
        dv[:, i] = torch.einsum("bhk,bhkv->bhv", k[:, i], grad)
        grad = a[:, i, :, None, None] * grad
        dlog[:, i] = (grad * states[i]).sum((-1, -2))
    return dq, dk, dv, grad, dlog


def grad_initial_state(
    q: Tensor, do: Tensor, log_decay: Tensor | None, doc_ids: Tensor | None, wanted: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    zero = torch.zeros(block_shape(q, do), dtype=state_dtype(q), device=q.device)
    dinitial = _gradients(q, torch.zeros_like(q), torch.zeros_like(do), do, log_decay, doc_ids, zero[:, :, 0], None)[3]
    return dinitial, slice_decay(q, log_decay, doc_ids), [zero]


def grad_query(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, log_decay: Tensor | None, doc_ids: Tensor | None, kept: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    dq = _gradients(q, k, v, do, log_decay, doc_ids, kept[0][:, :, 0], None)[0]
    return dq.to(q.dtype), [(q * dq).sum(-1)] if per_token(log_decay) else []


def grad_inputs(
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
) -> tuple[Tensor, Tensor, Tensor | None]:
    _, dk, dv, _, dlog = _gradients(q, k, v, do, log_decay, doc_ids, kept[0][:, :, 0], dfinal)
    return dk.to(k.dtype), dv.to(v.dtype), dlog if per_token(log_decay) else None
