"""Softmax attention over a window that is spread over ranks and segments: a segment's queries over the prefix.

The keys and values of a segment are all-gathered over its ranks (LASP-2H, arXiv:2502.07563) while its queries attend to
the blocks before it; parts are merged by the log-sum-exp of their scores. Back, a block's gradient is summed over the
segments that have read it and then reduce-scattered, once. What `saved` keeps makes that neither an exchange nor
attention is repeated where a layer is run again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils._mode_utils import no_dispatch

from lasptrain.ops import softmax
from lasptrain.parallel.collectives import all_gather, reduce_scatter
from lasptrain.parallel.place import Place
from lasptrain.parallel.prefix import Block, Prefix, Read
from lasptrain.parallel.recurrence import SavedStates
from lasptrain.parallel.scan import Exchange, Scan

Rows = tuple[Tensor, Tensor]  # of keys and of values, or of their gradients


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    place: Place,
    carry: Prefix | None,
    scan: Scan,
    saved: SavedStates,
    output_final_state: bool,
) -> tuple[Tensor, Prefix | None]:
    """Return o [B, T, H, V] of q [B, T, H, K], and the prefix before the next segment if asked for.

    Args:
        k, v: the slice's own, [B, T, G, ·], k rotated to its position in the window.
        place: of the slice.
        carry: the prefix before the segment; None at a window's start.
        scan: over the ranks that share the window.
        saved: keeps the prefix and what came of it, and provides both if the layer is being run again.
    """
    read, graph = _read(carry, saved), torch.is_grad_enabled()
    o, link = _Attend.apply(q, k, v, read.before.link, place, read, scan, graph)  # type: ignore[no-untyped-call]
    assert read.own is not None
    join = not (saved.again or graph)
    return o, read.before.then(read.own, link, join=join) if output_final_state else None


def grow(k: Tensor, v: Tensor, place: Place, carry: Prefix | None, scan: Scan, saved: SavedStates) -> Prefix:
    """Return the prefix before the next segment, without computing outputs; arguments as of `attend`."""
    read = _read(carry, saved)
    if read.own is None:
        read.own = Block(place.before.position, *_gather(k, v, scan).wait())
    return read.before.then(read.own, None, join=not saved.again)


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
        scan: Scan,
        graph: bool,
    ) -> tuple[Tensor, Tensor]:
        with no_dispatch():  # selective recomputation takes operators for those of the first pass, in their order
            o, lse = _output(q, k, v, place, read, scan) if read.output is None else read.output
        read.output = (o, lse) if graph else None
        o = o.detach()
        ctx.save_for_backward(q, o, lse)
        ctx.place, ctx.read, ctx.scan, ctx.dtype = place, read, scan, k.dtype
        ctx.set_materialize_grads(False)
        return o, q.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        q, o, lse = ctx.saved_tensors
        place, read, scan = ctx.place, ctx.read, ctx.scan
        given = q, o, lse, torch.zeros_like(o) if do is None else do.contiguous(), place
        dq = _back(read.own, *given)
        exchange = _scatter(read.own.take(), scan)
        for block in _reached(read.before, place):
            dq += _back(block, *given)
        dk, dv = exchange.wait()
        read.output = None
        link = q.new_empty(0) if ctx.needs_input_grad[3] else None
        return dq.to(q.dtype), dk.to(ctx.dtype), dv.to(ctx.dtype), link, None, None, None, None


def _output(q: Tensor, k: Tensor, v: Tensor, place: Place, read: Read, scan: Scan) -> Rows:
    """Return o and lse of a slice, given the keys and values of its own tokens."""
    exchange = _gather(k, v, scan) if read.own is None else None
    total: Rows | None = None
    for block in _reached(read.before, place):
        part = softmax.forward(q, block.k, block.v, place.documents, place.start, block.start, None, wide=True)
        total = part if total is None else softmax.merge(*total, *part)
    if exchange is not None:
        read.own = Block(place.before.position, *exchange.wait())
    own = read.own
    assert own is not None
    many = total is not None
    part = softmax.forward(q, own.k, own.v, place.documents, place.start, own.start, None, wide=many)
    o, lse = part if total is None else softmax.merge(*total, *part)
    return o.to(q.dtype), lse


def _reached(prefix: Prefix, place: Place) -> list[Block]:
    """Return the blocks of which a document that goes on into the segment holds a part."""
    first = 0 if place.before.earliest is None else place.before.earliest.value()
    return [block for block in prefix.blocks if block.stop > first]


def _back(block: Block, q: Tensor, o: Tensor, lse: Tensor, do: Tensor, place: Place) -> Tensor:
    """Add to the gradient of a block; return its part of dq, in at least fp32."""
    dq, dk, dv = softmax.backward(
        q, block.k, block.v, o, lse, do, place.documents, place.start, block.start, None, wide=True
    )
    block.add(dk, dv)
    return dq


def _gather(k: Tensor, v: Tensor, scan: Scan) -> Exchange[Rows]:
    """Begin to gather the keys and values [B, sp · T, G, ·] of all slices of a segment."""
    scan.calls += scan.size > 1
    return Exchange(lambda: (_gathered(k, scan), _gathered(v, scan)), scan.stream, (k, v))


def _gathered(x: Tensor, scan: Scan) -> Tensor:
    """Return x [B, T, …] of all ranks along T."""
    if scan.size == 1:
        return x.detach()
    parts = x.new_empty(scan.size, *x.shape)
    all_gather(parts.view(-1), x.contiguous().view(-1), group=scan.group)
    scan.bytes_sent += x.numel() * x.element_size()
    return parts.transpose(0, 1).flatten(1, 2)


def _scatter(grads: Rows, scan: Scan) -> Exchange[Rows]:
    """Begin to sum gradients [B, sp · T, G, ·] over ranks, of which each gets its slice's."""
    scan.calls += scan.size > 1
    dk, dv = grads
    return Exchange(lambda: (_scattered(dk, scan), _scattered(dv, scan)), scan.stream, grads)


def _scattered(x: Tensor, scan: Scan) -> Tensor:
    """Return this slice's part [B, T, …] of the sum of x [B, sp · T, …] over ranks."""
    if scan.size == 1:
        return x
    parts = x.unflatten(1, (scan.size, -1)).transpose(0, 1).contiguous()
    mine = torch.empty_like(parts[0])
    reduce_scatter(mine.view(-1), parts.view(-1), group=scan.group)
    scan.bytes_sent += (scan.size - 1) * mine.numel() * mine.element_size()
    return mine
