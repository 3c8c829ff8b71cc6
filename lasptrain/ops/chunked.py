"""Chunkwise linear attention in plain PyTorch: matrix products inside chunks, a scan over chunks.

Fast enough to train with on a CPU. The backward is the same two functions in reversed time with the roles of the
arguments exchanged. Signatures and shapes: `lasptrain.ops.decay_rule`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lasptrain.ops import per_token, state_dtype
from lasptrain.ops.reference import if_wanted, slice_decay, token_decay

CHUNK = 64


class Chunks(NamedTuple):
    """Decays of a slice cut into n chunks of C tokens, T padded to n·C.

    Logarithms are summed from one token to the other, never subtracted: a difference of two sums would lose a weak
    decay behind a strong one, and be undefined behind one of −∞.
    """

    each: Tensor  # [B, H, n, C] log a
    doc_ids: Tensor  # [B, 1, n, C] document numbers
    before: Tensor  # [B, 1, n, 1] document of the token before the chunk; 0 before the slice

    def weights(self) -> Tensor:
        """Weight of token j in the output of token i, [B, H, n, C, C]."""
        visible = self.doc_ids[..., :, None] == self.doc_ids[..., None, :]
        lag = self.each[..., None].expand(*self.each.shape, CHUNK).tril(-1).cumsum_(-2)
        return lag.exp_().masked_fill_(~visible, 0.0).tril_()

    def from_left(self) -> Tensor:
        """Weight of the chunk's initial state in the output of token i, [B, H, n, C]."""
        return torch.where(self.doc_ids == self.before, self.each.cumsum(-1).exp(), 0.0)

    def to_right(self) -> Tensor:
        """Weight of token j in the chunk's final state, [B, H, n, C]."""
        same = self.doc_ids == self.doc_ids[..., -1:]
        return torch.where(same, F.pad(self.each[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1).exp(), 0.0)

    def through(self) -> Tensor:
        """Decay over each chunk, [B, H, n]."""
        return self.from_left()[..., -1]


def _padding(t: int) -> int:
    return -t % CHUNK


def _pad(x: Tensor) -> Tensor:
    """Pad x [B, T, …] with zeros at the end, to whole chunks."""
    missing = _padding(x.shape[1])
    return F.pad(x, [0, 0] * (x.dim() - 2) + [0, missing]) if missing else x


def _pad_doc_ids(doc_ids: Tensor) -> Tensor:
    missing = _padding(doc_ids.shape[1])
    return torch.cat([doc_ids, doc_ids[:, -1:].expand(-1, missing)], dim=1) if missing else doc_ids


def _by_chunk(x: Tensor) -> Tensor:
    """Reshape [B, n·C, …] → [B, n, C, …]."""
    return x.view(x.shape[0], -1, CHUNK, *x.shape[2:])


def _cut(x: Tensor) -> Tensor:
    """Cut [B, T, H, ·] → [B, H, n, C, ·], at least fp32."""
    x = _pad(x).to(state_dtype(x))
    return _by_chunk(x).permute(0, 3, 1, 2, 4)


def _chunks(like: Tensor, log_decay: Tensor | None, doc_ids: Tensor | None) -> Chunks:
    b, t, h, _ = like.shape
    dtype = state_dtype(like)
    if log_decay is None:
        log_decay = torch.zeros(h, dtype=dtype, device=like.device)
    decays = _by_chunk(_pad(log_decay.to(dtype).expand(b, t, h))).permute(0, 3, 1, 2)
    doc_ids = _zero_doc_ids(like) if doc_ids is None else doc_ids
    numbers = _by_chunk(_pad_doc_ids(doc_ids))[:, None]
    before = F.pad(numbers[:, :, :-1, -1:], (0, 0, 1, 0))
    return Chunks(decays, numbers, before)


def _zero_doc_ids(like: Tensor) -> Tensor:
    return torch.zeros(like.shape[:2], dtype=torch.int32, device=like.device)


def block_shape(k: Tensor, v: Tensor) -> tuple[int, ...]:
    """Shape of the states in `blocks` and `kept`: one per chunk."""
    b, t, h, kdim = k.shape
    return b, h, (t + _padding(t)) // CHUNK, kdim, v.shape[-1]


def sums_shape(k: Tensor, v: Tensor) -> tuple[int, ...]:
    """Shape of the sums in `rest` where the decay is per token."""
    return tuple(k.shape[:3])


def _block_states(k: Tensor, v: Tensor, chunks: Chunks) -> Tensor:
    return (k * chunks.to_right()[..., None]).transpose(-1, -2) @ v


def _scan(blocks: Tensor, through: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the initial state of each block [B, H, n, K, V], and the final state of the last."""
    state = torch.zeros_like(blocks[:, :, 0]) if initial_state is None else initial_state.to(blocks.dtype)
    prefix = torch.empty_like(blocks)
    for i in range(blocks.shape[2]):
        prefix[:, :, i] = state
        state = torch.addcmul(blocks[:, :, i], state, through[:, :, i, None, None])
    return prefix, state


def summarize(
    k: Tensor, v: Tensor, log_decay: Tensor | None, doc_ids: Tensor | None, wanted: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    chunks = _chunks(k, log_decay, doc_ids)
    blocks = _block_states(_cut(k), _cut(v), chunks)
    _, state = _scan(blocks, chunks.through(), None)
    return if_wanted(state, wanted >= 1), if_wanted(slice_decay(k, log_decay, doc_ids), wanted == 2), [blocks]


def _scores(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)).mul_(weights)


def _far(q: Tensor, chunks: Chunks, prefix: Tensor) -> Tensor:
    """Return the outputs [B, H, n, C, V] that come from the chunks' initial states `prefix`."""
    return (q * chunks.from_left()[..., None]) @ prefix


def _join(o: Tensor, like: Tensor) -> Tensor:
    """Join [B, H, n, C, ·] → [B, T, H, ·] in the length and dtype of `like`."""
    return o.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, : like.shape[1]].to(like.dtype).contiguous()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    doc_ids: Tensor | None,
    initial_state: Tensor | None,
    blocks: list[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    chunks = _chunks(k, log_decay, doc_ids)
    cut_k, cut_v = _cut(k), _cut(v)
    added = blocks[0] if blocks else _block_states(cut_k, cut_v, chunks)
    prefix, _ = _scan(added, chunks.through(), initial_state)
    q = _cut(q)
    o = _scores(q, cut_k, chunks.weights()) @ cut_v
    return _join(o.add_(_far(q, chunks, prefix)), v), [prefix]


def _reversed_chunks(like: Tensor, log_decay: Tensor | None, doc_ids: Tensor | None) -> Chunks:
    """Return the chunks in reversed time: token t is reached through a_{t+1}, the last token through 1."""
    b, t, h, _ = like.shape
    if log_decay is None:
        log_decay = torch.zeros(h, dtype=state_dtype(like), device=like.device)
    decays = F.pad(_pad(log_decay.to(state_dtype(like)).expand(b, t, h)).flip(1)[:, :-1], (0, 0, 1, 0))
    doc_ids = _pad_doc_ids(_zero_doc_ids(like) if doc_ids is None else doc_ids)
    return _chunks(decays[..., None], decays, doc_ids[:, -1:] - doc_ids.flip(1))


def _reversed_cut(x: Tensor) -> Tensor:
    return _cut(_pad(x).flip(1))


def _reversed_join(o: Tensor, like: Tensor) -> Tensor:
    o = o.permute(0, 2, 3, 1, 4).flatten(1, 2).flip(1)
    return o[:, : like.shape[1]].to(like.dtype).contiguous()


def grad_initial_state(
    q: Tensor, do: Tensor, log_decay: Tensor | None, doc_ids: Tensor | None, wanted: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    chunks = _reversed_chunks(q, log_decay, doc_ids)
    blocks = _block_states(_reversed_cut(q), _reversed_cut(do), chunks)
    _, state = _scan(blocks, chunks.through(), None)
    dinitial = state * token_decay(q, log_decay, doc_ids)[:, 0, :, None, None]
    return if_wanted(dinitial, wanted >= 1), if_wanted(slice_decay(q, log_decay, doc_ids), wanted == 2), [blocks]


def grad_query(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, log_decay: Tensor | None, doc_ids: Tensor | None, kept: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    chunks = _chunks(k, log_decay, doc_ids)
    cut_q, cut_k = _cut(q), _cut(k)
    scores = _scores(_cut(do), _cut(v), chunks.weights())
    far = _far(_cut(do), chunks, kept[0].transpose(-1, -2))
    dq = scores @ cut_k
    rest = []
    if per_token(log_decay):
        row = _reading_over(scores.mul_(cut_q @ cut_k.transpose(-1, -2)), (cut_q * far).sum(-1))
        rest = [_join(row[..., None], q.to(row.dtype))[..., 0]]
    return _join(dq.add_(far), q), rest


def _reading_over(near: Tensor, far: Tensor) -> Tensor:
    """Sum what tokens t, t + 1, … of a chunk read from before t, [B, H, n, C], in units of the loss.

    Args:
        near: what token i reads from token j, [B, H, n, C, C].
        far: what token i reads from the chunk's initial state, [B, H, n, C].
    """
    earlier = F.pad(near[..., :-1], (1, 0)).cumsum(-1).tril().sum(-2)
    return far.flip(-1).cumsum(-1).flip(-1).add_(earlier)


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
    chunks = _reversed_chunks(q, log_decay, doc_ids)
    weights = chunks.weights()
    rq, rk, rv, rdo = (_reversed_cut(x) for x in (q, k, v, do))
    added = dblocks[0] if dblocks else _block_states(rq, rdo, chunks)
    suffix, _ = _scan(added, chunks.through(), dfinal)
    dv = (_scores(rk, rq, weights) @ rdo).add_(_far(rk, chunks, suffix))
    dk = _scores(rv, rdo, weights) @ rq
    far = _far(rv, chunks, suffix.transpose(-1, -2))
    dlog = None
    if per_token(log_decay):
        (row,) = rest
        sent = _reversed_join((rk * far).sum(-1, keepdim=True), row[..., None])[..., 0]
        dlog = row + _sent_over(k, log_decay, doc_ids, sent, kept[0], suffix.flip(2))
    return _reversed_join(dk.add_(far), k), _reversed_join(dv, v), dlog


def _sent_over(
    k: Tensor, log_decay: Tensor, doc_ids: Tensor | None, sent: Tensor, prefix: Tensor, suffix: Tensor
) -> Tensor:
    """Sum what tokens after t's chunk read from before t, [B, T, H], in units of the loss.

    `sent` is what they read from token t. Together with `_reading_over` this is the gradient of log_decay,
    ⟨G_t, a_t S_{t-1}⟩, as a sum over all pairs of tokens with the decay between them. Σ q·dq − Σ k·dk from t to the end
    of the sequence is equal, but cancels.
    """
    chunks = _chunks(k, log_decay, doc_ids)
    first = _by_chunk(_pad(token_decay(k, log_decay, doc_ids)))[:, 1:, 0].transpose(1, 2)
    through = chunks.through() * F.pad(first, (0, 1), value=1.0)  # the suffix lies before the next chunk's first decay
    inside = _by_chunk(_pad(sent)).permute(0, 3, 1, 2)
    over = F.pad(inside[..., :-1], (1, 0)).cumsum(-1) + (through * (prefix * suffix).sum((-1, -2)))[..., None]
    return _join(over[..., None], sent[..., None])[..., 0]
