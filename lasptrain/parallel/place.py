"""The place of a slice in its window, as softmax layers need it: positions and documents, made once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lasptrain.ops.softmax import Documents
from lasptrain.parallel.collectives import all_gather
from lasptrain.parallel.host import Number
from lasptrain.parallel.scan import Scan


@dataclass(frozen=True)
class Edge:
    """A position in a window up to which it has been read.

    Attributes:
        position: tokens so far.
        document: [B] int64 positions at which the documents of the last tokens began; None: 0.
        origin: [B] int64 positions from which rotations count; None: 0.
        earliest: the first of `document`, known to the host; None: 0.
    """

    position: int = 0
    document: Tensor | None = None
    origin: Tensor | None = None
    earliest: Number | None = None

    @classmethod
    def at(cls, position: int, document: Tensor | None, origin: Tensor | None) -> Edge:
        """Return an edge, and send its earliest document to the host."""
        return cls(position, document, origin, None if document is None else Number(document.min()))

    def pick(self, index: Tensor) -> Edge:
        """Return the edge of some of the texts of a batch."""
        document, origin = (None if x is None else x[index] for x in (self.document, self.origin))
        return Edge.at(self.position, document, origin)


@dataclass(frozen=True)
class Place:
    """The place of a slice.

    Attributes:
        start: position of its first token.
        documents: of its tokens.
        before, after: the edges of its segment.
    """

    start: int
    documents: Documents
    before: Edge
    after: Edge

    @property
    def rotation(self) -> int | Tensor:
        """Position of the first token as rotations count it, or one per window [B]."""
        return self.start if self.before.origin is None else self.start - self.before.origin


def enter(before: Edge | None, doc_ids: Tensor | None, length: int, scan: Scan) -> Place:
    """Return the place of this rank's slice of `length` tokens. Collective over the scan's ranks.

    Args:
        before: the edge at which the segment begins, as the one before it ended; None: a window's start.
        doc_ids: document numbers in the slice [B, T]; document 0 continues from the left. None: one document.
    """
    before = Edge() if before is None else before
    start, stop = before.position + scan.rank * length, before.position + scan.size * length
    if doc_ids is None:
        documents = Documents.of(None, start, before.document)
        return Place(start, documents, before, Edge(stop, before.document, before.origin, before.earliest))
    first = start + (doc_ids == doc_ids[:, -1:]).byte().argmax(1)
    began = _gathered(torch.where(doc_ids[:, -1] > 0, first, 0), scan)
    known = torch.zeros_like(began[:1]) if before.document is None else before.document[None]
    last = torch.cat([known, began]).cummax(0).values  # the later, the further on
    documents = Documents.of(doc_ids, start, last[scan.rank])
    return Place(start, documents, before, Edge.at(stop, last[-1], before.origin))


def _gathered(x: Tensor, scan: Scan) -> Tensor:
    """Return x [B] of all ranks, [sp, B]."""
    if scan.size == 1:
        return x[None]
    found = x.new_empty(scan.size, *x.shape)
    all_gather(found.view(-1), x, group=scan.group)
    scan.calls += 1
    scan.bytes_sent += x.numel() * x.element_size()
    return found


def together(edges: Sequence[Edge], sizes: Sequence[int], device: torch.device) -> Edge:
    """Return the edge of texts of so many rows each in one batch. Shorter ones are moved on, so that all end there."""
    position = max(edge.position for edge in edges)

    def moved(name: str) -> Tensor | None:
        given = [getattr(edge, name) for edge in edges]
        if all(x is None for x in given) and all(edge.position == position for edge in edges):
            return None
        zeros = [torch.zeros(size, dtype=torch.int64, device=device) for size in sizes]
        parts = zip(edges, zeros, given, strict=True)
        return torch.cat([position - edge.position + (zero if x is None else x) for edge, zero, x in parts])

    return Edge.at(position, moved("document"), moved("origin"))
