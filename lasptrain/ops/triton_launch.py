"""Linear attention with decay in Triton, for Hopper: one pass over a slice for its blocks' states, one for the rest.

Floor per token and head with dims D in 16 bits: forward 8·D bytes, both directions 22·D. These kernels move 12·D and
36·D: `summarize` reads k, v; `attend` and `grad_query` read three tensors and write one; `grad_initial_state` reads q,
do; `grad_inputs` reads four and writes two. Signatures and shapes: `lasptrain.ops.decay_rule`; the programs:
`triton_kernels`.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lasptrain.ops import per_token, triton_kernels

DIMS = (64, 128, 256)  # smaller ones are padded: rows of 64 bytes came out wrong on Hopper (Triton 3.6)
HERE = nullcontext()
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GRANULE = 128  # tokens; every chunk divides it
SHORTEST_BLOCK, LONGEST_BLOCK = 256, 8192
PART = 1024  # numbers of a state per program that scans blocks
PROGRAMS = 264  # two per multiprocessor of an H100 or H200
_compiled: dict[tuple[object, ...], Any] = {}  # by `run`'s key; None under the interpreter
_threads = threading.local()

Kernel = Literal["summarize", "attend", "grad_query", "grad_key_value", "grad_value", "grad_key"]


class Launch(NamedTuple):
    """Launch parameters of a program: tokens per chunk, columns of the output per program, warps, pipeline stages."""

    chunk: int
    tile: int
    warps: int
    stages: int
    registers: int | None = None  # per thread at most, to fit more programs onto a multiprocessor

    def options(self) -> dict[str, int | None]:
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


# By kernel and the larger of K and V, for inputs of 16 bits.
LAUNCHES: dict[tuple[Kernel, int], Launch] = {
    ("summarize", 64): Launch(64, 64, 4, 3),
    ("summarize", 128): Launch(64, 128, 4, 3),
    ("summarize", 256): Launch(64, 128, 8, 3),
    ("attend", 64): Launch(64, 64, 4, 3),
    ("attend", 128): Launch(64, 128, 8, 3),
    ("attend", 256): Launch(64, 128, 8, 2),
    ("grad_query", 64): Launch(64, 64, 4, 3),
    ("grad_query", 128): Launch(64, 128, 8, 3),
    ("grad_query", 256): Launch(64, 128, 8, 2),
    ("grad_key_value", 64): Launch(64, 64, 4, 3),
    ("grad_key_value", 128): Launch(64, 128, 8, 2),
    ("grad_value", 256): Launch(64, 128, 8, 2),
    ("grad_key", 256): Launch(64, 128, 8, 2),
}
# fp32 inputs: small tiles, since every operand is held three times.
EXACT = Launch(32, 32, 8, 1)
PLAIN = Launch(chunk=0, tile=0, warps=4, stages=3)  # for programs without chunks or tiles to choose


def _width(dim: int) -> int:
    """Return the smallest supported dim that holds `dim`."""
    for width in DIMS:
        if dim <= width:
            return width
    raise ValueError(f"key and value dims of the triton kernel reach {DIMS[-1]}, found {dim}")


@lru_cache(maxsize=1024)
def _launch(kernel: Kernel, s: _Slice, dtype: torch.dtype, tiled: int) -> Launch:
    """Return the kernel's launch parameters for inputs of `dtype` and `tiled` columns of output."""
    launch = EXACT if dtype == torch.float32 else LAUNCHES[kernel, max(s.keys, s.values)]
    return launch._replace(tile=min(launch.tile, tiled))


def _padded(x: Tensor) -> Tensor:
    """Return x [B, T, H, ·] as TMA needs it: a supported dim, rows aligned to 16 bytes."""
    if x.data_ptr() % 16 == 0 and _tma_reads(x.dtype, x.shape[-1], x.stride()):
        return x
    missing = _width(x.shape[-1]) - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x.clone(memory_format=torch.contiguous_format)


def _cropped(x: Tensor, rows: int, columns: int) -> Tensor:
    """Return x [..., rows, columns] without padding."""
    return x if x.shape[-2:] == (rows, columns) else x[..., :rows, :columns].contiguous()


@lru_cache(maxsize=1024)
def _tma_reads(dtype: torch.dtype, dim: int, strides: tuple[int, ...]) -> bool:
    if dtype not in DTYPES:
        raise TypeError(f"the triton kernel takes bf16, fp16 and fp32, found {dtype}")
    return dim in DIMS and strides[-1] == 1 and all(s > 0 and s * dtype.itemsize % 16 == 0 for s in strides[:-1])


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in `dtype`; the check costs less than a `to` that has nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def _device(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which the GPU of x is current; it does nothing on a CPU, or where that is so already."""
    if not x.is_cuda:
        return HERE
    if x.device not in _threads.__dict__.setdefault("ready", set()):
        x.new_zeros(1)  # gives this thread (autograd's, say) the device's context, which tensor maps need
        _threads.ready.add(x.device)
    return HERE if x.device.index == torch.cuda.current_device() else torch.cuda.device(x.device)


def run(
    program: Any, like: Tensor, grid: tuple[int, int, int], launch: Launch, constants: dict[str, Any], *args: object
) -> None:
    """Launch program[grid](*args, **constants), for inputs like `like`; constants in the program's order.

    At every launch Triton looks a program up by all its arguments, which takes the host longer than the launch itself.
    Here dtype, device and constants suffice as the key: pointers are aligned, sizes are not specialised, and constants
    say which arguments are None.
    """
    key = program.__name__, like.dtype, like.device, launch, *constants.values()
    with _device(like):
        compiled = _compiled.get(key)
        if compiled is None:
            assert [*constants] == program.arg_names[len(args) :], f"constants of {program.__name__} out of order"
            _compiled[key] = program[grid](*args, **constants, **launch.options())
        else:
            compiled[grid](*args, *constants.values())


class _Descriptor(TensorDescriptor):  # type: ignore[misc]
    """Tensor descriptor without checks, which cost the host more than the launch; `_padded` ensures what they ask."""

    def __init__(self, base: Tensor, shape: list[int], strides: list[int], block_shape: list[int]):
        self.base, self.shape, self.strides, self.block_shape = base, shape, strides, block_shape
        self.padding = "zero"


def _rows(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Return a descriptor of x [B, T, H, ·] whose blocks are `rows` tokens × `columns` of one head."""
    (b, t, h, d), (sb, st, sh, sd) = x.shape, x.stride()
    return _Descriptor(x, [b, h, t, d], [sb, sh, st, sd], [1, 1, rows, columns])


class _Slice(NamedTuple):
    """Sizes of a slice: [B, T, H, K or V], cut into `blocks` blocks of `length` tokens."""

    batch: int
    tokens: int
    heads: int
    keys: int
    values: int
    blocks: int
    length: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """T, H, NB, L of the programs."""
        return self.tokens, self.heads, self.blocks, self.length

    def grid(self, tiles: int = 1) -> tuple[int, int, int]:
        return self.batch * self.blocks * self.heads * tiles, 1, 1


def _slice(k: Tensor, v: Tensor) -> _Slice:
    return _cut(*map(int, k.shape), int(v.shape[-1]))


@lru_cache(maxsize=1024)
def _cut(b: int, t: int, h: int, kdim: int, vdim: int) -> _Slice:
    blocks = min(max(PROGRAMS // (b * h), triton.cdiv(t, LONGEST_BLOCK)), triton.cdiv(t, SHORTEST_BLOCK))
    length = triton.cdiv(triton.cdiv(t, blocks), GRANULE) * GRANULE
    return _Slice(b, t, h, _width(kdim), _width(vdim), triton.cdiv(t, length), length)


def block_shape(k: Tensor, v: Tensor) -> tuple[int, ...]:
    """Shape of the states in `blocks` and `kept`: one per block and one more, each with its decay and 3 unused."""
    s = _slice(k, v)
    return s.batch, s.heads, s.blocks + 1, s.keys * s.values + 4


def sums_shape(k: Tensor, v: Tensor) -> tuple[int, ...]:
    """Shape of the sums in `rest` where the decay is per token: per token, then flows per chunk."""
    s = _slice(k, v)
    return _sums_shape(s, _launch("grad_query", s, k.dtype, s.keys))


def _sums_shape(s: _Slice, launch: Launch) -> tuple[int, ...]:
    return s.batch, s.tokens + triton.cdiv(s.tokens, launch.chunk), s.heads


def _documents(doc_ids: Tensor) -> Tensor:
    """Return `doc_ids` as the programs read it."""
    return _aligned(_as(doc_ids, torch.int32))


def _logarithms(log_decay: Tensor) -> Tensor:
    """Return `log_decay` as the programs read it."""
    return _aligned(_as(log_decay, torch.float32))


def _aligned(x: Tensor) -> Tensor:
    """Return x contiguous and aligned to 16 bytes, as the programs expect."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


class _Gates(NamedTuple):
    """Inputs of the decays, as the programs read them."""

    log_decay: Tensor | None
    doc_ids: Tensor | None
    counts: Tensor | None  # of `doc_ids`, by chunk

    @property
    def constants(self) -> dict[str, int | bool]:
        kind = 0 if self.log_decay is None else 1 if self.log_decay.dim() == 1 else 2
        return {"DECAY": kind, "DOCS": self.doc_ids is not None}


def _gates(log_decay: Tensor | None, doc_ids: Tensor | None, chunk: int) -> _Gates:
    if log_decay is not None:
        log_decay = _logarithms(log_decay)
    if doc_ids is None:
        return _Gates(log_decay, None, None)
    doc_ids = _documents(doc_ids)
    batch, tokens = doc_ids.shape
    chunks, group = triton.cdiv(tokens, chunk), 16
    counts = doc_ids.new_empty((batch, chunks))
    grid, constants = (triton.cdiv(chunks, group), batch, 1), {"C": chunk, "GROUP": group}
    run(triton_kernels.count_documents, doc_ids, grid, PLAIN, constants, doc_ids, counts, tokens, chunks)
    return _Gates(log_decay, doc_ids, counts)


def _state(state: Tensor | None, s: _Slice) -> Tensor | None:
    """Return a state [B, H, K, V] as the programs read it: fp32, contiguous, padded to supported dims."""
    if state is None:
        return None
    state = state.to(torch.float32)
    if state.shape[-2:] != (s.keys, s.values):
        state = F.pad(state, (0, s.values - state.shape[-1], 0, s.keys - state.shape[-2]))
    return _aligned(state)


def _blocks(x: Tensor, y: Tensor, log_decay: Tensor | None, doc_ids: Tensor | None, reverse: bool) -> Tensor:
    """Return, per block of the slice, the state that it adds and its decay."""
    s = _slice(x, y)
    x, y = _padded(x), _padded(y)
    launch = _launch("summarize", s, x.dtype, s.values)
    gates = _gates(log_decay, doc_ids, launch.chunk)
    blocks = x.new_empty(block_shape(x, y), dtype=torch.float32)
    run(
        triton_kernels.summarize_blocks,
        x,
        s.grid(s.values // launch.tile),
        launch,
        {"K": s.keys, "V": s.values, "C": launch.chunk, "TILE": launch.tile, **gates.constants, "REVERSE": reverse},
        _rows(x, launch.chunk, s.keys),
        _rows(y, launch.chunk, launch.tile),
        gates.log_decay,
        gates.doc_ids,
        gates.counts,
        blocks,
        *s.sizes,
    )
    return blocks


def _scan(
    blocks: Tensor,
    s: _Slice,
    reverse: bool,
    edge: Tensor | None,
    into: Tensor | None,
    total: tuple[Tensor, Tensor] | None,
) -> None:
    """Scan the blocks from `edge` [B, H, K, V], the slice's initial state; None is zero.

    Each block's initial state and the final state are written to `into`, the latter and the slice's decay to `total`.
    """
    edge, size = _state(edge, s), s.keys * s.values
    grid = size // PART, s.batch * s.heads, 1
    constants = {
        "SIZE": size,
        "PART": PART,
        "REVERSE": reverse,
        "EDGED": edge is not None,
        "KEEP": into is not None,
        "TOTAL": total is not None,
    }
    run(
        triton_kernels.scan_blocks,
        blocks,
        grid,
        PLAIN,
        constants,
        blocks,
        edge,
        into,
        *(total or (None, None)),
        s.blocks,
    )


def _summarized(
    x: Tensor, y: Tensor, log_decay: Tensor | None, doc_ids: Tensor | None, reverse: bool, wanted: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the state [B, H, K, V] and the decay [B, H], both undefined unless `wanted`, and the blocks."""
    s = _slice(x, y)
    blocks = _blocks(x, y, log_decay, doc_ids, reverse)
    state, decay = blocks.new_empty((s.batch, s.heads, s.keys, s.values)), blocks.new_empty((s.batch, s.heads))
    if wanted:
        _scan(blocks, s, reverse, None, None, (state, decay))
    return _cropped(state, x.shape[-1], y.shape[-1]), decay, [blocks]


def _walk(
    kernel: Kernel,
    rows: tuple[Tensor, Tensor, Tensor],
    sizes: _Slice,
    log_decay: Tensor | None,
    doc_ids: Tensor | None,
    states: Tensor,
    summed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the output of `triton_kernels.walk` over padded x, y, z; with `summed` (w) also the sums per token."""
    s = sizes
    x, y, z = rows
    tiled = z.shape[-1]
    launch = _launch(kernel, s, x.dtype, tiled)
    if summed is not None:  # one stage less is a tenth faster: sums take registers, and spill with three
        launch = launch._replace(stages=min(launch.stages, 2))
    tiles = tiled // launch.tile
    gates = _gates(log_decay, doc_ids, launch.chunk)
    out = z.new_empty(z.shape)
    sums = None if summed is None else states.new_empty((tiles, *_sums_shape(s, launch)))
    run(
        triton_kernels.walk,
        x,
        s.grid(tiles),
        launch,
        {
            "K": s.keys,
            "V": s.values,
            "C": launch.chunk,
            "TILE": launch.tile,
            **gates.constants,
            "REVERSE": kernel in ("grad_value", "grad_key"),
            "TRANSPOSE": kernel in ("grad_query", "grad_key"),
            "SUM": summed is not None,
        },
        _rows(x, launch.chunk, x.shape[-1]),
        _rows(y, launch.chunk, y.shape[-1]),
        _rows(z, launch.chunk, launch.tile),
        None if summed is None else _rows(summed, launch.chunk, launch.tile),
        _rows(out, launch.chunk, launch.tile),
        *gates,
        states,
        sums,
        s.batch,
        *s.sizes,
    )
    return out, None if sums is None else sums[0] if tiles == 1 else sums.sum(0)


def _walk_key_value(
    rows: tuple[Tensor, Tensor, Tensor, Tensor],
    sizes: _Slice,
    log_decay: Tensor | None,
    doc_ids: Tensor | None,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return dk, dv, and Σ k·dk with flows where the decay is per token, from q, k, v, do; all padded."""
    s = sizes
    q, k, v, do = rows
    if k.dtype == torch.float32 or ("grad_key_value", max(s.keys, s.values)) not in LAUNCHES:
        dv, _ = _walk("grad_value", (k, q, do), s, log_decay, doc_ids, states)
        summed = k if per_token(log_decay) else None
        dk, column = _walk("grad_key", (v, do, q), s, log_decay, doc_ids, states, summed)
        return dk, dv, column
    launch = _launch("grad_key_value", s, k.dtype, s.values)
    gates = _gates(log_decay, doc_ids, launch.chunk)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    column = states.new_empty(_sums_shape(s, launch)) if per_token(log_decay) else None
    run(
        triton_kernels.walk_key_value,
        k,
        s.grid(),
        launch,
        {"K": s.keys, "V": s.values, "C": launch.chunk, **gates.constants, "SUM": column is not None},
        _rows(q, launch.chunk, s.keys),
        _rows(k, launch.chunk, s.keys),
        _rows(v, launch.chunk, s.values),
        _rows(do, launch.chunk, s.values),
        _rows(dk, launch.chunk, s.keys),
        _rows(dv, launch.chunk, s.values),
        *gates,
        states,
        column,
        s.batch,
        *s.sizes,
    )
    return dk, dv, column


def _grad_decay(
    row: Tensor,
    column: Tensor,
    states: Tensor,
    gradients: Tensor,
    log_decay: Tensor,
    doc_ids: Tensor | None,
    s: _Slice,
    chunk: int,
) -> Tensor:
    grad = row.new_empty((s.batch, s.tokens, s.heads))
    run(
        triton_kernels.decay_gradient,
        row,
        s.grid(),
        PLAIN,
        {"SIZE": s.keys * s.values, "PART": PART, "C": chunk, "DOCS": doc_ids is not None},
        row,
        column,
        states,
        gradients,
        _logarithms(log_decay),
        None if doc_ids is None else _documents(doc_ids),
        grad,
        *s.sizes,
    )
    return grad


def summarize(
    k: Tensor, v: Tensor, log_decay: Tensor | None, doc_ids: Tensor | None, wanted: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return _summarized(k, v, log_decay, doc_ids, False, wanted > 0)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    doc_ids: Tensor | None,
    initial_state: Tensor | None,
    blocks: list[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    s = _slice(k, v)
    prefix = _initial_states(blocks, k, v, log_decay, doc_ids, initial_state, reverse=False)
    o, _ = _walk("attend", (_padded(q), _padded(k), _padded(v)), s, log_decay, doc_ids, prefix)
    return _cropped(o, s.heads, v.shape[-1]), [prefix]


def _initial_states(
    blocks: list[Tensor],
    x: Tensor,
    y: Tensor,
    log_decay: Tensor | None,
    doc_ids: Tensor | None,
    edge: Tensor | None,
    reverse: bool,
) -> Tensor:
    """Return the initial state of each block; `blocks` are computed here if they are not given."""
    if blocks:
        (added,) = blocks
        into = torch.empty_like(added)
    else:
        added = into = _blocks(x, y, log_decay, doc_ids, reverse)
    _scan(added, _slice(x, y), reverse, edge, into, None)
    return into


def grad_initial_state(
    q: Tensor, do: Tensor, log_decay: Tensor | None, doc_ids: Tensor | None, wanted: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return _summarized(q, _as(do, q.dtype), log_decay, doc_ids, True, wanted > 0)


def grad_query(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, log_decay: Tensor | None, doc_ids: Tensor | None, kept: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return dq and, where the decay is per token, Σ q·dq per token with the flow per chunk for `decay_gradient`."""
    rows = _padded(_as(do, q.dtype)), _padded(v), _padded(k)
    summed = _padded(q) if per_token(log_decay) else None
    dq, row = _walk("grad_query", rows, _slice(k, v), log_decay, doc_ids, kept[0], summed=summed)
    return _cropped(dq, q.shape[2], q.shape[-1]), [] if row is None else [row]


def grad_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    log_decay: Tensor | None,
    doc_ids: Tensor | None,
    dfinal: Tensor | None,
    dblocks: list[Tensor],
    kept: list[Tensor],
    rest: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor | None]:
    s = _slice(k, v)
    do = _as(do, q.dtype)
    gradients = _initial_states(dblocks, q, do, log_decay, doc_ids, dfinal, reverse=True)
    rows = _padded(q), _padded(k), _padded(v), _padded(do)
    dk, dv, column = _walk_key_value(rows, s, log_decay, doc_ids, gradients)
    dlog = None
    if per_token(log_decay) and column is not None:
        chunk = _launch("grad_query", s, k.dtype, s.keys).chunk
        dlog = _grad_decay(rest[0], column, kept[0], gradients, log_decay, doc_ids, s, chunk)
    return _cropped(dk, s.heads, k.shape[-1]), _cropped(dv, s.heads, v.shape[-1]), dlog
