"""The delta rule on Hopper, for inputs in bf16 with K = V = 128: launches of the programs in `delta_hopper_kernels`.

Each function does what `delta_triton_forward` or `delta_triton_back` do, which call it where the slice `fits`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lasptrain.ops import delta_triton_back_kernels
from lasptrain.ops.delta_triton_slice import (
    CHUNK,
    Cut,
    Given,
    flow_like,
    inverse_rows,
    readable,
    sent_like,
    states_like,
)
from lasptrain.ops.triton_launch import Launch, run

DIM = 128  # of keys and values
WALK = Launch(CHUNK, DIM, 8, 1)
CHUNKWISE = Launch(CHUNK, DIM, 4, 1)
FINISH = Launch(CHUNK, 0, 1, 1)


def fits(s: Cut, like: Tensor) -> bool:
    """Return True where these programs are for a slice of such inputs, on this GPU, with this version of Triton."""
    wanted = like.dtype == torch.bfloat16 and (s.keys, s.values) == (DIM, DIM)
    return wanted and like.is_cuda and _runs(like.device.index)


@lru_cache(maxsize=64)
def _runs(device: int) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9 and _programs() is not None


@lru_cache(maxsize=1)
def _programs() -> Any:
    """Return the module of the programs; None where Triton has no Gluon, or one with other names."""
    try:
        from lasptrain.ops import delta_hopper_kernels
    except (ImportError, AttributeError):
        return None
    return delta_hopper_kernels


@lru_cache(maxsize=1)
def _descriptor() -> Any:
    """Return the class of tensor descriptors for Gluon, without checks, which cost the host more than the launch."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    class Descriptor(TensorDescriptor):  # type: ignore[misc]
        def __init__(self, base: Tensor, shape: list[int], strides: list[int], block_shape: list[int]):
            from triton.experimental.gluon.language import NVMMASharedLayout

            self.base, self.shape, self.strides, self.block_shape = base, shape, strides, block_shape
            self.layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(shape))
            self.padding, self.round_f32_to_tf32 = "zero", False

    return Descriptor


def _rows(x: Tensor, columns: int = DIM) -> Any:
    """Return a descriptor of x [B, T, H, ·] whose blocks are a chunk's tokens × `columns` of one head."""
    (b, t, h, d), (sb, st, sh, sd) = x.shape, x.stride()
    return _descriptor()(x, [b, h, t, d], [sb, sh, st, sd], [1, 1, CHUNK, columns])


def _flat(x: Tensor, rows: int, columns: int) -> Any:
    """Return a descriptor of x [..., ·] whose blocks are so many of its rows and columns."""
    width = x.shape[-1]
    return _descriptor()(x, [x.numel() // width, width], [width, 1], [rows, columns])


def _inverse(inverse: Tensor) -> Any:
    rows = inverse_rows(inverse)
    return _descriptor()(rows.base, rows.shape, rows.strides, rows.block_shape)


def invert(x: Given, inverse: Tensor) -> None:
    """Write T of each chunk to `inverse`."""
    run(
        _programs().invert_chunks,
        x.k,
        (x.s.batch * x.s.chunks * x.s.heads, 1, 1),
        CHUNKWISE,
        {"GROUP": x.s.group},
        _rows(x.k),
        _inverse(inverse),
        x.beta,
        x.s.tokens,
        x.s.heads,
    )


def summarize(x: Given, inverse: Tensor, gates: Tensor, added: Tensor, maps: Tensor | None, decays: Tensor) -> None:
    """Write what each block adds to `added`, and, if `maps` are given, its map there and its decay to `decays`."""
    tiles = 1 if maps is None else 2
    run(
        _programs().summarize_delta,
        x.k,
        x.s.grid(tiles),
        WALK,
        {"GROUP": x.s.group, "TILES": tiles},
        _rows(x.k),
        _rows(x.v),
        _inverse(inverse),
        gates,
        added,
        added if maps is None else maps,
        decays,
        *x.s.sizes,
    )


def walk(x: Given, q: Tensor, inverse: Tensor, gates: Tensor, prefix: Tensor) -> Tensor:
    """Return the outputs [B, T, H, V], and write the state behind the last block to `prefix`."""
    out = x.v.new_empty(x.v.shape)
    run(
        _programs().walk_delta,
        x.k,
        x.s.grid(),
        WALK,
        {"GROUP": x.s.group},
        _rows(readable(q)),
        _rows(x.k),
        _rows(x.v),
        _inverse(inverse),
        _rows(out),
        gates,
        prefix,
        *x.s.sizes,
    )
    return out


def sent_back(s: Cut, q: Tensor, k: Tensor, do: Tensor, inverse: Tensor, gates: Tensor) -> Tensor:
    """Return what each block's outputs send to its initial state."""
    first = sent_like(k, s)
    run(
        _programs().walk_gradients,
        k,
        s.grid(),
        WALK,
        {"GROUP": s.group},
        _rows(readable(q)),
        _rows(k),
        _rows(do),
        _inverse(inverse),
        gates,
        first,
        *s.sizes,
    )
    return first


def rest_like(like: Tensor, s: Cut, flows: bool) -> list[Tensor]:
    """`rest` of `grad_query`: the state that enters each chunk, and where the decay `flows` Σ q·dq of each half of the
    channels, [B, H, n, 2, C] fp32.
    """
    halves = [like.new_empty((s.batch, s.heads, s.chunks, 2, CHUNK), dtype=torch.float32)] if flows else []
    return [states_like(like, s), *halves]


def query_gradients(
    s: Cut,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    inverse: Tensor,
    gates: Tensor,
    prefix: Tensor,
    flows: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Return dq by value head, [B, T, H, K], and `rest`."""
    dq, (states, *flow) = _by_head(q, s), rest_like(k, s, flows)
    run(
        _programs().query_gradients,
        k,
        s.grid(),
        WALK,
        {"GROUP": s.group, "FLOWS": flows},
        _rows(readable(q)),
        _rows(k),
        _rows(v),
        _rows(do),
        _inverse(inverse),
        _flat(states, DIM, DIM),
        _rows(dq),
        gates,
        prefix,
        flow[0] if flow else gates,
        *s.sizes,
    )
    return dq, [states, *flow]


def input_gradients(
    s: Cut,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    inverse: Tensor,
    gates: Tensor,
    last: Tensor,
    rest: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return dk by value head, [B, T, H, K], dv [B, T, H, V], and the gradients [B, T, H] fp32 of β and, if it has one,
    of the decay; from those of what leaves blocks, `last`.
    """
    (states, *flow) = rest
    dk, dv, dbeta, dlog = _by_head(k, s), v.new_empty(v.shape), flow_like(k, s), flow_like(k, s) if flow else None
    rows = _programs().ROWS_OF_SUMS.value
    sums = k.new_empty((s.batch, s.heads, s.chunks, rows, CHUNK), dtype=torch.float32)
    run(
        _programs().input_gradients,
        k,
        s.grid(),
        WALK,
        {"GROUP": s.group, "FLOWS": bool(flow)},
        _rows(readable(q)),
        _rows(k),
        _rows(v),
        _rows(do),
        _inverse(inverse),
        _flat(states, DIM, DIM),
        _rows(dk),
        _rows(dv),
        gates,
        last,
        sums,
        *s.sizes,
    )
    run(
        delta_triton_back_kernels.finish_gradients,
        k,
        (s.batch * s.chunks * s.heads, 1, 1),
        FINISH,
        {"C": CHUNK, "SUMS_EACH": rows, "FLOWS": bool(flow)},
        sums,
        flow[0] if flow else gates,
        gates,
        dbeta,
        dlog,
        s.tokens,
        s.heads,
    )
    return dk, dv, dbeta, dlog


def _by_head(x: Tensor, s: Cut) -> Tensor:
    """An empty gradient [B, T, H, ·] of x [B, T, Hk, ·]."""
    return x.new_empty((s.batch, s.tokens, s.heads, x.shape[-1]))
