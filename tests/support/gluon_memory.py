"""Shared memory of a Gluon program in which something is always under way, for `gluon`.

A GPU keeps less order than the text of a program. `Memory` raises `Hazard` where something comes too early:

| first | then | unless there was between them |
|---|---|---|
| warps write, or init an mbarrier | warps read or write | a barrier |
| the same | a product or a copy reads, a load writes | a barrier and a fence, in either order |
| a load writes | anything | a wait for the phase of its mbarrier |
| warps read or wait for an mbarrier | anything writes, or the mbarrier is used for the next phase | a barrier |
| a product or a copy reads | anything writes | a wait for it, and then a barrier |

Bytes that nothing was written to are NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.support.gluon_values import Value

SIZE = 227 << 10  # bytes that a program can have


class Hazard(AssertionError):
    """Something that a GPU may do before what it depends on, or never."""


def need(held: bool, why: str) -> None:
    if not held:
        raise Hazard(why)


@dataclass(eq=False)
class Access:
    """A use of bytes of shared memory that others have to mind."""

    start: int
    end: int
    by: str
    writes: bool
    over: bool  # for the warps that made it or waited for it
    seen: bool = False  # a write by warps: a barrier followed
    fenced: bool = False


class Memory:
    """Shared memory of a program."""

    def __init__(self) -> None:
        self.bytes = torch.full((SIZE,), 255, dtype=torch.uint8)  # NaN in every dtype
        self.used = 0
        self.accesses: list[Access] = []

    def allocate(self, dtype: torch.dtype, shape: Sequence[Any], layout: object) -> Buffer:
        sizes = [int(n) for n in shape]
        start, size = -(-self.used // 16) * 16, math.prod(sizes) * dtype.itemsize
        need(start + size <= SIZE, "more shared memory than there is")
        self.used = start + size
        return Buffer(self, self.bytes[start : self.used].view(dtype).view(sizes))

    def check(self, start: int, end: int, by: str, writes: bool) -> None:
        """Raise Hazard where such an access comes too early."""
        for a in self.accesses:
            if a.end <= start or end <= a.start:
                continue
            what = f"{by} {'writes' if writes else 'reads'}"
            if not a.writes:
                need(not writes, f"{what} what {a.by} may still read")
            else:
                need(a.over, f"{what} what {a.by} may not have written")
                need(a.seen, f"{what} what other {a.by} may not have written")
                need(a.fenced or by == "warps", f"{what} what {a.by} wrote, without a fence")

    def access(self, buffer: Buffer, by: str, writes: bool = False) -> Access:
        """Note a checked access; those by warps are over at once."""
        start, end = buffer.span()
        self.check(start, end, by, writes)
        made = Access(start, end, by, writes, by == "warps")
        self.accesses.append(made)
        return made

    def fence(self) -> None:
        for a in self.accesses:
            a.fenced = a.fenced or a.over
        self._settle(False)

    def barrier(self) -> None:
        for a in self.accesses:
            a.seen = a.seen or a.over
        self._settle(True)

    def arrived(self, loads: list[Access]) -> None:
        """Forget loads whose mbarrier was waited for."""
        self.accesses = [a for a in self.accesses if a not in loads]
        loads.clear()

    def _settle(self, barrier: bool) -> None:
        self.accesses = [a for a in self.accesses if not (a.seen and a.fenced if a.writes else a.over and barrier)]


class Buffer:
    """A part of shared memory."""

    def __init__(self, memory: Memory, data: Tensor):
        self.memory, self.data = memory, data

    def span(self) -> tuple[int, int]:
        """Return its first byte and that behind its last."""
        start, size = int(self.data.storage_offset()), self.data.numel()
        reach = 1 + sum((n - 1) * step for n, step in zip(self.data.shape, self.data.stride(), strict=True))
        if reach != size:
            raise NotImplementedError("a part of shared memory with gaps is not modelled")
        return start * self.data.itemsize, (start + size) * self.data.itemsize

    def index(self, at: Any) -> Buffer:
        need(0 <= int(at) < len(self.data), "a part outside a buffer")
        return Buffer(self.memory, self.data[int(at)])

    def slice(self, start: Any, length: Any, dim: int = 0) -> Buffer:
        return Buffer(self.memory, self.data.narrow(dim, int(start), int(length)))

    def permute(self, order: Sequence[int]) -> Buffer:
        return Buffer(self.memory, self.data.permute(*order))

    def reshape(self, shape: Sequence[Any]) -> Reshaped:
        return Reshaped(self, [int(n) for n in shape])

    def load(self, layout: object) -> Value:
        self.memory.access(self, "warps")
        return Value(self.data.clone())

    def store(self, x: Value) -> None:
        need((x.data.shape, x.data.dtype) == (self.data.shape, self.data.dtype), "stored as it is not held")
        self.memory.access(self, "warps", writes=True)
        self.data.copy_(x.data)


class Reshaped:
    """A part of shared memory in another shape, in which it can only be read."""

    def __init__(self, of: Buffer, shape: list[int]):
        self.of, self.shape = of, shape

    def load(self, layout: object) -> Value:
        return Value(self.of.load(layout).data.reshape(self.shape))


@dataclass(eq=False)
class Phases:
    """State of an mbarrier whose phases have one arrival each."""

    passed: int = 0  # phases that were waited for
    begun: int = 0  # phases that were arrived at
    owed: int = 0  # bytes of the last that were not asked for
    arriving: list[Access] = field(default_factory=list)
