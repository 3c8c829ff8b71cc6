"""Softmax attention over a window that is spread over ranks and segments: a segment's queries over the prefix.

Queries attend to the blocks before their segment while its own keys and values travel; parts are merged by the
log-sum-exp of their scores. What `saved` keeps makes that attention is not repeated where a layer is run again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils._mode_utils import no_dispatch

from lasptrain.ops import softmax
from lasptrain.parallel.block import Block, Rows, Storage, visited
from lasptrain.parallel.place import Place
from lasptrain.parallel.prefix import Prefix, Read
from lasptrain.parallel.recurrence import SavedStates
from lasptrain.parallel.scan import Exchange


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    place: Place,
    carry: Prefix | None,
    storage: Storage,
    saved: SavedStates,
    output_final_state: bool,
) -> tuple[Tensor, Prefix | None]:
    """Return o [B, T, H, V] of q [B, T, H, K], and the prefix before the next segment if asked for.

    Args:
        k, v: the slice's own, [B, T, G, ·], k rotated to its position in the window.
        place: of the slice.
        carry: the prefix before the segment; None at a window's start.
        storage: where blocks are kept, and over which ranks.
        saved: keeps the prefix and what came of it, and provides both if the layer is being run again.
    """
    read, graph = _read(carry, saved), torch.is_grad_enabled()
    keep = graph or (saved.again and storage.outputs)
    o, link = _Attend.apply(q, k, v, read.before.link, place, read, storage, keep)  # type: ignore[no-untyped-call]
    assert read.own is not None
    join = storage.gathered and not (saved.again or graph)
    return o, read.before.then(read.own, link, join=join) if output_final_state else None


def grow(k: Tensor, v: Tensor, place: Place, carry: Prefix | None, storage: Storage, saved: SavedStates) -> Prefix:
    """Return the prefix before the next segment, without computing outputs; arguments as of `attend`."""
    read = _read(carry, saved)
    if read.own is None:
        read.own, _ = storage.keep(place.before.position, (k, v)).wait()
    return read.before.then(read.own, None, join=storage.gathered and not saved.again)


def _read(carry: Prefix | None, saved: SavedStates) -> Read:
    if saved.read is None:
        saved.read = Read(Prefix() if carry is None else carry)
    return saved.read


class _Attend(Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        link: Tensor | None,
        place: Place,
        read: Read,
        storage: Storage,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        with no_dispatch():  # selective recomputation takes operators for those of the first pass, in their order
            o, lse = _output(q, k, v, place, read, storage) if read.output is None else read.output
        read.output = (o, lse) if keep else None
        o = o.detach()
        ctx.save_for_backward(q, o, lse)
        ctx.place, ctx.read, ctx.dtype = place, read, k.dtype
        ctx.set_materialize_grads(False)
        return o, q.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        q, o, lse = ctx.saved_tensors
        place, read = ctx.place, ctx.read
        given = q, o, lse, torch.zeros_like(o) if do is None else do.contiguous(), place
        dq, *grads = _back(read.own, read.own.read().wait(), *given)
        taking = read.own.take((grads[0], grads[1]))
        adding: Exchange[None] | None = None
        for block, rows in visited(_reached(read, place)):
            part, *grads = _back(block, rows, *given)
            dq += part
            if adding is not None:
                adding.wait()
            adding = block.add((grads[0], grads[1]))
        if adding is not None:
            adding.wait()
        dk, dv = taking.wait()
        read.output = None
        link = q.new_empty(0) if ctx.needs_input_grad[3] else None
        return dq.to(q.dtype), dk.to(ctx.dtype), dv.to(ctx.dtype), link, None, None, None, None


def _output(q: Tensor, k: Tensor, v: Tensor, place: Place, read: Read, storage: Storage) -> Rows:
    """Return o and lse of a slice, given the keys and values of its own tokens."""
    keeping = storage.keep(place.before.position, (k, v)) if read.own is None else None
    total: Rows | None = None
    for block, rows in visited(_reached(read, place)):
        part = _forward(q, block, rows, place, wide=True)
        total = part if total is None else softmax.merge(*total, *part)
    if keeping is not None:
        read.own, rows = keeping.wait()
    else:
        assert read.own is not None
        rows = read.own.read().wait()
    part = _forward(q, read.own, rows, place, wide=total is not None)
    o, lse = part if total is None else softmax.merge(*total, *part)
    return o.to(q.dtype), lse


def _reached(read: Read, place: Place) -> list[Block]:
    """Return the blocks before the segment of which a document that goes on into it holds a part."""
    return read.before.reached(0 if place.before.earliest is None else place.before.earliest.value())


def _forward(q: Tensor, block: Block, rows: Rows, place: Place, *, wide: bool) -> Rows:
    return softmax.forward(q, *rows, place.documents, place.start, block.start, None, wide=wide)


def _back(
    block: Block, rows: Rows, q: Tensor, o: Tensor, lse: Tensor, do: Tensor, place: Place
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a block's part of dq, and its dk and dv, in at least fp32."""
    return softmax.backward(q, *rows, o, lse, do, place.documents, place.start, block.start, None, wide=True)
