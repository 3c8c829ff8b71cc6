# mypy: ignore-errors
"""The programs of `lasptrain.ops.convolution`, and their launches.

A program has the channels of one head, or WIDTH of them, of BT tokens at a time; rows that several taps read come from
the caches, so memory is read once. Forward: x → y. Backward: x, dy → the gradient g of what silu is given; then g, x →
dx, that of the rows before, and sums of the weights' gradients over STEPS tiles. Weights are [n + 1, C], the present
token's last; ROW, BATCH, DROW and DBATCH are strides of x and dy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasptrain.ops.triton_launch import _device

WIDTH, BT = 128, 32  # channels and tokens of a tile
SHORT, STEPS = 16, 32  # tokens of a tile, and tiles of a program, that sums weights' gradients
EPS = tl.constexpr(1e-6)


@triton.jit
def _channels(WIDTH: tl.constexpr, POWER: tl.constexpr, C):
    i = tl.arange(0, POWER)
    c = tl.program_id(1) * WIDTH + i
    return c, (i < WIDTH) & (c < C)


@triton.jit
def _document(DOC, batch, t, T):
    """Load the documents of tokens t; before the slice there is document 0."""
    return tl.load(DOC + batch * T + t, mask=(t >= 0) & (t < T), other=0)


@triton.jit
def _convolved(X, BEFORE, W, BIAS, DOC, batch, t, first, c, inside, T, C, ROW, N: tl.constexpr, DOCS: tl.constexpr):
    """Return b + Σ_j w_j x_{t−j} [BT, channels] for tokens t, of which `first` is the first."""
    known = t < T
    own = _document(DOC, batch, t, T) if DOCS else t
    x = tl.load(X + t[:, None] * ROW + c[None, :], mask=known[:, None] & inside[None, :], other=0.0)
    y = tl.load(W + N * C + c, mask=inside, other=0.0)[None, :] * x.to(tl.float32)
    if BIAS is not None:
        y += tl.load(BIAS + c, mask=inside, other=0.0)[None, :]
    for j in tl.static_range(1, N + 1):
        at = t - j
        seen = known
        if DOCS:
            seen = seen & (own == _document(DOC, batch, at, T))
        here = (seen & (at >= 0))[:, None] & inside[None, :]
        x = tl.load(X + at[:, None] * ROW + c[None, :], mask=here, other=0.0).to(tl.float32)
        if first < N:
            earlier = (seen & (at < 0))[:, None] & inside[None, :]
            rows = BEFORE + (batch * N + N + at)[:, None] * C + c[None, :]
            x += tl.load(rows, mask=earlier, other=0.0).to(tl.float32)
        y += tl.load(W + (N - j) * C + c, mask=inside, other=0.0)[None, :] * x
    return y


@triton.jit(do_not_specialize=["T"])
def convolve(
    X, BEFORE, W, BIAS, DOC, Y, SCALE, T, C, ROW, BATCH,
    N: tl.constexpr, WIDTH: tl.constexpr, POWER: tl.constexpr, BT: tl.constexpr, UNIT: tl.constexpr,
    DOCS: tl.constexpr,
):  # fmt: skip
    """Write y [B, T, C]; grid (tiles, heads, B)."""
    batch = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BT
    t = first + tl.arange(0, BT)
    c, inside = _channels(WIDTH, POWER, C)
    y = _convolved(X + batch * BATCH, BEFORE, W, BIAS, DOC, batch, t, first, c, inside, T, C, ROW, N, DOCS)
    y *= tl.sigmoid(y)
    if UNIT:
        y *= tl.rsqrt(tl.sum(y * y, 1) + EPS)[:, None]
    known = (t < T)[:, None] & inside[None, :]
    tl.store(Y + (batch * T + t)[:, None] * C + c[None, :], (y * SCALE).to(Y.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["T"])
def convolve_back(
    X, BEFORE, W, BIAS, DOC, DY, G, SCALE, T, C, ROW, BATCH, DROW, DBATCH,
    N: tl.constexpr, WIDTH: tl.constexpr, POWER: tl.constexpr, BT: tl.constexpr, UNIT: tl.constexpr,
    DOCS: tl.constexpr,
):  # fmt: skip
    """Write g [B, T, C]; grid (tiles, heads, B)."""
    batch = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BT
    t = first + tl.arange(0, BT)
    c, inside = _channels(WIDTH, POWER, C)
    known = (t < T)[:, None] & inside[None, :]
    g = tl.load(DY + batch * DBATCH + t[:, None] * DROW + c[None, :], mask=known, other=0.0).to(tl.float32) * SCALE
    z = _convolved(X + batch * BATCH, BEFORE, W, BIAS, DOC, batch, t, first, c, inside, T, C, ROW, N, DOCS)
    open = tl.sigmoid(z)
    if UNIT:
        y = z * open
        length = tl.rsqrt(tl.sum(y * y, 1) + EPS)[:, None]
        y *= length
        g = length * (g - y * tl.sum(g * y, 1)[:, None])
    g *= open * (1 + z * (1 - open))
    tl.store(G + (batch * T + t)[:, None] * C + c[None, :], g.to(G.dtype.element_ty), mask=known)


@triton.jit
def _later(G, DOC, batch, t, own, j, c, inside, T, C, DOCS: tl.constexpr):
    """Load g [tokens, channels] of the tokens t + j; zero where another document is."""
    at = t + j
    seen = (at >= 0) & (at < T)
    if DOCS:
        seen = seen & (own == _document(DOC, batch, at, T))
    rows = G + (batch * T + at)[:, None] * C + c[None, :]
    return tl.load(rows, mask=seen[:, None] & inside[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def convolve_transposed(
    G, X, BEFORE, W, DOC, DX, DBEFORE, DW, DBIAS, T, C, ROW, BATCH,
    N: tl.constexpr, WIDTH: tl.constexpr, POWER: tl.constexpr, BT: tl.constexpr, STEPS: tl.constexpr,
    DOCS: tl.constexpr,
):  # fmt: skip
    """Write dx [B, T, C], and of STEPS tiles the sums DW [B, programs, n + 1, C] and DBIAS [B, programs, C] fp32.

    Grid (programs, heads, B). The last program has the n rows before x, whose gradient is written to DBEFORE [B, n, C].
    """
    batch = tl.program_id(2).to(tl.int64)
    span = tl.program_id(0).to(tl.int64)
    before = span + 1 == tl.num_programs(0)
    c, inside = _channels(WIDTH, POWER, C)
    sum0, sum1 = tl.zeros([BT, POWER], tl.float32), tl.zeros([BT, POWER], tl.float32)
    sum2, sum3 = tl.zeros([BT, POWER], tl.float32), tl.zeros([BT, POWER], tl.float32)
    sums = tl.zeros([BT, POWER], tl.float32)
    w0 = tl.load(W + N * C + c, mask=inside, other=0.0)[None, :]
    end = tl.where(before, 0, T)
    for step in range(tl.where(before, 1, STEPS)):
        t = tl.where(before, -N, (span * STEPS + step) * BT) + tl.arange(0, BT)
        own = _document(DOC, batch, t, T) if DOCS else t
        known = ((t >= 0) & (t < end))[:, None] & inside[None, :]
        x = tl.load(X + batch * BATCH + t[:, None] * ROW + c[None, :], mask=known, other=0.0).to(tl.float32)
        earlier = (t < 0)[:, None] & inside[None, :]
        rows = (batch * N + N + t)[:, None] * C + c[None, :]
        if before:
            x += tl.load(BEFORE + rows, mask=earlier, other=0.0).to(tl.float32)
        g = _later(G, DOC, batch, t, own, 0, c, inside, T, C, DOCS)
        dx = w0 * g
        sum0 += x * g
        if DBIAS is not None:
            sums += tl.where(known, g, 0.0)
        if N >= 1:
            g = _later(G, DOC, batch, t, own, 1, c, inside, T, C, DOCS)
            dx += tl.load(W + (N - 1) * C + c, mask=inside, other=0.0)[None, :] * g
            sum1 += x * g
        if N >= 2:
            g = _later(G, DOC, batch, t, own, 2, c, inside, T, C, DOCS)
            dx += tl.load(W + (N - 2) * C + c, mask=inside, other=0.0)[None, :] * g
            sum2 += x * g
        if N >= 3:
            g = _later(G, DOC, batch, t, own, 3, c, inside, T, C, DOCS)
            dx += tl.load(W + (N - 3) * C + c, mask=inside, other=0.0)[None, :] * g
            sum3 += x * g
        if before:
            tl.store(DBEFORE + rows, dx.to(DBEFORE.dtype.element_ty), mask=earlier)
        else:
            tl.store(DX + (batch * T + t)[:, None] * C + c[None, :], dx.to(DX.dtype.element_ty), mask=known)
    here = batch * tl.num_programs(0) + span
    out = DW + here * (N + 1) * C + c
    tl.store(out + N * C, tl.sum(sum0, 0), mask=inside)
    if N >= 1:
        tl.store(out + (N - 1) * C, tl.sum(sum1, 0), mask=inside)
    if N >= 2:
        tl.store(out + (N - 2) * C, tl.sum(sum2, 0), mask=inside)
    if N >= 3:
        tl.store(out + (N - 3) * C, tl.sum(sum3, 0), mask=inside)
    if DBIAS is not None:
        tl.store(DBIAS + here * C + c, tl.sum(sums, 0), mask=inside)


def _rows(x: Tensor) -> Tensor:
    """Return x [B, T, C] whose channels are neighbours in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _sizes(x: Tensor, weight: Tensor, doc_ids: Tensor | None, head: int) -> dict[str, int | bool]:
    width = head or WIDTH
    return {
        "N": weight.shape[1] - 1,
        "WIDTH": width,
        "POWER": triton.next_power_of_2(width),
        "BT": BT,
        "UNIT": head > 0,
        "DOCS": doc_ids is not None,
    }


def forward(
    x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None, doc_ids: Tensor | None, head: int, scale: float
) -> Tensor:
    x, before, taps = _rows(x), before.contiguous(), weight.t().contiguous()
    doc_ids = None if doc_ids is None else doc_ids.contiguous()
    (b, t, c), sizes = x.shape, _sizes(x, weight, doc_ids, head)
    y = x.new_empty(x.shape)
    grid = triton.cdiv(t, BT), triton.cdiv(c, sizes["WIDTH"]), b
    with _device(x):
        convolve[grid](x, before, taps, bias, doc_ids, y, scale, t, c, x.stride(1), x.stride(0), **sizes)
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    before: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    doc_ids: Tensor | None,
    head: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dy, x, before, taps = _rows(dy), _rows(x), before.contiguous(), weight.t().contiguous()
    doc_ids = None if doc_ids is None else doc_ids.contiguous()
    (b, t, c), sizes = x.shape, _sizes(x, weight, doc_ids, head)
    g, dx, dbefore = x.new_empty(x.shape), x.new_empty(x.shape), torch.empty_like(before)
    spans, heads = triton.cdiv(t, SHORT * STEPS) + 1, triton.cdiv(c, sizes["WIDTH"])
    dtaps = x.new_empty(b, spans, *taps.shape, dtype=torch.float32)
    dbias = None if bias is None else x.new_empty(b, spans, c, dtype=torch.float32)
    strides = x.stride(1), x.stride(0)
    with _device(x):
        convolve_back[triton.cdiv(t, BT), heads, b](
            x, before, taps, bias, doc_ids, dy, g, scale, t, c, *strides, dy.stride(1), dy.stride(0), **sizes
        )
        del sizes["UNIT"]
        convolve_transposed[spans, heads, b](
            g,
            x,
            before,
            taps,
            doc_ids,
            dx,
            dbefore,
            dtaps,
            dbias,
            t,
            c,
            *strides,
            **sizes | {"BT": SHORT, "STEPS": STEPS},
        )
    dweight = dtaps.sum((0, 1)).t().to(weight.dtype).contiguous()
    return dx, dbefore, dweight, weight.new_empty(c) if dbias is None else dbias.sum((0, 1)).to(weight.dtype)
