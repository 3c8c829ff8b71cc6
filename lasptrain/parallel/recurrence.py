"""Linear attention over a window that is spread over ranks: a kernel and a scan behind two calls.

    pending = recurrence.begin(k, v, ...)           summarise the slice, start the exchange
    o, final_state = recurrence.finish(pending, q)  by now the initial state has arrived

Whatever the layer computes between the two hides the exchange. Autograd keeps that order backwards: the exchange of
state gradients starts in the backward of `finish`, the gradient of q flows on, and only the backward of `begin`, which
needs the state gradient from the right for dk and dv, waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lasptrain import ops
from lasptrain.parallel.host import unread
from lasptrain.parallel.scan import Exchange, Message, Ring, Scan, Scanned, Transition


@dataclass
class SavedStates:
    """The states at the edges of one layer's slice, once known: recomputing the layer then needs no exchange."""

    ready: bool = False
    decay: Tensor | None = None  # of the slice, [B, H]
    initial_state: Tensor | None = None  # [B, H, K, V]; None is zero
    final_state: Tensor | None = None  # as the scan returned it; may be dropped if not needed again
    before: SavedStates | None = None  # the same for the rows before the slice, where the layer needs some

    @property
    def rows(self) -> SavedStates:
        """`before`, created on first use."""
        if self.before is None:
            self.before = SavedStates()
        return self.before

    @property
    def parts(self) -> list[SavedStates]:
        """Self, and `before` if there is one."""
        return [self] if self.before is None else [self, self.before]


class _Given(NamedTuple):
    """An exchange that is not needed: the initial state is known."""

    scanned: Scanned

    def wait(self) -> Scanned:
        return self.scanned


@dataclass
class _Backward:
    """Values that the backward of `finish` leaves for the backward of `begin`."""

    q: Tensor
    do: Tensor
    initial_state: Tensor | None
    prefix: Tensor
    row: Tensor
    dblocks: Tensor
    exchange: Exchange | Message


@dataclass
class _Exchanging:
    """A layer between `begin`, which sets the fields not given at construction, and `finish`, which deletes them."""

    saved: SavedStates
    output_final_state: bool
    k: Tensor = field(init=False)
    v: Tensor = field(init=False)
    log_decay: Tensor | None = field(init=False)
    doc_ids: Tensor | None = field(init=False)
    transition: Transition = field(init=False)
    has_carry: bool = field(init=False)
    exchange: Exchange | Message | _Given = field(init=False)
    blocks: Tensor | None = field(init=False)
    link: Tensor = field(init=False)  # empty; ties the two halves together in the autograd graph
    backward: _Backward | None = None


class _Alone(NamedTuple):
    """A slice that is the whole window: nothing crosses its edges, so `finish` does all the work."""

    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    doc_ids: Tensor | None


Pending: TypeAlias = _Exchanging | _Alone


class ShardedRecurrence:
    """The recurrence of one model on one mesh.

    Args:
        kernel: name of a kernel of `lasptrain.ops`.
        scan: the scan over the sp group; without one the slice is the whole window.
    """

    def __init__(self, kernel: str, scan: Scan | None = None):
        self.kernel = kernel
        self.scan: Scan = scan if scan is not None else Ring(None, torch.device("cpu"))

    def begin(
        self,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        doc_ids: Tensor | None,
        *,
        angle: Tensor | None = None,
        carry: Tensor | None = None,
        saved: SavedStates | None = None,
        output_final_state: bool = False,
    ) -> Pending:
        """Summarise the slice k [B, T, H, K], v [B, T, H, V] and start the exchange.

        Args:
            log_decay, doc_ids: as in `lasptrain.ops`.
            angle: [H, K/2], or [1, K/2] without gradient, fp64 radians by which keys turn over the slice, where they
                are rotated.
            carry: the segment's initial state, as the scan returned it; None at a window's start.
            saved: keeps the slice's initial state, and provides it if the layer is being recomputed.
            output_final_state: whether `finish` is to return the next segment's initial state.
        """
        if self.scan.size == 1 and carry is None and not output_final_state:
            return _Alone(k, v, log_decay, doc_ids)
        pending = _Exchanging(saved if saved is not None else SavedStates(), output_final_state)
        pending.link = _Begin.apply(k, v, log_decay, angle, carry, doc_ids, self, pending)  # type: ignore[no-untyped-call]
        return pending

    def finish(self, pending: Pending, q: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return outputs [B, T, H, V] for q [B, T, H, K], and the next segment's initial state if asked for."""
        if isinstance(pending, _Alone):
            o: Tensor = _Whole.apply(q, *pending, self.kernel)  # type: ignore[no-untyped-call]
            return o, None
        link = pending.link
        del pending.link  # its graph holds `pending`: a cycle would keep states alive until garbage collection
        result: tuple[Tensor, Tensor | None] = _Finish.apply(q, link, self, pending)  # type: ignore[no-untyped-call]
        return result

    def final_state_of(self, pending: Pending) -> Tensor | None:
        """Return the next segment's initial state, after a `begin` that was asked for it, instead of `finish`.

        It has no gradient; outputs are not computed.
        """
        assert isinstance(pending, _Exchanging)
        initial_state, final_state = pending.exchange.wait()
        pending.saved.ready, pending.saved.initial_state = True, initial_state
        return final_state


class _Whole(Function):
    """A slice without exchange; apart from the two below, because at short lengths host time dominates."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, doc_ids: Tensor | None, kernel: str
    ) -> Tensor:
        o, prefix = ops.attend(kernel, q, k, v, log_decay, doc_ids, None, None)
        ctx.kernel = kernel
        ctx.save_for_backward(q, k, v, log_decay, doc_ids, prefix)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, doc_ids, prefix = ctx.saved_tensors
        do = do.contiguous()
        dq, row = ops.grad_query(ctx.kernel, q, k, v, do, log_decay, doc_ids, prefix)
        dk, dv, dlog = ops.grad_key_value(ctx.kernel, q, k, v, do, log_decay, doc_ids, None, None, prefix, row)
        return dq, dk, dv, (dlog if dlog.numel() else None), None, None


class _Begin(Function):
    @staticmethod
    def forward(
        ctx: Any,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        angle: Tensor | None,
        carry: Tensor | None,
        doc_ids: Tensor | None,
        recurrence: ShardedRecurrence,
        pending: _Exchanging,
    ) -> Tensor:
        saved, blocks = pending.saved, None
        if saved.ready:
            transition = Transition(saved.decay, angle)
            pending.exchange = _Given(_remembered(pending, k, v))
        else:
            scan = recurrence.scan
            wanted = scan.reads(pending.output_final_state)
            state, saved.decay, blocks = ops.summarize(recurrence.kernel, k, v, log_decay, doc_ids, wanted)
            transition = Transition(saved.decay, angle)
            state = transition.rotate(state) if wanted else state
            pending.exchange = scan.start(state, transition, carry, output_final_state=pending.output_final_state)
        pending.transition = transition
        pending.k, pending.v, pending.log_decay, pending.doc_ids = k, v, log_decay, doc_ids
        pending.blocks = blocks
        pending.has_carry = carry is not None and ctx.needs_input_grad[4]
        ctx.recurrence, ctx.pending = recurrence, pending
        ctx.save_for_backward(k, v, log_decay, doc_ids, angle, transition.decay)
        return k.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        k, v, log_decay, doc_ids, angle, decay = ctx.saved_tensors
        handed: _Backward = ctx.pending.backward
        ctx.pending.backward = None
        kernel = ctx.recurrence.kernel
        transition = Transition(decay, angle)
        right, dcarry = handed.exchange.wait()
        dangle = None
        if ctx.needs_input_grad[3] and right is not None:
            state = ops.summarize(kernel, k, v, log_decay, doc_ids, True)[0]
            final_state = transition.apply(handed.initial_state, transition.rotate(state))
            dangle = _grad_angle(right, final_state)
        dfinal = None if right is None else transition.transpose().rotate(right)
        dk, dv, dlog = ops.grad_key_value(
            kernel, handed.q, k, v, handed.do, log_decay, doc_ids, dfinal, handed.dblocks, handed.prefix, handed.row
        )
        return dk, dv, (dlog if dlog.numel() else None), dangle, dcarry, None, None, None


def _remembered(pending: _Exchanging, k: Tensor, v: Tensor) -> Scanned:
    """Return the states of an earlier pass. A final state that was dropped is not read again, only its gradient is."""
    saved = pending.saved
    if not pending.output_final_state:
        return Scanned(saved.initial_state, None)
    if saved.final_state is not None:
        return Scanned(saved.initial_state, saved.final_state.detach())
    b, _, h, kdim = k.shape
    assert saved.decay is not None
    return Scanned(saved.initial_state, unread((b, h, kdim, v.shape[-1]), saved.decay))


def _grad_angle(right: Tensor, final_state: Tensor) -> Tensor:
    """Return the gradient [H, K/2] of the angle: rotating the final state mixes its cosine and sine rows."""
    by_cos, by_sin = final_state.chunk(2, dim=-2)
    to_cos, to_sin = right.chunk(2, dim=-2)
    return (to_cos * by_sin - to_sin * by_cos).sum((0, -1)).double()


class _Finish(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, link: Tensor, recurrence: ShardedRecurrence, pending: _Exchanging
    ) -> tuple[Tensor, Tensor | None]:
        initial_state, final_state = pending.exchange.wait()
        saved = pending.saved
        saved.ready, saved.initial_state = True, initial_state
        saved.final_state = None if final_state is None else final_state.detach()
        kernel = recurrence.kernel
        o, prefix = ops.attend(
            kernel, q, pending.k, pending.v, pending.log_decay, pending.doc_ids, initial_state, pending.blocks
        )
        ctx.recurrence, ctx.pending = recurrence, pending
        ctx.set_materialize_grads(False)
        decay, angle, _ = pending.transition
        kept = None if angle is None else initial_state  # for the gradient of the angle
        ctx.save_for_backward(q, pending.k, pending.v, pending.log_decay, pending.doc_ids, prefix, kept, decay, angle)
        del pending.k, pending.v, pending.log_decay, pending.doc_ids
        del pending.blocks, pending.exchange, pending.transition
        return o, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, doc_ids, prefix, initial_state, decay, angle = ctx.saved_tensors
        kernel, scan, pending = ctx.recurrence.kernel, ctx.recurrence.scan, ctx.pending
        do = torch.zeros_like(v) if do is None else do.contiguous()
        wanted = scan.reads(pending.has_carry, reverse=True)
        dinitial, dblocks = ops.grad_initial_state(kernel, q, do, log_decay, doc_ids, wanted)
        exchange = scan.start(
            dinitial, Transition(decay, angle).transpose(), dfinal, reverse=True, output_final_state=pending.has_carry
        )
        dq, row = ops.grad_query(kernel, q, k, v, do, log_decay, doc_ids, prefix)
        pending.backward = _Backward(q, do, initial_state, prefix, row, dblocks, exchange)
        return dq, q.new_empty(0), None, None
