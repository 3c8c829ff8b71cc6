"""A slice of the delta rule as Triton programs read it: cut into blocks and chunks, aligned, its decays measured."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lasptrain.ops import delta_triton_kernels
from lasptrain.ops.triton_launch import (
    PROGRAMS,
    SHORTEST_BLOCK,
    Launch,
    _aligned,
    _as,
    _Descriptor,
    _documents,
    _logarithms,
    _rows,
    run,
)

CHUNK = 64  # rows of a chunk
MEASURE = Launch(CHUNK, 0, 1, 1)


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


@lru_cache(maxsize=64)
def shared_memory(device: int) -> int:
    """Return the bytes of shared memory that a program on that GPU can have."""
    return int(triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"])


def padded(s: Cut) -> tuple[int, int]:
    """K and V of the programs."""
    return s.widths[0], -(-s.values // 64) * 64


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


def gates_like(like: Tensor, s: Cut) -> Tensor:
    """An empty result of `measured`: six numbers per token of each chunk, [B, H, n, 6, C] fp32."""
    return like.new_empty((s.batch, s.heads, s.chunks, 6, CHUNK), dtype=torch.float32)


def measured(x: Given, gates: Tensor | None = None) -> Tensor:
    """Return what the programs need to know of decays, documents and β, written to `gates` if that is given."""
    s, gates = x.s, gates_like(x.k, x.s) if gates is None else gates
    run(
        delta_triton_kernels.measure_decays,
        x.beta,
        (s.batch * s.chunks * s.heads, 1, 1),
        MEASURE,
        {name: x.constants[name] for name in ("C", "DECAY", "DOCS")},
        *x.gates,
        gates,
        s.tokens,
        s.heads,
    )
    return gates


def states_like(like: Tensor, s: Cut) -> Tensor:
    """An empty state of each chunk, or its gradient."""
    keys, values = padded(s)
    return like.new_empty((s.batch, s.heads, s.chunks, values, keys))


def writes_like(like: Tensor, s: Cut) -> Tensor:
    """An empty U of each chunk, or the gradient of its R."""
    return like.new_empty((s.batch, s.heads, s.chunks, padded(s)[1], CHUNK))


def pairs_like(like: Tensor, s: Cut) -> Tensor:
    """An empty number per pair of tokens of each chunk."""
    return like.new_empty((s.batch, s.heads, s.chunks, CHUNK, CHUNK))


def sent_like(like: Tensor, s: Cut) -> Tensor:
    """An empty gradient of a state of each block."""
    keys, values = padded(s)
    return like.new_empty((s.batch, s.heads, s.blocks, values, keys), dtype=torch.float32)


def flow_like(like: Tensor, s: Cut, *parts: int) -> Tensor:
    """An empty gradient of a number per head and token, or parts of it."""
    return like.new_empty((*parts, s.batch, s.tokens, s.heads), dtype=torch.float32)


def fit(x: Tensor, rows: int, columns: int) -> Tensor:
    """Return x [..., rows, columns] at most, padded with zeros to that, contiguous."""
    missing = columns - x.shape[-1], rows - x.shape[-2]
    return _aligned(F.pad(x, (0, missing[0], 0, missing[1])) if any(missing) else x)


def flat(x: Tensor, rows: int, columns: int | None = None) -> _Descriptor:
    """Return a descriptor of x [..., ·] whose blocks are so many of its rows and columns; None is all."""
    width = x.shape[-1]
    return _Descriptor(x, [x.numel() // width, width], [width, 1], [rows, columns or width])
