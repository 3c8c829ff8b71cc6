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

LONGEST = 65_536  # tokens of blocks that were joined


class Block:
    """Keys [B, S, G, K], rotated, and values [B, S, G, V] of the tokens from position `start` of the window on."""

    def __init__(self, start: int, k: Tensor, v: Tensor):
        self.start, self.k, self.v = start, k, v
        self._grads: tuple[Tensor, Tensor] | None = None

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.k.shape[1]

    @property
    def stop(self) -> int:
        """Position after the last token."""
        return self.start + self.length

    def add(self, dk: Tensor, dv: Tensor) -> None:
        """Add to the gradient, in at least fp32; the tensors are taken over."""
        if self._grads is None:
            self._grads = dk, dv
        else:
            for total, part in zip(self._grads, (dk, dv), strict=True):
                total.add_(part)

    def take(self) -> tuple[Tensor, Tensor]:
        """Return the gradient, which is complete, and keep it no longer."""
        assert self._grads is not None
        taken, self._grads = self._grads, None
        return taken


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
            first, second = blocks[-2:]
            blocks[-2:] = [Block(first.start, torch.cat([first.k, second.k], 1), torch.cat([first.v, second.v], 1))]
        return Prefix(tuple(blocks), link)


def together(prefixes: Sequence[Prefix]) -> Prefix:
    """Return prefixes in one batch. Shorter ones are moved on, behind zeros that no document holds."""
    stop = max(one.blocks[-1].stop for one in prefixes)

    def rows(name: str) -> Tensor:
        parts = [torch.cat([getattr(block, name) for block in one.blocks], dim=1) for one in prefixes]
        return torch.cat([F.pad(part, [0, 0, 0, 0, stop - part.shape[1], 0]) for part in parts])

    return Prefix((Block(0, rows("k"), rows("v")),))


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
