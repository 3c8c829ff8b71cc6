"""The backward of the delta rule with a decay per head in Triton, for Hopper.

| function | programs |
|---|---|
| `grad_initial_state` | the gradient that each block's outputs send to its initial state; a scan over blocks |
| `grad_query` | a walk that writes every chunk's initial state and U; dq, by chunks |
| `grad_inputs` | the scan, with the gradient of the final state; a walk that writes every chunk's gradients; the rest |

`delta_hopper` takes one walk for each of the last two, where it `fits`, and computes U again instead of reading it.

`kept` is that of `delta_triton_forward`. `dblocks` is what each block's outputs send to its initial state,
[B, H, NB, V, K] fp32. `rest` is, of every chunk, its initial state [B, H, n, V, K], U [B, H, n, V, C] and the gradient
of Q Kᵀ [B, H, n, C, C] in the dtype of k, and where the decay is per token Σ q·dq [B, T, H] fp32; that of
`delta_hopper` is only the first and, by chunk, the last. States are transposed; K and V of what is handed on here are
padded. Signatures: `lasptrain.ops.delta_rule`; programs: `delta_triton_back_kernels`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lasptrain.ops import delta_hopper, delta_triton_back_kernels, per_token
from lasptrain.ops.delta_reference import by_key_head, linear_like, state_like
from lasptrain.ops.delta_triton_forward import summarize
from lasptrain.ops.delta_triton_slice import (
    CHUNK,
    Cut,
    cut,
    fit,
    flat,
    flow_like,
    inverse_rows,
    padded,
    pairs_like,
    readable,
    sent_like,
    shared_memory,
    states_like,
    writes_like,
)
from lasptrain.ops.reference import if_wanted
from lasptrain.ops.triton_launch import (
    Launch,
    _as,
    _cropped,
    _rows,
    run,
)

Kernel = Literal["walk_states", "walk_gradients", "query_gradient", "input_gradients"]

# By kernel and padded K, for inputs of 16 bits; `tile` is of V, and halved where V is no multiple of it.
LAUNCHES: dict[tuple[Kernel, int], Launch] = {
    ("walk_states", 64): Launch(CHUNK, 64, 4, 2),
    ("walk_states", 128): Launch(CHUNK, 128, 8, 3),
    ("walk_gradients", 64): Launch(CHUNK, 64, 4, 2),
    ("walk_gradients", 128): Launch(CHUNK, 128, 8, 3),
    ("query_gradient", 64): Launch(CHUNK, 64, 4, 2),
    ("query_gradient", 128): Launch(CHUNK, 64, 4, 2),
    ("input_gradients", 64): Launch(CHUNK, 64, 4, 2),
    ("input_gradients", 128): Launch(CHUNK, 64, 4, 2),
}
LARGE = 220 << 10  # bytes of shared memory; a GPU with less gets these instead
SMALL: dict[tuple[Kernel, int], Launch] = {
    ("walk_states", 128): Launch(CHUNK, 64, 4, 1),
    ("walk_gradients", 128): Launch(CHUNK, 64, 4, 1),
}
EXACT = Launch(CHUNK, 32, 8, 1)  # fp32 inputs
PART = 64  # columns of keys per program that computes the inputs' gradients
SCAN = Launch(0, 16, 8, 2)  # rows of a state per program


def _launch(kernel: Kernel, s: Cut, like: Tensor) -> Launch:
    """Return the launch parameters of a program, for inputs like that."""
    keys, values = padded(s)
    launch = EXACT if like.dtype == torch.float32 else LAUNCHES[kernel, keys]
    if like.is_cuda and launch is not EXACT and shared_memory(like.device.index) < LARGE:
        launch = SMALL.get((kernel, keys), launch)
    return launch if values % launch.tile == 0 else launch._replace(tile=launch.tile // 2)


class _Slice(NamedTuple):
    """Inputs of a slice, as the programs read them."""

    cut: Cut
    k: Tensor
    v: Tensor  # or the gradient of outputs, where values are not known
    inverse: Tensor
    gates: Tensor  # of decays, documents and beta
    flows: bool  # whether the decay is per token, and so has a gradient

    @classmethod
    def of(cls, k: Tensor, v: Tensor, log_decay: Tensor | None, kept: list[Tensor]) -> _Slice:
        return cls(cut(k, v), readable(k), readable(v), kept[0], kept[3], per_token(log_decay))

    @property
    def lines(self) -> tuple[int, int]:
        """Batch and heads."""
        return self.cut.batch, self.cut.heads

    def constants(self, launch: Launch) -> dict[str, int]:
        keys, values = padded(self.cut)
        return {"K": keys, "V": values, "C": CHUNK, "TILE": launch.tile, "GROUP": self.cut.group}

    def by_block(self, launch: Launch) -> tuple[int, int, int]:
        return self.cut.grid(padded(self.cut)[1] // launch.tile)

    def by_chunk(self) -> tuple[int, int, int]:
        return self.cut.batch * self.cut.chunks * self.cut.heads, 1, 1

    def walk_states(self, prefix: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states that enter chunks and U, from those that enter blocks."""
        keys, values = padded(self.cut)
        launch = _launch("walk_states", self.cut, self.k)
        states, wrote = states_like(self.k, self.cut), writes_like(self.k, self.cut)
        run(
            delta_triton_back_kernels.walk_states,
            self.k,
            self.by_block(launch),
            launch,
            self.constants(launch),
            _rows(self.k, CHUNK, keys),
            _rows(self.v, CHUNK, launch.tile),
            inverse_rows(self.inverse),
            flat(states, launch.tile),
            flat(wrote, launch.tile),
            self.gates,
            fit(prefix, values, keys),
            *self.cut.sizes,
        )
        return states, wrote

    def walk_gradients(self, q: Tensor, do: Tensor, last: Tensor | None) -> tuple[Tensor, ...]:
        """Return what each block's outputs send to its initial state; or, from the gradients of what leaves blocks,
        those of what leaves chunks and those of R.
        """
        if last is None and delta_hopper.fits(self.cut, self.k):
            return (delta_hopper.sent_back(self.cut, q, self.k, readable(do), self.inverse, self.gates),)
        keys, _ = padded(self.cut)
        launch = _launch("walk_gradients", self.cut, self.k)
        first, made = None, tuple[Tensor, ...]()
        if last is None:
            first = sent_like(self.k, self.cut)
        else:
            made = states_like(self.k, self.cut), writes_like(self.k, self.cut)
        run(
            delta_triton_back_kernels.walk_gradients,
            self.k,
            self.by_block(launch),
            launch,
            {**self.constants(launch), "KEEP": last is not None},
            _rows(readable(q), CHUNK, keys),
            _rows(self.k, CHUNK, keys),
            _rows(readable(do), CHUNK, launch.tile),
            inverse_rows(self.inverse),
            *((None, None) if last is None else (flat(x, launch.tile) for x in made)),
            self.gates,
            last,
            first,
            *self.cut.sizes,
        )
        return made if first is None else (first,)


def _total(parts: Tensor) -> Tensor:
    """Return the sum of parts [parts, B, T, H]."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


def _scan(
    s: Cut,
    sent: Tensor | None,
    maps: Tensor | None,
    decays: Tensor,
    edge: Tensor | None = None,
    last: Tensor | None = None,
    first: Tensor | None = None,
    linear: Tensor | None = None,
) -> None:
    """Scan the blocks from the right, from `edge`; fill `last`, or `first` and, where there are maps, `linear`."""
    keys, values = padded(s)
    rows = values if linear is None else values + keys
    like = first if last is None else last
    assert like is not None
    run(
        delta_triton_back_kernels.scan_gradients,
        like,
        (rows // SCAN.tile, s.batch * s.heads, 1),
        SCAN,
        {
            "K": keys,
            "V": values,
            "ROWS": SCAN.tile,
            "EDGED": edge is not None,
            "MAPPED": maps is not None,
            "KEEP": last is not None,
        },
        sent,
        maps,
        decays,
        edge,
        last,
        first,
        linear,
        s.blocks,
    )


def dblocks_like(q: Tensor, do: Tensor, beta: Tensor | None, log_decay: Tensor | None, wanted: int) -> list[Tensor]:
    """`dblocks` of `grad_initial_state`."""
    return [sent_like(q, cut(q, do))] if wanted else []


def rest_like(q: Tensor, v: Tensor, beta: Tensor | None, log_decay: Tensor | None) -> list[Tensor]:
    """`rest` of `grad_query`."""
    s = cut(q, v)
    if delta_hopper.fits(s, q):
        return delta_hopper.rest_like(q, s, per_token(log_decay))
    flow = [flow_like(q, s)] if per_token(log_decay) else []
    return [states_like(q, s), writes_like(q, s), pairs_like(q, s), *flow]


def grad_initial_state(
    q: Tensor,
    do: Tensor,
    k: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    doc_ids: Tensor | None,
    kept: list[Tensor],
    wanted: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    dinitial, linear = state_like(k, do), linear_like(k, do, beta, log_decay)
    if not wanted:
        return if_wanted(dinitial, False), if_wanted(linear, False), []
    x = _Slice.of(k, _as(do, q.dtype), log_decay, kept)
    s, (keys, values) = x.cut, padded(x.cut)
    (sent,) = x.walk_gradients(q, x.v, None)
    first = sent.new_empty((*x.lines, keys, values))
    maps, decays, whole = None, kept[4], None
    if wanted == 2 or s.blocks > 1:
        maps = kept[2]
        if not maps.numel():  # of one block, whose outputs need none
            _, _, maps, decays = summarize(k, x.v, beta, log_decay, doc_ids, 2)[2]
        maps, whole = fit(maps, keys, keys), sent.new_empty((*x.lines, keys, keys))
    _scan(s, sent, maps, decays, first=first, linear=whole)
    linear = _cropped(whole, *linear.shape[-2:]) if whole is not None and wanted == 2 else if_wanted(linear, False)
    return _cropped(first, *dinitial.shape[-2:]), linear, [sent]


def _by_key_head(dx: Tensor, like: Tensor) -> Tensor:
    """Return dx [B, T, H, ·] as a gradient of `like` [B, T, Hk, ·]."""
    dx = dx if dx.shape[2] == like.shape[2] else by_key_head(dx, like.shape[2])
    return _cropped(dx.to(like.dtype), like.shape[2], like.shape[-1])


def _heads_like(x: Tensor, s: Cut) -> Tensor:
    """An empty gradient [B, T, H, ·] of x [B, T, Hk, ·], in fp32 if heads are to be summed."""
    dtype = x.dtype if s.group == 1 else torch.float32
    return x.new_empty((s.batch, s.tokens, s.heads, x.shape[-1]), dtype=dtype)


def grad_query(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    doc_ids: Tensor | None,
    kept: list[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    x = _Slice.of(k, v, log_decay, kept)
    if delta_hopper.fits(x.cut, x.k):
        dout = readable(_as(do, q.dtype))
        dq, rest = delta_hopper.query_gradients(
            x.cut, q, x.k, x.v, dout, x.inverse, x.gates, kept[1], per_token(log_decay)
        )
        return _by_key_head(dq, q), rest
    states, wrote = x.walk_states(kept[1])
    s, rows, (keys, _) = x.cut, readable(q), padded(x.cut)
    launch = _launch("query_gradient", s, k)
    dq, dscores = _heads_like(rows, s), pairs_like(k, s)
    flow = flow_like(q, s) if per_token(log_decay) else None
    run(
        delta_triton_back_kernels.query_gradient,
        q,
        x.by_chunk(),
        launch,
        {**x.constants(launch), "FLOWS": x.flows},
        _rows(rows, CHUNK, keys),
        _rows(x.k, CHUNK, keys),
        _rows(readable(_as(do, q.dtype)), CHUNK, launch.tile),
        flat(states, launch.tile),
        flat(wrote, launch.tile),
        _rows(dq, CHUNK, keys),
        flat(dscores, CHUNK),
        x.gates,
        flow,
        *s.sizes,
    )
    return _by_key_head(dq, q), [states, wrote, dscores, *([] if flow is None else [flow])]


def _leaving(
    x: _Slice, q: Tensor, do: Tensor, dfinal: Tensor | None, dblocks: list[Tensor], kept: list[Tensor]
) -> Tensor:
    """Return the gradients of what leaves blocks, [B, H, NB, V, K]."""
    s, sent, maps, (keys, values) = x.cut, None, None, padded(x.cut)
    if s.blocks > 1:
        sent = dblocks[0] if dblocks else x.walk_gradients(q, do, None)[0]
        maps = fit(kept[2], keys, keys)
    last = sent_like(x.k, s)
    edge = None if dfinal is None else fit(_as(dfinal, torch.float32), keys, values)
    _scan(s, sent, maps, kept[4], edge, last)
    return last


def grad_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    doc_ids: Tensor | None,
    dfinal: Tensor | None,
    dblocks: list[Tensor],
    kept: list[Tensor],
    rest: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    assert beta is not None
    x = _Slice.of(k, v, log_decay, kept)
    s, (keys, _), do = x.cut, padded(x.cut), _as(do, q.dtype)
    last = _leaving(x, q, do, dfinal, dblocks, kept)
    if delta_hopper.fits(s, x.k):
        dk, dv, dbeta, dlog = delta_hopper.input_gradients(s, q, x.k, x.v, readable(do), x.inverse, x.gates, last, rest)
        dlog = dlog if dlog is None or log_decay is None else _as(dlog, log_decay.dtype)
        return _by_key_head(dk, k), dv, _as(dbeta, beta.dtype), dlog
    dstates, dread = x.walk_gradients(q, do, last)
    launch = _launch("input_gradients", s, k)
    parts = keys // PART
    dk, dv, dbeta = _heads_like(x.k, s), x.v.new_empty(x.v.shape), flow_like(k, s, parts)
    dlog = flow_like(k, s, parts) if per_token(log_decay) else None
    states, wrote, dscores, *flow = rest
    run(
        delta_triton_back_kernels.input_gradients,
        k,
        (s.batch * s.chunks * s.heads * parts, 1, 1),
        launch,
        {
            "K": keys,
            "V": padded(s)[1],
            "C": CHUNK,
            "TILE": launch.tile,
            "PART": PART,
            "GROUP": s.group,
            "FLOWS": x.flows,
        },
        _rows(readable(q), CHUNK, PART),
        _rows(x.k, CHUNK, PART),
        _rows(x.v, CHUNK, launch.tile),
        flat(states, launch.tile, PART),
        flat(wrote, launch.tile),
        flat(dstates, launch.tile, PART),
        flat(dread, launch.tile),
        flat(dscores, CHUNK),
        _rows(dk, CHUNK, PART),
        _rows(dv, CHUNK, launch.tile),
        x.gates,
        flow[0] if flow else None,
        dbeta,
        dlog,
        s.batch,
        *s.sizes,
    )
    dbeta, dlog = _total(dbeta), None if dlog is None else _total(dlog)
    if dlog is not None and log_decay is not None:
        dlog = _as(dlog, log_decay.dtype)
    return _by_key_head(dk, k), _cropped(dv, s.heads, v.shape[-1]), _as(dbeta, beta.dtype), dlog
