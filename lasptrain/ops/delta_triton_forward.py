"""The forward half of the delta rule in Triton: launches of the programs in `delta_triton_kernels`.

Of a slice in n chunks of 64 tokens and NB blocks, made forward and read again backwards:

| name | shape, dtype | meaning |
|---|---|---|
| `inverse` | [B, H, n, 64, 64], fp16, of fp32 inputs fp32 | T of each chunk, without decays and documents |
| `added` | [B, H, NB, V, K] fp32 | state that each block adds, transposed |
| `maps` | [B, H, NB, K, K] fp32 | what each block does to a state, from the left |
| `prefix` | [B, H, NB + 1, V, K] fp32 | state that enters each block, and the last one, transposed |

`blocks` is (inverse, added, maps), `kept` is (inverse, prefix, maps). A slice of one block needs neither `added` nor
`maps` for its outputs: `kept` has no maps then, and `summarize` makes what is wanted of them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lasptrain.ops import delta_triton_kernels
from lasptrain.ops.delta_reference import linear_like, state_like
from lasptrain.ops.reference import if_wanted
from lasptrain.ops.triton_launch import (
    DTYPES,
    PROGRAMS,
    SHORTEST_BLOCK,
    Launch,
    _aligned,
    _as,
    _documents,
    _logarithms,
    _rows,
    run,
)

CHUNK, BASE, LEVELS = 64, 16, 2  # rows of a chunk; of the blocks of its matrix that are inverted first
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


class Cut(NamedTuple):
    """A slice [B, T, H, K or V], cut into `blocks` blocks of `length` tokens."""

    batch: int
    tokens: int
    heads: int
    group: int  # value heads that read one key head
    keys: int
    values: int
    blocks: int
    length: int

    @property
    def chunks(self) -> int:
        """Chunks of the slice."""
        return -(-self.tokens // CHUNK)

    @property
    def widths(self) -> tuple[int, int]:
        """Powers of two that hold K and V."""
        return width(self.keys), width(self.values)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """T, H, NB, L of the programs."""
        return self.tokens, self.heads, self.blocks, self.length

    @property
    def constants(self) -> dict[str, int]:
        """Widths and dims of the programs."""
        keys, values = self.widths
        return {"K": keys, "V": values, "KEYS": self.keys, "VALUES": self.values}

    def grid(self, tiles: int = 1) -> tuple[int, int, int]:
        """One program per block, head and tile."""
        return self.batch * self.blocks * self.heads * tiles, 1, 1


def width(dim: int) -> int:
    """Return the power of two, at least 64, that holds `dim`: narrower rows came out wrong on Hopper (Triton 3.6)."""
    return 1 << max(64 - 1, dim - 1).bit_length()


def cut(k: Tensor, v: Tensor) -> Cut:
    """Return how the slice of keys and values is cut. Raises ValueError for dims that the programs do not hold."""
    (b, t, key_heads, kdim), (heads, vdim) = k.shape, v.shape[2:]
    return _cut(int(b), int(t), int(key_heads), int(heads), int(kdim), int(vdim))


@lru_cache(maxsize=1024)
def _cut(b: int, t: int, key_heads: int, h: int, kdim: int, vdim: int) -> Cut:
    if kdim > 128 or vdim > 256:
        raise ValueError(f"K and V of the delta rule's triton kernel reach 128 and 256, found {kdim} and {vdim}")
    blocks = max(1, min(PROGRAMS // (b * h), triton.cdiv(t, SHORTEST_BLOCK)))
    length = triton.cdiv(triton.cdiv(t, blocks), CHUNK) * CHUNK
    return Cut(b, t, h, h // key_heads, kdim, vdim, triton.cdiv(t, length), length)


def launch_of(program: Program, s: Cut, like: Tensor) -> Launch:
    """Return the launch parameters of a program, for inputs like that."""
    return _launch(program, s, like.dtype, _memory(like.device.index) if like.is_cuda else LARGE)


@lru_cache(maxsize=1024)
def _launch(program: Program, s: Cut, dtype: torch.dtype, memory: int) -> Launch:
    if dtype not in DTYPES:
        raise TypeError(f"the triton kernel takes bf16, fp16 and fp32, found {dtype}")
    keys, values = s.widths
    size = program, min(128, max(keys, values))
    launch = EXACT if dtype == torch.float32 else LAUNCHES[size] if memory >= LARGE else SMALL.get(size, LAUNCHES[size])
    return launch._replace(tile=min(launch.tile, keys, values))


@lru_cache(maxsize=64)
def _memory(device: int) -> int:
    """Return the bytes of shared memory that a program on that GPU can have."""
    return int(triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"])


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


def prefix_like(k: Tensor, v: Tensor) -> Tensor:
    """Empty states between blocks."""
    s = cut(k, v)
    return k.new_empty((s.batch, s.heads, s.blocks + 1, s.values, s.keys), dtype=torch.float32)


def blocks_like(k: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None, wanted: int) -> list[Tensor]:
    """`blocks` of `summarize`: T, U and M; nothing if nothing is wanted."""
    return [inverse_like(k, v), added_like(k, v), _maps_like(k, v, wanted)] if wanted else []


def kept_like(q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None) -> list[Tensor]:
    """`kept` of `attend`: T, the states between blocks, and M."""
    return [inverse_like(k, v), prefix_like(k, v), kept_maps_like(k, v)]


def _maps_like(k: Tensor, v: Tensor, wanted: int) -> Tensor:
    """Empty maps of `blocks`: none of one block if `linear` is not wanted."""
    return maps_like(k, v) if wanted == 2 else kept_maps_like(k, v)


def readable(x: Tensor) -> Tensor:
    """Return x [B, T, H, ·] as TMA reads it: rows of whole 16 bytes, and aligned to them."""
    unit = 16 // x.dtype.itemsize
    if x.data_ptr() % 16 == 0 and _in_units(unit, x.shape[-1], x.stride()):
        return x
    missing = -x.shape[-1] % unit
    return F.pad(x, (0, missing)) if missing else x.clone(memory_format=torch.contiguous_format)


@lru_cache(maxsize=1024)
def _in_units(unit: int, dim: int, strides: tuple[int, ...]) -> bool:
    return dim % unit == 0 and strides[-1] == 1 and all(s > 0 and s % unit == 0 for s in strides[:-1])


def inverse_rows(inverse: Tensor) -> TensorDescriptor:
    """Return a descriptor of T of chunks, as rows of one matrix per head: [B, n · 64, H, 64], in blocks of a chunk."""
    return _rows(inverse.flatten(2, 3).transpose(1, 2), CHUNK, CHUNK)


def betas(beta: Tensor) -> Tensor:
    """Return β as the programs read it."""
    return _aligned(_as(beta, torch.float32))


def check(beta: Tensor | None, log_decay: Tensor | None) -> Tensor:
    """Return β. Raises ValueError for a recurrence that the programs are not for."""
    if beta is None or (log_decay is not None and log_decay.dim() == 4):
        found = "no beta" if beta is None else "a decay per channel"
        raise ValueError(f"the delta rule's triton kernel takes beta and a decay per head, found {found}; use chunked")
    return beta


class Given(NamedTuple):
    """A slice as the programs read it."""

    s: Cut
    k: Tensor
    v: Tensor
    beta: Tensor
    log_decay: Tensor | None
    doc_ids: Tensor | None

    @classmethod
    def of(cls, k: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None, doc_ids: Tensor | None) -> Given:
        """Raises ValueError for a recurrence that the programs are not for."""
        return cls(
            cut(k, v),
            readable(k),
            readable(v),
            betas(check(beta, log_decay)),
            None if log_decay is None else _logarithms(log_decay),
            None if doc_ids is None else _documents(doc_ids),
        )

    @property
    def gates(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """BETA, LOG_DECAY and DOC of the programs."""
        return self.beta, self.log_decay, self.doc_ids

    @property
    def constants(self) -> dict[str, int | bool]:
        """C; GROUP; DECAY, 0 none, 1 constant per head, 2 per token; DOCS."""
        kind = 0 if self.log_decay is None else 1 if self.log_decay.dim() == 1 else 2
        return {"C": CHUNK, "GROUP": self.s.group, "DECAY": kind, "DOCS": self.doc_ids is not None}

    @property
    def forgets(self) -> bool:
        """True if there are decays or documents."""
        return self.log_decay is not None or self.doc_ids is not None


def invert(x: Given, inverse: Tensor, sums: Tensor | None = None) -> None:
    """Write T of each chunk to `inverse`, and the log2 of its decay to `sums` [B, H, n], if they are given."""
    s, (keys, _) = x.s, x.s.widths
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


def _summarize(x: Given, inverse: Tensor, added: Tensor, maps: Tensor | None) -> None:
    """Write T of each chunk to `inverse`, what each block adds to `added`, and to `maps`, if given, its map."""
    s, (keys, values) = x.s, x.s.widths
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
        *s.sizes,
    )


def _scan(
    s: Cut,
    added: Tensor,
    maps: Tensor,
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
        edge,
        prefix,
        state,
        linear,
        s.blocks,
    )


def _walk(x: Given, q: Tensor, inverse: Tensor, prefix: Tensor) -> Tensor:
    """Return the outputs [B, T, H, V], and write the state behind the last block to `prefix`."""
    s, (keys, values) = x.s, x.s.widths
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
    inverse, added, maps = blocks_like(k, v, beta, log_decay, wanted)
    _summarize(x, inverse, added, maps if maps.numel() else None)
    if x.s.blocks > 1:
        _scan(x.s, added, maps, None, None, state, linear if wanted == 2 else None)
    else:
        state.copy_(added[:, :, 0].mT)
        if wanted == 2:
            linear.copy_(maps[:, :, 0])
    return state, if_wanted(linear, wanted == 2), [inverse, added, maps]


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
    inverse, prefix, maps = kept_like(q, k, v, beta, log_decay)
    if blocks:  # copied, because an operator may not return what it was given
        added = blocks[1]
        inverse.copy_(blocks[0])
        if x.s.blocks > 1:
            maps.copy_(blocks[2])
    else:
        added = added_like(k, v)
        if x.s.blocks > 1:
            _summarize(x, inverse, added, maps)
        else:
            invert(x, inverse)
    _scan(x.s, added, maps, initial_state, prefix, None, None)
    return _walk(x, q, inverse, prefix), [inverse, prefix, maps]
