"""The attention kernels that PyTorch brings, each behind one function, and the choice between them.

Letters as in `lasptrain.ops`; R queries and C keys: q, o and do [R, H, D], k and v [C, G, D], lse [H, R] for the kernel
of variable lengths, which takes them packed; the dense one takes them with a batch N before R, C and H. lse is fp32 and
natural, all else of one dtype, bf16 or fp16, contiguous along D. Neither repeats keys of grouped heads; flash
attention's backward holds dk and dv of all H heads before it sums them.

Backward takes o and lse over more keys than these, and then returns the exact part of theirs.

cuDNN is taken on Hopper alone, where it is fastest; elsewhere it is unmeasured. It builds a plan for every new shape,
in tenths of a second: it is to see few. It has no window here, and its kernel of variable lengths is not used: PyTorch
builds that plan in every call and mistakes the places of lse. It is not deterministic: where PyTorch is told to be,
flash attention does it all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten

WIDEST = 256  # head dim
HOPPER = 9  # major compute capability


class Lengths(NamedTuple):
    """Sequences side by side: int32 edges [sequences + 1] of queries and of keys, and the longest of each."""

    rows: Tensor
    keys: Tensor
    most_rows: int
    most_keys: int


class Mask(NamedTuple):
    """Of n queries and m keys, query i sees those from i + m − n − left (all if −1), up to i + m − n if causal."""

    causal: bool
    left: int = -1


Gradients = tuple[Tensor, Tensor, Tensor]


class Kernels(NamedTuple):
    """Two kernels, forward and backward; the dense one takes, if causal, as many keys as queries."""

    varlen_forward: Callable[[Tensor, Tensor, Tensor, Lengths, Mask, float], tuple[Tensor, Tensor]]
    varlen_backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Lengths, Mask, float], Gradients]
    dense_forward: Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]] | None = None
    dense_backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, float], Gradients] | None = None


def select(q: Tensor, v: Tensor) -> Kernels | None:
    """Return the kernels for q [B, T, H, K] and v [B, J, G, V]; None: the definition, in fp32, fp64 and on a CPU."""
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or max(q.shape[-1], v.shape[-1]) > WIDEST:
        return None
    unfit = torch.are_deterministic_algorithms_enabled() or torch.cuda.get_device_capability(q.device)[0] != HOPPER
    if unfit or _cudnn_stats(q.device.index, q.dtype, width(q, v)) == 0:
        return Kernels(flash_forward, flash_backward)
    return Kernels(flash_forward, flash_backward, cudnn_forward, cudnn_backward)


def width(q: Tensor, v: Tensor) -> int:
    """Return the head dim that the kernels take for q [..., K] and v [..., V]: of both, a multiple of eight."""
    return -(-max(q.shape[-1], v.shape[-1]) // 8) * 8


def flash_forward(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    o, lse, *_ = aten._flash_attention_forward(
        q, k, v, *lengths, 0.0, mask.causal, False, scale=scale, **_window(mask)
    )  # fmt: skip
    return o, torch.where(lse == torch.inf, -torch.inf, lse)  # its sign for queries that see nothing


def flash_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    lengths: Lengths,
    mask: Mask,
    scale: float,
) -> Gradients:
    state = q.new_empty(2, dtype=torch.uint64), q.new_empty((), dtype=torch.uint64)  # of dropout
    dq, dk, dv = aten._flash_attention_backward(
        do, q, k, v, o, lse, *lengths, 0.0, mask.causal, *state, scale=scale, **_window(mask)
    )  # fmt: skip
    return dq, dk, dv


def _window(mask: Mask) -> dict[str, int]:
    return {"window_size_left": mask.left, "window_size_right": 0 if mask.causal else -1}


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return o.transpose(1, 2), lse.view(q.shape[:3])


def cudnn_backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, causal: bool, scale: float
) -> Gradients:
    lse = lse.contiguous()
    if _cudnn_stats(q.device.index, q.dtype, q.shape[-1]) == 4:
        lse = lse[..., None]
    # A plan is found again by the layouts of q, k and v alone, so those of o and do have to be always the same.
    q, k, v, o, do = (x.transpose(1, 2) for x in (q, k, v, o.contiguous(), do.contiguous()))
    state = q.new_empty((), dtype=torch.int64), q.new_empty((), dtype=torch.int64)  # of dropout
    most = q.shape[2], k.shape[2]
    found = aten._scaled_dot_product_cudnn_attention_backward(
        do, q, k, v, o, lse, *state, None, None, None, *most, 0.0, causal, scale=scale
    )
    dq, dk, dv = (x.transpose(1, 2) for x in found)
    return dq, dk, dv


@cache
def _cudnn_stats(device: int, dtype: torch.dtype, dim: int) -> int:
    """Return the number of dimensions that PyTorch's cuDNN attention gives lse, or 0 where it does not run.

    They differ between versions, and so does what its backward takes.
    """
    q = torch.zeros((1, 128, 2, dim), device=f"cuda:{device}", dtype=dtype).transpose(1, 2)
    k, state = q[:, :1], q.new_empty((), dtype=torch.int64)
    with torch.no_grad():
        try:
            o, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, k, None, True, 0.0, True, False)
            aten._scaled_dot_product_cudnn_attention_backward(
                o, q, k, k, o, lse, state, state, None, None, None, 128, 128, 0.0, True
            )
        except RuntimeError:
            return 0
    return int(lse.dim())
