# mypy: ignore-errors
"""Messages between GPUs with peer access: one kernel writes a message into the other's memory, another takes it.

A message is cut into independent parts, one per program. For each part, the flag `full` on the receiver's side says
that it has arrived, and the flag `busy` on the sender's side that it has not been taken yet. So either side polls only
its own memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lasptrain.ops.triton_launch import PLAIN, run

PART = 8192  # bytes, so that parts of successive messages in a buffer coincide whatever their dtypes


def parts(size: int) -> int:
    """Return the number of parts of a message of `size` bytes."""
    return triton.cdiv(size, PART)


def send(x: Tensor, buffer: Tensor, full: Tensor, busy: Tensor) -> None:
    """Queue a copy of x [...], contiguous, to the receiver's buffer [≥ n] once it is empty; flags [≥ parts] int32."""
    _move(x, x, buffer, busy, full, 0)


def receive(x: Tensor, buffer: Tensor, full: Tensor, busy: Tensor) -> None:
    """Queue a copy of the message in the buffer to x [...], contiguous, once it has arrived."""
    _move(x, buffer, x, full, busy, 1)


def _move(x: Tensor, source: Tensor, target: Tensor, awaited: Tensor, signalled: Tensor, before: int) -> None:
    n, numbers = x.numel(), PART // x.itemsize
    constants = {"BEFORE": before, "PART": numbers, "WHOLE": n % numbers == 0}
    run(move_parts, x, (parts(x.nbytes), 1, 1), PLAIN, constants, source, target, awaited, signalled, n)


@triton.jit(do_not_specialize=["n"])
def move_parts(SOURCE, TARGET, AWAITED, SIGNALLED, n, BEFORE: tl.constexpr, PART: tl.constexpr, WHOLE: tl.constexpr):
    """Copy SOURCE [n] to TARGET, each part once its flag AWAITED is BEFORE; then both its flags are the opposite.

    Grid n / PART, WHOLE where that leaves no remainder: without masks 16 bytes are copied at a time. Reads bypass the
    L1 cache, which does not know what another GPU has written.
    """
    part = tl.program_id(0)
    offset = part * PART + tl.arange(0, PART)
    while tl.atomic_cas(AWAITED + part, BEFORE, 1 - BEFORE, sem="acquire", scope="sys") != BEFORE:
        pass
    tl.debug_barrier()  # one thread has waited for all others
    if WHOLE:
        tl.store(TARGET + offset, tl.load(SOURCE + offset, cache_modifier=".cg"))
    else:
        inside = offset < n
        tl.store(TARGET + offset, tl.load(SOURCE + offset, mask=inside, cache_modifier=".cg"), mask=inside)
    tl.debug_barrier()  # one thread signals for all others
    tl.atomic_xchg(SIGNALLED + part, 1 - BEFORE, sem="release", scope="sys")
