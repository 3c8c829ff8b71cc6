"""The forward half of the delta rule in Triton: launches of the programs in `delta_triton_kernels`.

Of a slice in n chunks of 64 tokens and NB blocks, made forward and read again backwards:

| name | shape, dtype | meaning |
|---|---|---|
| `inverse` | [B, H, n, 64, 64], fp16, of fp32 inputs fp32 | T of each chunk, without decays and documents |
| `added` | [B, H, NB, V, K] fp32 | state that each block adds, transposed |
| `maps` | [B, H, NB, K, K] fp32 | what each block does to a state, from the left |
| `decays` | [B, H, NB] fp32 | log2 of the decay over each block, or zero; where nothing is left, its map is not read |
| `prefix` | [B, H, NB + 1, V, K] fp32 | state that enters each block, and the last one, transposed |
| `gates` | [B, H, n, 6, 64] fp32 | what `measure_decays` knows of decays, documents and β of each token |

`blocks` is (inverse, added, maps, decays), `kept` is (inverse, prefix, maps, gates, decays). A slice of one block needs
neither `added` nor `maps` for its outputs: `kept` has no maps then, and `summarize` makes what is wanted of them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from lasptrain.ops import delta_hopper, delta_triton_kernels
from lasptrain.ops.delta_reference import linear_like, state_like
from lasptrain.ops.delta_triton_slice import (
    CHUNK,
    Cut,
    Given,
    cut,
    gates_like,
    inverse_rows,
    measured,
    readable,
    shared_memory,
)
from lasptrain.ops.reference import if_wanted
from lasptrain.ops.triton_launch import (
    DTYPES,
    Launch,
    _aligned,
    _as,
    _rows,
    run,
)

BASE, LEVELS = 16, 2  # a chunk's matrix is inverted from blocks of 16 rows, twice doubled
PART = 16  # columns of the state per program that scans blocks

Program = Literal["invert", "summarize", "walk", "scan"]

# By program and the larger of the widths of K and V, for inputs of 16 bits.
LAUNCHES: dict[tuple[Program, int], Launch] = {
    ("invert", 64): Launch(CHUNK, 0, 1, 1),
    ("invert", 128): Launch(CHUNK, 0, 1, 1),
    ("summarize", 64): Launch(CHUNK, 64, 4, 2),
    ("summarize", 128): Launch(CHUNK, 64, 4, 3),
    ("walk", 64): Launch(CHUNK, 64, 4, 2),
    ("walk", 128): Launch(CHUNK, 128, 8, 2),
}
LARGE = 160 << 10  # bytes of shared memory; a GPU with less gets these instead
SMALL: dict[tuple[Program, int], Launch] = {
    ("summarize", 128): Launch(CHUNK, 64, 8, 1),
    ("walk", 128): Launch(CHUNK, 32, 8, 1),
}
# fp32 inputs: small tiles, since every operand is held three times.
EXACT = Launch(CHUNK, 32, 8, 1)
SCAN = Launch(0, PART, 8, 1)


def launch_of(program: Program, s: Cut, like: Tensor) -> Launch:
    """Return the launch parameters of a program, for inputs like that."""
    return _launch(program, s, like.dtype, shared_memory(like.device.index) if like.is_cuda else LARGE)


@lru_cache(maxsize=1024)
def _launch(program: Program, s: Cut, dtype: torch.dtype, memory: int) -> Launch:
    if dtype not in DTYPES:
        raise TypeError(f"the triton kernel takes bf16, fp16 and fp32, found {dtype}")
    keys, values = s.widths
    size = program, min(128, max(keys, values))
    launch = EXACT if dtype == torch.float32 else LAUNCHES[size] if memory >= LARGE else SMALL.get(size, LAUNCHES[size])
    return launch._replace(tile=min(launch.tile, keys, values))


def inverse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of T: fp16 has more digits than bf16, and T no large numbers."""
    return dtype if dtype == torch.float32 else torch.float16


def inverse_like(k: Tensor, v: Tensor) -> Tensor:
    """An empty T of each chunk."""
    s = cut(k, v)
    return k.new_empty((s.batch, s.heads, s.chunks, CHUNK, CHUNK), dtype=inverse_dtype(k.dtype))


def added_like(k: Tensor, v: Tensor) -> Tensor:
    """An empty U of each block."""
    s = cut(k, v)
    return k.new_empty((s.batch, s.heads, s.blocks, s.values, s.keys), dtype=torch.float32)


def maps_like(k: Tensor, v: Tensor, blocks: int | None = None) -> Tensor:
    """An empty M of each block, or of that many."""
    s = cut(k, v)
    return k.new_empty((s.batch, s.heads, s.blocks if blocks is None else blocks, s.keys, s.keys), dtype=torch.float32)


def kept_maps_like(k: Tensor, v: Tensor) -> Tensor:
    """Empty maps that are kept for the backward: none if there is one block."""
    s = cut(k, v)
    return maps_like(k, v, s.blocks if s.blocks > 1 else 0)


def decays_like(k: Tensor, v: Tensor) -> Tensor:
    """An empty decay of each block, to be written beside its map."""
    s = cut(k, v)
    return k.new_empty((s.batch, s.heads, s.blocks), dtype=torch.float32)


def prefix_like(k: Tensor, v: Tensor) -> Tensor:
    """Empty states between blocks."""
    s = cut(k, v)
    return k.new_empty((s.batch, s.heads, s.blocks + 1, s.values, s.keys), dtype=torch.float32)


def blocks_like(k: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None, wanted: int) -> list[Tensor]:
    """`blocks` of `summarize`: T, U, M and decays; nothing if nothing is wanted."""
    return [inverse_like(k, v), added_like(k, v), _maps_like(k, v, wanted), decays_like(k, v)] if wanted else []


def kept_like(q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None) -> list[Tensor]:
    """`kept` of `attend`: T, the states between blocks, M, what is known of decays and β, and decays of blocks."""
    gates = gates_like(k, cut(k, v))
    return [inverse_like(k, v), prefix_like(k, v), kept_maps_like(k, v), gates, decays_like(k, v)]


def _maps_like(k: Tensor, v: Tensor, wanted: int) -> Tensor:
    """Empty maps of `blocks`: none of one block if `linear` is not wanted."""
    return maps_like(k, v) if wanted == 2 else kept_maps_like(k, v)


def invert(x: Given, inverse: Tensor, sums: Tensor | None = None) -> None:
    """Write T of each chunk to `inverse`, and the log2 of its decay to `sums` [B, H, n], if they are given."""
    s, (keys, _) = x.s, x.s.widths
    if sums is None and delta_hopper.fits(s, x.k):
        delta_hopper.invert(x, inverse)
        return
    run(
        delta_triton_kernels.invert_chunks,
        x.k,
        (s.batch * s.chunks * s.heads, 1, 1),
        launch_of("invert", s, x.k),
        {"K": keys, **x.constants, "BASE": BASE, "LEVELS": LEVELS, "SUM": sums is not None},
        _rows(x.k, CHUNK, keys),
        *x.gates,
        inverse_rows(inverse),
        sums,
        s.tokens,
        s.heads,
        s.chunks,
    )


def _summarize(
    x: Given, inverse: Tensor, added: Tensor, maps: Tensor | None, decays: Tensor, gates: Tensor | None = None
) -> None:
    """Write T of each chunk to `inverse`, what each block adds to `added`, and, if `maps` are given, its map there and
    its decay to `decays`.

    `gates` are measured if they are needed and not given.
    """
    s, (keys, values) = x.s, x.s.widths
    if delta_hopper.fits(s, x.k):
        invert(x, inverse)
        delta_hopper.summarize(x, inverse, measured(x) if gates is None else gates, added, maps, decays)
        return
    sums = added.new_empty((s.batch, s.heads, s.chunks)) if x.forgets else None
    invert(x, inverse, sums)
    launch = launch_of("summarize", s, x.k)
    tiles = (values if maps is None else values + keys) // launch.tile
    run(
        delta_triton_kernels.summarize_delta,
        x.k,
        s.grid(tiles),
        launch,
        {**s.constants, "TILE": launch.tile, "TILES": tiles, **x.constants, "SUM": sums is not None},
        _rows(x.k, CHUNK, keys),
        _rows(x.v, CHUNK, launch.tile),
        inverse_rows(inverse),
        sums,
        *x.gates,
        added,
        maps,
        decays,
        *s.sizes,
    )


def _scan(
    s: Cut,
    added: Tensor,
    maps: Tensor,
    decays: Tensor,
    edge: Tensor | None,
    prefix: Tensor | None,
    state: Tensor | None,
    linear: Tensor | None,
) -> None:
    """Scan the blocks from `edge` [B, H, K, V], the slice's initial state; None is zero.

    The states that enter blocks are written to `prefix`, or the final state and the product of maps to `state`
    [B, H, K, V] and `linear` [B, H, K, K].
    """
    if edge is not None:
        edge = _aligned(_as(edge, torch.float32))
    keys, values = s.widths
    tiles = values // PART if linear is None else (values + keys) // PART
    run(
        delta_triton_kernels.scan_maps,
        added,
        (tiles, s.batch * s.heads, 1),
        SCAN,
        {**s.constants, "PART": PART, "TILES": tiles, "EDGED": edge is not None, "KEEP": prefix is not None},
        added,
        maps,
        decays,
        edge,
        prefix,
        state,
        linear,
        s.blocks,
    )


def _walk(x: Given, q: Tensor, inverse: Tensor, prefix: Tensor, gates: Tensor) -> Tensor:
    """Return the outputs [B, T, H, V], and write the state behind the last block to `prefix`."""
    s, (keys, values) = x.s, x.s.widths
    if delta_hopper.fits(s, x.k):
        return delta_hopper.walk(x, q, inverse, gates, prefix)
    launch = launch_of("walk", s, x.k)
    out = x.v.new_empty(x.v.shape)
    run(
        delta_triton_kernels.walk_delta,
        x.k,
        s.grid(values // launch.tile),
        launch,
        {**s.constants, "TILE": launch.tile, **x.constants},
        _rows(readable(q), CHUNK, keys),
        _rows(x.k, CHUNK, keys),
        _rows(x.v, CHUNK, launch.tile),
        inverse_rows(inverse),
        _rows(out, CHUNK, launch.tile),
        *x.gates,
        prefix,
        *s.sizes,
    )
    return out if out.shape[-1] == s.values else out[..., : s.values].contiguous()


def summarize(
    k: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None, doc_ids: Tensor | None, wanted: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    x, state, linear = Given.of(k, v, beta, log_decay, doc_ids), state_like(k, v), linear_like(k, v, beta, log_decay)
    if not wanted:
        return if_wanted(state, False), if_wanted(linear, False), []
    inverse, added, maps, decays = blocks_like(k, v, beta, log_decay, wanted)
    _summarize(x, inverse, added, maps if maps.numel() else None, decays)
    if x.s.blocks > 1:
        _scan(x.s, added, maps, decays, None, None, state, linear if wanted == 2 else None)
    else:
        state.copy_(added[:, :, 0].mT)
        if wanted == 2:
            linear.copy_(maps[:, :, 0])
    return state, if_wanted(linear, wanted == 2), [inverse, added, maps, decays]


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
    x = Given.of(k, v, beta, log_decay, doc_ids)
    inverse, prefix, maps, gates, decays = kept_like(q, k, v, beta, log_decay)
    measured(x, gates)
    if blocks:  # copied, because an operator may not return what it was given
        added = blocks[1]
        inverse.copy_(blocks[0])
        if x.s.blocks > 1:
            maps.copy_(blocks[2])
            decays.copy_(blocks[3])
    else:
        added = added_like(k, v)
        if x.s.blocks > 1:
            _summarize(x, inverse, added, maps, decays, gates)
        else:
            invert(x, inverse)
    _scan(x.s, added, maps, decays, initial_state, prefix, None, None)
    return _walk(x, q, inverse, prefix, gates), [inverse, prefix, maps, gates, decays]
