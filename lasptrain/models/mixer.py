"""Mixers: the layers that move information between tokens.

Each takes the normalised input h [B, T, D] and what the scan needs, and returns y [B, T, D] with its leaving state. If
ranks share the window it makes k and v first, so that the exchange travels while q and the gate are computed. What
`phases` returns is small and full precision; the block makes it outside of recomputation and hands it in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from lasptrain.models.layers import Phases
from lasptrain.parallel.recurrence import Pending, SavedStates, ShardedRecurrence

State = tuple[Tensor | None, ...]  # what a mixer carries from segment to segment; only the mixer understands it


COMPILED = ("keys", "queries", "project", "output")  # the parts of a mixer between exchanges


class Recurrence(nn.Module):
    """A mixer that is one linear recurrence: what all have in common is the order of work around the exchange.

    `keys` gives k and v, `queries` q and what else `output` takes, `project` both at once. Slopes of None: no decay.
    """

    compiled: ClassVar[tuple[str, ...]] = COMPILED
    attention: ShardedRecurrence
    slope: Tensor | None
    keys: Callable[..., tuple[Tensor, Tensor]]
    queries: Callable[..., tuple[Tensor, ...]]
    project: Callable[..., tuple[Tensor, ...]]
    output: Callable[..., Tensor]

    def prepare(self, length: int) -> Phases | None:
        return None

    def forward(
        self,
        h: Tensor,
        phases: Phases | None,
        doc_ids: Tensor | None,
        carry: State,
        memory: SavedStates,
        output_final_state: bool,
    ) -> tuple[Tensor, State]:
        if self.attention.scan.size > 1:
            pending = self._begin(*self.keys(h, phases), phases, doc_ids, carry, memory, output_final_state)
            q, *rest = self.queries(h, phases)
        else:
            k, v, q, *rest = self.project(h, phases)
            pending = self._begin(k, v, phases, doc_ids, carry, memory, output_final_state)
        o, final_state = self.attention.finish(pending, q)
        return self.output(o, *rest), (final_state,)

    def state(
        self, h: Tensor, phases: Phases | None, doc_ids: Tensor | None, carry: State, memory: SavedStates
    ) -> State:
        """What leaves the segment, without outputs."""
        k, v = self.keys(h, phases)
        return (self.attention.final_state_of(self._begin(k, v, phases, doc_ids, carry, memory, True)),)

    def _begin(
        self,
        k: Tensor,
        v: Tensor,
        phases: Phases | None,
        doc_ids: Tensor | None,
        carry: State,
        memory: SavedStates,
        output_final_state: bool,
    ) -> Pending:
        decay = None if self.slope is None else -self.slope
        turn = None if phases is None else phases.turn
        return self.attention.begin(
            k, v, decay, doc_ids, angle=turn, carry=carry[0], memory=memory, output_final_state=output_final_state
        )


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:2], heads, -1)
