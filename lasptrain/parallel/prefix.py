"""The state of a softmax layer: the keys and values of all tokens before, S ↦ [S; k, v].

A `Prefix` is never written to and shares its blocks, one per segment, with those that grew from it: nothing is copied,
and any number of texts may continue from one. Its gradient does not travel as that of a state does: segments add to the
blocks that they have read, and the segment that a block is of, which runs back after those, takes the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lasptrain.parallel.block import Block

LONGEST = 65_536  # tokens of blocks that were joined


@dataclass(frozen=True)
class Prefix:
    """The keys and values of B windows so far, in blocks.

    `link` is empty: it makes the backward of a segment follow that of the next in the autograd graph.
    """

    blocks: tuple[Block, ...] = ()
    link: Tensor | None = None

    def then(self, own: Block, link: Tensor | None, *, join: bool) -> Prefix:
        """Return this with a block behind it.

        `join`: copy neighbours together where the first is no longer, up to LONGEST, so that there are few.
        """
        blocks = [*self.blocks, own]
        while join and len(blocks) > 1 and blocks[-2].length <= min(blocks[-1].length, LONGEST // 2):
            blocks[-2:] = [_joined(blocks[-2:])]
        return Prefix(tuple(blocks), link)

    def reached(self, first: int) -> list[Block]:
        """Return the blocks with tokens at position `first` or after."""
        return [block for block in self.blocks if block.stop > first]

    def pick(self, index: Tensor) -> Prefix:
        """Return the prefix of some of the texts of a batch."""
        rows = [(block.rows[0][index], block.rows[1][index]) for block in self.blocks]
        blocks = zip(self.blocks, rows, strict=True)
        return Prefix(tuple(Block(block.start, block.length, own, block.storage) for block, own in blocks))


def _joined(blocks: Sequence[Block]) -> Block:
    """Return consecutive blocks as one."""
    k, v = (torch.cat(parts, dim=1) for parts in zip(*(block.rows for block in blocks), strict=True))
    return Block(blocks[0].start, k.shape[1], (k, v), blocks[0].storage)


def together(prefixes: Sequence[Prefix]) -> Prefix:
    """Return prefixes in one batch. Shorter ones are moved on, behind zeros that no document holds."""
    stop = max(one.blocks[-1].stop for one in prefixes)
    storage = prefixes[0].blocks[0].storage

    def rows(number: int) -> Tensor:
        parts = [torch.cat([block.rows[number] for block in one.blocks], dim=1) for one in prefixes]
        return torch.cat([F.pad(part, [0, 0, 0, 0, stop - part.shape[1], 0]) for part in parts])

    return Prefix((Block(0, stop, (rows(0), rows(1)), storage),))


@dataclass
class Read:
    """The keys that one layer's queries read, once known, and what came of it.

    Attributes:
        before: the segment's.
        own: the segment's block.
        output: o and lse, where the layer may be run again in the backward.
    """

    before: Prefix
    own: Block | None = None
    output: tuple[Tensor, Tensor] | None = None
