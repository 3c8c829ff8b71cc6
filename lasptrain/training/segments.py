"""The gradient of one window, taken segment by segment: exact back-propagation in memory that does not grow with it.

Forward without gradients over all segments but the last keeps, per layer and segment, the initial state of this rank's
slice: in host memory, so that the window's length costs a GPU nothing. Then, from the last segment back to the first,
each is run with gradients from its kept states, and the gradient of its initial states is passed to the segment before.
A window of one segment has no extra forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lasptrain.data.loader import Slice
from lasptrain.models.language_model import Output
from lasptrain.models.mixer import State
from lasptrain.parallel.host import unread
from lasptrain.parallel.recurrence import SavedStates
from lasptrain.parallel.signals import Signals

States = list[State]  # of all layers at one edge between segments; None for what a mixer does not carry


def backward(
    model: nn.Module,
    layers: int,
    segments: Sequence[Slice],
    scale: Tensor | float,
    before_last_backward: Callable[[], None] = lambda: None,
    on_segment: Callable[[], None] = lambda: None,
    signals: Sequence[Signals] | None = None,
) -> Tensor:
    """Add the gradient of scale · (sum of this window's losses) to the parameters.

    Returns that sum in its two parts, detached: [cross-entropy, z-loss].

    Args:
        model: a `LanguageModel`, or what `parallelize` made of one.
        segments: this rank's slice of each segment, in order.
        before_last_backward: called before the forward that precedes the last backward, to turn gradient reduction on.
        on_segment: called before each forward, on all ranks equally often; what it raises leaves gradients unfinished.
        signals: one for each layer and one for the head, to report to.
    """
    kept, carry = keep_states(model, layers, segments[:-1], on_segment)
    kept.append(_unknown(layers))
    total: Tensor | None = None
    grads: States | None = None
    for index in reversed(range(len(segments))):
        on_segment()
        last = index == len(segments) - 1
        if index == 0:
            before_last_backward()
        leaves = None
        if carry is not None and index > 0:
            leaves = _map(partial(_leaf, read=last), carry)
        loss = _segment(model, segments[index], leaves, kept.pop(), scale, grads, signals, last=last)
        grads = None if leaves is None else _map(lambda leaf: leaf.grad, leaves)
        total = loss if total is None else total + loss
    assert total is not None
    return total


def keep_states(
    model: nn.Module, layers: int, segments: Sequence[Slice], on_segment: Callable[[], None] = lambda: None
) -> tuple[list[list[SavedStates]], States | None]:
    """Return the initial states of this rank's slice per segment and layer, and the carry into the next segment."""
    kept: list[list[SavedStates]] = []
    carry: States | None = None
    with torch.no_grad():
        for segment in segments:
            on_segment()
            kept.append(_unknown(layers))
            carry = model(segment.tokens, None, segment.doc_ids, carry, kept[-1], output_final_state=True).final_state
            for saved in kept[-1]:
                saved.to_host()
    return kept, carry


def _unknown(layers: int) -> list[SavedStates]:
    return [SavedStates() for _ in range(layers)]


def _segment(
    model: nn.Module,
    segment: Slice,
    initial: States | None,
    saved: list[SavedStates],
    scale: Tensor | float,
    grads: States | None,
    signals: Sequence[Signals] | None,
    *,
    last: bool,
) -> Tensor:
    """Run a segment again and back from its loss and the gradients of its final states; return the loss's parts."""
    for states in saved:
        states.to_device(segment.tokens.device)
    head = None if signals is None else _listen(saved, signals, last)
    out: Output = model(
        segment.tokens, segment.labels, segment.doc_ids, initial, saved, output_final_state=not last, signals=head
    )
    for states in saved:
        states.signals = None  # a layer that is recomputed in the backward has reported
    assert out.loss is not None
    pairs = [] if grads is None else _pairs(out.final_state, grads)
    with torch.autograd.set_multithreading_enabled(False):  # waking a second thread dominates on short slices
        torch.autograd.backward([out.loss * scale, *(s for s, _ in pairs)], [None, *(g for _, g in pairs)])
    loss, z_loss = out.loss.detach(), torch.zeros_like(out.loss) if out.z_loss is None else out.z_loss
    return torch.stack([loss - z_loss, z_loss])


def _listen(saved: list[SavedStates], signals: Sequence[Signals], last: bool) -> Signals:
    """Have layers report in the next forward; return the signals of the head."""
    *layers, head = signals
    for states, layer in zip(saved, layers, strict=True):
        states.signals, layer.ends = layer, last
    return head


def _leaf(state: Tensor, *, read: bool) -> Tensor:
    """Return a leaf for the gradient of a segment's initial state, with its value if nothing else keeps it (`read`)."""
    return (state if read else unread(state.shape, state)).detach().requires_grad_()


def _map(function: Callable[[Tensor], Tensor | None], states: States) -> States:
    """Apply a function to the states that are tensors; a prefix, which keeps its own gradient, is left as it is."""
    return [tuple(function(x) if isinstance(x, Tensor) else x for x in state) for state in states]


def _pairs(final_states: States, grads: States) -> list[tuple[Tensor, Tensor]]:
    """Return the final states that have a gradient, each with it."""
    both = zip(_flat(final_states), _flat(grads), strict=True)
    return [(state, grad) for state, grad in both if isinstance(grad, Tensor)]


def _flat(states: States) -> Iterator[Any]:
    return (x for state in states for x in state)
