# mypy: ignore-errors
"""Triton programs of the delta rule with a decay per head and token; `delta_triton_forward` launches them.

A slice is cut into NB blocks of L tokens, a block into chunks of C tokens. Four programs, in the letters of
`delta_chunked`, with β of a token and the decays `lead`, `fold`, `through` and Γ of a chunk:

    invert_chunks      T = (I + β strict(K Kᵀ))⁻¹ of each chunk, without decays: with them it is T ∘ Γ
    summarize_delta    U and M of each block: a state S that enters it leaves it as M S + U
    scan_maps          the state that enters each block
    walk_delta         R = β (V − lead K S),  U = (T ∘ Γ) R,  O = lead Q S + (Q Kᵀ ∘ Γ) U,  S′ = through S + (fold K)ᵀ U

States are kept transposed, Sᵀ [V, K]: then each product of the walk takes its left operand from registers and its right
one as it was loaded, and rows of V never mix. Decays multiply T exactly, because Γ_ij = Γ_il Γ_lj for i ≥ l ≥ j, also
where Γ is zero. To a block's last state they matter less still: with X = fold (Tᵀ K), S′ = through S + Xᵀ R.

Arguments common to the programs, beside those of `triton_kernels`:

| name | meaning |
|---|---|
| `k`, `q` | tensor descriptors of [B, H / GROUP, T, K] |
| `v`, `out` | of [B, H, T, V] |
| `inverse` | of T, [B, H, chunks · C, C] |
| `BETA` | [B, T, H] fp32 |
| `SUMS` | [B, H, chunks] fp32: log2 of the decay of each chunk |
| `ADDED` | U of each block, transposed: [B, H, NB, VALUES, KEYS] fp32 |
| `MAPS` | M of each block: [B, H, NB, KEYS, KEYS] fp32 |
| `DECAYS` | log2 of the decay over each block, or zero: [B, H, NB] fp32; where nothing is left, `MAPS` is not read |
| `DOC` | doc_ids [B, T] int32, where `DOCS` |
| `PREFIX` | the state that enters each block, and the last one, transposed: [B, H, NB + 1, VALUES, KEYS] fp32 |
| `K`, `V` | powers of two that hold the dims `KEYS`, `VALUES` |
"""

import triton
import triton.language as tl

from lasptrain.ops.triton_kernels import LOG2_E, PRECISION, _begins, _place, _rows, _store_rows, restarted

SIZES = ["T", "H", "NB", "L"]  # one compilation serves every length
NOTHING_LOG2 = tl.constexpr(-40.0)  # what this leaves of a state is invisible in fp32
LARGEST = tl.constexpr(6e4)  # in fp16
# The start of a document is a decay like any other, after which exp2 leaves exactly nothing. Stronger ones are clamped
# to it, so that a chunk's sum stays within 2^16.
CUT_LOG2 = tl.constexpr(-1000.0)
STEPS = tl.constexpr(256.0)  # per unit of log2; sums of whole steps within 2^16 are exact in fp32


@triton.jit
def _betas(BETA, batch, head, t, T, H, C: tl.constexpr):
    """Load β [C] of the chunk at token t, which may lie past the slice; zero there."""
    token = t + tl.arange(0, C)
    return tl.load(BETA + (batch.to(tl.int64) * T + token) * H + head, mask=token < T, other=0.0)


@triton.jit
def _decays(LOG_DECAY, DOC, batch, head, t, T, H, C: tl.constexpr, DECAY: tl.constexpr, DOCS: tl.constexpr):
    """Load log2 of the decays [C] of the chunk at token t, which may lie past the slice; zero there."""
    token = t + tl.arange(0, C)
    known = token < T
    at = batch.to(tl.int64) * T + token
    each = tl.zeros([C], tl.float32)
    if DECAY == 1:
        each = tl.where(known, tl.load(LOG_DECAY + head), 0.0)
    if DECAY == 2:
        each = tl.load(LOG_DECAY + at * H + head, mask=known, other=0.0)
    each = tl.maximum(each * LOG2_E, CUT_LOG2)
    if DOCS:
        each = tl.where(_begins(DOC, batch, t, T, C, DOCS) != 0, CUT_LOG2, each)
    return each


@triton.jit
def _gates(each):
    """Compute the decays of a chunk from their log2 [C].

    Returns `inside` [C], the cumulative log2 of the decay up to and including each token, in whole steps: a sum without
    rounding, however strong the decays; `rest` [C], its small remainder, since the last decay of zero: no document's
    rounding depends on another's; `lead` [C], the decay from the chunk's start to a token; `fold` [C], that from a
    token to the chunk's end; `total`, the log2 of that over the chunk.
    """
    C: tl.constexpr = each.shape[0]
    whole = tl.floor(each * STEPS) / STEPS
    inside = tl.cumsum(whole, 0)
    rest, _ = tl.associative_scan((each - whole, (each <= CUT_LOG2).to(tl.int32)), 0, restarted)
    total = tl.sum(whole, 0)
    remaining = tl.sum(tl.where(tl.arange(0, C) == C - 1, rest, 0.0), 0)
    lead = tl.exp2(inside + rest)
    fold = tl.exp2((total - inside) + (remaining - rest))
    return inside, rest, lead, fold, total + remaining


@triton.jit(do_not_specialize=["T", "H"])
def measure_decays(
    BETA, LOG_DECAY, DOC, GATES, T, H, C: tl.constexpr, DECAY: tl.constexpr, DOCS: tl.constexpr
):  # fmt: skip
    """Write what the programs need to know of the decays and β of a chunk to GATES [B, H, n, 6, C]; grid B·n·H.

    `inside`, the cumulative log2 of the decay up to and including each token in whole steps, which is exact however
    strong the decays; `rest`, its small remainder; `lead`, the decay from the chunk's start to a token, of the last
    token that over the chunk; `fold`, that from a token to the chunk's end; β; and how many tokens of the chunk up to
    this one have a decay of zero, negative if this one has. Tokens past T change nothing.
    """
    total = tl.cdiv(T, C)
    batch, head, chunk, _ = _place(total, H, 1)
    t = chunk * C
    each = _decays(LOG_DECAY, DOC, batch, head, t, T, H, C, DECAY, DOCS)
    inside, rest, lead, fold, _ = _gates(each)
    out = GATES + ((batch * H + head).to(tl.int64) * total + chunk) * (6 * C) + tl.arange(0, C)
    tl.store(out, inside)
    tl.store(out + C, rest)
    tl.store(out + 2 * C, lead)
    tl.store(out + 3 * C, fold)
    tl.store(out + 4 * C, _betas(BETA, batch, head, t, T, H, C))
    zero = each <= CUT_LOG2
    run = tl.cumsum(zero.to(tl.int32), 0).to(tl.float32)
    tl.store(out + 5 * C, tl.where(zero, -run, run))


@triton.jit
def _weights(inside, rest, C: tl.constexpr, TRANSPOSE: tl.constexpr):
    """Decay [C, C] from the token of a column to that of a row, or with TRANSPOSE from row to column; 0 backwards."""
    i = tl.arange(0, C)
    if TRANSPOSE:
        visible = i[:, None] <= i[None, :]
        lag = (inside[None, :] - inside[:, None]) + (rest[None, :] - rest[:, None])
    else:
        visible = i[:, None] >= i[None, :]
        lag = (inside[:, None] - inside[None, :]) + (rest[:, None] - rest[None, :])
    return tl.exp2(tl.where(visible, lag, float("-inf")))


@triton.jit
def _as_operand(x, DTYPE: tl.constexpr):
    """Round fp32 x to DTYPE, within its range."""
    if tl.float16 == DTYPE:
        x = tl.clamp(x, -LARGEST, LARGEST)
    return x.to(DTYPE)


@triton.jit
def _inverse(a, C: tl.constexpr, BASE: tl.constexpr, LEVELS: tl.constexpr, DTYPE: tl.constexpr):
    """Return (I + a)⁻¹ for a [C, C] that is zero on and above the diagonal; C is BASE · 2^LEVELS.

    Blocks of BASE rows on the diagonal are inverted together by substitution, which is exact however large powers of a
    are. Then each pair of neighbours gets the block below, −T₂₂ a₂₁ T₁₁, in products of the whole matrix, of DTYPE.
    """
    BLOCKS: tl.constexpr = C // BASE
    block = tl.arange(0, BLOCKS)
    own = block[:, None, None, None] == block[None, None, :, None]
    near = tl.sum(tl.where(own, tl.reshape(a, [BLOCKS, BASE, BLOCKS, BASE]), 0.0), 2)
    i = tl.arange(0, BASE)
    row = i[None, :, None]
    done = tl.where(row == i[None, None, :], 1.0, tl.zeros_like(near))
    for step in range(1, BASE):
        factors = tl.sum(tl.where(row == step, near, 0.0), 1)
        done = tl.where(row == step, done - tl.sum(factors[:, :, None] * done, 1)[:, None, :], done)
    done = tl.reshape(tl.where(own, done[:, :, None, :], 0.0), [C, C])
    i = tl.arange(0, C)
    for level in tl.static_range(LEVELS):
        half = i // (BASE << level)
        pair = half // 2
        below = (pair[:, None] == pair[None, :]) & (half[:, None] > half[None, :])
        low = _as_operand(done, DTYPE)
        left = tl.dot(low, _as_operand(tl.where(below, a, 0.0), DTYPE), input_precision=PRECISION)
        done -= tl.dot(_as_operand(left, DTYPE), low, input_precision=PRECISION)
    return done


@triton.jit(do_not_specialize=["T", "H", "CHUNKS"])
def invert_chunks(
    k, BETA, LOG_DECAY, DOC, inverse, SUMS, T, H, CHUNKS,
    K: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, DECAY: tl.constexpr, DOCS: tl.constexpr,
    BASE: tl.constexpr, LEVELS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Write T of each chunk and value head to `inverse`, and where SUM its log2 of decay to SUMS; grid B·CHUNKS·H."""
    batch, head, chunk, _ = _place(CHUNKS, H, 1)
    t = chunk * C
    keys = _rows(k, batch, head // GROUP, t, 0, C, K)
    beta = _betas(BETA, batch, head, t, T, H, C)
    i = tl.arange(0, C)
    products = tl.dot(keys, tl.trans(keys), input_precision=PRECISION) * beta[:, None]
    done = _inverse(tl.where(i[:, None] > i[None, :], products, 0.0), C, BASE, LEVELS, inverse.dtype)
    _store_rows(inverse, batch, head, t, 0, _as_operand(done, inverse.dtype), C, C)
    if SUM:
        each = _decays(LOG_DECAY, DOC, batch, head, t, T, H, C, DECAY, DOCS)
        tl.store(SUMS + (batch * H + head).to(tl.int64) * CHUNKS + chunk, tl.sum(each, 0))


@triton.jit
def _kept(SUMS, chunks, GROUP: tl.constexpr):
    """Return from which chunk on anything is left at the end of a block, of its SUMS; and the log2 of its decay."""
    start, behind = 0, 0.0
    for group in range(tl.cdiv(chunks, GROUP)):
        chunk = chunks - (group + 1) * GROUP + tl.arange(0, GROUP)
        each = tl.load(SUMS + chunk, mask=chunk >= 0, other=0.0)
        following = behind + tl.cumsum(each, 0, reverse=True) - each
        start += tl.sum(((following < NOTHING_LOG2) & (chunk >= 0)).to(tl.int32), 0)
        behind += tl.sum(each, 0)
    return start, behind


@triton.jit(do_not_specialize=SIZES)
def summarize_delta(
    k, v, inverse, SUMS, BETA, LOG_DECAY, DOC, ADDED, MAPS, DECAYS, T, H, NB, L,
    K: tl.constexpr, V: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, TILE: tl.constexpr,
    TILES: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, DECAY: tl.constexpr, DOCS: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """Write U and M of each block to ADDED and MAPS, and its decay to DECAYS; grid B·NB·H·TILES.

    Both are the last state of one walk of V + K columns, of which the K of M start as the identity and are written
    nothing. Without MAPS the tiles of M are not launched. Where SUM, chunks of which nothing remains at the end of the
    block are left out.
    """
    batch, head, block, tile = _place(NB, H, TILES)
    line = (batch * H + head).to(tl.int64)
    begin = tile * TILE
    column = begin + tl.arange(0, TILE)
    channel = tl.arange(0, K)
    first = block * L
    state = tl.where((column - V)[:, None] == channel[None, :], 1.0, 0.0)
    chunks = tl.cdiv(tl.minimum(L, T - first), C)
    start, decay = 0, 0.0
    if SUM:
        start, decay = _kept(SUMS + line * tl.cdiv(T, C) + first // C, chunks, 128)
        if begin >= V:
            start = tl.where(decay < NOTHING_LOG2, chunks, 0)
            state = tl.where(decay < NOTHING_LOG2, 0.0, state)
    t = first + start * C
    each = _decays(LOG_DECAY, DOC, batch, head, t, T, H, C, DECAY, DOCS)
    beta = _betas(BETA, batch, head, t, T, H, C)
    for _ in range(start, chunks):
        ahead = t + C
        next_each = _decays(LOG_DECAY, DOC, batch, head, ahead, T, H, C, DECAY, DOCS)
        next_beta = _betas(BETA, batch, head, ahead, T, H, C)
        _, _, lead, fold, total = _gates(each)
        keys = _rows(k, batch, head // GROUP, t, 0, C, K)
        values = _rows(v, batch, head, t, begin, C, TILE)  # zero beyond the last column, so for M
        transform = _rows(inverse, batch, head, t, 0, C, C)
        x = tl.dot(tl.trans(transform.to(keys.dtype)), keys, input_precision=PRECISION) * (beta * fold)[:, None]
        read = tl.dot(state.to(keys.dtype), tl.trans(keys), input_precision=PRECISION)
        missing = tl.trans(values).to(tl.float32) - lead[None, :] * read
        state = tl.dot(missing.to(keys.dtype), x.to(keys.dtype), state * tl.exp2(total), input_precision=PRECISION)
        t = ahead
        each, beta = next_each, next_beta
    here = line * NB + block
    inside = (column < VALUES)[:, None] & (channel < KEYS)[None, :]
    tl.store(ADDED + here * (VALUES * KEYS) + column[:, None] * KEYS + channel[None, :], state, mask=inside)
    if MAPS is not None:
        column -= V
        inside = ((column >= 0) & (column < KEYS))[:, None] & (channel < KEYS)[None, :]
        tl.store(MAPS + here * (KEYS * KEYS) + channel[None, :] * KEYS + column[:, None], state, mask=inside)
        if begin == V:
            tl.store(DECAYS + here, decay)


@triton.jit(do_not_specialize=["NB"])
def scan_maps(
    ADDED, MAPS, DECAYS, EDGE, PREFIX, STATE, LINEAR, NB,
    K: tl.constexpr, V: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, PART: tl.constexpr,
    TILES: tl.constexpr, EDGED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Scan the blocks from EDGE [B·H, KEYS, VALUES] where EDGED, else from zero; grid (TILES, B·H).

    KEEP writes the state that enters each block to PREFIX; what leaves the last is not looked at. Otherwise that is
    written to STATE [B·H, KEYS, VALUES], by the tiles of PART columns of V, and by those that follow the product of all
    maps to LINEAR [B·H, KEYS, KEYS].
    """
    begin = tl.program_id(0) * PART
    line = tl.program_id(1).to(tl.int64)
    column = begin + tl.arange(0, PART)
    channel = tl.arange(0, K)
    inside = (column < VALUES)[:, None] & (channel < KEYS)[None, :]
    square = (channel < KEYS)[:, None] & (channel < KEYS)[None, :]
    state = tl.where((column - V)[:, None] == channel[None, :], 1.0, 0.0)
    if EDGED:
        offset = channel[None, :] * VALUES + column[:, None]
        state += tl.load(EDGE + line * (KEYS * VALUES) + offset, mask=inside, other=0.0)
    for block in range(NB):
        if KEEP:
            at = (line * (NB + 1) + block) * (VALUES * KEYS)
            tl.store(PREFIX + at + column[:, None] * KEYS + channel[None, :], state, mask=inside)
        if (block + 1 < NB) | (not KEEP):
            here = line * NB + block
            added = ADDED + here * (VALUES * KEYS) + column[:, None] * KEYS + channel[None, :]
            following = tl.load(added, mask=inside, other=0.0)
            if tl.load(DECAYS + here) >= NOTHING_LOG2:
                maps = MAPS + here * (KEYS * KEYS) + channel[None, :] * KEYS + channel[:, None]
                maps = tl.load(maps, mask=square, other=0.0)
                following = tl.dot(state, maps, following, input_precision=PRECISION)
            state = following
    if STATE is not None:
        offset = channel[None, :] * VALUES + column[:, None]
        tl.store(STATE + line * (KEYS * VALUES) + offset, state, mask=inside)
    if LINEAR is not None:
        column -= V
        inside = ((column >= 0) & (column < KEYS))[:, None] & (channel < KEYS)[None, :]
        tl.store(LINEAR + line * (KEYS * KEYS) + channel[None, :] * KEYS + column[:, None], state, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def walk_delta(
    q, k, v, inverse, out, BETA, LOG_DECAY, DOC, PREFIX, T, H, NB, L,
    K: tl.constexpr, V: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, TILE: tl.constexpr,
    C: tl.constexpr, GROUP: tl.constexpr, DECAY: tl.constexpr, DOCS: tl.constexpr,
):  # fmt: skip
    """Write outputs, from the states that enter blocks, and the state behind the last block; grid B·NB·H·(V / TILE)."""
    batch, head, block, tile = _place(NB, H, V // TILE)
    begin = tile * TILE
    first = block * L
    column = begin + tl.arange(0, TILE)
    channel = tl.arange(0, K)
    within = (column < VALUES)[:, None] & (channel < KEYS)[None, :]
    line = (batch * H + head).to(tl.int64)
    states = PREFIX + (line * (NB + 1) + block) * (VALUES * KEYS)
    state = tl.load(states + column[:, None] * KEYS + channel[None, :], mask=within, other=0.0)
    t = first
    each = _decays(LOG_DECAY, DOC, batch, head, t, T, H, C, DECAY, DOCS)
    beta = _betas(BETA, batch, head, t, T, H, C)
    for _ in range(tl.cdiv(tl.minimum(L, T - first), C)):
        ahead = t + C
        next_each = _decays(LOG_DECAY, DOC, batch, head, ahead, T, H, C, DECAY, DOCS)
        next_beta = _betas(BETA, batch, head, ahead, T, H, C)
        inside, rest, lead, fold, total = _gates(each)
        keys = _rows(k, batch, head // GROUP, t, 0, C, K)
        low = state.to(keys.dtype)
        read = tl.dot(low, tl.trans(keys), input_precision=PRECISION) * lead[None, :]
        values = _rows(v, batch, head, t, begin, C, TILE)
        missing = tl.trans(values).to(tl.float32) - read
        transform = _rows(inverse, batch, head, t, 0, C, C)
        decayed = transform.to(tl.float32) * _weights(inside, rest, C, False) * beta[None, :]
        missing = _as_operand(missing, transform.dtype)
        wrote = tl.dot(missing, tl.trans(decayed.to(transform.dtype)), input_precision=PRECISION)
        queries = _rows(q, batch, head // GROUP, t, 0, C, K)
        near = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * _weights(inside, rest, C, True)
        far = tl.dot(low, tl.trans(queries), input_precision=PRECISION) * lead[None, :]
        result = tl.dot(wrote.to(keys.dtype), near.to(keys.dtype), far, input_precision=PRECISION)
        _store_rows(out, batch, head, t, begin, tl.trans(result), C, TILE)
        wrote = (wrote * fold[None, :]).to(keys.dtype)
        state = tl.dot(wrote, keys, state * tl.exp2(total), input_precision=PRECISION)
        t = ahead
        each, beta = next_each, next_beta
    if block == NB - 1:
        tl.store(states + VALUES * KEYS + column[:, None] * KEYS + channel[None, :], state, mask=within)
