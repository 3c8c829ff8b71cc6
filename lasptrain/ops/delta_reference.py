"""The delta rule, token by token: the definition by which its other kernels are judged.

    S_t = (I − β_t k_t k_tᵀ) diag(a_t) S_{t-1} + β_t k_t v_tᵀ,    o_t = q_t S_t

The state decays first, then what is stored under the key is replaced. The backward functions walk the same recurrence
from the right. Signatures and shapes: `lasptrain.ops.delta_rule`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lasptrain.ops import state_dtype
from lasptrain.ops.reference import if_wanted, starts


def with_starts(v: Tensor, log_decay: Tensor | None, doc_ids: Tensor | None) -> Tensor:
    """Log decays [B, T, H, 1 or K] in the dtype of states, of values v [B, T, H, V]; −∞ where a document starts."""
    b, t, h, _ = v.shape
    dtype = state_dtype(v)
    if log_decay is None:
        log_decay = torch.zeros(h, dtype=dtype, device=v.device)
    each = log_decay.to(dtype)
    each = each if each.dim() == 4 else each.expand(b, t, h)[..., None]
    return each if doc_ids is None else each.masked_fill(starts(doc_ids)[..., None, None], float("-inf"))


def has_gradient(log_decay: Tensor | None) -> bool:
    """Return True if the decay is per token."""
    return log_decay is not None and log_decay.dim() > 1


def slice_decay(v: Tensor, log_decay: Tensor | None, doc_ids: Tensor | None) -> Tensor:
    """Decay of the whole slice, [B, H] or, of a decay per channel, [B, H, K]: Π a_t, zero where a document starts."""
    total = with_starts(v, log_decay, doc_ids).sum(1).exp()
    return total if log_decay is not None and log_decay.dim() == 4 else total[..., 0]


def linear_like(k: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None) -> Tensor:
    """An empty tensor of the shape of `linear`: [B, H], [B, H, K] or [B, H, K, K]."""
    b, _t, h, _v = v.shape
    kdim = k.shape[-1]
    if beta is not None:
        shape: tuple[int, ...] = (b, h, kdim, kdim)
    else:
        shape = (b, h, kdim) if log_decay is not None and log_decay.dim() == 4 else (b, h)
    return k.new_empty(shape, dtype=state_dtype(k))


def state_like(k: Tensor, v: Tensor) -> Tensor:
    """An empty state [B, H, K, V]."""
    return k.new_empty((v.shape[0], v.shape[2], k.shape[-1], v.shape[-1]), dtype=state_dtype(k))


def by_value_head(x: Tensor, heads: int) -> Tensor:
    """Repeat the key heads of x [B, T, Hk, ·] so that each of H value heads has its own: j reads j // (H / Hk)."""
    return x.repeat_interleave(heads // x.shape[2], dim=2)


def by_key_head(x: Tensor, heads: int) -> Tensor:
    """Sum the value heads of x [B, T, H, ·] that read the same of Hk key heads."""
    summed: Tensor = x.unflatten(2, (heads, -1)).sum(3)
    return summed


class Slice(NamedTuple):
    """A slice in the dtype of states, with one key head per value head."""

    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, H, V]
    beta: Tensor | None  # [B, T, H, 1]; None: nothing is erased
    decay: Tensor  # [B, T, H, 1 or K], a

    @classmethod
    def of(cls, k: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None, doc_ids: Tensor | None) -> Slice:
        dtype = state_dtype(k)
        decay = with_starts(v, log_decay, doc_ids).exp()
        beta = None if beta is None else beta.to(dtype)[..., None]
        return cls(by_value_head(k.to(dtype), v.shape[2]), v.to(dtype), beta, decay)

    def read(self, i: int, state: Tensor) -> tuple[Tensor, Tensor]:
        """The decayed state that token i finds, and how far its value is from what is stored under its key."""
        decayed = self.decay[:, i, ..., None] * state
        if self.beta is None:
            return decayed, self.v[:, i]
        return decayed, self.v[:, i] - torch.einsum("bhk,bhkv->bhv", self.k[:, i], decayed)

    def step(self, i: int, state: Tensor) -> Tensor:
        """The state behind token i."""
        decayed, wrote = self.read(i, state)
        wrote = wrote if self.beta is None else self.beta[:, i] * wrote
        return decayed + self.k[:, i, :, :, None] * wrote[:, :, None, :]

    def states(self, initial_state: Tensor | None) -> list[Tensor]:
        """The T + 1 states between tokens, the initial one first."""
        state = state_like(self.k, self.v).zero_() if initial_state is None else initial_state.to(self.k.dtype)
        states = [state]
        for i in range(self.v.shape[1]):
            states.append(self.step(i, states[-1]))
        return states


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    doc_ids: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return outputs [B, T, H, V] (at least fp32) and the final state; differentiable in every floating argument."""
    states = Slice.of(k, v, beta, log_decay, doc_ids).states(initial_state)
    q = by_value_head(q.to(states[0].dtype), v.shape[2])
    return torch.einsum("bthk,bthkv->bthv", q, torch.stack(states[1:], dim=1)), states[-1]


def blocks_like(k: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None, wanted: int) -> list[Tensor]:
    """`blocks` of `summarize`: none."""
    return []


def kept_like(q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None) -> list[Tensor]:
    """`kept` of `attend`: the initial state."""
    return [state_like(k, v)]


def dblocks_like(q: Tensor, do: Tensor, beta: Tensor | None, log_decay: Tensor | None, wanted: int) -> list[Tensor]:
    """`dblocks` of `grad_initial_state`: none."""
    return []


def rest_like(q: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None) -> list[Tensor]:
    """`rest` of `grad_query`: none."""
    return []


def _linear(k: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None, doc_ids: Tensor | None) -> Tensor:
    """The slice's map on states: of a matrix, the final state of the identity if nothing is written."""
    if beta is None:
        return slice_decay(v, log_decay, doc_ids)
    h, kdim = v.shape[2], k.shape[-1]
    identity = torch.eye(kdim, dtype=state_dtype(k), device=k.device).expand(k.shape[0], h, kdim, kdim)
    nothing = k.new_zeros(*v.shape[:3], kdim)
    return Slice.of(k, nothing, beta, log_decay, doc_ids).states(identity)[-1]


def summarize(
    k: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None, doc_ids: Tensor | None, wanted: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    state, linear = state_like(k, v), linear_like(k, v, beta, log_decay)
    state = Slice.of(k, v, beta, log_decay, doc_ids).states(None)[-1] if wanted else if_wanted(state, False)
    linear = _linear(k, v, beta, log_decay, doc_ids) if wanted == 2 else if_wanted(linear, False)
    return state, linear, []


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    doc_ids: Tensor | None,
    initial_state: Tensor | None,
    blocks: list[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    o, _ = recurrence(q, k, v, beta, log_decay, doc_ids, initial_state)
    kept = state_like(k, v).zero_()
    return o.to(v.dtype), [kept if initial_state is None else kept.copy_(initial_state)]


class Gradients(NamedTuple):
    """Gradients of a slice in the dtype of states, by value head."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbeta: Tensor  # [B, T, H, 1]
    dlog: Tensor  # [B, T, H, 1 or K]
    dinitial: Tensor


def _gradients(q: Tensor, do: Tensor, x: Slice, initial_state: Tensor | None, dfinal: Tensor | None) -> Gradients:
    """Walk from the last token to the first; `grad` is the gradient of the state behind a token."""
    dtype = x.k.dtype
    q, do = by_value_head(q.to(dtype), x.v.shape[2]), do.to(dtype)
    states = x.states(initial_state)
    dq, dk, dv, dbeta, dlog = (torch.empty_like(y) for y in (q, x.k, x.v, x.v[..., :1], x.decay))
    grad = torch.zeros_like(states[0]) if dfinal is None else dfinal.to(dtype)
    for i in reversed(range(x.v.shape[1])):
        grad = grad + q[:, i, :, :, None] * do[:, i, :, None, :]
        dq[:, i] = torch.einsum("bhv,bhkv->bhk", do[:, i], states[i + 1])
        decayed, missing = x.read(i, states[i])
        dwrote = torch.einsum("bhk,bhkv->bhv", x.k[:, i], grad)
        if x.beta is None:
            dk[:, i] = torch.einsum("bhv,bhkv->bhk", missing, grad)
            dv[:, i] = dwrote
        else:
            dbeta[:, i] = (dwrote * missing).sum(-1, keepdim=True)
            dv[:, i] = x.beta[:, i] * dwrote
            dk[:, i] = torch.einsum("bhv,bhkv->bhk", x.beta[:, i] * missing, grad)
            dk[:, i] -= torch.einsum("bhv,bhkv->bhk", dv[:, i], decayed)
            grad = grad - x.k[:, i, :, :, None] * dv[:, i, :, None, :]
        flow = (grad * decayed).sum(-1)
        dlog[:, i] = flow if x.decay.shape[-1] > 1 else flow.sum(-1, keepdim=True)
        grad = x.decay[:, i, ..., None] * grad
    return Gradients(dq, dk, dv, dbeta, dlog, grad)


def grad_initial_state(
    q: Tensor,
    do: Tensor,
    k: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    doc_ids: Tensor | None,
    kept: list[Tensor],
    wanted: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    dinitial, linear = state_like(k, do), linear_like(k, do, beta, log_decay)
    if wanted:
        x = Slice.of(k, torch.zeros_like(do), beta, log_decay, doc_ids)
        dinitial = _gradients(q, do, x, None, None).dinitial
    linear = _linear(k, do, beta, log_decay, doc_ids) if wanted == 2 else if_wanted(linear, False)
    return if_wanted(dinitial, wanted > 0), linear, []


def grad_query(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    doc_ids: Tensor | None,
    kept: list[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    states = Slice.of(k, v, beta, log_decay, doc_ids).states(kept[0])
    dq = torch.einsum("bthv,bthkv->bthk", do.to(states[0].dtype), torch.stack(states[1:], dim=1))
    return by_key_head(dq, q.shape[2]).to(q.dtype), []


def grad_inputs(
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
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    found = _gradients(q, do, Slice.of(k, v, beta, log_decay, doc_ids), kept[0], dfinal)
    dbeta = None if beta is None else found.dbeta[..., 0].to(beta.dtype)
    dlog = None
    if log_decay is not None and has_gradient(log_decay):
        dlog = (found.dlog if log_decay.dim() == 4 else found.dlog[..., 0]).to(log_decay.dtype)
    return by_key_head(found.dk, k.shape[2]).to(k.dtype), found.dv.to(v.dtype), dbeta, dlog
