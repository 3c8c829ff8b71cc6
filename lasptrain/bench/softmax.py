"""Causal softmax attention of a whole window, for the rivals to run: what linear attention is instead of."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def softmax(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
    """Output [B, T, H, V] of q, k [B, T, H, K] and v [B, T, H, V]; without decay, whatever `log_decay` says.

    PyTorch's fused kernel, quadratic in time and linear in memory.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
