"""Linear attention as softmax attention computes it, (q kᵀ ∘ decay) v, from the left: quadratic in the window.

What the LASP paper ran its rivals with (arXiv:2404.02882, section 4), in tiles of rows so that memory stays linear.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class LeftProduct:
    """Attention of a whole window, `tile` tokens of queries at a time; each tile is computed again in the backward."""

    def __init__(self, tile: int = 256):
        self.tile = tile

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
        """Output [B, T, H, V] of q, k [B, T, H, K], v [B, T, H, V] and a log decay [H] per head."""
        tiles = []
        for start in range(0, q.shape[1], self.tile):
            end = min(start + self.tile, q.shape[1])
            arguments = q[:, start:end], k[:, :end], v[:, :end], log_decay
            tiles.append(checkpoint(_rows, *arguments, use_reentrant=False, preserve_rng_state=False))
        return torch.cat(tiles, dim=1)


def _rows(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
    """Output of the last tokens, q [B, t, H, K], of a run k [B, s, H, K], v [B, s, H, V]."""
    own, seen = q.shape[1], k.shape[1]
    token = torch.arange(seen - own, seen, device=q.device)
    lag = token[:, None] - torch.arange(seen, device=q.device)
    rate = torch.zeros(q.shape[2], device=q.device) if log_decay is None else log_decay
    weight = torch.where(lag >= 0, (rate.to(torch.float64)[:, None, None] * lag).exp(), 0.0).to(q.dtype)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * weight
    return torch.einsum("bhts,bshv->bthv", scores, v)
