"""Mixers: the layers that move information between tokens.

Each takes the normalised input h [B, T, D] and the arguments of the scan, and returns y [B, T, D] with its final state.
If ranks share the window, it computes k and v first, so that the exchange overlaps with q and the gate. The result of
`prepare` is small and in full precision; the block calls it outside of recomputation and passes it in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from lasptrain.models.layers import Phases
from lasptrain.models.start import Start
from lasptrain.ops import decay_rule
from lasptrain.ops.recurrence import Inputs, Recurrence
from lasptrain.parallel.place import Place
from lasptrain.parallel.recurrence import Pending, SavedStates, ShardedRecurrence

Kinds = dict[str, str]  # of a module's submodules by name: those that Muon does not move, and the kind of their weights
State = tuple[Any, ...]  # carried by a mixer from segment to segment, tensors or not; private to the mixer


class Context(NamedTuple):
    """The arguments of the scan, as the model passes them to a mixer.

    Attributes:
        doc_ids: documents that have started in the slice [B, T]; document 0 continues from the left. None: all is one.
        carry: the segment's initial state; a tuple of None at a window's start.
        saved: keeps the states at the slice's edges, and provides them if the layer is being recomputed.
        output_final_state: whether the next segment's initial state is wanted.
        place: of the slice in its window, in a model with softmax layers.
    """

    doc_ids: Tensor | None
    carry: State
    saved: SavedStates
    output_final_state: bool
    place: Place | None = None


class Mixer(nn.Module):
    """A layer that moves information between tokens."""

    compiled: ClassVar[tuple[str, ...]]  # methods that are compiled: the parts between exchanges
    attention: ShardedRecurrence

    def prepare(self, length: int) -> Any:
        """Return small things in full precision for a slice of `length` tokens; only the mixer knows them."""
        return None

    def initial(self, part: str, start: Start) -> Tensor | None:
        """Return the initial value of one of its own tensors, None for the usual one.

        The decays of a layer are a persistent buffer `slope`: in a checkpoint the numbers are the definition.
        """
        return start.slopes if part == "slope" else None

    def state(self, h: Tensor, prepared: Any, context: Context) -> State:
        """Return the next segment's initial state for h [B, T, D], without computing outputs."""
        raise NotImplementedError


COMPILED = ("keys", "queries", "project", "output")  # the parts of a mixer between exchanges


class RecurrentMixer(Mixer):
    """A mixer that is one linear recurrence: the order of work around the exchange, common to all of them.

    `keys` returns the recurrence's inputs, `queries` q and the other arguments of `output`, `project` the inputs, q and
    those arguments; they are given h and what `prepare` returned. Slopes of None: no decay.
    """

    compiled: ClassVar[tuple[str, ...]] = COMPILED
    rule: ClassVar[Recurrence] = decay_rule
    attention: ShardedRecurrence
    slope: Tensor | None
    keys: Callable[..., Inputs]
    queries: Callable[..., tuple[Tensor, ...]]
    project: Callable[..., tuple[Any, ...]]
    output: Callable[..., Tensor]

    @property
    def log_decay(self) -> Tensor | None:
        """Constant log decays [H] of the heads."""
        return None if self.slope is None else -self.slope

    def forward(self, h: Tensor, prepared: Any, context: Context) -> tuple[Tensor, State]:
        o, final_state, rest = self._attended(h, prepared, context)
        return self.output(o, *rest), (final_state,)

    def state(self, h: Tensor, prepared: Any, context: Context) -> State:
        """Return the next segment's initial state, without computing outputs."""
        return (self.attention.final_state_of(self._begin(self.keys(h, prepared), prepared, context)),)

    def _attended(self, h: Tensor, prepared: Any, context: Context) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Return o, the final state and the other arguments of `output`; what else the scan needed is freed."""
        if self.attention.scan.size > 1:
            pending = self._begin(self.keys(h, prepared), prepared, context)
            q, *rest = self.queries(h, prepared)
        else:
            inputs, q, *rest = self.project(h, prepared)
            pending = self._begin(inputs, prepared, context)
        return *self.attention.finish(pending, q), rest

    def _begin(self, inputs: Inputs, prepared: Any, context: Context) -> Pending:
        doc_ids, (carry, *_), saved, wanted, _ = context
        turn = prepared.turn if isinstance(prepared, Phases) else None
        return self.attention.begin(
            inputs, doc_ids, rule=self.rule, angle=turn, carry=carry, saved=saved, output_final_state=wanted
        )


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:2], heads, -1)
