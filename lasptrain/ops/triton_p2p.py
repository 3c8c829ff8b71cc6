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

from lasptrain.ops.triton_launch import PLAIN, run

PART = 8192  # bytes: parts of messages that follow each other in a box, of whatever dtype, lie over each other


def parts(size: int) -> int:
    """Parts of a message of `size` bytes."""
    return triton.cdiv(size, PART)


def put(x: Tensor, box: Tensor, full: Tensor, busy: Tensor) -> None:
    """Queue: x [...], contiguous, into the receiver's box [≥ n] once that is empty; flags are [≥ parts] int32."""
    _move(x, x, box, busy, full, 0)


def take(x: Tensor, box: Tensor, full: Tensor, busy: Tensor) -> None:
    """Queue: the message out of the box into x [...], contiguous, once it is there."""
    _move(x, box, x, full, busy, 1)


def _move(x: Tensor, source: Tensor, target: Tensor, awaited: Tensor, told: Tensor, before: int) -> None:
    n, numbers = x.numel(), PART // x.itemsize
    constants = {"BEFORE": before, "PART": numbers, "WHOLE": n % numbers == 0}
    run(move_parts, x, (parts(x.nbytes), 1, 1), PLAIN, constants, source, target, awaited, told, n)


@triton.jit(do_not_specialize=["n"])
def move_parts(SOURCE, TARGET, AWAITED, TOLD, n, BEFORE: tl.constexpr, PART: tl.constexpr, WHOLE: tl.constexpr):
    """SOURCE [n] to TARGET, once a flag AWAITED is BEFORE; then it and that TOLD of it are the opposite.

    Grid n / PART, WHOLE where that leaves no remainder: without masks 16 bytes go at a time. Read past the L1 cache,
    which does not know what another GPU has written.
    """
    part = tl.program_id(0)
    offset = part * PART + tl.arange(0, PART)
    while tl.atomic_cas(AWAITED + part, BEFORE, 1 - BEFORE, sem="acquire", scope="sys") != BEFORE:
        pass
    tl.debug_barrier()  # one thread has waited for all
    if WHOLE:
        tl.store(TARGET + offset, tl.load(SOURCE + offset, cache_modifier=".cg"))
    else:
        inside = offset < n
        tl.store(TARGET + offset, tl.load(SOURCE + offset, mask=inside, cache_modifier=".cg"), mask=inside)
    tl.debug_barrier()  # one thread tells for all
    tl.atomic_xchg(TOLD + part, 1 - BEFORE, sem="release", scope="sys")
