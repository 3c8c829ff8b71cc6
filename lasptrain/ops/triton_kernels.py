# mypy: ignore-errors
"""Triton programs of linear attention with decay; `triton_launch` launches them.

A slice is cut into NB blocks of L tokens, a block into chunks of C tokens. One program walks the chunks of one block of
one head with the state in registers, in time or against it. Against time, the gradient takes the state's place: it
flows from right to left through the same decays, so that every program here serves both directions.

Decays are products of a ≤ 1 inside one chunk only, as differences of cumulative logarithms that never exceed 0. A
document boundary is a decay of zero.

Arguments common to the programs:

| name | meaning |
|---|---|
| `x`, `y`, … | tensor descriptors of [B, H, T, K or V]; reads and writes past T are harmless |
| `LOG_DECAY` | [H] or [B, T, H] fp32, see `DECAY` |
| `DOC`, `COUNTS` | doc_ids [B, T] int32 and the output of `count_documents`, where `DOCS` |
| `BLOCKS` | [B, H, NB + 1, K·V + 4] fp32: per block the state that it adds and its decay |
| `STATES` | the same layout with the initial state of each block, made by `scan_blocks` |
| `DECAY` | 0 none · 1 constant per head · 2 per token |
"""

import triton
import triton.language as tl

PRECISION = tl.constexpr("tf32x3")  # of fp32 inputs: three tensor-core products that together are exact to fp32
LOG2_E = tl.constexpr(1.4426950408889634)
SIZES = ["B", "T", "H", "NB", "L"]  # one compilation serves every length
# Stronger decays are clamped to this one: what 2^-64 leaves is invisible beside a token, and a chunk's sum stays within
# 2^12, so that a weak decay behind strong ones keeps the precision of 16-bit inputs.
SMALLEST_LOG2 = tl.constexpr(-64.0)
STEPS = tl.constexpr(256.0)  # per unit of log2; sums of whole steps within 2^12 are exact in fp32


@triton.jit
def _place(NB, H, TILES):
    """Return batch, head, block and tile of this program. Heads vary fast: rows of neighbouring heads are adjacent."""
    pid = tl.program_id(0)
    tile = pid % TILES
    rest = pid // TILES
    head = rest % H
    rest = rest // H
    return rest // NB, head, rest % NB, tile


@triton.jit
def _head_log2_decay(LOG_DECAY, head, DECAY: tl.constexpr):
    log2 = 0.0
    if DECAY == 1:
        log2 = tl.maximum(tl.load(LOG_DECAY + head) * LOG2_E, SMALLEST_LOG2)
    return log2


@triton.jit(do_not_specialize=["T", "CHUNKS"])
def count_documents(DOC, COUNTS, T, CHUNKS, C: tl.constexpr, GROUP: tl.constexpr):
    """Pack what the gates need to know of each chunk's documents into COUNTS [B, CHUNKS] int32; see `_marks`.

    Counts instead of comparisons keep doc_ids out of the walks, where moving them between threads costs a sixth of the
    time. Grid (CHUNKS / GROUP, B).
    """
    chunk = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    batch = tl.program_id(1).to(tl.int64)
    t = chunk * C
    token = t[:, None] + tl.arange(0, C)[None, :]
    doc_ids = tl.load(DOC + batch * T + token, mask=token < T, other=-1)
    before = tl.load(DOC + batch * T + t - 1, mask=(t > 0) & (t < T), other=0)
    after = tl.load(DOC + batch * T + tl.minimum(t + C, T) - 1, mask=t < T, other=0)
    continuing = tl.sum((doc_ids == before[:, None]).to(tl.int32), 1)
    finishing = tl.sum((doc_ids == after[:, None]).to(tl.int32), 1)
    several = (after - before > 1).to(tl.int32)
    tl.store(COUNTS + batch * CHUNKS + chunk, continuing | (finishing << 8) | (several << 16), mask=chunk < CHUNKS)


@triton.jit
def _marks(LOG_DECAY, COUNTS, batch, head, t, T, H, C: tl.constexpr, DECAY: tl.constexpr, DOCS: tl.constexpr):
    """Load the inputs of the gates of the chunk at token t: the log decays of its tokens [C] and its counts.

    Counts: the number of tokens that continue the document before the chunk (8 bits), the number that belong to the
    chunk's last one (8 bits), and a flag for more documents than these two.

    Walks load them one chunk ahead, because nothing else would hide the latency; so t may lie outside the slice.
    """
    i = tl.arange(0, C)
    each = tl.zeros([C], tl.float32)
    counts = tl.minimum(C, T - t) * 257
    if DECAY == 2:
        inside = (t + i >= 0) & (t + i < T)
        each = tl.load(LOG_DECAY + (batch.to(tl.int64) * T + t + i) * H + head, mask=inside, other=0.0)
    if DOCS:
        inside = (t >= 0) & (t < T)
        counts = tl.load(COUNTS + batch.to(tl.int64) * tl.cdiv(T, C) + t // C, mask=inside, other=0)
    return each, counts


@triton.jit
def restarted(sum, ended, following, ends):
    """Join two sums of a scan that starts again wherever `ends` is not 0, and whether it did in either."""
    return tl.where(ends != 0, following, sum + following), ended | ends


@triton.jit
def _begins(DOC, batch, t, T, C: tl.constexpr, DOCS: tl.constexpr):
    """Return 1 for the first tokens of documents in the chunk at token t, else 0, [C] int32."""
    token = t + tl.arange(0, C)
    begins = tl.zeros([C], tl.int32)
    if DOCS:
        at = DOC + batch.to(tl.int64) * T + token
        doc_ids = tl.load(at, mask=token < T, other=0)
        previous = tl.load(at - 1, mask=(token > 0) & (token < T), other=0)
        begins = (doc_ids != previous).to(tl.int32)
    return begins


@triton.jit
def _gates(
    each, counts, log2, DOC, batch, t, T,
    C: tl.constexpr, DECAY: tl.constexpr, DOCS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Compute the decays of the chunk that starts at token t, from its marks.

    Returns `inside` [C], the cumulative log2 of the decay up to and including each token, and `rest` [C], its remainder
    where EXACT; `lead` [C], the weight of the chunk's initial state in each token's output; `fold` [C], the weight of
    each token in the final state; `through`, the weight of the initial state in the final state, and `passing`, its
    log2.

    EXACT, for fp32 inputs with decays per token: `inside` is a sum of whole steps without rounding, however strong the
    decays; `rest` is small, and starts again with each document, so that none depends on another's roundings.
    """
    i = tl.arange(0, C)
    n = tl.minimum(C, T - t)
    if DECAY == 2:
        each = tl.maximum(each * LOG2_E, SMALLEST_LOG2)
        if EXACT:
            part = each
            each = tl.floor(each * STEPS) / STEPS
            part -= each
        inside = tl.cumsum(each, 0)
        total = tl.sum(each, 0)
    else:
        inside = log2 * tl.minimum(i + 1, n).to(tl.float32)  # of n, else the compiler keeps all weights in registers
        total = log2 * n.to(tl.float32)
    continuing = counts & 255
    finishing = (counts >> 8) & 255
    lead = tl.where(i < continuing, tl.exp2(inside), 0.0)
    fold = tl.where(i >= n - finishing, tl.exp2(total - inside), 0.0)
    through = tl.where(continuing == n, tl.exp2(total), 0.0)
    passing = tl.where(continuing == n, total, float("-inf"))
    rest = inside
    if EXACT:
        rest, _ = tl.associative_scan((part, _begins(DOC, batch, t, T, C, DOCS)), 0, restarted)
        remaining = tl.sum(tl.where(i == C - 1, rest, 0.0), 0)
        lead *= tl.exp2(rest)
        fold *= tl.exp2(remaining - rest)
        through *= tl.exp2(remaining)
        passing += remaining
    return inside, rest, lead, fold, through, passing


@triton.jit
def _lag(inside, REVERSE: tl.constexpr):
    """Differences of cumulative logarithms [C, C]; row: the token that is read, column: the token that is written."""
    return inside[:, None] - inside[None, :] if REVERSE else inside[None, :] - inside[:, None]


@triton.jit
def _weights(inside, rest, counts, C: tl.constexpr, REVERSE: tl.constexpr, EXACT: tl.constexpr):
    """Decay between the tokens of a chunk [C, C], as `_lag` lays them out.

    For a chunk of at most two documents; `_apart` handles more.
    """
    i = tl.arange(0, C)
    if REVERSE:
        visible = i[:, None] >= i[None, :]
    else:
        visible = i[:, None] <= i[None, :]
    lag = _lag(inside, REVERSE)
    if EXACT:
        lag += _lag(rest, REVERSE)
    continuing = counts & 255
    visible = visible & ((i[:, None] < continuing) == (i[None, :] < continuing))
    return tl.exp2(tl.where(visible, lag, float("-inf")))


@triton.jit
def _apart(near, DOC, counts, batch, t, T, C: tl.constexpr, DOCS: tl.constexpr):
    """Zero the weights between different documents in near [C, C], where the chunk has more than two documents.

    The branch exists without documents too, never taken: between its halves the compiler spills no registers, which
    makes walks a tenth faster.
    """
    if counts >> 16 > 0:
        token = t + tl.arange(0, C)
        doc_ids = token
        if DOCS:
            doc_ids = tl.load(DOC + batch.to(tl.int64) * T + token, mask=token < T, other=-1)
        near = tl.where(doc_ids[:, None] == doc_ids[None, :], near, 0.0)
    return near


@triton.jit
def _split(x, DTYPE: tl.constexpr):
    """Split fp32 x into two 16-bit parts: x truncated, which is cheaper than rounding, and the remainder."""
    MASK: tl.constexpr = -65536 if tl.bfloat16 == DTYPE else -8192  # the bits that DTYPE has
    high = (x.to(tl.int32, bitcast=True) & MASK).to(tl.float32, bitcast=True)
    return high.to(DTYPE), (x - high).to(DTYPE)


@triton.jit
def _update(state, x, y, weight, through, FINE: tl.constexpr):
    """Return through · state + xᵀ (weight · y). The same side is weighted everywhere.

    FINE where the gradient of a per-token decay is computed from the states: it is a product of two states, which may
    be small where they are not, so the weighted rows keep what 16 bits would drop.
    """
    rows = y * weight[:, None]
    state = state * through
    if FINE and y.dtype != tl.float32:
        high, low = _split(rows, y.dtype)
        return tl.dot(tl.trans(x), low, tl.dot(tl.trans(x), high, state))
    return tl.dot(tl.trans(x), rows.to(y.dtype), state, input_precision=PRECISION)


@triton.jit
def _rows(desc, batch, head, t, column, C: tl.constexpr, WIDTH: tl.constexpr):
    """Load [C, WIDTH] of a tensor from token t; zero past its end."""
    return desc.load([batch, head, t, column]).reshape(C, WIDTH)


@triton.jit
def _store_rows(desc, batch, head, t, column, x, C: tl.constexpr, WIDTH: tl.constexpr):
    desc.store([batch, head, t, column], x.to(desc.dtype).reshape(1, 1, C, WIDTH))


@triton.jit(do_not_specialize=SIZES)
def summarize_blocks(
    x, y, LOG_DECAY, DOC, COUNTS, BLOCKS, T, H, NB, L,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr,
    DECAY: tl.constexpr, DOCS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Write the state Σ xᵀy [K, V] that each block adds, and the block's decay, to BLOCKS; grid B·NB·H·(V / TILE).

    In time: x = k, y = v. Against time: x = q, y = do, the gradient that the block sends to its initial state.
    """
    EXACT: tl.constexpr = DECAY == 2 and x.dtype == tl.float32
    batch, head, block, tile = _place(NB, H, V // TILE)
    log2 = _head_log2_decay(LOG_DECAY, head, DECAY)
    first = block * L
    chunks = tl.cdiv(tl.minimum(L, T - first), C)
    state = tl.zeros([K, TILE], tl.float32)
    decay = 0.0
    t = first + (chunks - 1) * C if REVERSE else first
    each, counts = _marks(LOG_DECAY, COUNTS, batch, head, t, T, H, C, DECAY, DOCS)
    for _ in range(chunks):
        ahead = t - C if REVERSE else t + C
        next_each, next_counts = _marks(LOG_DECAY, COUNTS, batch, head, ahead, T, H, C, DECAY, DOCS)
        a = _rows(x, batch, head, t, 0, C, K)
        b = _rows(y, batch, head, t, tile * TILE, C, TILE)
        _, _, lead, fold, through, passing = _gates(each, counts, log2, DOC, batch, t, T, C, DECAY, DOCS, EXACT)
        state = _update(state, a, b, lead if REVERSE else fold, through, DECAY == 2)
        decay += passing  # a product would accumulate a rounding error per chunk
        t = ahead
        each, counts = next_each, next_counts
    slot = BLOCKS + ((batch * H + head).to(tl.int64) * (NB + 1) + block) * (K * V + 4)
    row = tl.arange(0, K)
    column = tile * TILE + tl.arange(0, TILE)
    tl.store(slot + row[:, None] * V + column[None, :], state)
    if tile == 0:
        tl.store(slot + K * V, tl.exp2(decay))


@triton.jit(do_not_specialize=SIZES)
def scan_blocks(
    BLOCKS, EDGE, STATES, STATE, GAIN, NB, SIZE: tl.constexpr, PART: tl.constexpr,
    REVERSE: tl.constexpr, EDGED: tl.constexpr, KEEP: tl.constexpr, TOTAL: tl.constexpr,
):  # fmt: skip
    """Scan the blocks from EDGE [B·H, SIZE] where EDGED, else from zero; grid (SIZE / PART, B·H).

    KEEP writes the initial state of each block, and behind them the final state, to STATES, which may be BLOCKS. TOTAL
    writes the final state to STATE [B·H, SIZE], and the decay of the slice to GAIN [B·H].
    """
    part = tl.program_id(0)
    line = tl.program_id(1).to(tl.int64)
    offset = part * PART + tl.arange(0, PART)
    state = tl.zeros([PART], tl.float32)
    if EDGED:
        state = tl.load(EDGE + line * SIZE + offset)
    gain = 1.0
    for step in tl.range(NB, num_stages=4):
        at = (line * (NB + 1) + (NB - 1 - step if REVERSE else step)) * (SIZE + 4)
        added = tl.load(BLOCKS + at + offset)
        through = tl.load(BLOCKS + at + SIZE)
        if KEEP:
            tl.store(STATES + at + offset, state)
        state = state * through + added
        gain *= through
    if KEEP:
        tl.store(STATES + (line * (NB + 1) + NB) * (SIZE + 4) + offset, state)
    if TOTAL:
        tl.store(STATE + line * SIZE + offset, state)
        if part == 0:
            tl.store(GAIN + line, gain)


@triton.jit
def _far(state, x, weight, FINE: tl.constexpr):
    """Return weight · state xᵀ; FINE where sums over it cancel."""
    if FINE and x.dtype != tl.float32:
        high, low = _split(state, x.dtype)
        far = tl.dot(high, tl.trans(x), tl.dot(low, tl.trans(x)))
    else:
        far = tl.dot(state.to(x.dtype), tl.trans(x), input_precision=PRECISION)
    return far * weight[None, :]


@triton.jit
def _store_sums(SUMS, line, head, t, T, H, x, dx, flow, C: tl.constexpr):
    """Write Σ x·dx per token of the chunk, x and dx [·, C], to SUMS [·, T + chunks, H]; after them the edge's flow."""
    token = t + tl.arange(0, C)
    start = line.to(tl.int64) * (T + tl.cdiv(T, C))
    tl.store(SUMS + (start + token) * H + head, tl.sum(x.to(tl.float32) * dx, 0), mask=token < T)
    tl.store(SUMS + (start + T + t // C) * H + head, flow)


@triton.jit(do_not_specialize=SIZES)
def walk(
    x, y, z, w, out, LOG_DECAY, DOC, COUNTS, STATES, SUMS, B, T, H, NB, L,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr,
    DECAY: tl.constexpr, DOCS: tl.constexpr, REVERSE: tl.constexpr, TRANSPOSE: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Compute out = (x yᵀ ∘ weights) z + lead · x state by chunks; grid B·NB·H·tiles, tiles of the columns of out.

    Computed transposed, outᵀ = zᵀ (y xᵀ ∘ weightsᵀ) + stateᵀ xᵀ · lead, so that the state goes to the tensor cores from
    registers. The state is kept transposed too: columns of out × depth.

    | | x, y, z | REVERSE | TRANSPOSE |
    |---|---|---|---|
    | o | q, k, v | no | no |
    | dq | do, v, k | no | yes: x stateᵀ |
    | dv | k, q, do | yes | no |
    | dk | v, do, q | yes | yes |

    SUM writes Σ w·out per token to SUMS [tiles, B, T + chunks, H], and after them, per chunk, the flow
    ⟨state, (lead·w)ᵀ x⟩ through its edge.
    """
    WIDTH: tl.constexpr = K if TRANSPOSE else V
    DEPTH: tl.constexpr = V if TRANSPOSE else K
    SIZE: tl.constexpr = K * V
    EXACT: tl.constexpr = DECAY == 2 and x.dtype == tl.float32
    batch, head, block, tile = _place(NB, H, WIDTH // TILE)
    line = (batch * H + head).to(tl.int64)
    log2 = _head_log2_decay(LOG_DECAY, head, DECAY)
    first = block * L
    chunks = tl.cdiv(tl.minimum(L, T - first), C)
    begin = tile * TILE
    row = begin + tl.arange(0, TILE)
    column = tl.arange(0, DEPTH)
    if TRANSPOSE:
        offset = row[:, None] * V + column[None, :]
    else:
        offset = row[:, None] + column[None, :] * V
    state = tl.load(STATES + (line * (NB + 1) + block) * (SIZE + 4) + offset)
    t = first + (chunks - 1) * C if REVERSE else first
    each, counts = _marks(LOG_DECAY, COUNTS, batch, head, t, T, H, C, DECAY, DOCS)
    for _ in range(chunks):
        ahead = t - C if REVERSE else t + C
        next_each, next_counts = _marks(LOG_DECAY, COUNTS, batch, head, ahead, T, H, C, DECAY, DOCS)
        inside, rest, lead, fold, through, _ = _gates(each, counts, log2, DOC, batch, t, T, C, DECAY, DOCS, EXACT)
        if REVERSE:
            lead, fold = fold, lead
        a = _rows(x, batch, head, t, 0, C, DEPTH)
        b = _rows(y, batch, head, t, 0, C, DEPTH)
        c = _rows(z, batch, head, t, begin, C, TILE)
        far = _far(state, a, lead, SUM)
        if SUM:
            d = _rows(w, batch, head, t, begin, C, TILE)
            flow = tl.sum(tl.sum(tl.trans(d) * far, 1), 0)
        near = tl.dot(b, tl.trans(a), input_precision=PRECISION) * _weights(inside, rest, counts, C, REVERSE, EXACT)
        near = _apart(near, DOC, counts, batch, t, T, C, DOCS)
        result = tl.dot(tl.trans(c), near.to(a.dtype), far, input_precision=PRECISION)
        _store_rows(out, batch, head, t, begin, tl.trans(result), C, TILE)
        if SUM:
            _store_sums(SUMS, tile * B + batch, head, t, T, H, tl.trans(d), result, flow, C)
        state = _update(state, c, b, fold, through, SUM)
        t = ahead
        each, counts = next_each, next_counts


@triton.jit(do_not_specialize=SIZES)
def walk_key_value(
    q, k, v, do, dk, dv, LOG_DECAY, DOC, COUNTS, STATES, SUMS, B, T, H, NB, L,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, DOCS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv in one walk against time if the state's gradient fits in registers; grid B·NB·H; see `walk`."""
    SIZE: tl.constexpr = K * V
    EXACT: tl.constexpr = DECAY == 2 and k.dtype == tl.float32
    batch, head, block, _ = _place(NB, H, 1)
    line = (batch * H + head).to(tl.int64)
    log2 = _head_log2_decay(LOG_DECAY, head, DECAY)
    first = block * L
    chunks = tl.cdiv(tl.minimum(L, T - first), C)
    offset = tl.arange(0, K)[:, None] * V + tl.arange(0, V)[None, :]
    state = tl.load(STATES + (line * (NB + 1) + block) * (SIZE + 4) + offset)
    t = first + (chunks - 1) * C
    each, counts = _marks(LOG_DECAY, COUNTS, batch, head, t, T, H, C, DECAY, DOCS)
    for _ in range(chunks):
        next_each, next_counts = _marks(LOG_DECAY, COUNTS, batch, head, t - C, T, H, C, DECAY, DOCS)
        inside, rest, lead, fold, through, _ = _gates(each, counts, log2, DOC, batch, t, T, C, DECAY, DOCS, EXACT)
        weights = _weights(inside, rest, counts, C, True, EXACT)
        cq = _rows(q, batch, head, t, 0, C, K)
        ck = _rows(k, batch, head, t, 0, C, K)
        cv = _rows(v, batch, head, t, 0, C, V)
        cdo = _rows(do, batch, head, t, 0, C, V)
        far = _far(state, cv, fold, SUM)
        if SUM:
            flow = tl.sum(tl.sum(tl.trans(ck) * far, 1), 0)
        near = tl.dot(cdo, tl.trans(cv), input_precision=PRECISION) * weights
        near = _apart(near, DOC, counts, batch, t, T, C, DOCS).to(ck.dtype)
        result = tl.dot(tl.trans(cq), near, far, input_precision=PRECISION)
        _store_rows(dk, batch, head, t, 0, tl.trans(result), C, K)
        if SUM:
            _store_sums(SUMS, batch, head, t, T, H, tl.trans(ck), result, flow, C)
        far = _far(tl.trans(state), ck, fold, False)
        near = tl.dot(cq, tl.trans(ck), input_precision=PRECISION) * weights
        near = _apart(near, DOC, counts, batch, t, T, C, DOCS).to(ck.dtype)
        _store_rows(dv, batch, head, t, 0, tl.trans(tl.dot(tl.trans(cdo), near, far, input_precision=PRECISION)), C, V)
        state = _update(state, cq, cdo, lead, through, SUM)
        t -= C
        each, counts = next_each, next_counts


@triton.jit(do_not_specialize=SIZES)
def decay_gradient(
    ROW, COLUMN, STATES, GRADIENTS, LOG_DECAY, DOC, OUT, T, H, NB, L,
    SIZE: tl.constexpr, PART: tl.constexpr, C: tl.constexpr, DOCS: tl.constexpr,
):  # fmt: skip
    """Write ⟨G_t, a_t S_{t-1}⟩, the gradient of a per-token log decay, to OUT [B, T, H]; grid B·NB·H.

    Summed from t to the end of the sequence, Σ q·dq − Σ k·dk is that gradient, but the sum cancels. So it runs only to
    the nearer edge of t's chunk, where the flow ⟨gradient, state⟩ through the edge stands for all that lies beyond. The
    flow is computed from the states at the block's end and updated from chunk to chunk by what joins and leaves it
    there, in fp32 from the same products as the states. ROW and COLUMN [B, T + chunks, H] are written by `_store_sums`.

    Nothing flows over a decay of zero, which has no gradient; so no sum continues beyond one: it cuts, like the start
    of a document.
    """
    batch, head, block, _ = _place(NB, H, 1)
    line = (batch * H + head).to(tl.int64)
    first = block * L
    chunks = tl.cdiv(tl.minimum(L, T - first), C)
    product = tl.zeros([PART], tl.float32)
    for part in range(0, SIZE, PART):
        offset = part + tl.arange(0, PART)
        gradient = tl.load(GRADIENTS + (line * (NB + 1) + block) * (SIZE + 4) + offset)
        product += gradient * tl.load(STATES + (line * (NB + 1) + block + 1) * (SIZE + 4) + offset)
    flow = tl.sum(product, 0)
    i = tl.arange(0, C)
    start = batch.to(tl.int64) * T
    sums = batch.to(tl.int64) * (T + tl.cdiv(T, C))
    for step in range(chunks):
        t = first + (chunks - 1 - step) * C
        n = tl.minimum(C, T - t)
        at = (sums + t + i) * H + head
        edge = (sums + T + t // C) * H + head
        difference = tl.load(ROW + at, mask=i < n, other=0.0) - tl.load(COLUMN + at, mask=i < n, other=0.0)
        following = flow
        flow -= tl.load(COLUMN + edge)
        here = (start + t + i) * H + head
        cuts = tl.load(LOG_DECAY + here, mask=i < n, other=0.0) * LOG2_E <= SMALLEST_LOG2
        if DOCS:
            cuts = cuts | (_begins(DOC, batch, t, T, C, DOCS) != 0)
        run = tl.cumsum(cuts.to(tl.int32), 0)
        last = tl.sum(cuts.to(tl.int32), 0)
        same = run[:, None] == run[None, :]
        following = tl.where(run == last, following, 0.0)
        flow = tl.where(last == 0, flow, 0.0)
        flow += tl.load(ROW + edge)
        nearer = (run == 0) & (2 * i < tl.minimum(n, tl.sum((run == 0).to(tl.int32), 0)))
        later = same & (i[:, None] <= i[None, :])
        earlier = i[:, None] > i[None, :]
        from_left = flow - tl.sum(tl.where(earlier, difference[None, :], 0.0), 1)
        from_right = following + tl.sum(tl.where(later, difference[None, :], 0.0), 1)
        gradient = tl.where(cuts, 0.0, tl.where(nearer, from_left, from_right))
        tl.store(OUT + here, gradient, mask=i < n)
