"""Linear attention over a window that is spread over ranks: a kernel and a scan behind two calls.

    pending = recurrence.begin((k, v, log_decay), doc_ids)
    o, final_state = recurrence.finish(pending, q)

Whatever the layer computes between the two hides the exchange, in both directions, because autograd keeps their order:

    begin     inputs ──▶ summarize ──▶ start the exchange of states ···┐
              the layer computes q, its gate, …                        ⋮
    finish    q, inputs, initial state ◀── wait ◀······················┘ ──▶ attend ──▶ o

    finish′   do ──▶ grad_initial_state ──▶ start the exchange of gradients ···┐ ──▶ grad_query ──▶ dq
              autograd goes on through q, the gate, …                          ⋮
    begin′    gradient of the final state ◀── wait ◀···························┘ ──▶ grad_inputs ──▶ dk, dv, …

`begin` passes on a record that nobody changes. Backwards, finish′ leaves what begin′ needs in a `_Handoff`. No other
state lies between the four.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, NamedTuple, ParamSpec, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils._mode_utils import no_dispatch

from lasptrain.ops import decay_rule, state_dtype
from lasptrain.ops.recurrence import Inputs, Recurrence, gates_of
from lasptrain.parallel.block import Storage
from lasptrain.parallel.host import to_device, to_host, unread
from lasptrain.parallel.place import Place
from lasptrain.parallel.prefix import Read
from lasptrain.parallel.scan import Exchange, Message, Ring, Scan, Scanned
from lasptrain.parallel.shapes import check_query, check_slice
from lasptrain.parallel.signals import Signals
from lasptrain.parallel.transition import Transition


@dataclass
class SavedStates:
    """The states at the edges of one layer's slice, once known: recomputing the layer then needs no exchange."""

    ready: bool = False
    initial_state: Tensor | None = None  # [B, H, K, V]; None is zero
    final_state: Tensor | None = None  # as the scan returned it; may be dropped if not needed again
    before: SavedStates | None = None  # the same for the rows before the slice, where the layer needs some
    read: Read | None = None  # keys of a softmax layer that sees all before, instead of states
    place: Place | None = None  # of the slice, in the first softmax layer's
    again: bool = True  # the layer may be run again from these
    signals: Signals | None = None  # to report to, where that is asked of the layer

    @property
    def rows(self) -> SavedStates:
        """`before`, created on first use."""
        if self.before is None:
            self.before = SavedStates()
        return self.before

    def to_host(self) -> None:
        """Let what a later pass reads wait in host memory, and drop what none does."""
        self.final_state = None
        if self.before is not None:
            self.before.final_state = None
        self._moved(to_host)

    def to_device(self, device: torch.device) -> None:
        """Bring it back."""
        self._moved(partial(to_device, device=device))

    def _moved(self, move: Callable[[Tensor], Tensor]) -> None:
        if self.initial_state is not None:
            self.initial_state = move(self.initial_state)
        if self.read is not None and self.read.output is not None:
            o, lse = self.read.output
            self.read.output = move(o), move(lse)
        if self.before is not None:
            self.before._moved(move)


class _Known(NamedTuple):
    """An exchange that is not needed: the states are those of an earlier pass."""

    scanned: Scanned

    def wait(self) -> Scanned:
        return self.scanned


class _Backward(NamedTuple):
    """Values that finish′ leaves for begin′."""

    q: Tensor
    do: Tensor
    inputs: Inputs
    doc_ids: Tensor | None
    angle: Tensor | None
    initial_state: Tensor | None  # where the gradient of the angle needs it
    kept: list[Tensor]
    rest: list[Tensor]
    dblocks: list[Tensor]
    exchange: Exchange[Scanned] | Message


@dataclass
class _Handoff:
    """The way from finish′ to begin′: filled by the one, emptied by the other."""

    backward: _Backward | None = None

    def take(self) -> _Backward:
        taken, self.backward = self.backward, None
        assert taken is not None
        return taken


class _Slice(NamedTuple):
    """A slice whose edges states cross, as `begin` is given it."""

    rule: Recurrence
    inputs: Inputs
    doc_ids: Tensor | None
    angle: Tensor | None
    saved: SavedStates
    output_final_state: bool
    grad_carry: bool  # the segment's initial state wants a gradient


class _Exchanging(NamedTuple):
    """A slice between `begin` and `finish`."""

    slice: _Slice
    blocks: list[Tensor]
    exchange: Exchange[Scanned] | Message | _Known
    handoff: _Handoff
    link: Tensor  # empty; makes begin′ follow finish′ in the autograd graph


class _Alone(NamedTuple):
    """A slice that is the whole window: nothing crosses its edges, so `finish` does all the work."""

    rule: Recurrence
    inputs: Inputs
    doc_ids: Tensor | None
    angle: Tensor | None
    saved: SavedStates


Pending: TypeAlias = _Exchanging | _Alone


class ShardedRecurrence:
    """The recurrence of one model on one mesh.

    Args:
        kernel: name of a kernel, as `lasptrain.ops.select` returns it.
        scan: the scan over the sp group; without one the slice is the whole window.
        prefix, outputs: where keys and values of softmax layers that see all are kept, and whether their outputs are
            between the passes over a window; see `Storage`.
    """

    def __init__(self, kernel: str, scan: Scan | None = None, prefix: str = "gathered", outputs: bool = True):
        self.kernel = kernel
        self.scan: Scan = scan if scan is not None else Ring(None, torch.device("cpu"))
        self.storage = Storage(self.scan, prefix, outputs)

    def share_as(self, other: ShardedRecurrence) -> None:
        """Share windows from now on over the ranks that another one does."""
        self.scan, self.storage = other.scan, other.storage

    def begin(
        self,
        inputs: Inputs,
        doc_ids: Tensor | None,
        *,
        rule: Recurrence = decay_rule,
        angle: Tensor | None = None,
        carry: Tensor | None = None,
        saved: SavedStates | None = None,
        output_final_state: bool = False,
    ) -> Pending:
        """Summarise the slice and start the exchange.

        Args:
            inputs: of the rule: k [B, T, H_k, K], v [B, T, H, V], then its own.
            doc_ids: as in `lasptrain.ops`.
            rule: the recurrence.
            angle: [H, K/2], or [1, K/2] without gradient, fp64 radians by which keys turn over the slice, where they
                are rotated.
            carry: the segment's initial state, as the scan returned it; None at a window's start.
            saved: keeps the slice's initial state, and provides it if the layer is being recomputed.
            output_final_state: whether `finish` is to return the next segment's initial state.

        Raises:
            ValueError: for shapes that do not fit each other.
        """
        check_slice(inputs, doc_ids, angle, carry)
        saved = SavedStates() if saved is None else saved
        if self.scan.size == 1 and carry is None and not output_final_state:
            return _Alone(rule, inputs, doc_ids, angle, saved)
        grad_carry = carry is not None and carry.requires_grad
        piece = _Slice(rule, inputs, doc_ids, angle, saved, output_final_state, grad_carry)
        handoff = _Handoff()
        begun: tuple[Any, ...] = _Begin.apply(self, handoff, piece, angle, carry, *inputs)  # type: ignore[no-untyped-call]
        link, blocks, exchange = begun
        return _Exchanging(piece, blocks, exchange, handoff, link)

    def finish(self, pending: Pending, q: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return outputs [B, T, H, V] for q [B, T, H_k, K], and the next segment's initial state if asked for.

        Raises ValueError if q does not have the shape of k.
        """
        result: tuple[Tensor, Tensor | None]
        if isinstance(pending, _Alone):
            check_query(q, pending.inputs)
            o: Tensor = _Whole.apply(self.kernel, pending.rule, pending.doc_ids, q, *pending.inputs)  # type: ignore[no-untyped-call]
            self._report(pending)
            result = o, None
        else:
            check_query(q, pending.slice.inputs)
            result = _Finish.apply(self, pending, q, pending.link)  # type: ignore[no-untyped-call]
            self._report(pending.slice)
        return result

    def _report(self, piece: _Slice | _Alone) -> None:
        """Report the gates of a slice, and its final state where its window ends, if that is asked for."""
        signals = piece.saved.signals
        if signals is None:
            return
        with torch.no_grad(), no_dispatch():  # as in `_Begin`
            k, *_ = cast(tuple[Tensor], piece.inputs)
            signals.gates(gates_of(piece.rule, piece.inputs), k.shape[0] * k.shape[1])
            if signals.ends:
                before = piece.saved.initial_state
                wanted = 1 if before is None else 2
                state, linear, _ = piece.rule.summarize(self.kernel, piece.inputs, piece.doc_ids, wanted)
                transition = Transition(linear, piece.angle)
                final_state = transition.apply(before, transition.rotate(state))
                signals.states(final_state, counts=self.scan.rank == self.scan.size - 1)

    def final_state_of(self, pending: Pending) -> Tensor | None:
        """Return the next segment's initial state, after a `begin` that was asked for it, instead of `finish`.

        It has no gradient; outputs are not computed.
        """
        assert isinstance(pending, _Exchanging)
        saved = pending.slice.saved
        initial_state, final_state = pending.exchange.wait()
        saved.ready, saved.initial_state = True, initial_state
        return final_state


P = ParamSpec("P")
R = TypeVar("R")


def _as_given(function: Callable[P, R]) -> Callable[P, R]:
    """Let a pass compute in the dtypes of its tensors: autocast would round states and sums."""

    @wraps(function)
    def run(*arguments: P.args, **named: P.kwargs) -> R:
        if not (torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")):
            return function(*arguments, **named)
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return function(*arguments, **named)

    return run


class _Whole(Function):
    """A slice without exchange; apart from the two below, because at short lengths host time dominates."""

    @staticmethod
    @_as_given
    def forward(
        ctx: Any, kernel: str, rule: Recurrence, doc_ids: Tensor | None, q: Tensor, *inputs: Tensor | None
    ) -> Tensor:
        o, kept = rule.attend(kernel, q, inputs, doc_ids, None, [])
        ctx.kernel, ctx.rule, ctx.count = kernel, rule, len(inputs)
        ctx.save_for_backward(q, doc_ids, *inputs, *kept)
        return o

    @staticmethod
    @once_differentiable
    @_as_given
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, doc_ids, *saved = ctx.saved_tensors
        inputs, kept = tuple(saved[: ctx.count]), saved[ctx.count :]
        do = do.contiguous()
        dq, rest = ctx.rule.grad_query(ctx.kernel, q, inputs, do, doc_ids, kept)
        grads = ctx.rule.grad_inputs(ctx.kernel, q, inputs, do, doc_ids, None, [], kept, rest)
        return None, None, None, dq, *grads


class _Begin(Function):
    @staticmethod
    @_as_given
    def forward(
        ctx: Any,
        recurrence: ShardedRecurrence,
        handoff: _Handoff,
        piece: _Slice,
        angle: Tensor | None,
        carry: Tensor | None,
        *inputs: Tensor | None,
    ) -> tuple[Tensor, list[Tensor], Exchange[Scanned] | Message | _Known]:
        ctx.kernel, ctx.rule, ctx.handoff = recurrence.kernel, piece.rule, handoff
        ctx.set_materialize_grads(False)
        k, v, *_ = cast(tuple[Tensor, Tensor], inputs)
        link = k.new_empty(0)
        if piece.saved.ready:
            return link, [], _Known(_remembered(piece, k, v))
        scan, final = recurrence.scan, piece.output_final_state
        wanted = scan.reads(carried=carry is not None, output_final_state=final)
        with no_dispatch():  # selective recomputation takes operators for those of the first pass, in their order
            state, linear, blocks = piece.rule.summarize(recurrence.kernel, inputs, piece.doc_ids, wanted)
            transition = Transition(linear, angle)
            state = transition.rotate(state) if wanted else state
            return link, blocks, scan.start(state, transition, carry, output_final_state=final)

    @staticmethod
    @once_differentiable
    @_as_given
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        q, do, inputs, doc_ids, angle, initial_state, kept, rest, dblocks, exchange = ctx.handoff.take()
        kernel, rule = ctx.kernel, ctx.rule
        right, dcarry = exchange.wait()
        dangle = None
        if ctx.needs_input_grad[3] and right is not None:
            state, linear, _blocks = rule.summarize(kernel, inputs, doc_ids, 2)
            transition = Transition(linear, angle)
            dangle = _grad_angle(right, transition.apply(initial_state, transition.rotate(state)))
        dfinal = None if right is None else Transition(None, angle).transpose().rotate(right)
        grads = rule.grad_inputs(kernel, q, inputs, do, doc_ids, dfinal, dblocks, kept, rest)
        return None, None, None, dangle, dcarry, *grads


def _remembered(piece: _Slice, k: Tensor, v: Tensor) -> Scanned:
    """Return the states of an earlier pass. A final state that was dropped is not read again, only its gradient is."""
    saved = piece.saved
    if not piece.output_final_state:
        return Scanned(saved.initial_state, None)
    if saved.final_state is not None:
        return Scanned(saved.initial_state, saved.final_state.detach())
    shape = (k.shape[0], v.shape[2], k.shape[3], v.shape[3])
    return Scanned(saved.initial_state, unread(shape, k, state_dtype(k)))


def _grad_angle(right: Tensor, final_state: Tensor) -> Tensor:
    """Return the gradient [H, K/2] of the angle: rotating the final state mixes its cosine and sine rows."""
    by_cos, by_sin = final_state.chunk(2, dim=-2)
    to_cos, to_sin = right.chunk(2, dim=-2)
    return (to_cos * by_sin - to_sin * by_cos).sum((0, -1)).double()


class _Finish(Function):
    @staticmethod
    @_as_given
    def forward(
        ctx: Any, recurrence: ShardedRecurrence, pending: _Exchanging, q: Tensor, link: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        rule, inputs, doc_ids, angle, saved, _, ctx.grad_carry = pending.slice
        with no_dispatch():  # as in `_Begin`
            initial_state, final_state = pending.exchange.wait()
        saved.ready, saved.initial_state = True, initial_state
        saved.final_state = None if final_state is None else final_state.detach()
        o, kept = rule.attend(recurrence.kernel, q, inputs, doc_ids, initial_state, pending.blocks)
        ctx.recurrence, ctx.rule, ctx.handoff, ctx.count = recurrence, rule, pending.handoff, len(inputs)
        ctx.set_materialize_grads(False)
        for_angle = None if angle is None else initial_state
        ctx.save_for_backward(q, doc_ids, angle, for_angle, *inputs, *kept)
        return o, final_state

    @staticmethod
    @once_differentiable
    @_as_given
    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        q, doc_ids, angle, initial_state, *saved = ctx.saved_tensors
        inputs, kept = tuple(saved[: ctx.count]), saved[ctx.count :]
        kernel, scan, rule = ctx.recurrence.kernel, ctx.recurrence.scan, ctx.rule
        do = torch.zeros_like(inputs[1]) if do is None else do.contiguous()
        wanted = scan.reads(carried=dfinal is not None, output_final_state=ctx.grad_carry, reverse=True)
        dinitial, linear, dblocks = rule.grad_initial_state(kernel, q, do, inputs, doc_ids, kept, wanted)
        exchange = scan.start(
            dinitial, Transition(linear, angle).transpose(), dfinal, reverse=True, output_final_state=ctx.grad_carry
        )
        dq, rest = rule.grad_query(kernel, q, inputs, do, doc_ids, kept)
        ctx.handoff.backward = _Backward(q, do, inputs, doc_ids, angle, initial_state, kept, rest, dblocks, exchange)
        return None, None, dq, q.new_empty(0)
