# mypy: ignore-errors
"""Programs of the delta rule for Hopper, in Gluon; `delta_hopper` launches them.

They compute what the programs of the same names in `delta_triton_kernels` and `delta_triton_back_kernels` do, for
inputs in bf16 with K = V = 128, whose layouts Triton does not choose well: products of 64 rows by two warpgroups are
computed twice there, and what is loaded is waited for. Letters and arguments are those of the two modules; a block is
walked by one program, whose 8 warps hold the state [V, K] in fp32, in registers. It decays before a chunk's first
product is issued: to read it later, ptxas would wait for all products that are under way.

| layout | of | held by |
|---|---|---|
| `WIDE`, `TALL` | [V, K], [V, C] | 8 warps, rows of V: left operands of products stay in registers |
| `ROWS`, `PAIRS` | [C, K], [C, C] | two warpgroups, half of the columns each |
| `QUARTER` | [C, C] | 4 warps |
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lasptrain.ops.delta_triton_back_kernels import LEAST
from lasptrain.ops.delta_triton_kernels import NOTHING_LOG2, SIZES

# the names of the oldest Triton that has them, and today's
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

C = gl.constexpr(64)
D = gl.constexpr(128)  # K and V
NUMBERS = gl.constexpr(6)  # of each token, from `measure_decays`
ROWS_OF_SUMS = gl.constexpr(9)  # of a chunk, from `input_gradients`

WIDE = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, 128, 16]))
TALL = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, 64, 16]))
ROWS = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, 64, 16]))
PAIRS = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, 32, 16]))
QUARTER = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))
OF_WIDE = gl.constexpr(gl.DotOperandLayout(0, WIDE.value, 2))
OF_TALL = gl.constexpr(gl.DotOperandLayout(0, TALL.value, 2))
OF_QUARTER = gl.constexpr(gl.DotOperandLayout(0, QUARTER.value, 2))
COLUMNS = gl.constexpr(gl.BlockedLayout([16, 1, 1], [1, 2, 16], [1, 2, 2], [2, 1, 0]))  # of blocks: one each thread's
SPREAD = gl.constexpr(gl.BlockedLayout([1, 4, 8], [16, 1, 2], [4, 1, 1], [2, 1, 0]))
EACH = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0]))  # [C, K] by 8 warps
EACH_PAIR = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))  # [C, C] by 8 warps
VECTOR = gl.constexpr(gl.BlockedLayout([1], [32], [8], [0]))
TILE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
CUBE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, order=[2, 1, 0]))
LINE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, order=[0]))


@gluon.jit
def _place(programs, H):
    """Number of this program among `programs` of a line, its head and its batch; heads of one place are neighbours."""
    pid = gl.program_id(0)
    return (pid // H) % programs, pid % H, pid // (H * programs)


@gluon.jit
def _chunks(block, line, T, L):
    """First and last chunk of a block, and the number of a line's first chunk among those of all lines."""
    first = block * L // C
    last = first + (gl.minimum(L, T - block * L) + C - 1) // C - 1
    return first, last, (line * ((T + C - 1) // C)).to(gl.int32)


@gluon.jit
def _barriers(N: gl.constexpr):
    """Allocate N barriers for one arrival each."""
    bars = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(N):
        mbarrier.init(bars.index(n), count=1)
    fence_async_shared()
    _barrier()
    return bars


@gluon.jit
def _published():
    """Make what all warps have written to shared memory readable by products and copies."""
    fence_async_shared()
    _barrier()


@gluon.jit
def _numbers(GATES, at):
    """Load `inside`, `rest`, `lead`, `fold` and β of the chunk `at` as one row, and the decay over the chunk."""
    here = GATES + at.to(gl.int64) * (NUMBERS * C)
    i = gl.arange(0, 8 * C, layout=VECTOR)
    return gl.load(here + i, mask=i < 5 * C, other=0.0), gl.load(here + 3 * C - 1)


@gluon.jit
def _across(lines, number: gl.constexpr, layout: gl.constexpr):
    """Read a number of each token as a row [1, C], from shared memory, where it is in any layout."""
    return lines.slice(number * C, C).load(gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def _down(lines, number: gl.constexpr, layout: gl.constexpr):
    """Read a number of each token as a column [C, 1]."""
    return lines.slice(number * C, C).load(gl.SliceLayout(1, layout))[:, None]


@gluon.jit
def _weights(inside_down, inside_across, rest_down, rest_across, layout: gl.constexpr):
    """Decay [C, C] from the token of a column to that of a row; zero backwards."""
    i = gl.arange(0, C, layout=gl.SliceLayout(1, layout))
    j = gl.arange(0, C, layout=gl.SliceLayout(0, layout))
    lag = (inside_down - inside_across) + (rest_down - rest_across)
    return gl.exp2(gl.where(i[:, None] >= j[None, :], lag, float("-inf")))


@gluon.jit
def _between(lines):
    """Compute the decays [C, C] of a chunk whose numbers are kept."""
    return _weights(
        _down(lines, 0, PAIRS), _across(lines, 0, PAIRS), _down(lines, 1, PAIRS), _across(lines, 1, PAIRS), PAIRS
    )


@gluon.jit
def _transformed(inverse, lines, transform):
    """Write T with the decays, times β, of a chunk whose numbers are kept to `transform`; return the decays [C, C]."""
    weights = _between(lines)
    transform.store((inverse.load(PAIRS).to(gl.float32) * weights * _across(lines, 4, PAIRS)).to(gl.bfloat16))
    return weights


@gluon.jit
def _offset():
    """Offsets [V, K] of a state in memory."""
    rows = gl.arange(0, D, layout=gl.SliceLayout(1, WIDE))
    return rows[:, None] * D + gl.arange(0, D, layout=gl.SliceLayout(0, WIDE))[None, :]


@gluon.jit
def _nonzero(numbers):
    """Return the numbers of a chunk with a β that its gradient can be divided by."""
    beta = gl.arange(0, 8 * C, layout=VECTOR) >= 4 * C
    return gl.where(beta & (gl.abs(numbers) < LEAST), LEAST, numbers)


@gluon.jit
def _zeros(N: gl.constexpr, M: gl.constexpr, layout: gl.constexpr):
    return gl.zeros([N, M], gl.float32, layout)


@gluon.jit
def _row_sums(OUT, x, WIDTH: gl.constexpr):
    """Store the sums of each half of the rows of x [C, WIDTH], which different warps hold, to two rows of OUT."""
    sums = gl.sum(gl.reshape(x, [C, 2, WIDTH // 2]), 2)
    i = gl.arange(0, C, layout=gl.SliceLayout(1, sums.type.layout))
    half = gl.arange(0, 2, layout=gl.SliceLayout(0, sums.type.layout))
    gl.store(OUT + half[None, :] * C + i[:, None], sums)


@gluon.jit
def _add(x, y):
    return x + y


@gluon.jit
def _over(GATES, at, known):
    """Load log2 of the decays over chunks; zero where they are not `known`."""
    last = GATES + at.to(gl.int64) * (NUMBERS * C) + C - 1
    return gl.load(last, mask=known, other=0.0) + gl.load(last + C, mask=known, other=0.0)


@gluon.jit
def _remaining(GATES, at, chunks):
    """Return from which of `chunks` on anything is left at their end; and the log2 of the decay over all."""
    start, behind = 0, 0.0
    for group in range((chunks + 255) // 256):
        chunk = chunks - (group + 1) * 256 + gl.arange(0, 256, layout=VECTOR)
        each = _over(GATES, at + gl.maximum(chunk, 0), chunk >= 0)
        following = behind + gl.associative_scan(each, 0, _add, reverse=True) - each
        start += gl.sum(((following < NOTHING_LOG2) & (chunk >= 0)).to(gl.int32), 0)
        behind += gl.sum(each, 0)
    return start, behind


@gluon.jit
def _reach(GATES, at, chunks):
    """Return of how many of `chunks` anything is left at their beginning."""
    reach, passed = 0, 0.0
    for group in range((chunks + 255) // 256):
        chunk = group * 256 + gl.arange(0, 256, layout=VECTOR)
        each = _over(GATES, at + gl.minimum(chunk, chunks - 1), chunk < chunks)
        before = passed + gl.associative_scan(each, 0, _add) - each
        reach += gl.sum(((before >= NOTHING_LOG2) & (chunk < chunks)).to(gl.int32), 0)
        passed += gl.sum(each, 0)
    return reach


@gluon.jit
def _on_diagonal(blocks):
    """Read blocks [16, 4, 16] (row, block, column) as those on the diagonal of [C, C]."""
    each = blocks.permute((1, 0, 2)).reshape((C, 1, 16)).load(SPREAD)
    row = gl.arange(0, C, layout=gl.SliceLayout(1, gl.SliceLayout(2, SPREAD)))
    block = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, SPREAD)))
    own = gl.expand_dims(row[:, None], 2) // 16 == gl.expand_dims(block[None, :], 2)
    return gl.reshape(gl.where(own, each, 0.0), [C, C])


@gluon.jit(do_not_specialize=["T", "H"])
def invert_chunks(k, inverse, BETA, T, H, GROUP: gl.constexpr):
    """Write T of each chunk and value head to `inverse`; grid B·n·H.

    Blocks of 16 rows on the diagonal are inverted by substitution, each column by one thread; then each pair of
    neighbours gets the block below, in products of fp16.
    """
    chunk, head, batch = _place((T + C - 1) // C, H)
    t = chunk * C
    sk = gl.allocate_shared_memory(gl.bfloat16, [C, D], TILE)
    diagonal = gl.allocate_shared_memory(gl.float32, [16, 4, 16], CUBE)
    below = gl.allocate_shared_memory(gl.float16, [C, C], TILE)
    made = gl.allocate_shared_memory(gl.float16, [C, C], TILE)
    bar = _barriers(1).index(0)
    mbarrier.expect(bar, C * D * 2)
    _load(k, [batch, head // GROUP, t, 0], bar, sk)
    i = gl.arange(0, C, layout=gl.SliceLayout(1, QUARTER))
    j = gl.arange(0, C, layout=gl.SliceLayout(0, QUARTER))
    beta = gl.load(BETA + (batch.to(gl.int64) * T + t + i) * H + head, mask=t + i < T, other=0.0)
    mbarrier.wait(bar, 0)
    a = warpgroup_mma(sk, sk.permute((1, 0)), _zeros(C, C, QUARTER), is_async=True)
    a = warpgroup_mma_wait(0, deps=[a])
    a = gl.where(i[:, None] > j[None, :], a * beta[:, None], 0.0)
    near = gl.where((i[:, None] // 16) == (j[None, :] // 16), a, 0.0)
    diagonal.permute((1, 0, 2)).store(gl.sum(gl.reshape(near, [4, 16, 4, 16]), 2))
    _barrier()
    row = gl.arange(0, 16, layout=gl.SliceLayout(1, gl.SliceLayout(2, COLUMNS)))
    row = gl.expand_dims(row[:, None], 2)
    column = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(1, COLUMNS)))
    column = gl.expand_dims(column[None, :], 1)
    done = gl.where(row == column, 1.0, gl.zeros([16, 4, 16], gl.float32, COLUMNS))
    for step in gl.static_range(1, 16):
        factors = diagonal.slice(step, 1, dim=0).permute((2, 1, 0)).load(COLUMNS)
        sums = gl.sum(factors * done, 0)
        done = gl.where(row == step, done - gl.expand_dims(sums, 0), done)
    _barrier()
    diagonal.store(done)
    _barrier()
    made.store(_on_diagonal(diagonal).to(gl.float16))
    for level in gl.static_range(2):
        half_i = i[:, None] // (16 << level)
        half_j = j[None, :] // (16 << level)
        pair = (half_i // 2 == half_j // 2) & (half_i > half_j)
        below.store(gl.where(pair, a, 0.0).to(gl.float16))
        _published()
        left = warpgroup_mma(made, below, _zeros(C, C, QUARTER), is_async=True)
        left = warpgroup_mma_wait(0, deps=[left])
        left = gl.convert_layout(left.to(gl.float16), OF_QUARTER)
        product = warpgroup_mma(left, made, _zeros(C, C, QUARTER), is_async=True)
        whole = made.load(QUARTER).to(gl.float32)
        product = warpgroup_mma_wait(0, deps=[product])
        _barrier()
        made.store((whole - product).to(gl.float16))
    _published()
    _store(inverse, [batch, head, t, 0], made)
    tma.store_wait(0)


# What loads inputs does so where they are `known`, without branches: products may be under way.
@gluon.jit
def _fetch_one(x, at, buffer, bar, BYTES: gl.constexpr, known):
    mbarrier.expect(bar, BYTES, pred=known)
    _load(x, at, bar, buffer, pred=known)


@gluon.jit
def _fetch_two(x, y, ones, others, bars, stage, batch, head, t, known):
    bar = bars.index(stage)
    mbarrier.expect(bar, 2 * C * D * 2, pred=known)
    _load(x, [batch, head, t, 0], bar, ones.index(stage), pred=known)
    _load(y, [batch, head, t, 0], bar, others.index(stage), pred=known)


@gluon.jit
def _fetch_summary(k, v, inverse, keys, values, inverses, bars, stage, place, column, chunk, last):
    """Load a chunk of k, v and T, if it is not past the last."""
    batch, head, key_head = place
    bar, t, known = bars.index(stage), chunk * C, chunk <= last
    mbarrier.expect(bar, C * (2 * D + C) * 2, pred=known)
    _load(inverse, [batch, head, t, 0], bar, inverses.index(stage), pred=known)
    _load(k, [batch, key_head, t, 0], bar, keys.index(stage), pred=known)
    _load(v, [batch, head, t, column], bar, values.index(stage), pred=known)


@gluon.jit
def _fetch_walk(k, x, v, inverse, keys, others, values, inverses, bars, stage, place, chunk, first, last):
    """Load a chunk of k, x, T and v; `place` is the batch, and the heads of v, k and x."""
    batch, head, key_head, of_x = place
    bar, t, known = bars.index(stage), chunk * C, (chunk >= first) & (chunk <= last)
    mbarrier.expect(bar, C * (3 * D + C) * 2, pred=known)
    _load(k, [batch, key_head, t, 0], bar, keys.index(stage), pred=known)
    _load(x, [batch, of_x, t, 0], bar, others.index(stage), pred=known)
    _load(inverse, [batch, head, t, 0], bar, inverses.index(stage), pred=known)
    _load(v, [batch, head, t, 0], bar, values.index(stage), pred=known)


@gluon.jit(do_not_specialize=SIZES)
def summarize_delta(
    k, v, inverse, GATES, ADDED, MAPS, DECAYS, T, H, NB, L, GROUP: gl.constexpr, TILES: gl.constexpr
):  # fmt: skip
    """Write U, and with two TILES M and the decay, of each block to ADDED, MAPS and DECAYS; grid B·NB·H·TILES.

    M is the last state of a walk from the identity that is written nothing: there v has no more columns, which reads as
    zeros. Chunks of which nothing remains at the end of the block are left out.
    """
    tile, head, batch = _place(NB * TILES, H)
    mapping, block = tile % TILES, tile // TILES
    place = batch, head, head // GROUP
    line = (batch * H + head).to(gl.int64)
    first, last, base = _chunks(block, line, T, L)
    start, decay = _remaining(GATES, base + first, last - first + 1)
    rows = gl.arange(0, D, layout=gl.SliceLayout(1, WIDE))
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, WIDE))
    unit = (rows[:, None] == cols[None, :]) & (mapping == 1) & (decay >= NOTHING_LOG2)
    state = gl.where(unit, 1.0, _zeros(D, D, WIDE))
    if mapping == 1:
        start = gl.where(decay < NOTHING_LOG2, last - first + 1, 0)
    chunk = first + start
    column = mapping * D

    keys = gl.allocate_shared_memory(gl.bfloat16, [2, C, D], TILE)
    values = gl.allocate_shared_memory(gl.bfloat16, [2, C, D], TILE)
    inverses = gl.allocate_shared_memory(gl.float16, [2, C, C], TILE)
    lines = gl.allocate_shared_memory(gl.float32, [8 * C], LINE)
    transforms = gl.allocate_shared_memory(gl.bfloat16, [1, C, C], TILE)
    written = gl.allocate_shared_memory(gl.bfloat16, [1, C, D], TILE)
    bars = _barriers(2)
    for stage in gl.static_range(2):
        _fetch_summary(k, v, inverse, keys, values, inverses, bars, stage, place, column, chunk + stage, last)
    numbers, through = _numbers(GATES, base + gl.minimum(chunk, last))
    stage = 0
    phase = 0
    while chunk <= last:
        zero = chunk >> 24  # not known to be zero, so addresses are made where they are used, not kept in registers
        sk = keys.index(stage)
        transform = transforms.index(zero)
        x = written.index(zero)
        lines.store(numbers)
        low = gl.convert_layout(state.to(gl.bfloat16), OF_TALL)
        state = state * through
        mbarrier.wait(bars.index(stage), phase)
        transform.store(inverses.index(stage).load(EACH_PAIR).to(gl.bfloat16))
        _published()
        made = warpgroup_mma(transform.permute((1, 0)), sk, _zeros(C, D, ROWS), is_async=True)
        read = warpgroup_mma(low, sk.permute((1, 0)), _zeros(D, C, TALL), is_async=True)
        numbers, through = _numbers(GATES, base + gl.minimum(chunk + 1, last))
        value = values.index(stage).permute((1, 0)).load(TALL).to(gl.float32)
        made = warpgroup_mma_wait(1, deps=[made])
        x.store((made * (_down(lines, 3, ROWS) * _down(lines, 4, ROWS))).to(gl.bfloat16))
        fence_async_shared()
        read = warpgroup_mma_wait(0, deps=[read])
        missing = gl.convert_layout((value - read * _across(lines, 2, TALL)).to(gl.bfloat16), OF_WIDE)
        _barrier()
        _fetch_summary(k, v, inverse, keys, values, inverses, bars, stage, place, column, chunk + 2, last)
        state = warpgroup_mma(missing, x, state, is_async=True)
        state = warpgroup_mma_wait(0, deps=[state])
        chunk += 1
        phase ^= stage
        stage ^= 1
    here = (line * NB + block) * (D * D)
    added, maps = rows[:, None] * D + cols[None, :], cols[None, :] * D + rows[:, None]
    if TILES == 1:  # Triton 3.6 does not compile the branch where it knows that it is never taken
        gl.store(ADDED + here + added, state)
    elif mapping == 1:
        gl.store(MAPS + here + maps, state)
        gl.store(DECAYS + line * NB + block, decay)
    else:
        gl.store(ADDED + here + added, state)


@gluon.jit(do_not_specialize=SIZES)
def walk_delta(
    q, k, v, inverse, out, GATES, PREFIX, T, H, NB, L, GROUP: gl.constexpr
):  # fmt: skip
    """Write outputs, from the states that enter blocks, and the state behind the last block; grid B·NB·H."""
    block, head, batch = _place(NB, H)
    key_head = head // GROUP
    place = batch, head, key_head, key_head
    line = (batch * H + head).to(gl.int64)
    chunk, last, base = _chunks(block, line, T, L)
    queries = gl.allocate_shared_memory(gl.bfloat16, [2, C, D], TILE)
    keys = gl.allocate_shared_memory(gl.bfloat16, [2, C, D], TILE)
    values = gl.allocate_shared_memory(gl.bfloat16, [2, C, D], TILE)
    inverses = gl.allocate_shared_memory(gl.float16, [2, C, C], TILE)
    lines = gl.allocate_shared_memory(gl.float32, [8 * C], LINE)
    transforms = gl.allocate_shared_memory(gl.bfloat16, [1, C, C], TILE)
    scores = gl.allocate_shared_memory(gl.bfloat16, [1, C, C], TILE)
    outs = gl.allocate_shared_memory(gl.bfloat16, [1, C, D], TILE)
    bars = _barriers(2)
    for stage in gl.static_range(2):
        _fetch_walk(k, q, v, inverse, keys, queries, values, inverses, bars, stage, place, chunk + stage, chunk, last)
    state = gl.load(PREFIX + (line * (NB + 1) + block) * (D * D) + _offset())
    numbers, through = _numbers(GATES, base + chunk)
    stage = 0
    phase = 0
    while chunk <= last:
        zero = chunk >> 24
        sk = keys.index(stage)
        sq = queries.index(stage)
        transform = transforms.index(zero)
        score = scores.index(zero)
        so = outs.index(zero)
        lines.store(numbers)
        low = gl.convert_layout(state.to(gl.bfloat16), OF_TALL)
        state = state * through
        tma.store_wait(0)
        _barrier()
        mbarrier.wait(bars.index(stage), phase)
        read = warpgroup_mma(low, sk.permute((1, 0)), _zeros(D, C, TALL), is_async=True)
        products = warpgroup_mma(sq, sk.permute((1, 0)), _zeros(C, C, PAIRS), is_async=True)
        o = warpgroup_mma(low, sq.permute((1, 0)), _zeros(D, C, TALL), is_async=True)
        numbers, through = _numbers(GATES, base + gl.minimum(chunk + 1, last))
        weights = _transformed(inverses.index(stage), lines, transform)
        value = values.index(stage).permute((1, 0)).load(TALL).to(gl.float32)
        read, products = warpgroup_mma_wait(1, deps=[read, products])
        score.store((products * weights).to(gl.bfloat16))
        fence_async_shared()
        missing = gl.convert_layout((value - read * _across(lines, 2, TALL)).to(gl.bfloat16), OF_TALL)
        _barrier()
        u = warpgroup_mma(missing, transform.permute((1, 0)), _zeros(D, C, TALL), is_async=True)
        u, o = warpgroup_mma_wait(0, deps=[u, o])
        folded = gl.convert_layout((u * _across(lines, 3, TALL)).to(gl.bfloat16), OF_WIDE)
        state = warpgroup_mma(folded, sk, state, is_async=True)
        u = gl.convert_layout(u.to(gl.bfloat16), OF_TALL)
        o = warpgroup_mma(u, score.permute((1, 0)), o * _across(lines, 2, TALL), is_async=True)
        o, state = warpgroup_mma_wait(0, deps=[o, state])
        so.permute((1, 0)).store(o.to(gl.bfloat16))
        _published()
        _store(out, [batch, head, chunk * C, 0], so)
        _fetch_walk(k, q, v, inverse, keys, queries, values, inverses, bars, stage, place, chunk + 2, chunk, last)
        chunk += 1
        phase ^= stage
        stage ^= 1
    tma.store_wait(0)
    if block + 1 == NB:
        gl.store(PREFIX + (line * (NB + 1) + NB) * (D * D) + _offset(), state)


@gluon.jit(do_not_specialize=SIZES)
def query_gradients(
    q, k, v, do, inverse, states, dq, GATES, PREFIX, FLOW, T, H, NB, L,
    GROUP: gl.constexpr, FLOWS: gl.constexpr,
):  # fmt: skip
    """Write what enters every chunk, and dq [B, T, H, K]; grid B·NB·H.

    FLOW [B, H, n, 2, C] fp32 gets Σ q·dq, of each half of the channels.
    """
    block, head, batch = _place(NB, H)
    key_head = head // GROUP
    place = batch, head, key_head, head
    line = (batch * H + head).to(gl.int64)
    chunk, last, base = _chunks(block, line, T, L)
    keys = gl.allocate_shared_memory(gl.bfloat16, [2, C, D], TILE)
    values = gl.allocate_shared_memory(gl.bfloat16, [2, C, D], TILE)
    dos = gl.allocate_shared_memory(gl.bfloat16, [2, C, D], TILE)
    inverses = gl.allocate_shared_memory(gl.float16, [2, C, C], TILE)
    lines = gl.allocate_shared_memory(gl.float32, [8 * C], LINE)
    transforms = gl.allocate_shared_memory(gl.bfloat16, [1, C, C], TILE)
    near = gl.allocate_shared_memory(gl.bfloat16, [1, C, C], TILE)
    outs = gl.allocate_shared_memory(gl.bfloat16, [1, C, D], TILE)
    lows = gl.allocate_shared_memory(gl.bfloat16, [1, D, D], TILE)
    us = gl.allocate_shared_memory(gl.bfloat16, [1, D, C], TILE)
    queries = gl.allocate_shared_memory(gl.bfloat16, [1, C, D], TILE)
    bars = _barriers(3)
    for stage in gl.static_range(2):
        _fetch_walk(k, do, v, inverse, keys, dos, values, inverses, bars, stage, place, chunk + stage, chunk, last)
    if FLOWS:
        _fetch_one(q, [batch, key_head, chunk * C, 0], queries.index(0), bars.index(2), C * D * 2, True)
    state = gl.load(PREFIX + (line * (NB + 1) + block) * (D * D) + _offset())
    numbers, through = _numbers(GATES, base + chunk)
    stage = 0
    phase = 0
    turn = 0
    while chunk <= last:
        zero = chunk >> 24
        at = base + chunk
        sk = keys.index(stage)
        sdo = dos.index(stage)
        transform = transforms.index(zero)
        ds = near.index(zero)
        so = outs.index(zero)
        low = lows.index(zero)
        su = us.index(zero)
        query = queries.index(zero)
        lines.store(numbers)
        rounded = state.to(gl.bfloat16)
        state = state * through
        tma.store_wait(0)
        _barrier()
        low.store(rounded)
        mbarrier.wait(bars.index(stage), phase)
        rounded = gl.convert_layout(rounded, OF_TALL)
        read = warpgroup_mma(rounded, sk.permute((1, 0)), _zeros(D, C, TALL), is_async=True)
        numbers, through = _numbers(GATES, base + gl.minimum(chunk + 1, last))
        weights = _transformed(inverses.index(stage), lines, transform)
        value = values.index(stage).permute((1, 0)).load(TALL).to(gl.float32)
        read = warpgroup_mma_wait(0, deps=[read])
        fence_async_shared()
        missing = gl.convert_layout((value - read * _across(lines, 2, TALL)).to(gl.bfloat16), OF_TALL)
        _barrier()
        u = warpgroup_mma(missing, transform.permute((1, 0)), _zeros(D, C, TALL), is_async=True)
        gradient = warpgroup_mma(sdo, low, _zeros(C, D, ROWS), is_async=True)
        _store(states, [at * D, 0], low)
        u = warpgroup_mma_wait(1, deps=[u])
        su.store(u.to(gl.bfloat16))
        fence_async_shared()
        folded = gl.convert_layout((u * _across(lines, 3, TALL)).to(gl.bfloat16), OF_WIDE)
        _barrier()
        pairs = warpgroup_mma(sdo, su, _zeros(C, C, PAIRS), is_async=True)
        state = warpgroup_mma(folded, sk, state, is_async=True)
        gradient, pairs = warpgroup_mma_wait(1, deps=[gradient, pairs])
        ds.store((pairs * weights).to(gl.bfloat16))
        fence_async_shared()
        gradient = gradient * _down(lines, 2, ROWS)
        _barrier()
        gradient = warpgroup_mma(ds, sk, gradient, is_async=True)
        if FLOWS:
            mbarrier.wait(bars.index(2), turn)
            own = query.load(ROWS)
        state, gradient = warpgroup_mma_wait(0, deps=[state, gradient])
        so.store(gradient.to(gl.bfloat16))
        _published()
        if FLOWS:
            _fetch_one(q, [batch, key_head, (chunk + 1) * C, 0], query, bars.index(2), C * D * 2, chunk < last)
        _fetch_walk(k, do, v, inverse, keys, dos, values, inverses, bars, stage, place, chunk + 2, chunk, last)
        _store(dq, [batch, head, chunk * C, 0], so)
        if FLOWS:
            _row_sums(FLOW + at.to(gl.int64) * (2 * C), own.to(gl.float32) * gradient, D)
        chunk += 1
        phase ^= stage
        stage ^= 1
        turn ^= 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=SIZES)
def walk_gradients(
    q, k, do, inverse, GATES, FIRST, T, H, NB, L, GROUP: gl.constexpr
):  # fmt: skip
    """Write what a block's outputs alone send to its initial state to FIRST [B, H, NB, V, K] fp32; grid B·NB·H."""
    block, head, batch = _place(NB, H)
    key_head = head // GROUP
    place = batch, head, key_head, key_head
    line = (batch * H + head).to(gl.int64)
    first, last, base = _chunks(block, line, T, L)
    state = _zeros(D, D, WIDE)
    chunk = first + _reach(GATES, base + first, last - first + 1) - 1
    queries = gl.allocate_shared_memory(gl.bfloat16, [2, C, D], TILE)
    keys = gl.allocate_shared_memory(gl.bfloat16, [2, C, D], TILE)
    dos = gl.allocate_shared_memory(gl.bfloat16, [2, C, D], TILE)
    inverses = gl.allocate_shared_memory(gl.float16, [2, C, C], TILE)
    lines = gl.allocate_shared_memory(gl.float32, [8 * C], LINE)
    transforms = gl.allocate_shared_memory(gl.bfloat16, [1, C, C], TILE)
    scores = gl.allocate_shared_memory(gl.bfloat16, [1, C, C], TILE)
    lows = gl.allocate_shared_memory(gl.bfloat16, [1, D, D], TILE)
    bars = _barriers(2)
    for stage in gl.static_range(2):
        _fetch_walk(k, q, do, inverse, keys, queries, dos, inverses, bars, stage, place, chunk - stage, first, chunk)
    numbers, through = _numbers(GATES, base + gl.maximum(chunk, first))
    stage = 0
    phase = 0
    while chunk >= first:
        zero = chunk >> 24
        sk = keys.index(stage)
        sq = queries.index(stage)
        sdo = dos.index(stage)
        transform = transforms.index(zero)
        score = scores.index(zero)
        low = lows.index(zero)
        lines.store(numbers)
        low.store(state.to(gl.bfloat16))
        state = state * through
        mbarrier.wait(bars.index(stage), phase)
        products = warpgroup_mma(sq, sk.permute((1, 0)), _zeros(C, C, PAIRS), is_async=True)
        _published()
        du = warpgroup_mma(low, sk.permute((1, 0)), _zeros(D, C, TALL), is_async=True)
        numbers, through = _numbers(GATES, base + gl.maximum(chunk - 1, first))
        weights = _transformed(inverses.index(stage), lines, transform)
        leading = sdo.permute((1, 0)).load(TALL).to(gl.float32) * _across(lines, 2, TALL)
        products = warpgroup_mma_wait(1, deps=[products])
        score.store((products * weights).to(gl.bfloat16))
        _published()
        du = warpgroup_mma_wait(0, deps=[du])
        du = warpgroup_mma(sdo.permute((1, 0)), score, du * _across(lines, 3, TALL), is_async=True)
        state = warpgroup_mma(gl.convert_layout(leading.to(gl.bfloat16), OF_WIDE), sq, state, is_async=True)
        du = warpgroup_mma_wait(1, deps=[du])
        du = gl.convert_layout(du.to(gl.bfloat16), OF_TALL)
        dx = warpgroup_mma(du, transform, _zeros(D, C, TALL), is_async=True)
        dx, state = warpgroup_mma_wait(0, deps=[dx, state])
        back = gl.convert_layout((dx * -_across(lines, 2, TALL)).to(gl.bfloat16), OF_WIDE)
        state = warpgroup_mma(back, sk, state, is_async=True)
        state = warpgroup_mma_wait(0, deps=[state])
        _barrier()
        _fetch_walk(k, q, do, inverse, keys, queries, dos, inverses, bars, stage, place, chunk - 2, first, chunk)
        chunk -= 1
        phase ^= stage
        stage ^= 1
    gl.store(FIRST + (line * NB + block) * (D * D) + _offset(), state)


@gluon.jit(do_not_specialize=SIZES)
def input_gradients(
    q, k, v, do, inverse, states, dk, dv, GATES, LAST, SUMS, T, H, NB, L,
    GROUP: gl.constexpr, FLOWS: gl.constexpr,
):  # fmt: skip
    """Walk the gradients of the states of a block against time, and write dk [B, T, H, K] and dv; grid B·NB·H.

    LAST [B, H, NB, V, K] fp32 is the gradient of what leaves blocks. U and the gradient of Q Kᵀ are computed again from
    the states that enter chunks, because memory is what such walks wait for. Each input is loaded into its buffer as
    soon as that is free, for the next chunk; those that are needed first and last have two. A chunk's first products
    are issued before the last ones of the chunk behind it are waited for.

    SUMS [B, H, n, 9, C] fp32 gets what `finish_gradients` sums the gradients of β and of decays from: Σ v·dv; two rows
    each of Σ k·dk through what k reads, of that less what is sent through what it writes, and of Σ k·dk through the
    next state; and two of the product of states and their gradients, rounded as others are, so that errors cancel.
    """
    block, head, batch = _place(NB, H)
    key_head = head // GROUP
    line = (batch * H + head).to(gl.int64)
    first, chunk, base = _chunks(block, line, T, L)
    keys = gl.allocate_shared_memory(gl.bfloat16, [2, C, D], TILE)
    queries = gl.allocate_shared_memory(gl.bfloat16, [2, C, D], TILE)
    values = gl.allocate_shared_memory(gl.bfloat16, [1, C, D], TILE)
    inverses = gl.allocate_shared_memory(gl.float16, [1, C, C], TILE)
    dos = gl.allocate_shared_memory(gl.bfloat16, [1, C, D], TILE)
    befores = gl.allocate_shared_memory(gl.bfloat16, [1, D, D], TILE)
    lineses = gl.allocate_shared_memory(gl.float32, [1, 8 * C], LINE)
    transforms = gl.allocate_shared_memory(gl.bfloat16, [1, C, C], TILE)
    nears = gl.allocate_shared_memory(gl.bfloat16, [1, C, C], TILE)  # Q Kᵀ, then the gradient of A
    pairs = gl.allocate_shared_memory(gl.bfloat16, [1, C, C], TILE)
    lows = gl.allocate_shared_memory(gl.bfloat16, [1, D, D], TILE)
    us = gl.allocate_shared_memory(gl.bfloat16, [1, C, D], TILE)  # U, then dk
    dvs = gl.allocate_shared_memory(gl.bfloat16, [1, C, D], TILE)
    of_keys, of_values, of_inverse, of_states = _barriers(2), _barriers(1), _barriers(1), _barriers(1)
    t = chunk * C
    for stage in gl.static_range(2):
        _fetch_two(k, q, keys, queries, of_keys, stage, batch, key_head, t - stage * C, chunk - stage >= first)
    _fetch_one(inverse, [batch, head, t, 0], inverses.index(0), of_inverse.index(0), C * C * 2, True)
    _fetch_two(v, do, values, dos, of_values, 0, batch, head, t, True)
    _fetch_one(states, [(base + chunk) * D, 0], befores.index(0), of_states.index(0), D * D * 2, True)
    state = gl.load(LAST + (line * NB + block) * (D * D) + _offset())
    numbers, through = _numbers(GATES, base + chunk)
    lineses.index(0).store(_nonzero(numbers))
    lows.index(0).store(state.to(gl.bfloat16))
    state = state * through
    _published()
    mbarrier.wait(of_keys.index(0), 0)
    scores = warpgroup_mma(queries.index(0), keys.index(0).permute((1, 0)), _zeros(C, C, PAIRS), is_async=True)
    du = warpgroup_mma(lows.index(0), keys.index(0).permute((1, 0)), _zeros(D, C, TALL), is_async=True)
    scores, du = warpgroup_mma_wait(0, deps=[scores, du])
    i = gl.arange(0, C, layout=gl.SliceLayout(1, PAIRS))
    j = gl.arange(0, C, layout=gl.SliceLayout(0, PAIRS))
    stage = 0
    phase = 0
    turn = 0
    while chunk >= first:
        zero = chunk >> 24
        at = base + chunk
        lines = lineses.index(zero)
        t = chunk * C
        more = chunk > first
        sk = keys.index(stage)
        sq = queries.index(stage)
        sv = values.index(zero)
        sdo = dos.index(zero)
        own = inverses.index(zero)
        before = befores.index(zero)
        transform = transforms.index(zero)
        near = nears.index(zero)
        ds = pairs.index(zero)
        low = lows.index(zero)
        su = us.index(zero)
        sdv = dvs.index(zero)
        out = SUMS + at.to(gl.int64) * (ROWS_OF_SUMS * C)
        mbarrier.wait(of_states.index(0), turn)
        read = warpgroup_mma(before, sk.permute((1, 0)), _zeros(D, C, TALL), is_async=True)
        mbarrier.wait(of_inverse.index(0), turn)
        weights = _transformed(own, lines, transform)
        near.store((scores * weights).to(gl.bfloat16))
        mbarrier.wait(of_values.index(0), turn)
        value = sv.permute((1, 0)).load(TALL).to(gl.float32)
        tma.store_wait(0)  # of dk and dv, into whose buffers the next are written after the barrier
        read = warpgroup_mma_wait(0, deps=[read])
        missing = gl.convert_layout((value - read * _across(lines, 2, TALL)).to(gl.bfloat16), OF_TALL)
        _published()
        _fetch_one(inverse, [batch, head, t - C, 0], own, of_inverse.index(0), C * C * 2, more)
        du = warpgroup_mma(sdo.permute((1, 0)), near, du * _across(lines, 3, TALL), is_async=True)
        u = warpgroup_mma(missing, transform.permute((1, 0)), _zeros(D, C, TALL), is_async=True)
        du = warpgroup_mma_wait(1, deps=[du])
        du = gl.convert_layout(du.to(gl.bfloat16), OF_TALL)
        dx = warpgroup_mma(du, transform, _zeros(D, C, TALL), is_async=True)
        u = warpgroup_mma_wait(1, deps=[u])
        su.permute((1, 0)).store(u.to(gl.bfloat16))
        leading = sdo.permute((1, 0)).load(TALL).to(gl.float32) * _across(lines, 2, TALL)
        state = warpgroup_mma(gl.convert_layout(leading.to(gl.bfloat16), OF_WIDE), sq, state, is_async=True)
        dx = warpgroup_mma_wait(1, deps=[dx])
        back = gl.convert_layout((dx * -_across(lines, 2, TALL)).to(gl.bfloat16), OF_WIDE)
        state = warpgroup_mma(back, sk, state, is_async=True)
        sdv.permute((1, 0)).store(dx.to(gl.bfloat16))
        _published()
        _store(dv, [batch, head, t, 0], sdv)
        product = sv.load(EACH).to(gl.float32) * sdv.load(EACH).to(gl.float32)
        gl.store(out + gl.arange(0, C, layout=gl.SliceLayout(1, EACH)), gl.sum(product, 1))
        if FLOWS:
            edges = gl.sum(before.load(WIDE).to(gl.float32) * low.load(WIDE).to(gl.float32), 1)
            gl.store(out + 7 * C + gl.arange(0, D, layout=gl.SliceLayout(1, WIDE)), edges * through)
        numbers, through = _numbers(GATES, base + gl.maximum(chunk - 1, first))
        dscores = warpgroup_mma(sdo, su.permute((1, 0)), _zeros(C, C, PAIRS), is_async=True)
        sent = warpgroup_mma(su, low, _zeros(C, D, ROWS), is_async=True)
        da = warpgroup_mma(sdv, su.permute((1, 0)), _zeros(C, C, PAIRS), is_async=True)
        row = warpgroup_mma(sdv, before, _zeros(C, D, ROWS), is_async=True)
        state, dscores = warpgroup_mma_wait(3, deps=[state, dscores])
        weights = _between(lines)  # again: kept all along, they would take too many registers
        ds.store((dscores * weights).to(gl.bfloat16))
        sent, da = warpgroup_mma_wait(1, deps=[sent, da])
        near.store(gl.where(i[:, None] > j[None, :], da * -weights, 0.0).to(gl.bfloat16))
        sent = sent * _down(lines, 3, ROWS)
        if FLOWS:
            _row_sums(out + 5 * C, sk.load(ROWS).to(gl.float32) * sent, D)
        row = warpgroup_mma_wait(0, deps=[row])
        row = row * -_down(lines, 2, ROWS)
        _published()
        _fetch_two(v, do, values, dos, of_values, zero, batch, head, t - C, more)
        _fetch_one(states, [(at - 1) * D, 0], before, of_states.index(0), D * D * 2, more)
        row = warpgroup_mma(near, sk, row, is_async=True)
        sent = warpgroup_mma(near.permute((1, 0)), sk, sent, is_async=True)
        sent = warpgroup_mma(ds.permute((1, 0)), sq, sent, is_async=True)
        lines.store(_nonzero(numbers))
        low.store(state.to(gl.bfloat16))
        state = state * through
        _published()
        phase ^= stage
        stage ^= 1
        mbarrier.wait(of_keys.index(stage), phase, pred=more)
        ahead = keys.index(stage).permute((1, 0))
        scores = warpgroup_mma(queries.index(stage), ahead, _zeros(C, C, PAIRS), is_async=True)
        du = warpgroup_mma(low, ahead, _zeros(D, C, TALL), is_async=True)
        key = sk.load(ROWS).to(gl.float32)
        row, sent = warpgroup_mma_wait(2, deps=[row, sent])
        su.store((row + sent).to(gl.bfloat16))
        _published()
        _store(dk, [batch, head, t, 0], su)
        _fetch_two(k, q, keys, queries, of_keys, stage ^ 1, batch, key_head, t - 2 * C, chunk - 2 >= first)
        read = key * row
        _row_sums(out + C, read, D)
        if FLOWS:
            _row_sums(out + 3 * C, read - key * sent, D)
        scores, du = warpgroup_mma_wait(0, deps=[scores, du])
        chunk -= 1
        turn ^= 1
    tma.store_wait(0)
