"""`ShardedRecurrence` knows nothing of a recurrence: one with matrices for transitions is the same on all ranks.

S_t = a (1 − β_t k_tᵀ k_t) S_{t−1} + a β_t k_tᵀ v_t, token by token, gradients by autograd; what is not wanted is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from lasptrain.ops.recurrence import Inputs, Recurrence
from lasptrain.ops.reference import starts
from lasptrain.parallel import mesh
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.parallel.scan import SCANS
from tests.support.gloo import spawn
from tests.support.kernel_cases import error

B, T, KEY_HEADS, H, K, V = 2, 6, 1, 2, 4, 3  # T of a slice


def walk(q: Tensor, inputs: Inputs, doc_ids: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and the final state."""
    k, v, beta = inputs
    assert k is not None and v is not None and beta is not None
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
    outputs = []
    for t in range(k.shape[1]):
        if doc_ids is not None:
            state = state * (~starts(doc_ids))[:, t, None, None, None]
        seen = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        written = beta[:, t, :, None] * (v[:, t] - seen)
        state = 0.95 * (state + k[:, t, :, :, None] * written[:, :, None])
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, 1), state


def gradients(
    q: Tensor, inputs: Inputs, doc_ids: Tensor | None, state: Tensor, do: Tensor, dfinal: Tensor
) -> list[Tensor]:
    """Those of q, the state and the inputs."""
    given = [q, state, *(x for x in inputs if x is not None)]
    with torch.enable_grad():
        q, state, *leaves = (x.detach().requires_grad_() for x in given)
        o, final_state = walk(q, tuple(leaves), doc_ids, state)
        return list(torch.autograd.grad([o, final_state], [q, state, *leaves], [do, dfinal]))


def zeros(inputs: Inputs, columns: int) -> Tensor:
    k, v, *_ = inputs
    assert k is not None and v is not None
    return k.new_zeros(k.shape[0], v.shape[2], k.shape[3], columns)


class Rule:
    def summarize(
        self, kernel: str, inputs: Inputs, doc_ids: Tensor | None, wanted: int
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        k, v, beta = inputs
        assert k is not None and v is not None
        _, state = walk(k, inputs, doc_ids, zeros(inputs, v.shape[3]))
        identity = torch.eye(k.shape[3]).to(k).expand_as(zeros(inputs, k.shape[3]))
        _, linear = walk(k, (k, v.new_zeros(*v.shape[:3], k.shape[3]), beta), doc_ids, identity)
        nan = float("nan")
        return state if wanted else state * nan, linear if wanted == 2 else linear * nan, [state]

    def attend(
        self,
        kernel: str,
        q: Tensor,
        inputs: Inputs,
        doc_ids: Tensor | None,
        initial_state: Tensor | None,
        blocks: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        state = zeros(inputs, V) if initial_state is None else initial_state
        return walk(q, inputs, doc_ids, state)[0], [state.clone()]

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
        linear = self.summarize(kernel, inputs, doc_ids, wanted)[1]
        dinitial = gradients(q, inputs, doc_ids, kept[0], do, torch.zeros_like(kept[0]))[1]
        return dinitial if wanted else dinitial * float("nan"), linear, []

    def grad_query(
        self, kernel: str, q: Tensor, inputs: Inputs, do: Tensor, doc_ids: Tensor | None, kept: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        return gradients(q, inputs, doc_ids, kept[0], do, torch.zeros_like(kept[0]))[0], [q + 1, q + 2]

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
        assert len(rest) == 2 and not dblocks
        dfinal = torch.zeros_like(kept[0]) if dfinal is None else dfinal
        return tuple(gradients(q, inputs, doc_ids, kept[0], do, dfinal)[2:])


def window(tokens: int) -> list[Tensor]:
    """q, k, v, beta and do; the same on every rank."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(B, tokens, *shape, generator=g, dtype=torch.float64)

    beta = torch.rand(B, tokens, H, generator=g, dtype=torch.float64) / 4  # little is forgotten
    q, k = normal(KEY_HEADS, K), F.normalize(normal(KEY_HEADS, K), dim=-1)
    return [q, k, normal(H, V), beta, normal(H, V)]


def run(
    recurrence: ShardedRecurrence, rule: Recurrence, parts: list[list[Tensor]], marks: Sequence[Tensor | None]
) -> list[Tensor]:
    """Output and gradients of a window in segments."""
    leaves = [[x.clone().requires_grad_() for x in part[:4]] for part in parts]
    outputs, carry = [], None
    for m, (q, *inputs) in enumerate(leaves):
        last = m + 1 == len(parts)
        pending = recurrence.begin(tuple(inputs), marks[m], rule=rule, carry=carry, output_final_state=not last)
        o, carry = recurrence.finish(pending, q)
        outputs.append(o)
    o = torch.cat(outputs, 1)
    grads = torch.autograd.grad(o, [x for part in leaves for x in part], torch.cat([part[4] for part in parts], 1))
    return [o.detach(), *(torch.cat(grads[i::4], 1) for i in range(4))]


def shared(rank: int, world: int) -> dict[str, float]:
    """The largest error by scan, segments and documents."""
    found = {}
    for name, segments, documents in product(SCANS, (1, 2), (False, True)):
        whole = window(T * world * segments)
        begun = torch.zeros(B, T * world * segments, dtype=torch.int32)
        begun[0, [8, 20] if segments == 2 else [8]] = 1
        numbers = begun.cumsum(1, dtype=torch.int32)

        def mine(x: Tensor, segments: int = segments) -> list[Tensor]:
            return [part.chunk(world, 1)[rank] for part in x.chunk(segments, 1)]

        parts = [list(part) for part in zip(*map(mine, whole), strict=True)]
        marks = [part.cumsum(1, dtype=torch.int32) if documents else None for part in mine(begun)]
        got = run(ShardedRecurrence("", SCANS[name](mesh.world(), torch.device("cpu"))), Rule(), parts, marks)
        want = run(ShardedRecurrence(""), Rule(), [whole], [numbers if documents else None])
        errors = [error(a, torch.cat(mine(b), 1)) for a, b in zip(got, want, strict=True)]
        found[f"{name}, {segments} segments, {documents=}"] = max(errors)
    return found


def test_a_recurrence_of_matrices_is_the_same_over_ranks_and_segments() -> None:
    for found in spawn(3, shared):
        assert len(found) == 12 and max(found.values()) < 1e-12, found
