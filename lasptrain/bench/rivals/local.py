"""Causal attention of a whole window on one rank, for the rivals to run.

As softmax, the layer that linear attention replaces, or linear attention as that is computed, (q kᵀ ∘ decay) v, from
the left: quadratic in the window. The LASP paper ran its rivals like this (arXiv:2404.02882, section 4); in tiles of
rows, so that memory stays linear.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Local = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # q, k, v, log_decay → output


def softmax(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
    """Return the output [B, T, H, V] of q, k [B, T, H, K] and v [B, T, H, V]; `log_decay` is ignored.

    PyTorch's fused kernel, quadratic in time and linear in memory.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


class LeftProduct:
    """Attention of a whole window, `tile` tokens of queries at a time; each tile is recomputed in the backward."""

    def __init__(self, tile: int = 256):
        self.tile = tile

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, behind: int = 0) -> Tensor:
        """Return the output [B, T, H, V] of q, k [B, T, H, K], v [B, T, H, V] and a log decay [H] per head; keys and
        values lie `behind` tokens to the left of the queries.
        """
        tiles = []
        for start in range(0, q.shape[1], self.tile):
            rows = q[:, start : start + self.tile]
            seen = min(start + behind + rows.shape[1], k.shape[1])
            arguments = rows, k[:, :seen], v[:, :seen], log_decay, start + behind
            tiles.append(checkpoint(_rows, *arguments, use_reentrant=False, preserve_rng_state=False))
        return torch.cat(tiles, dim=1)


def _rows(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, first: int) -> Tensor:
    """Output [B, t, H, V] of queries q [B, t, H, K] from token `first` on over k [B, s, H, K], v [B, s, H, V]."""
    token = torch.arange(first, first + q.shape[1], device=q.device)
    lag = token[:, None] - torch.arange(k.shape[1], device=q.device)
    rate = torch.zeros(q.shape[2], device=q.device) if log_decay is None else log_decay
    rate = rate.to(torch.promote_types(q.dtype, torch.float32))
    weight = torch.where(lag >= 0, (rate[:, None, None] * lag.clamp(min=0)).exp(), 0.0).to(q.dtype)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * weight
    return torch.einsum("bhts,bshv->bthv", scores, v)
