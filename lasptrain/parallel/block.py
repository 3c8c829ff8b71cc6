"""Blocks of keys and values, one per segment of a window: where they lie, how they are read, their gradients.

| kind | a rank holds | when a block is read | when its gradient is added to |
|---|---|---|---|
| `gathered` | all rows, gathered over the ranks of the segment once (LASP-2H, arXiv:2502.07563) | | |
| `sharded` | the rows of its slices | all-gather | reduce-scatter |
| `host` | those, in host memory | copy to the device, all-gather | reduce-scatter, copy |

What travels does so on a stream of its own, beside the products for another block. Rows are pairs, of keys and values
or of their gradients, [B, S, G, ·] for the S tokens of a segment or the T of a slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lasptrain.parallel.collectives import all_gather, reduce_scatter
from lasptrain.parallel.host import to_device, to_host
from lasptrain.parallel.scan import Exchange, Scan

T = TypeVar("T")
Rows = tuple[Tensor, Tensor]


class Storage:
    """The place of a model's blocks on a mesh: one of the kinds above, over the ranks of a scan.

    `outputs`: what queries made of the blocks is kept from a window's first pass to its second.
    """

    def __init__(self, scan: Scan, kind: str = "gathered", outputs: bool = True):
        self.scan, self.outputs = scan, outputs
        self.gathered, self.host = kind == "gathered", kind == "host"
        self._stream = scan.stream

    def begin(self, what: Callable[[], T], needs: tuple[Tensor, ...]) -> Exchange[T]:
        """Begin what travels; what it needs is kept until it is waited for."""
        if self.host and self._stream is None and needs[0].is_cuda:
            self._stream = torch.cuda.Stream(needs[0].device)
        self.scan.calls += self.scan.size > 1
        return Exchange(what, self._stream, needs)

    def keep(self, start: int, own: Rows) -> Exchange[tuple[Block, Rows]]:
        """Begin to gather the rows of a segment's slices and to keep them as a block at position `start`."""
        k, v = own[0].detach(), own[1].detach()

        def body() -> tuple[Block, Rows]:
            rows = self.gather((k, v))
            return Block(start, rows[0].shape[1], rows if self.gathered else (k, v), self), rows

        return self.begin(body, (k, v))

    def gather(self, own: Rows) -> Rows:
        """Return the rows of all slices of a segment."""
        k, v = (self._gather(x.detach()) for x in own)
        return k, v

    def scatter(self, rows: Rows) -> Rows:
        """Return this slice's part of the sum over ranks of rows of a segment."""
        k, v = (self._scatter(x) for x in rows)
        return k, v

    def _gather(self, x: Tensor) -> Tensor:
        scan = self.scan
        if scan.size == 1:
            return x
        parts = x.new_empty(scan.size, *x.shape)
        all_gather(parts.view(-1), x.contiguous().view(-1), group=scan.group)
        scan.bytes_sent += x.numel() * x.element_size()
        return parts.transpose(0, 1).flatten(1, 2)

    def _scatter(self, x: Tensor) -> Tensor:
        scan = self.scan
        if scan.size == 1:
            return x
        parts = x.unflatten(1, (scan.size, -1)).transpose(0, 1).contiguous()
        mine = torch.empty_like(parts[0])
        reduce_scatter(mine.view(-1), parts.view(-1), group=scan.group)
        scan.bytes_sent += (scan.size - 1) * mine.numel() * mine.element_size()
        return mine


class Block:
    """The keys and values of `length` tokens from position `start` of the window on, and their gradient so far."""

    def __init__(self, start: int, length: int, rows: Rows, storage: Storage):
        self.start, self.length, self.storage, self._device = start, length, storage, rows[0].device
        self.rows = self._away(rows)
        self._grads: Rows | None = None

    @property
    def stop(self) -> int:
        """Position after the last token."""
        return self.start + self.length

    def read(self) -> Exchange[Rows]:
        """Begin to bring the rows of all slices."""
        if self.storage.gathered:
            return Exchange(lambda: self.rows, None, ())
        return self.storage.begin(lambda: self.storage.gather(self._here(self.rows)), self.rows)

    def add(self, grads: Rows) -> Exchange[None]:
        """Begin to add to the gradient, in at least fp32; the tensors are taken over."""
        if not self.storage.gathered:
            return self.storage.begin(lambda: self._add(self.storage.scatter(grads)), grads)
        self._add(grads)
        return Exchange(lambda: None, None, ())

    def take(self, grads: Rows) -> Exchange[Rows]:
        """Begin to bring the gradient of this slice's rows, `grads` being the last to be added, and forget it."""
        storage, before = self.storage, self._grads
        self._grads = None

        def body() -> Rows:
            if storage.gathered:
                return storage.scatter(_sum(grads, before))
            return _sum(storage.scatter(grads), None if before is None else self._here(before))

        return storage.begin(body, (*grads, *(before or ())))

    def _add(self, grads: Rows) -> None:
        if self._grads is None:
            self._grads = self._away(grads)
        else:
            total = _sum(self._here(self._grads), grads)
            for kept, x in zip(self._grads, total, strict=True):
                if kept is not x:
                    kept.copy_(x, non_blocking=True)

    def _away(self, rows: Rows) -> Rows:
        """Return rows where they are kept."""
        return (to_host(rows[0]), to_host(rows[1])) if self.storage.host else rows

    def _here(self, rows: Rows) -> Rows:
        """Return rows where they are used."""
        return to_device(rows[0], self._device), to_device(rows[1], self._device)


def _sum(total: Rows, more: Rows | None) -> Rows:
    """Add to a pair of tensors, in place, and return it."""
    for x, y in zip(total, more or (), strict=False):
        x.add_(y)
    return total


def visited(blocks: Sequence[Block]) -> Iterator[tuple[Block, Rows]]:
    """Yield blocks, each with the rows of all slices; those of the next are on their way meanwhile."""
    reading = [block.read() for block in blocks[:1]]
    for number, block in enumerate(blocks):
        rows = reading.pop().wait()
        reading += [following.read() for following in blocks[number + 1 : number + 2]]
        yield block, rows
