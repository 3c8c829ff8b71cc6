# mypy: ignore-errors
"""The programs of `lasptrain.ops.convolution`, and their launches.

A program walks over tokens with the channels of one head, or WIDTH of them: each of its ROWS rows reads LENGTH tokens
in turn and carries the three before along, so that memory is read once. Forward: x → y. Backward: x, dy → dx, from the
gradient g of what silu is given; that of the rows before x; and sums of the weights' gradients over a program. Fewer
than four taps are four, the first of them zero. Weights are [4, C], the present token's last; ROW, BATCH, DROW and
DBATCH are strides of x and dy.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lasptrain.ops.precision import UNIT_EPS
from lasptrain.ops.triton_launch import _device

WIDTH, TILE = 128, 1024  # channels of a program without heads; and times its rows, eight for each of its threads
LENGTH = 128  # tokens that a row walks over
STAGES = 5  # tokens that are loaded ahead, and the present one
REGISTERS = 168  # of a thread of the backward, so that three programs share a multiprocessor
EPS = tl.constexpr(UNIT_EPS)


@triton.jit
def _channels(WIDTH: tl.constexpr, POWER: tl.constexpr, C):
    i = tl.arange(0, POWER)
    c = tl.program_id(1) * WIDTH + i
    return c, (i < WIDTH) & (c < C)


@triton.jit
def _weights(W, BIAS, c, inside, C):
    """Load the weights [1, channels] of the tokens t, t − 1, t − 2, t − 3, and the bias."""
    w0 = tl.load(W + 3 * C + c, mask=inside, other=0.0)[None, :]
    w1 = tl.load(W + 2 * C + c, mask=inside, other=0.0)[None, :]
    w2 = tl.load(W + C + c, mask=inside, other=0.0)[None, :]
    w3 = tl.load(W + c, mask=inside, other=0.0)[None, :]
    bias = tl.zeros_like(w0)
    if BIAS is not None:
        bias += tl.load(BIAS + c, mask=inside, other=0.0)[None, :]
    return w0, w1, w2, w3, bias


@triton.jit
def _document(DOC, t, T):
    """Load the documents of tokens t; before the slice there is document 0."""
    return tl.load(DOC + t, mask=(t >= 0) & (t < T), other=0)


@triton.jit
def _earlier(X, BEFORE, DOC, t, c, inside, T, C, ROW, N, own, DOCS: tl.constexpr):
    """Load x [rows, channels] of tokens t, where it is of the document `own`."""
    known = t < T
    if DOCS:
        known = known & (_document(DOC, t, T) == own)
    x = tl.load(X + t[:, None] * ROW + c[None, :], mask=(known & (t >= 0))[:, None] & inside[None, :], other=0.0)
    before = (known & (t < 0) & (t >= -N))[:, None] & inside[None, :]
    rows = tl.load(BEFORE + (N + t)[:, None] * C + c[None, :], mask=before, other=0.0)
    return x.to(tl.float32) + rows.to(tl.float32)


@triton.jit
def _carried(X, BEFORE, DOC, start, c, inside, T, C, ROW, N, DOCS: tl.constexpr):
    """Load what is carried to the tokens `start`: the document of the one before, and x of the three before."""
    own = _document(DOC, start - 1, T) if DOCS else start
    x1 = _earlier(X, BEFORE, DOC, start - 1, c, inside, T, C, ROW, N, own, DOCS)
    x2 = _earlier(X, BEFORE, DOC, start - 2, c, inside, T, C, ROW, N, own, DOCS)
    return own, x1, x2, _earlier(X, BEFORE, DOC, start - 3, c, inside, T, C, ROW, N, own, DOCS)


@triton.jit(do_not_specialize=["T"])
def convolve(
    X, BEFORE, W, BIAS, DOC, Y, SCALE, T, C, ROW, BATCH, N,
    WIDTH: tl.constexpr, POWER: tl.constexpr, ROWS: tl.constexpr, LENGTH: tl.constexpr, STAGES: tl.constexpr,
    UNIT: tl.constexpr, DOCS: tl.constexpr,
):  # fmt: skip
    """Write y [B, T, C]; grid (programs, heads, B)."""
    batch = tl.program_id(2).to(tl.int64)
    X += batch * BATCH
    Y += batch * T * C
    BEFORE += batch * N * C
    if DOCS:
        DOC += batch * T
    start = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)) * LENGTH
    c, inside = _channels(WIDTH, POWER, C)
    w0, w1, w2, w3, bias = _weights(W, BIAS, c, inside, C)
    own, x1, x2, x3 = _carried(X, BEFORE, DOC, start, c, inside, T, C, ROW, N, DOCS)
    reads = X + start[:, None] * ROW + c[None, :]
    writes = Y + start[:, None] * C + c[None, :]
    for step in tl.range(LENGTH, num_stages=STAGES):
        fits = start + step < T
        known = fits[:, None] & inside[None, :]
        x = tl.load(reads + step * ROW, mask=known, other=0.0).to(tl.float32)
        if DOCS:
            document = tl.load(DOC + start + step, mask=fits, other=0)
            same = (document == own)[:, None]
            own = document
        else:
            same = (start + step >= 0)[:, None]  # always; what is carried as it is would not let it load ahead
        x1, x2, x3 = tl.where(same, x1, 0.0), tl.where(same, x2, 0.0), tl.where(same, x3, 0.0)
        y = bias + w0 * x + w1 * x1 + w2 * x2 + w3 * x3
        y *= tl.sigmoid(y)
        if UNIT:
            y *= tl.rsqrt(tl.sum(y * y, 1) + EPS)[:, None]
        tl.store(writes + step * C, (y * SCALE).to(Y.dtype.element_ty), mask=known)
        x3 = x2
        x2 = x1
        x1 = x


@triton.jit(do_not_specialize=["T"])
def convolve_back(
    X, BEFORE, W, BIAS, DOC, DY, DX, DBEFORE, DW, DBIAS, SCALE, T, C, ROW, BATCH, DROW, DBATCH, N,
    WIDTH: tl.constexpr, POWER: tl.constexpr, ROWS: tl.constexpr, LENGTH: tl.constexpr, STAGES: tl.constexpr,
    UNIT: tl.constexpr, DOCS: tl.constexpr,
):  # fmt: skip
    """Write dx [B, T, C], that of the N rows before, and a program's sums DW [B, programs, 4, C] and DBIAS fp32.

    Grid (programs, heads, B). At token t a row knows all that reaches t − 3; so it walks three tokens further, which
    the next row counts. d1, d2, d3 are what is known so far of the gradients of t − 1, t − 2 and t − 3.
    """
    batch = tl.program_id(2).to(tl.int64)
    X += batch * BATCH
    DY += batch * DBATCH
    DX += batch * T * C
    BEFORE += batch * N * C
    DBEFORE += batch * N * C
    if DOCS:
        DOC += batch * T
    start = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)) * LENGTH
    c, inside = _channels(WIDTH, POWER, C)
    w0, w1, w2, w3, bias = _weights(W, BIAS, c, inside, C)
    own, x1, x2, x3 = _carried(X, BEFORE, DOC, start, c, inside, T, C, ROW, N, DOCS)
    age = tl.full([ROWS], 3, tl.int32)  # tokens of its document before t, at most three
    d1, d2 = tl.zeros([ROWS, POWER], tl.float32), tl.zeros([ROWS, POWER], tl.float32)
    d3 = tl.zeros([ROWS, POWER], tl.float32)
    sum0, sum1 = tl.zeros([ROWS, POWER], tl.float32), tl.zeros([ROWS, POWER], tl.float32)
    sum2, sum3 = tl.zeros([ROWS, POWER], tl.float32), tl.zeros([ROWS, POWER], tl.float32)
    sums = tl.zeros([ROWS, POWER], tl.float32)
    reads = X + start[:, None] * ROW + c[None, :]
    gradients = DY + start[:, None] * DROW + c[None, :]
    writes = DX + (start - 3)[:, None] * C + c[None, :]
    for step in tl.range(LENGTH + 3, num_stages=STAGES):
        t = start + step
        known = (t < T)[:, None] & inside[None, :]
        x = tl.load(reads + step * ROW, mask=known, other=0.0).to(tl.float32)
        g = tl.load(gradients + step * DROW, mask=known, other=0.0).to(tl.float32) * SCALE
        if DOCS:
            document = tl.load(DOC + t, mask=t < T, other=0)
            same = document == own
            own = document
            age = tl.where(same, tl.minimum(age + 1, 3), 0)
        else:
            same = t >= 0  # as above
        x1, x2 = tl.where(same[:, None], x1, 0.0), tl.where(same[:, None], x2, 0.0)
        x3 = tl.where(same[:, None], x3, 0.0)
        z = bias + w0 * x + w1 * x1 + w2 * x2 + w3 * x3
        open = tl.sigmoid(z)
        if UNIT:
            y = z * open
            length = tl.rsqrt(tl.sum(y * y, 1) + EPS)
            along = length * length * length * tl.sum(g * y, 1)
            g = length[:, None] * g - along[:, None] * y
        g *= open * (1 + z * (1 - open))
        counts = tl.where(((step >= 3) | (start == 0))[:, None], g, 0.0)
        sum0 += counts * x
        sum1 += counts * x1
        sum2 += counts * x2
        sum3 += counts * x3
        if DBIAS is not None:
            sums += counts
        if DOCS:
            d1 += w1 * tl.where((age >= 1)[:, None], g, 0.0)
            d2 += w2 * tl.where((age >= 2)[:, None], g, 0.0)
            d3 += w3 * tl.where((age >= 3)[:, None], g, 0.0)
        else:
            d1 += w1 * g
            d2 += w2 * g
            d3 += w3 * g
        done = ((t < T + 3) & (step >= 3))[:, None] & inside[None, :]
        tl.store(writes + step * C, d3.to(DX.dtype.element_ty), mask=done)
        if step < 3:
            before = ((start == 0) & (t >= 3 - N))[:, None] & inside[None, :]
            rows = DBEFORE + (N + t - 3)[:, None] * C + c[None, :]
            tl.store(rows, d3.to(DBEFORE.dtype.element_ty), mask=before)
        d3 = d2
        d2 = d1
        d1 = w0 * g
        x3 = x2
        x2 = x1
        x1 = x
    here = batch * tl.num_programs(0) + tl.program_id(0)
    out = DW + here * 4 * C + c
    tl.store(out + 3 * C, tl.sum(sum0, 0), mask=inside)
    tl.store(out + 2 * C, tl.sum(sum1, 0), mask=inside)
    tl.store(out + C, tl.sum(sum2, 0), mask=inside)
    tl.store(out, tl.sum(sum3, 0), mask=inside)
    if DBIAS is not None:
        tl.store(DBIAS + here * C + c, tl.sum(sums, 0), mask=inside)


def _rows(x: Tensor) -> Tensor:
    """Return x [B, T, C] whose channels are neighbours in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _taps(weight: Tensor) -> Tensor:
    """Return weights [4, C] of weights [C, n + 1]."""
    return F.pad(weight, [4 - weight.shape[1], 0]).t().contiguous()


def _launch(x: Tensor, doc_ids: Tensor | None, head: int) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Return the grid and the constants of programs over x [B, T, C]."""
    b, t, c = x.shape
    width = head or WIDTH
    power = triton.next_power_of_2(width)
    rows = max(1, TILE // power)
    sizes = {"WIDTH": width, "POWER": power, "ROWS": rows, "LENGTH": LENGTH, "STAGES": STAGES}
    grid = triton.cdiv(t, rows * LENGTH), triton.cdiv(c, width), b
    return grid, sizes | {"UNIT": head > 0, "DOCS": doc_ids is not None}


def forward(
    x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None, doc_ids: Tensor | None, head: int, scale: float
) -> Tensor:
    x, before = _rows(x), before.contiguous()
    doc_ids = None if doc_ids is None else doc_ids.contiguous()
    (_, t, c), y = x.shape, x.new_empty(x.shape)
    grid, sizes = _launch(x, doc_ids, head)
    strides = x.stride(1), x.stride(0)
    with _device(x):
        convolve[grid](x, before, _taps(weight), bias, doc_ids, y, scale, t, c, *strides, before.shape[1], **sizes)
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
    dy, x, before = _rows(dy), _rows(x), before.contiguous()
    doc_ids = None if doc_ids is None else doc_ids.contiguous()
    b, t, c = x.shape
    dx, dbefore = x.new_empty(x.shape), torch.empty_like(before)
    grid, sizes = _launch(x, doc_ids, head)
    dtaps = x.new_empty(b, grid[0], 4, c, dtype=torch.float32)
    dbias = None if bias is None else x.new_empty(b, grid[0], c, dtype=torch.float32)
    strides = x.stride(1), x.stride(0), dy.stride(1), dy.stride(0)
    given = x, before, _taps(weight), bias, doc_ids, dy
    with _device(x):
        convolve_back[grid](
            *given, dx, dbefore, dtaps, dbias, scale, t, c, *strides, before.shape[1], **sizes, maxnreg=REGISTERS
        )
    dweight = dtaps.sum((0, 1))[4 - weight.shape[1] :].t().to(weight.dtype).contiguous()
    return dx, dbefore, dweight, weight.new_empty(c) if dbias is None else dbias.sum((0, 1)).to(weight.dtype)
