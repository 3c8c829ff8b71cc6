"""S_t = A_t S_{t−1} + k_tᵀ v_t, o_t = q_t S_t, token by token in plain PyTorch, and its gradients by autograd.

The inputs are k, v and A: matrices [B, T, H, K, K] in `MATRIX`, a number per row [B, T, H, K] in `DIAGONAL`. Where a
document starts, A is zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lasptrain.ops import state_dtype
from lasptrain.ops.recurrence import Inputs


class Slow:
    """A `lasptrain.ops.recurrence.Recurrence` of matrices, or of a number per row. Every kernel is this one."""

    def __init__(self, *, matrix: bool):
        self.matrix = matrix

    def summarize(
        self, kernel: str, inputs: Inputs, doc_ids: Tensor | None, wanted: int
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        k, v, transition = _wide(inputs, doc_ids)
        state = self._outputs(k, k, v, transition, _zero(k, v))[1] if wanted else _zero(k, v) * math.nan
        return state, self._linear(transition, wanted), []

    def attend(
        self,
        kernel: str,
        q: Tensor,
        inputs: Inputs,
        doc_ids: Tensor | None,
        initial_state: Tensor | None,
        blocks: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        k, v, transition = _wide(inputs, doc_ids)
        entering = _zero(k, v) if initial_state is None else initial_state
        o, _ = self._outputs(q.to(k.dtype), k, v, transition, entering)
        return o.to(dtype=_given(inputs)[1].dtype), [entering.clone()]

    def grad_initial_state(
        self,
        kernel: str,
        q: Tensor,
        do: Tensor,
        inputs: Inputs,
        doc_ids: Tensor | None,
        kept: list[Tensor],
        wanted: int,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        *_, grad = self._gradients(q, inputs, do, doc_ids, None, kept)
        _, _, transition = _wide(inputs, doc_ids)
        return grad if wanted else grad * math.nan, self._linear(transition, wanted), []

    def grad_query(
        self, kernel: str, q: Tensor, inputs: Inputs, do: Tensor, doc_ids: Tensor | None, kept: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        return self._gradients(q, inputs, do, doc_ids, None, kept)[0], []

    def grad_inputs(
        self,
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
        return self._gradients(q, inputs, do, doc_ids, dfinal, kept)[1:4]

    def _times(self, transition: Tensor, state: Tensor) -> Tensor:
        return transition @ state if self.matrix else transition[..., None] * state

    def _outputs(self, q: Tensor, k: Tensor, v: Tensor, transition: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs [B, T, H, V] and the final state."""
        outputs = []
        for t in range(k.shape[1]):
            state = self._times(transition[:, t], state) + k[:, t, :, :, None] * v[:, t, :, None, :]
            outputs.append((q[:, t, :, None, :] @ state).squeeze(-2))
        return torch.stack(outputs, dim=1), state

    def _linear(self, transition: Tensor, wanted: int) -> Tensor:
        """Return the product of all transitions, the last one on the left; nothing that may be read unless asked."""
        if wanted < 2:
            return torch.full_like(transition[:, 0], math.nan)
        if not self.matrix:
            return transition.prod(1)
        product = transition[:, 0]
        for t in range(1, transition.shape[1]):
            product = transition[:, t] @ product
        return product

    def _gradients(
        self,
        q: Tensor,
        inputs: Inputs,
        do: Tensor,
        doc_ids: Tensor | None,
        dfinal: Tensor | None,
        kept: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """Return the gradients of q, k, v, A and the initial state."""
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, *_given(inputs), *kept)]
            k, v, transition = _wide(tuple(leaves[1:4]), doc_ids)
            o, final_state = self._outputs(leaves[0].to(k.dtype), k, v, transition, leaves[4])
        dfinal = torch.zeros_like(final_state) if dfinal is None else dfinal
        return torch.autograd.grad([o, final_state], leaves, [do.to(o.dtype), dfinal])


def _given(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    k, v, transition = inputs
    assert k is not None and v is not None and transition is not None
    return k, v, transition


def _wide(inputs: Inputs, doc_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return k, v and A in the dtype of states, A zero where a document starts."""
    k, v, transition = (x.to(state_dtype(x)) for x in _given(inputs))
    if doc_ids is not None:
        starts = doc_ids.diff(dim=1, prepend=torch.zeros_like(doc_ids[:, :1])) > 0
        transition = transition.masked_fill(starts[(..., *[None] * (transition.dim() - 2))], 0.0)
    return k, v, transition


def _zero(k: Tensor, v: Tensor) -> Tensor:
    """Return the state of nothing [B, H, K, V]."""
    b, _, h, width = k.shape
    return k.new_zeros(b, h, width, v.shape[-1])


MATRIX, DIAGONAL = Slow(matrix=True), Slow(matrix=False)
