# mypy: ignore-errors
"""Messages between GPUs that reach each other's memory: one kernel writes it there, where another takes it.

A message is cut into parts, one per program, that are on their own. Of each part a flag on the receiver's side, `full`,
says that it is there, and one on the sender's side, `busy`, that it has not yet been taken. So whoever waits only reads
memory of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lasptrain.ops.triton_kernels import PLAIN, run

PART = 8192  # bytes: parts of messages that follow each other in a box, of whatever dtype, lie over each other


def parts(size: int) -> int:
    """Parts of a message of `size` bytes."""
    return triton.cdiv(size, PART)


def put(x: Tensor, box: Tensor, full: Tensor, busy: Tensor) -> None:
    """Queue: x [...], contiguous, into the receiver's box [≥ n] once that is empty; flags are [≥ parts] int32."""
    _move(put_parts, x, box, full, busy)


def take(x: Tensor, box: Tensor, full: Tensor, busy: Tensor) -> None:
    """Queue: the message out of the box into x [...], contiguous, once it is there."""
    _move(take_parts, x, box, full, busy)


def _move(program: object, x: Tensor, box: Tensor, full: Tensor, busy: Tensor) -> None:
    n, numbers = x.numel(), PART // x.itemsize
    constants = {"PART": numbers, "WHOLE": n % numbers == 0}
    run(program, x, (parts(n * x.itemsize), 1, 1), PLAIN, constants, x, box, full, busy, n)


@triton.jit(do_not_specialize=["n"])
def put_parts(X, BOX, FULL, BUSY, n, PART: tl.constexpr, WHOLE: tl.constexpr):
    """X [n] into BOX; grid n / PART, WHOLE where that leaves no remainder: without masks 16 bytes go at a time."""
    part = tl.program_id(0)
    offset = part * PART + tl.arange(0, PART)
    while tl.atomic_cas(BUSY + part, 0, 1, sem="acquire", scope="sys") != 0:
        pass
    if WHOLE:
        tl.store(BOX + offset, tl.load(X + offset))
    else:
        tl.store(BOX + offset, tl.load(X + offset, mask=offset < n), mask=offset < n)
    tl.debug_barrier()  # one thread raises the flag for all
    tl.atomic_xchg(FULL + part, 1, sem="release", scope="sys")


@triton.jit(do_not_specialize=["n"])
def take_parts(X, BOX, FULL, BUSY, n, PART: tl.constexpr, WHOLE: tl.constexpr):
    """BOX into X [n]. Read past the L1 cache, which does not know what another GPU has written."""
    part = tl.program_id(0)
    offset = part * PART + tl.arange(0, PART)
    while tl.atomic_cas(FULL + part, 1, 0, sem="acquire", scope="sys") != 1:
        pass
    tl.debug_barrier()  # one thread has waited for all
    if WHOLE:
        tl.store(X + offset, tl.load(BOX + offset, cache_modifier=".cg"))
    else:
        tl.store(X + offset, tl.load(BOX + offset, mask=offset < n, cache_modifier=".cg"), mask=offset < n)
    tl.debug_barrier()
    tl.atomic_xchg(BUSY + part, 0, sem="release", scope="sys")
