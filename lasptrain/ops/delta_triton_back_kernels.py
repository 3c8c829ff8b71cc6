# mypy: ignore-errors
"""Triton programs of the delta rule's backward, with a decay per head; `delta_triton_back` launches them.

A slice is cut into NB blocks of L tokens, a block into chunks of C tokens; the algebra of a chunk is that of
`delta_chunked`. Two walks, of the states in time and of their gradients against it, write what every chunk meets and
adds; what is parallel over chunks is left to programs without a chain.

States and their gradients are kept transposed, [V, K]: rows never mix, so a program has a tile of them, and every
product of a chain has its left operand in registers, the right one in shared memory. No product has the transpose of
another as its left operand: Triton 3.6 miscompiles that on Hopper.

Arguments common to the programs:

| name | meaning |
|---|---|
| `q`, `k`, `v`, … | tensor descriptors of [B, H, T, K or V]; reads and writes past T are harmless |
| `inverse` | (I + A)⁻¹ of chunks [B, H, n · C, C], of A without decays: with them it is that ∘ their weights |
| `states`, `dstates` | descriptors of what enters chunks and of the gradients of what leaves them, [B, H, n, V, K] |
| `wrote`, `dread` | descriptors of U and of the gradient of R = β (V − (lead K) S), [B, H, n, V, C] |
| `dscores` | descriptor of the gradients of Q Kᵀ in chunks, [B, H, n, C, C] |
| `BETA` | [B, T, H] fp32 |
| `LOG_DECAY` | [H] or [B, T, H] fp32: `DECAY` is 0 none · 1 constant per head · 2 per token |
| `DOC` | doc_ids [B, T] int32, where `DOCS` |
| `GATES` | all that other programs know of these three, from `measure_decays` |
| `GROUP` | value heads of a key head |
| `FLOWS` | whether the gradient of a decay per token is wanted |
"""

import triton
import triton.language as tl

from lasptrain.ops.delta_triton_kernels import NOTHING_LOG2, SIZES, _weights
from lasptrain.ops.triton_kernels import PRECISION, _place, _rows, _store_rows

LEAST = tl.constexpr(1e-10)  # a smaller β is this one where its own gradient is divided by it; a state cannot tell


@triton.jit
def _measured(GATES, line, chunk, total, C: tl.constexpr):
    """Load what `measure_decays` wrote of a chunk, and the decay over it."""
    at = GATES + (line * total + chunk) * (6 * C)
    i = at + tl.arange(0, C)
    through = tl.load(at + 3 * C - 1)
    return tl.load(i), tl.load(i + C), tl.load(i + 2 * C), tl.load(i + 3 * C), tl.load(i + 4 * C), through


@triton.jit
def _reach(GATES, line, chunk, chunks, total, C: tl.constexpr):
    """Number of the first chunks of a block, which begins at `chunk`, of which something is left at its beginning."""
    i = tl.arange(0, C)
    reach = 0
    passed = 0.0
    for begin in range(0, chunks, C):
        known = begin + i < chunks
        last = GATES + (line * total + chunk + begin + i) * (6 * C) + C - 1
        over = tl.load(last, mask=known, other=0.0) + tl.load(last + C, mask=known, other=0.0)
        before = passed + (tl.cumsum(over, 0) - over)
        reach += tl.sum((known & (before >= NOTHING_LOG2)).to(tl.int32), 0)
        passed += tl.sum(over, 0)
    return reach


@triton.jit
def _dot(x, y, sum=None):
    return tl.dot(x, y, sum, input_precision=PRECISION)


@triton.jit(do_not_specialize=SIZES)
def walk_states(
    k, v, inverse, states, wrote, GATES, PREFIX, T, H, NB, L,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write what enters every chunk and what it writes, from PREFIX [B, H, NB + 1, V, K]; grid B·NB·H·(V / TILE)."""
    batch, head, block, tile = _place(NB, H, V // TILE)
    line = (batch * H + head).to(tl.int64)
    total = tl.cdiv(T, C)
    chunks = tl.cdiv(tl.minimum(L, T - block * L), C)
    offset = (tile * TILE + tl.arange(0, TILE))[:, None] * K + tl.arange(0, K)[None, :]
    state = tl.load(PREFIX + (line * (NB + 1) + block) * (V * K) + offset)
    chunk = block * L // C
    for _ in range(chunks):
        inside, rest, lead, fold, beta, through = _measured(GATES, line, chunk, total, C)
        t = chunk * C
        at = ((line * total + chunk) * V + tile * TILE).to(tl.int32)
        ck = _rows(k, batch, head // GROUP, t, 0, C, K)
        cv = _rows(v, batch, head, t, tile * TILE, C, TILE)
        transform = _rows(inverse, batch, head, t, 0, C, C).to(tl.float32) * _weights(inside, rest, C, False)
        states.store([at, 0], state.to(states.dtype))
        missing = tl.trans(cv).to(tl.float32) - _dot(state.to(ck.dtype), tl.trans(ck)) * lead[None, :]
        u = _dot((missing * beta[None, :]).to(ck.dtype), tl.trans(transform.to(ck.dtype)))
        wrote.store([at, 0], u.to(wrote.dtype))
        state = _dot((u * fold[None, :]).to(ck.dtype), ck, state * through)
        chunk += 1


@triton.jit(do_not_specialize=SIZES)
def walk_gradients(
    q, k, do, inverse, dstates, dread, GATES, LAST, FIRST, T, H, NB, L,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Walk the gradients of the states of a block against time; grid B·NB·H·(V / TILE).

    KEEP starts from LAST [B, H, NB, V, K] fp32, the gradient of what leaves the block, and writes that of what leaves
    every chunk, and of its R. Else it starts from zero and writes what the block's outputs alone send to its initial
    state to FIRST [B, H, NB, V, K] fp32.
    """
    batch, head, block, tile = _place(NB, H, V // TILE)
    line = (batch * H + head).to(tl.int64)
    total = tl.cdiv(T, C)
    chunks = tl.cdiv(tl.minimum(L, T - block * L), C)
    offset = (tile * TILE + tl.arange(0, TILE))[:, None] * K + tl.arange(0, K)[None, :]
    state = tl.zeros([TILE, K], tl.float32)
    if KEEP:
        state = tl.load(LAST + (line * NB + block) * (V * K) + offset)
    else:
        chunks = _reach(GATES, line, block * L // C, chunks, total, C)
    chunk = block * L // C + chunks - 1
    for _ in range(chunks):
        inside, rest, lead, fold, beta, through = _measured(GATES, line, chunk, total, C)
        t = chunk * C
        at = ((line * total + chunk) * V + tile * TILE).to(tl.int32)
        cq = _rows(q, batch, head // GROUP, t, 0, C, K)
        ck = _rows(k, batch, head // GROUP, t, 0, C, K)
        cdo = _rows(do, batch, head, t, tile * TILE, C, TILE)
        weights = _weights(inside, rest, C, False)
        transform = (_rows(inverse, batch, head, t, 0, C, C).to(tl.float32) * weights).to(ck.dtype)
        scores = (_dot(cq, tl.trans(ck)) * weights).to(ck.dtype)
        if KEEP:
            dstates.store([at, 0], state.to(dstates.dtype))
        du = _dot(tl.trans(cdo), scores, _dot(state.to(ck.dtype), tl.trans(ck)) * fold[None, :])
        dr = _dot(du.to(ck.dtype), transform)
        if KEEP:
            dread.store([at, 0], dr.to(dread.dtype))
        state = _dot(tl.trans(cdo), (cq.to(tl.float32) * lead[:, None]).to(ck.dtype), state * through)
        state = _dot((-dr * (beta * lead)[None, :]).to(ck.dtype), ck, state)
        chunk -= 1
    if not KEEP:
        tl.store(FIRST + (line * NB + block) * (V * K) + offset, state)


@triton.jit(do_not_specialize=SIZES)
def scan_gradients(
    SENT, MAPS, DECAYS, EDGE, LAST, FIRST, LINEAR, NB,
    K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, EDGED: tl.constexpr, MAPPED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Scan the blocks from the right, from EDGE [B, H, K, V] where EDGED, else from zero; grid (rows / ROWS, B·H).

    SENT [B, H, NB, V, K] is what each block's outputs send to its initial state, MAPS [B, H, NB, K, K] what it does to
    states, DECAYS [B, H, NB] log2 of its decay: not MAPPED, of one block, there are none. KEEP writes the gradient of
    what leaves each block to LAST [B, H, NB, V, K]. Else that of the slice's initial state goes to FIRST [B, H, K, V],
    from V rows, and from K more, where MAPPED, what the slice does to states to LINEAR [B, H, K, K].
    """
    line = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, K)
    offset = row[:, None] * K + column[None, :]
    written = (row < V)[:, None]
    state = tl.where((row - V)[:, None] == column[None, :], 1.0, 0.0)
    if EDGED:
        state += tl.load(EDGE + line * (K * V) + row[:, None] + column[None, :] * V, mask=written, other=0.0)
    for step in range(NB):
        at = line * NB + NB - 1 - step
        if KEEP:
            tl.store(LAST + at * (V * K) + offset, state)
        if MAPPED:
            before = tl.zeros([ROWS, K], tl.float32)
            if tl.load(DECAYS + at) >= NOTHING_LOG2:
                before = _dot(state, tl.load(MAPS + at * (K * K) + column[:, None] * K + column[None, :]))
            state = before
        if MAPPED or not KEEP:
            state += tl.load(SENT + at * (V * K) + offset, mask=written, other=0.0)
    if not KEEP:
        tl.store(FIRST + line * (K * V) + row[:, None] + column[None, :] * V, state, mask=written)
    if MAPPED and not KEEP:
        tl.store(LINEAR + line * (K * K) + offset - V * K, state, mask=(row >= V)[:, None])


@triton.jit
def _decay_gradient(GATES, line, chunk, total, difference, edge, C: tl.constexpr):
    """Gradient [C] of the log decays of a chunk, whose final state and its gradient have the product `edge`.

    Of token t it is the sum of `difference`, what tokens read less what is read of them, from t to the chunk's end, and
    `edge` stands for all that lies beyond. Nothing flows over a decay of zero, which has no gradient: sums end there.
    """
    i = tl.arange(0, C)
    run = tl.load(GATES + (line * total + chunk) * (6 * C) + 5 * C + i)
    number = tl.abs(run)
    later = (number[:, None] == number[None, :]) & (i[:, None] >= i[None, :])
    following = tl.sum(tl.where(later, difference[:, None], 0.0), 0)
    following += tl.where(number == tl.max(number, 0), edge, 0.0)
    return tl.where(run < 0, 0.0, following)


@triton.jit(do_not_specialize=["T", "H"])
def finish_gradients(
    SUMS, FLOW, GATES, DBETA, DLOG, T, H, C: tl.constexpr, SUMS_EACH: tl.constexpr, FLOWS: tl.constexpr
):  # fmt: skip
    """Sum DBETA and DLOG [B, T, H] fp32 from what programs of `delta_hopper_kernels` left of chunks; grid B·n·H.

    SUMS [B, H, n, SUMS_EACH, C] is that of `input_gradients` there, FLOW [B, H, n, 2, C] of `query_gradients`. A β of
    zero was replaced by a small one, by which dv and its sums can be divided.
    """
    total = tl.cdiv(T, C)
    batch, head, chunk, _ = _place(total, H, 1)
    line = (batch * H + head).to(tl.int64)
    i = tl.arange(0, C)
    at = SUMS + (line * total + chunk) * (SUMS_EACH * C) + i
    known = chunk * C + i < T
    token = (batch.to(tl.int64) * T + chunk * C + i) * H + head
    beta = tl.load(GATES + (line * total + chunk) * (6 * C) + 4 * C + i)
    beta = tl.where(tl.abs(beta) < LEAST, LEAST, beta)
    tl.store(DBETA + token, (tl.load(at) + tl.load(at + C) + tl.load(at + 2 * C)) / beta, mask=known)
    if FLOWS:
        flow = FLOW + (line * total + chunk) * (2 * C) + i
        difference = (tl.load(at + 3 * C) + tl.load(at + 4 * C)) + (tl.load(flow) + tl.load(flow + C))
        edges = (tl.load(at + 5 * C) + tl.load(at + 6 * C)) + (tl.load(at + 7 * C) + tl.load(at + 8 * C))
        dlog = _decay_gradient(GATES, line, chunk, total, difference, tl.sum(edges, 0), C)
        tl.store(DLOG + token, dlog, mask=known)


@triton.jit(do_not_specialize=SIZES)
def query_gradient(
    q, k, do, states, wrote, dq, dscores, GATES, FLOW, T, H, NB, L,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
    FLOWS: tl.constexpr,
):  # fmt: skip
    """Compute dq [B, T, H, K] of a chunk, and the gradient of Q Kᵀ; grid B·n·H.

    FLOW [B, T, H] fp32 gets Σ q·dq.
    """
    total = tl.cdiv(T, C)
    batch, head, chunk, _ = _place(total, H, 1)
    line = (batch * H + head).to(tl.int64)
    t = chunk * C
    begin = ((line * total + chunk) * V).to(tl.int32)
    inside, rest, lead, _, _, _ = _measured(GATES, line, chunk, total, C)
    near = tl.zeros([C, C], tl.float32)
    far = tl.zeros([C, K], tl.float32)
    for tile in range(V // TILE):
        cdo = _rows(do, batch, head, t, tile * TILE, C, TILE)
        near = _dot(cdo, wrote.load([begin + tile * TILE, 0]), near)
        far = _dot(cdo, states.load([begin + tile * TILE, 0]), far)
    near *= _weights(inside, rest, C, False)
    far *= lead[:, None]
    dscores.store([(line * total + chunk).to(tl.int32) * C, 0], near.to(dscores.dtype))
    ck = _rows(k, batch, head // GROUP, t, 0, C, K)
    far = _dot(near.to(ck.dtype), ck, far)
    if FLOWS:
        cq = _rows(q, batch, head // GROUP, t, 0, C, K)
        token = t + tl.arange(0, C)
        flow = FLOW + (batch.to(tl.int64) * T + token) * H + head
        tl.store(flow, tl.sum(cq.to(tl.float32) * far, 1), mask=token < T)
    _store_rows(dq, batch, head, t, 0, far, C, K)


@triton.jit(do_not_specialize=["B", *SIZES])
def input_gradients(
    q, k, v, states, wrote, dstates, dread, dscores, dk, dv, GATES, FLOW, DBETA, DLOG, B, T, H, NB, L,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr, PART: tl.constexpr, GROUP: tl.constexpr,
    FLOWS: tl.constexpr,
):  # fmt: skip
    """Compute dk [B, T, H, K], dv [B, T, H, V] and parts of DBETA and DLOG [K / PART, B, T, H] fp32 of a chunk.

    Grid B·n·H·(K / PART): a program has PART columns of keys, so that several fit on a multiprocessor, and its share of
    the tiles of V for dv. What goes to keys as columns is summed transposed, so that A's gradient is needed one way.
    """
    total = tl.cdiv(T, C)
    batch, head, chunk, part = _place(total, H, K // PART)
    line = (batch * H + head).to(tl.int64)
    t = chunk * C
    begin = ((line * total + chunk) * V).to(tl.int32)
    inside, rest, lead, fold, beta, through = _measured(GATES, line, chunk, total, C)
    i = tl.arange(0, C)
    below = tl.zeros([C, C], tl.float32)
    sent = tl.zeros([PART, C], tl.float32)
    erased = tl.zeros([C, PART], tl.float32)
    dbeta = tl.zeros([C], tl.float32)
    flow = 0.0
    for tile in range(V // TILE):
        at = begin + tile * TILE
        u = wrote.load([at, 0])
        dr = dread.load([at, 0])
        state = states.load([at, part * PART])
        dstate = dstates.load([at, part * PART])
        below = _dot(tl.trans(dr), u, below)
        sent = _dot(tl.trans(dstate), u, sent)
        erased = _dot(tl.trans(dr), state, erased)
        if FLOWS:
            flow += tl.sum(tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1), 0)
    for tile in range(part, V // TILE, K // PART):
        rows = tl.trans(dread.load([begin + tile * TILE, 0])).to(tl.float32)
        dbeta += tl.sum(rows * _rows(v, batch, head, t, tile * TILE, C, TILE).to(tl.float32), 1)
        _store_rows(dv, batch, head, t, tile * TILE, rows * beta[:, None], C, TILE)
    cq = _rows(q, batch, head // GROUP, t, part * PART, C, PART)
    ck = _rows(k, batch, head // GROUP, t, part * PART, C, PART)
    # the gradient of A, with its decays
    below *= tl.where(i[:, None] > i[None, :], -_weights(inside, rest, C, False), 0.0)
    sent *= fold[None, :]
    dwritten = -erased * lead[:, None]  # of β K
    token = (batch.to(tl.int64) * T + t + i) * H + head
    out = part * (B.to(tl.int64) * T * H) + token
    if FLOWS:
        passed = tl.sum(tl.sum(tl.trans(ck).to(tl.float32) * sent, 1), 0)
    sent = _dot(tl.trans(cq), dscores.load([(line * total + chunk).to(tl.int32) * C, 0]), sent)
    sent = _dot(tl.trans(ck), (below * beta[:, None]).to(ck.dtype), sent)
    dwritten = _dot(below.to(ck.dtype), ck, dwritten)
    read = tl.sum(ck.to(tl.float32) * dwritten, 1)
    tl.store(DBETA + out, dbeta + read, mask=t + i < T)
    if FLOWS:
        difference = beta * read - tl.sum(tl.trans(ck).to(tl.float32) * sent, 0)
        if part == 0:
            difference += tl.load(FLOW + token, mask=t + i < T, other=0.0)
        dlog = _decay_gradient(GATES, line, chunk, total, difference, passed + through * flow, C)
        tl.store(DLOG + out, dlog, mask=t + i < T)
    _store_rows(dk, batch, head, t, part * PART, tl.trans(sent) + beta[:, None] * dwritten, C, PART)
