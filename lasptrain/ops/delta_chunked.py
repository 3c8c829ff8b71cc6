"""The chunkwise delta rule in plain PyTorch: matrix products inside chunks, a walk from chunk to chunk.

Fast enough to train with on a CPU. Of a chunk of C tokens, with the decays `lead` from its start to a token, `fold`
from a token to its end, `through` over all of it, and γ between two tokens (the UT transform of Yang et al.,
arXiv:2406.06484, with the decays of arXiv:2412.06464):

    A_tj = β_t ⟨k_t, γ_tj k_j⟩, j < t      P_tj = ⟨q_t, γ_tj k_j⟩, j ≤ t      T = (I + A)⁻¹
    U = T β (V − (lead K) S)               O = (lead Q) S + P U               S′ = through S + (fold K)ᵀ U

T is found by substitution: its entries are at most β for keys of length one, the powers of A are not bounded. The
backward walks the same chunks from the right, D′ being the gradient of S′:

    dU = Pᵀ dO + (fold K) D′               dR = Tᵀ dU                         D = through D′ + (lead Q)ᵀ dO + Eᵀ dU
    dV = β dR,  dβ and the rest of dK by the gradient of β K, in which A and E = −T β (lead K) are linear

so that U = T β V + E S and dU are written by one and the same walk. Signatures and shapes: `lasptrain.ops.delta_rule`;
below, N = B·H, and chunks of a slice are padded with tokens that change nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lasptrain.ops import state_dtype
from lasptrain.ops.delta_gates import gates
from lasptrain.ops.delta_reference import by_key_head, has_gradient, linear_like, slice_decay, state_like, with_starts
from lasptrain.ops.reference import if_wanted

CHUNK = 64


def _chunk_count(tokens: int) -> int:
    return (tokens + CHUNK - 1) // CHUNK


def _cut(x: Tensor, heads: int) -> Tensor:
    """Cut x [B, T, H or Hk, ·] → [B·H, n, C, ·], contiguous, at least fp32; may share memory with x."""
    b, t, own, width = x.shape
    n = _chunk_count(t)
    x = F.pad(x, (0, 0, 0, 0, 0, n * CHUNK - t)) if t % CHUNK else x
    x = x.reshape(b, n, CHUNK, own, 1, width).permute(0, 3, 4, 1, 2, 5).expand(-1, -1, heads // own, -1, -1, -1)
    return x.to(state_dtype(x)).reshape(b * heads, n, CHUNK, width).contiguous()


def _join(x: Tensor, like: Tensor) -> Tensor:
    """Join x [B·H, n, C, ·] → [B, T, H, ·] in the length and dtype of `like`, summed over what reads one key head."""
    b, t, heads, _ = like.shape
    x = x.unflatten(0, (b, -1)).permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :t]
    x = x if x.shape[2] == heads else by_key_head(x, heads)
    return x.to(like.dtype).contiguous()


class Walk(NamedTuple):
    """States, or their gradients, from chunk to chunk: X = inside + read·S, S′ = through·S + plus + writeᵀ·X.

    Nothing is read where nothing is erased: then X is `inside`, and `plus` has all of writeᵀ·X already.
    """

    through: Tensor  # [N, n, 1 or K, 1]
    plus: Tensor | None  # [N, n, K, V]
    inside: Tensor  # [N, n, C, V]
    read: Tensor | None  # [N, n, C, K]
    write: Tensor  # [N, n, C, K]

    def run(self, state: Tensor, order: Iterable[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return X, the states [N, n, K, V] that chunks met in this order, and the state behind the last."""
        wrote = self.inside if self.read is None else torch.empty_like(self.inside)
        states = state.new_empty(*self.inside.shape[:2], *state.shape[1:])
        for i in order:
            states[:, i] = state
            state = state * self.through[:, i]
            if self.plus is not None:
                state += self.plus[:, i]
            if self.read is not None:
                wrote[:, i] = torch.baddbmm(self.inside[:, i], self.read[:, i], states[:, i])
                state = torch.baddbmm(state, self.write[:, i].mT, wrote[:, i])
        return wrote, states, state

    def from_left(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.run(state, range(self.inside.shape[1]))

    def from_right(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.run(state, reversed(range(self.inside.shape[1])))

    def beside_identity(self) -> Walk:
        """The same walk of states [N, K, V + K], whose last K columns read and decay, and are not written to."""
        width = self.write.shape[-1]
        plus = None if self.plus is None else F.pad(self.plus, (0, width))
        return self._replace(inside=F.pad(self.inside, (0, width)), plus=plus)


class Chunks:
    """A slice in chunks, in the dtype of states; per value head."""

    def __init__(
        self, k: Tensor, values: Tensor, beta: Tensor | None, log_decay: Tensor | None, doc_ids: Tensor | None
    ):
        self.k = _cut(k, values.shape[2])
        self.beta = None if beta is None else _cut(beta.to(self.k.dtype)[..., None], values.shape[2])
        self.gates = gates(_cut(with_starts(values, log_decay, doc_ids), values.shape[2]))
        self.width = values.shape[-1]

    def zero(self) -> Tensor:
        """A state of zeros, [N, K, V]."""
        return self.k.new_zeros(self.k.shape[0], self.k.shape[-1], self.width)

    def state(self, given: Tensor | None) -> Tensor:
        """The given state [B, H, K, V] as [N, K, V]; zeros if there is none."""
        return self.zero() if given is None else given.to(self.k.dtype).flatten(0, 1)

    def transform(self) -> list[Tensor]:
        """T and E = −T β (lead K) of each chunk, [N, n, C, C] and [N, n, C, K]; nothing where nothing is erased."""
        if self.beta is None:
            return []
        written = self.beta * self.k
        below = self.gates.scores(written, self.k)  # its diagonal is not read
        identity = torch.eye(CHUNK, dtype=below.dtype, device=below.device).expand_as(below)
        # transposed, because the solver works on columns
        transform = torch.linalg.solve_triangular(below.mT, identity, upper=True, unitriangular=True).mT
        return [transform, transform @ written.mul_(self.gates.lead).neg_()]

    def forward(self, v: Tensor, transform: list[Tensor]) -> Walk:
        """The walk of states from the left; its X is U."""
        v = _cut(v, v.shape[2])
        write = self.gates.fold * self.k
        if self.beta is None:
            return Walk(self.gates.through, write.mT @ v, v, None, write)
        matrix, erase = transform
        return Walk(self.gates.through, None, matrix @ (self.beta * v), erase, write)


def blocks_like(k: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None, wanted: int) -> list[Tensor]:
    """`blocks` of `summarize`: T and E."""
    return _transform_like(k, v) if wanted and beta is not None else []


def kept_like(q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None) -> list[Tensor]:
    """`kept` of `attend`: the states that enter chunks and P; where something is erased also U, T and E."""
    erased = [] if beta is None else [_chunks_like(k, v, v.shape[-1]), *_transform_like(k, v)]
    return [_states_like(k, v), _chunks_like(k, v, CHUNK), *erased]


def dblocks_like(q: Tensor, do: Tensor, beta: Tensor | None, log_decay: Tensor | None, wanted: int) -> list[Tensor]:
    """`dblocks` of `grad_initial_state`: Pᵀ dO and (lead Q)ᵀ dO."""
    return [_chunks_like(q, do, do.shape[-1]), _states_like(q, do)] if wanted else []


def rest_like(q: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None) -> list[Tensor]:
    """`rest` of `grad_query`: what P sends to dK, and to the gradient of a decay per token."""
    widths = [q.shape[-1]]
    if has_gradient(log_decay):
        widths.append(q.shape[-1] if log_decay is not None and log_decay.dim() == 4 else 1)
    return [_chunks_like(q, v, width) for width in widths]


def _chunks_like(k: Tensor, v: Tensor, width: int) -> Tensor:
    b, t, h, _ = v.shape
    return k.new_empty((b * h, _chunk_count(t), CHUNK, width), dtype=state_dtype(k))


def _states_like(k: Tensor, v: Tensor) -> Tensor:
    b, t, h, vdim = v.shape
    return k.new_empty((b * h, _chunk_count(t), k.shape[-1], vdim), dtype=state_dtype(k))


def _transform_like(k: Tensor, v: Tensor) -> list[Tensor]:
    return [_chunks_like(k, v, CHUNK), _chunks_like(k, v, k.shape[-1])]


def _identity_like(state: Tensor) -> Tensor:
    """An identity [N, K, K] for states [N, K, V]."""
    return torch.eye(state.shape[-2], dtype=state.dtype, device=state.device).expand(state.shape[0], -1, -1)


def summarize(
    k: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None, doc_ids: Tensor | None, wanted: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    state, linear = state_like(k, v), linear_like(k, v, beta, log_decay)
    if not wanted:
        return if_wanted(state, False), if_wanted(linear, False), []
    chunks = Chunks(k, v, beta, log_decay, doc_ids)
    transform = chunks.transform()
    walk, start = chunks.forward(v, transform), chunks.zero()
    if wanted == 2 and beta is not None:
        *_, final = walk.beside_identity().from_left(torch.cat([start, _identity_like(start)], dim=-1))
        final, matrix = final.split([v.shape[-1], k.shape[-1]], dim=-1)
        linear = matrix.unflatten(0, linear.shape[:2]).contiguous()
    else:
        *_, final = walk.from_left(start)
        linear = slice_decay(v, log_decay, doc_ids) if wanted == 2 else if_wanted(linear, False)
    return final.unflatten(0, state.shape[:2]).contiguous(), linear, transform


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
    chunks = Chunks(k, v, beta, log_decay, doc_ids)
    transform = [x.clone() for x in blocks] or chunks.transform()
    wrote, states, _ = chunks.forward(v, transform).from_left(chunks.state(initial_state))
    cut_q = _cut(q, v.shape[2])
    scores = chunks.gates.scores(cut_q, chunks.k)
    o = (cut_q * chunks.gates.lead) @ states
    return _join(o.add_(scores @ wrote), v), [states, scores, *([wrote, *transform] if transform else [])]


def _sent(q: Tensor, do: Tensor, chunks: Chunks, scores: Tensor) -> list[Tensor]:
    """Gradients of U and of the states that enter chunks, by the outputs of these chunks: Pᵀ dO and (lead Q)ᵀ dO."""
    heads = do.shape[2]
    do = _cut(do, heads)
    return [scores.mT @ do, (_cut(q, heads) * chunks.gates.lead).mT @ do]


def _backward(chunks: Chunks, sent: list[Tensor], erased: list[Tensor]) -> Walk:
    """The walk of states' gradients from the right, with U, T and E of what was `erased`; then its X is dU."""
    near, plus = sent
    read = chunks.gates.fold * chunks.k
    if not erased:
        return Walk(chunks.gates.through, plus, near, None, read)
    return Walk(chunks.gates.through, plus, near, read, erased[2])


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
    if not wanted:
        return if_wanted(dinitial, False), if_wanted(linear, False), []
    chunks = Chunks(k, do, beta, log_decay, doc_ids)
    _states, scores, *erased = kept
    sent = _sent(q, do, chunks, scores)
    walk, start = _backward(chunks, sent, erased), chunks.zero()
    if wanted == 2 and beta is not None:
        *_, first = walk.beside_identity().from_right(torch.cat([start, _identity_like(start)], dim=-1))
        first, transposed = first.split([do.shape[-1], k.shape[-1]], dim=-1)
        linear = transposed.mT.unflatten(0, linear.shape[:2]).contiguous()
    else:
        *_, first = walk.from_right(start)
        linear = slice_decay(do, log_decay, doc_ids) if wanted == 2 else if_wanted(linear, False)
    return first.unflatten(0, dinitial.shape[:2]).contiguous(), linear, sent


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
    chunks = Chunks(k, v, beta, log_decay, doc_ids)
    states, _scores, *erased = kept
    wrote = erased[0] if erased else _cut(v, v.shape[2])
    cut_q, cut_do = _cut(q, v.shape[2]), _cut(do, v.shape[2])
    dq, dk = (cut_do @ states.mT).mul_(chunks.gates.lead), torch.zeros_like(chunks.k)
    scores = cut_do @ wrote.mT
    over = chunks.gates.scores_grad(scores, cut_q, chunks.k, dq, dk, has_gradient(log_decay))
    return _join(dq, q), [dk] if over is None else [dk, over]


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
    chunks = Chunks(k, v, beta, log_decay, doc_ids)
    states, scores, *erased = kept
    cut_v = _cut(v, v.shape[2])
    wrote = erased[0] if erased else cut_v
    walk = _backward(chunks, dblocks or _sent(q, do, chunks, scores), erased)
    dwrote, dstates, _ = walk.from_right(chunks.state(dfinal))
    dk = (wrote @ dstates.mT).mul_(chunks.gates.fold)
    if chunks.beta is None:
        over = chunks.gates.sent_over(chunks.k, dk) if has_gradient(log_decay) else None
        dv, dbeta = walk.write @ dstates + dwrote, None
    else:
        dread = erased[1].mT @ dwrote
        dwritten = (dread @ states.mT).mul_(chunks.gates.lead).neg_()
        below = (dread @ wrote.mT).neg_().tril_(-1)
        written = chunks.beta * chunks.k
        over = chunks.gates.scores_grad(below, written, chunks.k, dwritten, dk, has_gradient(log_decay))
        dk.addcmul_(chunks.beta, dwritten)
        dbeta = (chunks.k * dwritten).sum(-1, keepdim=True) + (cut_v * dread).sum(-1, keepdim=True)
        dv = chunks.beta * dread
    if over is not None:
        over += rest[1]
        over += chunks.gates.sent_through(states, dstates)
    return _join(dk.add_(rest[0]), k), _join(dv, v), _join_or_none(dbeta, beta), _join_or_none(over, log_decay)


def _join_or_none(x: Tensor | None, like: Tensor | None) -> Tensor | None:
    """Join x [N, n, C, 1 or K] → [B, T, H] or [B, T, H, K], as `like` is, if there is any."""
    if x is None or like is None:
        return None
    return _join(x, like if like.dim() == 4 else like[..., None]).view_as(like)
