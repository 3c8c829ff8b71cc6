"""Chunkwise linear attention in plain PyTorch: matrix products inside chunks, a scan over chunks.

Fast enough to train with on a CPU. The backward is the same two functions in reversed time with the roles of the
arguments exchanged. Signatures and shapes: `lasptrain.ops`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lasptrain.ops import per_token, state_dtype
from lasptrain.ops.reference import slice_decay, starts, token_decay

CHUNK = 64


class Chunks(NamedTuple):
    """Decays of a slice cut into n chunks of C tokens, T padded to n·C."""

    inside: Tensor  # [B, H, n, C] Σ log a from the chunk's start up to and including the token
    doc: Tensor  # [B, 1, n, C] document numbers
    before: Tensor  # [B, 1, n, 1] document of the token before the chunk; 0 before the slice

    def weights(self) -> Tensor:
        """Weight of token j in the output of token i, [B, H, n, C, C]."""
        lag = (self.inside[..., :, None] - self.inside[..., None, :]).clamp(max=0.0)
        visible = self.doc[..., :, None] == self.doc[..., None, :]
        return torch.where(visible, lag.exp(), 0.0).tril()

    def from_left(self) -> Tensor:
        """Weight of the chunk's entering state in the output of token i, [B, H, n, C]."""
        return torch.where(self.doc == self.before, self.inside.exp(), 0.0)

    def to_right(self) -> Tensor:
        """Weight of token j in the chunk's leaving state, [B, H, n, C]."""
        same = self.doc == self.doc[..., -1:]
        return torch.where(same, (self.inside[..., -1:] - self.inside).exp(), 0.0)

    def through(self) -> Tensor:
        """Decay over each chunk, [B, H, n]."""
        return self.from_left()[..., -1]


def _padding(t: int) -> int:
    return -t % CHUNK


def _pad(x: Tensor) -> Tensor:
    """x [B, T, …] with zeros behind, up to whole chunks."""
    missing = _padding(x.shape[1])
    return F.pad(x, [0, 0] * (x.dim() - 2) + [0, missing]) if missing else x


def _pad_doc(doc: Tensor) -> Tensor:
    missing = _padding(doc.shape[1])
    return torch.cat([doc, doc[:, -1:].expand(-1, missing)], dim=1) if missing else doc


def _by_chunk(x: Tensor) -> Tensor:
    """[B, n·C, …] → [B, n, C, …]."""
    return x.view(x.shape[0], -1, CHUNK, *x.shape[2:])


def _cut(x: Tensor) -> Tensor:
    """[B, T, H, ·] → [B, H, n, C, ·], at least fp32."""
    x = _pad(x).to(state_dtype(x))
    return _by_chunk(x).permute(0, 3, 1, 2, 4)


def _chunks(like: Tensor, log_decay: Tensor | None, doc: Tensor | None) -> Chunks:
    b, t, h, _ = like.shape
    dtype = state_dtype(like)
    if log_decay is None:
        log_decay = torch.zeros(h, dtype=dtype, device=like.device)
    decays = _by_chunk(_pad(log_decay.to(dtype).expand(b, t, h))).permute(0, 3, 1, 2)
    doc = _zero_doc(like) if doc is None else doc
    numbers = _by_chunk(_pad_doc(doc))[:, None]
    before = F.pad(numbers[:, :, :-1, -1:], (0, 0, 1, 0))
    return Chunks(decays.cumsum(-1), numbers, before)


def _zero_doc(like: Tensor) -> Tensor:
    return torch.zeros(like.shape[:2], dtype=torch.int32, device=like.device)


def block_shape(k: Tensor, v: Tensor) -> tuple[int, ...]:
    """Shape of `blocks` and `prefix`: one state per chunk."""
    b, t, h, kdim = k.shape
    return b, h, (t + _padding(t)) // CHUNK, kdim, v.shape[-1]


def row_shape(k: Tensor, v: Tensor) -> tuple[int, ...]:
    """Shape of `row` where the decay is per token."""
    return tuple(k.shape[:3])


def _block_states(k: Tensor, v: Tensor, chunks: Chunks) -> Tensor:
    return (k * chunks.to_right()[..., None]).transpose(-1, -2) @ v


def _scan(blocks: Tensor, through: Tensor, entering: Tensor | None) -> tuple[Tensor, Tensor]:
    """States that enter each block [B, H, n, K, V], and the one that leaves the last."""
    state = torch.zeros_like(blocks[:, :, 0]) if entering is None else entering.to(blocks.dtype)
    prefix = torch.empty_like(blocks)
    for i in range(blocks.shape[2]):
        prefix[:, :, i] = state
        state = torch.addcmul(blocks[:, :, i], state, through[:, :, i, None, None])
    return prefix, state


def summarize(
    k: Tensor, v: Tensor, log_decay: Tensor | None, doc: Tensor | None, wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    chunks = _chunks(k, log_decay, doc)
    blocks = _block_states(_cut(k), _cut(v), chunks)
    _, state = _scan(blocks, chunks.through(), None)
    return _told(state, wanted), _told(slice_decay(k, log_decay, doc), wanted), blocks


def _told(x: Tensor, wanted: bool) -> Tensor:
    """x, or what shows up wherever it is read."""
    return x if wanted else torch.full_like(x, float("nan"))


def _outputs(q: Tensor, k: Tensor, v: Tensor, chunks: Chunks, weights: Tensor, prefix: Tensor) -> Tensor:
    """o [B, H, n, C, V] from the tokens of the same chunk and the state that enters it."""
    o = (q @ k.transpose(-1, -2) * weights) @ v
    return o.add_((q * chunks.from_left()[..., None]) @ prefix)


def _join(o: Tensor, like: Tensor) -> Tensor:
    """[B, H, n, C, ·] → [B, T, H, ·] in the length and dtype of `like`."""
    return o.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, : like.shape[1]].to(like.dtype).contiguous()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    doc: Tensor | None,
    entering: Tensor | None,
    blocks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    chunks = _chunks(k, log_decay, doc)
    cut_k, cut_v = _cut(k), _cut(v)
    if blocks is None:
        blocks = _block_states(cut_k, cut_v, chunks)
    prefix, _ = _scan(blocks, chunks.through(), entering)
    return _join(_outputs(_cut(q), cut_k, cut_v, chunks, chunks.weights(), prefix), v), prefix


def _reversed_chunks(like: Tensor, log_decay: Tensor | None, doc: Tensor | None) -> Chunks:
    """The same chunks walked from the right: token t is reached through a_{t+1}, the last one through 1."""
    b, t, h, _ = like.shape
    if log_decay is None:
        log_decay = torch.zeros(h, dtype=state_dtype(like), device=like.device)
    decays = F.pad(_pad(log_decay.to(state_dtype(like)).expand(b, t, h)).flip(1)[:, :-1], (0, 0, 1, 0))
    doc = _pad_doc(_zero_doc(like) if doc is None else doc)
    return _chunks(decays[..., None], decays, doc[:, -1:] - doc.flip(1))


def _reversed_cut(x: Tensor) -> Tensor:
    return _cut(_pad(x).flip(1))


def _reversed_join(o: Tensor, like: Tensor) -> Tensor:
    o = o.permute(0, 2, 3, 1, 4).flatten(1, 2).flip(1)
    return o[:, : like.shape[1]].to(like.dtype).contiguous()


def grad_entering(
    q: Tensor, do: Tensor, log_decay: Tensor | None, doc: Tensor | None, wanted: bool
) -> tuple[Tensor, Tensor]:
    chunks = _reversed_chunks(q, log_decay, doc)
    blocks = _block_states(_reversed_cut(q), _reversed_cut(do), chunks)
    _, state = _scan(blocks, chunks.through(), None)
    return _told(state * token_decay(q, log_decay, doc)[:, 0, :, None, None], wanted), blocks


def grad_query(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    log_decay: Tensor | None,
    doc: Tensor | None,
    prefix: Tensor,
) -> tuple[Tensor, Tensor]:
    chunks = _chunks(k, log_decay, doc)
    weights = chunks.weights()
    dq = _outputs(_cut(do), _cut(v), _cut(k), chunks, weights, prefix.transpose(-1, -2))
    row = (
        _join((_cut(q) * dq).sum(-1, keepdim=True), q[..., :1].to(dq.dtype))[..., 0]
        if per_token(log_decay)
        else dq.new_empty(0)
    )
    return _join(dq, q), row


def grad_key_value(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    log_decay: Tensor | None,
    doc: Tensor | None,
    dleaving: Tensor | None,
    dblocks: Tensor | None,
    prefix: Tensor,
    row: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    chunks = _reversed_chunks(q, log_decay, doc)
    weights = chunks.weights()
    rq, rk, rv, rdo = (_reversed_cut(x) for x in (q, k, v, do))
    if dblocks is None:
        dblocks = _block_states(rq, rdo, chunks)
    suffix, _ = _scan(dblocks, chunks.through(), dleaving)
    dv = _outputs(rk, rq, rdo, chunks, weights, suffix)
    dk = _outputs(rv, rdo, rq, chunks, weights, suffix.transpose(-1, -2))
    dlog = None
    if per_token(log_decay):
        column = _reversed_join((rk * dk).sum(-1, keepdim=True), row[..., None])[..., 0]
        dlog = _grad_decay(k, v, log_decay, doc, row - column, prefix, suffix.flip(2))
    return _reversed_join(dk, k), _reversed_join(dv, v), dlog


def _grad_decay(
    k: Tensor, v: Tensor, log_decay: Tensor, doc: Tensor | None, difference: Tensor, prefix: Tensor, suffix: Tensor
) -> Tensor:
    """Gradient of log_decay [B, T, H]: ⟨G_t, a_t S_{t-1}⟩.

    `difference` is Σ q·dq − Σ k·dk per token. Summed from t to the end of the sequence it is the gradient, but that sum
    cancels over long sequences; so it runs to the end of the chunk only, where ⟨G, S⟩ stands for all that follows.
    """
    chunks = _chunks(k, log_decay, doc)
    last = _block_states(_cut(k)[:, :, -1:], _cut(v)[:, :, -1:], Chunks(*(x[:, :, -1:] for x in chunks)))[:, :, 0]
    leaving = torch.addcmul(last, prefix[:, :, -1], chunks.through()[:, :, -1, None, None])
    states = torch.cat([prefix[:, :, 1:], leaving[:, :, None]], dim=2)
    anchor = (suffix * states).sum((-1, -2))  # [B, H, n] before the first decay of the next chunk
    first = _by_chunk(_pad(token_decay(k, log_decay, doc)))[:, 1:, 0].transpose(1, 2)
    anchor = anchor * F.pad(first, (0, 1), value=1.0)
    inside = _by_chunk(_pad(difference)).permute(0, 3, 1, 2)
    same = chunks.doc[..., :, None] == chunks.doc[..., None, :]
    total = (same.to(inside.dtype).triu() @ inside[..., None])[..., 0]
    total = total + torch.where(chunks.doc == chunks.doc[..., -1:], anchor[..., None], 0.0)
    grad = total.permute(0, 2, 3, 1).flatten(1, 2)[:, : k.shape[1]]
    return grad if doc is None else grad.masked_fill(starts(doc)[..., None], 0.0)
