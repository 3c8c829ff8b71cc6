"""Orthogonalisation of matrices by Newton-Schulz iterations, as Muon wants it."""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that torch.optim.Muon iterates
STEPS, EPS = 5, 1e-7


def orthogonalised(
    x: Tensor, coefficients: tuple[float, float, float] = COEFFICIENTS, steps: int = STEPS, eps: float = EPS
) -> Tensor:
    """Return matrices [B, m, n] with the singular vectors of x [B, m, n], all singular values moved close to one.

    Each step is the polynomial a s + b s³ + c s⁵ of the singular values, which begin as those of x / |x|; five leave
    all but tiny ones within 0.7 to 1.2 (https://kellerjordan.github.io/posts/muon). Products are in the dtype of x,
    and on the shorter side of the matrices.
    """
    a, b, c = coefficients
    tall = x.shape[-2] > x.shape[-1]
    y = x.mT if tall else x
    y = y / torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if tall else y
