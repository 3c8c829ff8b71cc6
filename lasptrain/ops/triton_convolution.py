# mypy: ignore-errors
"""The programs of `lasptrain.ops.convolution`, and their launches.

A program has the channels of one head, or WIDTH of them, of BT tokens at a time. Rows that several taps read come from
the caches, so memory is read once. Forward: x → y. Backward: x, dy → the gradient g of what silu is given, and sums of
the weights' gradients over SPAN tokens; then g → dx, and from the first tokens that of the rows before them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasptrain.ops.triton_launch import _device

WIDTH, BT, STEPS = 128, 32, 16  # channels; tokens of a tile; tiles of a program that sums weights' gradients
EPS = tl.constexpr(1e-6)


@triton.jit
def _same(DOC, batch, t, shifted, T, DOCS: tl.constexpr):
    """Return True for tokens t [BT] in the slice whose document is that of token `shifted`; before it is document 0."""
    known = (t >= 0) & (t < T)
    if not DOCS:
        return known
    own = tl.load(DOC + batch * T + t, mask=known, other=0)
    other = tl.load(DOC + batch * T + shifted, mask=(shifted >= 0) & (shifted < T), other=0)
    return known & (own == other)


@triton.jit
def _shifted(X, BEFORE, DOC, batch, t, j, c, inside, T, C, ROW, N: tl.constexpr, DOCS: tl.constexpr):
    """Load x [BT, channels] of the tokens t − j, in fp32; zero where another document is."""
    at = t - j
    seen = _same(DOC, batch, t, at, T, DOCS)
    x = tl.load(X + at[:, None] * ROW + c[None, :], mask=(seen & (at >= 0))[:, None] & inside[None, :], other=0.0)
    x = x.to(tl.float32)
    if N > 0:
        rows = BEFORE + (batch * N + N + at)[:, None] * C + c[None, :]
        earlier = (seen & (at < 0) & (at >= -N))[:, None] & inside[None, :]
        x += tl.load(rows, mask=earlier, other=0.0).to(tl.float32)
    return x


@triton.jit
def _convolved(X, BEFORE, W, BIAS, DOC, batch, t, c, inside, T, C, ROW, N: tl.constexpr, DOCS: tl.constexpr):
    """Return b + Σ_j w_j x_{t−j} [BT, channels]."""
    y = tl.zeros([t.shape[0], c.shape[0]], tl.float32)
    if BIAS is not None:
        y += tl.load(BIAS + c, mask=inside, other=0.0)[None, :]
    for j in tl.static_range(N + 1):
        w = tl.load(W + c * (N + 1) + N - j, mask=inside, other=0.0)
        y += w[None, :] * _shifted(X, BEFORE, DOC, batch, t, j, c, inside, T, C, ROW, N, DOCS)
    return y


@triton.jit
def _channels(WIDTH: tl.constexpr, POWER: tl.constexpr, C):
    i = tl.arange(0, POWER)
    c = tl.program_id(1) * WIDTH + i
    return c, (i < WIDTH) & (c < C)


@triton.jit(do_not_specialize=["T"])
def convolve(
    X, BEFORE, W, BIAS, DOC, Y, SCALE, T, C, ROW, BATCH,
    N: tl.constexpr, WIDTH: tl.constexpr, POWER: tl.constexpr, BT: tl.constexpr, UNIT: tl.constexpr,
    DOCS: tl.constexpr,
):  # fmt: skip
    """Write y [B, T, C]; grid (tiles, heads, B). ROW and BATCH are strides of x."""
    batch = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    c, inside = _channels(WIDTH, POWER, C)
    y = _convolved(X + batch * BATCH, BEFORE, W, BIAS, DOC, batch, t, c, inside, T, C, ROW, N, DOCS)
    y *= tl.sigmoid(y)
    if UNIT:
        y *= tl.rsqrt(tl.sum(y * y, 1) + EPS)[:, None]
    y *= SCALE
    known = (t < T)[:, None] & inside[None, :]
    tl.store(Y + (batch * T + t)[:, None] * C + c[None, :], y.to(Y.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["T"])
def convolve_back(
    X, BEFORE, W, BIAS, DOC, DY, G, DW, DBIAS, SCALE, T, C, ROW, BATCH, DROW, DBATCH,
    N: tl.constexpr, TAPS: tl.constexpr, WIDTH: tl.constexpr, POWER: tl.constexpr, BT: tl.constexpr,
    STEPS: tl.constexpr, UNIT: tl.constexpr, DOCS: tl.constexpr,
):  # fmt: skip
    """Write g [B, T, C], and of STEPS tiles the sums DW [B, programs, C, n + 1] and DBIAS [B, programs, C] fp32.

    Grid (programs, heads, B). DROW and DBATCH are strides of dy; TAPS is a power of two that holds n + 1.
    """
    batch = tl.program_id(2).to(tl.int64)
    c, inside = _channels(WIDTH, POWER, C)
    tap = tl.arange(0, TAPS)
    dw = tl.zeros([TAPS, POWER], tl.float32)
    dbias = tl.zeros([POWER], tl.float32)
    x = X + batch * BATCH
    for step in range(STEPS):
        t = (tl.program_id(0).to(tl.int64) * STEPS + step) * BT + tl.arange(0, BT)
        known = (t < T)[:, None] & inside[None, :]
        z = _convolved(x, BEFORE, W, BIAS, DOC, batch, t, c, inside, T, C, ROW, N, DOCS)
        open = tl.sigmoid(z)
        g = tl.load(DY + batch * DBATCH + t[:, None] * DROW + c[None, :], mask=known, other=0.0).to(tl.float32)
        g *= SCALE
        if UNIT:
            y = z * open
            length = tl.rsqrt(tl.sum(y * y, 1) + EPS)[:, None]
            y *= length
            g = length * (g - y * tl.sum(g * y, 1)[:, None])
        g *= open * (1 + z * (1 - open))
        tl.store(G + (batch * T + t)[:, None] * C + c[None, :], g.to(G.dtype.element_ty), mask=known)
        dbias += tl.sum(g, 0)
        for j in tl.static_range(N + 1):
            sums = tl.sum(g * _shifted(x, BEFORE, DOC, batch, t, j, c, inside, T, C, ROW, N, DOCS), 0)
            dw += tl.where((tap == N - j)[:, None], sums[None, :], 0.0)
    here = (batch * tl.num_programs(0) + tl.program_id(0)) * C + c
    tl.store(DBIAS + here, dbias, mask=inside)
    tl.store(DW + here[None, :] * (N + 1) + tap[:, None], dw, mask=(tap <= N)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["T"])
def convolve_transposed(
    G, W, DOC, DX, DBEFORE, T, C,
    N: tl.constexpr, WIDTH: tl.constexpr, POWER: tl.constexpr, BT: tl.constexpr, DOCS: tl.constexpr,
):  # fmt: skip
    """Write dx [B, T, C], and in the last tile that of the n rows before it [B, n, C]; grid (tiles + 1, ·, B)."""
    batch = tl.program_id(2).to(tl.int64)
    tile = tl.program_id(0).to(tl.int64)
    before = tile + 1 == tl.num_programs(0)
    t = tl.where(before, -N, tile * BT) + tl.arange(0, BT)
    c, inside = _channels(WIDTH, POWER, C)
    dx = tl.zeros([BT, POWER], tl.float32)
    for j in tl.static_range(N + 1):
        later = t + j
        seen = _same(DOC, batch, later, t, T, DOCS)
        rows = G + (batch * T + later)[:, None] * C + c[None, :]
        g = tl.load(rows, mask=seen[:, None] & inside[None, :], other=0.0).to(tl.float32)
        dx += tl.load(W + c * (N + 1) + N - j, mask=inside, other=0.0)[None, :] * g
    known = (t < T)[:, None] & inside[None, :]
    if before:
        if N > 0:
            rows = DBEFORE + (batch * N + N + t)[:, None] * C + c[None, :]
            tl.store(rows, dx.to(DBEFORE.dtype.element_ty), mask=(t < 0)[:, None] & inside[None, :])
    else:
        tl.store(DX + (batch * T + t)[:, None] * C + c[None, :], dx.to(DX.dtype.element_ty), mask=known)


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
    x, before, weight = _rows(x), before.contiguous(), weight.contiguous()
    doc_ids = None if doc_ids is None else doc_ids.contiguous()
    (b, t, c), sizes = x.shape, _sizes(x, weight, doc_ids, head)
    y = x.new_empty(x.shape)
    grid = triton.cdiv(t, BT), triton.cdiv(c, sizes["WIDTH"]), b
    with _device(x):
        convolve[grid](x, before, weight, bias, doc_ids, y, scale, t, c, x.stride(1), x.stride(0), **sizes)
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
    dy, x, before, weight = _rows(dy), _rows(x), before.contiguous(), weight.contiguous()
    doc_ids = None if doc_ids is None else doc_ids.contiguous()
    (b, t, c), sizes = x.shape, _sizes(x, weight, doc_ids, head)
    g, dx, dbefore = x.new_empty(x.shape), x.new_empty(x.shape), torch.empty_like(before)
    spans, heads = triton.cdiv(t, BT * STEPS), triton.cdiv(c, sizes["WIDTH"])
    dweight = weight.new_empty(b, spans, *weight.shape, dtype=torch.float32)
    dbias = weight.new_empty(b, spans, c, dtype=torch.float32)
    strides = x.stride(1), x.stride(0), dy.stride(1), dy.stride(0)
    taps = {"TAPS": triton.next_power_of_2(weight.shape[1]), "STEPS": STEPS}
    with _device(x):
        convolve_back[spans, heads, b](
            x, before, weight, bias, doc_ids, dy, g, dweight, dbias, scale, t, c, *strides, **sizes, **taps
        )
        del sizes["UNIT"]
        tiles = triton.cdiv(t, BT) + 1
        convolve_transposed[tiles, heads, b](g, weight, doc_ids, dx, dbefore, t, c, **sizes)
    return dx, dbefore, dweight.sum((0, 1)).to(weight.dtype), dbias.sum((0, 1)).to(weight.dtype)
