"""Documents for softmax attention: where those of a slice's queries begin, on the device and on the host.

Letters as in `lasptrain.ops`; positions count tokens from the start of the window.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lasptrain.ops.softmax_plan import Runs, calls, pieces


class Plan(NamedTuple):
    """Calls of kernels, each a `softmax_plan.Call` written out, and the edges of their sequences, on the device."""

    calls: list[int]
    edges: Tensor  # int32


class Place(NamedTuple):
    """A block of keys and the queries that see it."""

    b: int
    t: int
    query_start: int
    j: int
    key_start: int
    window: int | None


@dataclass(eq=False)
class Documents:
    """The documents of a slice's queries, made once per slice and used by all its layers.

    start: [B, T] int64 ([B, 1] where no document starts in the slice), the position of the first token of each query's
    document; None: 0 everywhere. Along a row it never falls, and it is nowhere beyond the query.
    """

    start: Tensor | None = None
    _plans: dict[tuple[Place, bool, torch.device], Plan] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, doc_ids: Tensor | None, query_start: int, carry_start: Tensor | None = None) -> Documents:
        """Return the documents of the slice that begins at position `query_start`; no device is waited for.

        doc_ids: [B, T] integers, documents that have started in the slice up to and including t; None: none has.
        carry_start: [B] int64, where the document began that goes on from the left; None: at 0.
        """
        if doc_ids is None:
            return cls(None if carry_start is None else carry_start[:, None])
        begins = torch.diff(doc_ids, dim=1, prepend=torch.zeros_like(doc_ids[:, :1])) > 0
        position = torch.arange(query_start, query_start + doc_ids.shape[1], device=doc_ids.device)
        before = position.new_zeros(()) if carry_start is None else carry_start[:, None]
        return cls(torch.where(begins, position, before).cummax(1).values)

    @cached_property
    def runs(self) -> Runs | None:
        """Each row's documents: the number of its first query in the slice, and its start; None: one from 0.

        The first use waits for the device, once.
        """
        if self.start is None:
            return None
        found = []
        for row in self.start.cpu():
            start, count = torch.unique_consecutive(row, return_counts=True)
            first = count.cumsum(0) - count
            found.append(list(zip(first.tolist(), start.tolist(), strict=True)))
        return found

    def plan(self, place: Place, dense: bool, device: torch.device) -> Plan:
        """Return the calls for one block of keys, with a dense kernel or without; made once for all layers."""
        found = self._plans.get((place, dense, device))
        if found is None:
            b, t, query_start, j, key_start, window = place
            seen = pieces(self.runs or [[(0, 0)]] * b, t, query_start, j, key_start, window)
            made, edges = calls(seen, dense)
            host = torch.tensor(edges, dtype=torch.int32, pin_memory=device.type == "cuda")
            found = Plan([number for call in made for number in call], host.to(device, non_blocking=True))
            self._plans[place, dense, device] = found
        return found
