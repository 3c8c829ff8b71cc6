"""Mixers: the layers that move information between tokens.

Each takes the normalised input h [B, T, D] and the arguments of the scan, and returns y [B, T, D] with its final state.
If ranks share the window, it computes k and v first, so that the exchange overlaps with q and the gate. The result of
`prepare` is small and in full precision; the block calls it outside of recomputation and passes it in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from lasptrain.models.layers import Phases
from lasptrain.parallel.recurrence import Pending, SavedStates, ShardedRecurrence

State = tuple[Tensor | None, ...]  # carried by a mixer from segment to segment; private to the mixer


class Context(NamedTuple):
    """The arguments of the scan, as the model passes them to a mixer.

    Attributes:
        doc_ids: documents that have started in the slice [B, T]; document 0 continues from the left. None: all is one.
        carry: the segment's initial state; a tuple of None at a window's start.
        saved: keeps the states at the slice's edges, and provides them if the layer is being recomputed.
        output_final_state: whether the next segment's initial state is wanted.
    """

    doc_ids: Tensor | None
    carry: State
    saved: SavedStates
    output_final_state: bool


COMPILED = ("keys", "queries", "project", "output")  # the parts of a mixer between exchanges


class Recurrence(nn.Module):
    """A mixer that is one linear recurrence: the order of work around the exchange, common to all of them.

    `keys` returns k and v, `queries` q and the other arguments of `output`, `project` both. Slopes of None: no decay.
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

    def forward(self, h: Tensor, phases: Phases | None, context: Context) -> tuple[Tensor, State]:
        if self.attention.scan.size > 1:
            pending = self._begin(*self.keys(h, phases), phases, context)
            q, *rest = self.queries(h, phases)
        else:
            k, v, q, *rest = self.project(h, phases)
            pending = self._begin(k, v, phases, context)
        o, final_state = self.attention.finish(pending, q)
        return self.output(o, *rest), (final_state,)

    def state(self, h: Tensor, phases: Phases | None, context: Context) -> State:
        """Return the next segment's initial state, without computing outputs."""
        k, v = self.keys(h, phases)
        return (self.attention.final_state_of(self._begin(k, v, phases, context)),)

    def _begin(self, k: Tensor, v: Tensor, phases: Phases | None, context: Context) -> Pending:
        decay = None if self.slope is None else -self.slope
        turn = None if phases is None else phases.turn
        doc_ids, (carry, *_), saved, wanted = context
        return self.attention.begin(
            k, v, decay, doc_ids, angle=turn, carry=carry, saved=saved, output_final_state=wanted
        )


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:2], heads, -1)
