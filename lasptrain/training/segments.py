"""The gradient of one window, taken segment by segment: exact back-propagation in memory that does not grow with it.

Forward without gradients over all segments but the last keeps, per layer and segment, the initial state of this rank's
slice: in host memory, so that the window's length costs a GPU nothing. Then, from the last segment back to the first,
each is run with gradients from its kept states, and the gradient of its initial states is passed to the segment before.
A window of one segment has no extra forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lasptrain.data.loader import Slice
from lasptrain.models.mixer import State
from lasptrain.parallel.host import to_device, to_host, unread
from lasptrain.parallel.recurrence import SavedStates


def _leaf(state: Tensor | None, *, read: bool) -> Tensor | None:
    """Return a leaf for the gradient of a segment's initial state, with its value if nothing else keeps it (`read`)."""
    return None if state is None else (state if read else unread(state.shape, state)).detach().requires_grad_()


def _forward_states(
    model: nn.Module, layers: int, segments: Sequence[Slice], on_segment: Callable[[], None] = lambda: None
) -> tuple[list[list[SavedStates]], list[State] | None]:
    """Return the initial states of this rank's slice per segment and layer, and the carry into the last segment."""
    kept: list[list[SavedStates]] = []
    carry: list[State] | None = None
    with torch.no_grad():
        for segment in segments:
            on_segment()
            kept.append([SavedStates() for _ in range(layers)])
            carry = model(segment.tokens, None, segment.doc_ids, carry, kept[-1], output_final_state=True).final_state
            for part in (part for saved in kept[-1] for part in saved.parts):
                part.final_state = None
                if part.initial_state is not None:
                    part.initial_state = to_host(part.initial_state)
    return kept, carry


def backward(
    model: nn.Module,
    layers: int,
    segments: Sequence[Slice],
    scale: Tensor | float,
    before_last_backward: Callable[[], None] = lambda: None,
    on_segment: Callable[[], None] = lambda: None,
) -> Tensor:
    """Add the gradient of scale · (sum of this window's losses) to the parameters; return that sum, detached.

    Args:
        model: a `LanguageModel`, or what `parallelize` made of one.
        segments: this rank's slice of each segment, in order.
        before_last_backward: called before the forward that precedes the last backward, to turn gradient reduction on.
        on_segment: called before each forward, on all ranks equally often; what it raises leaves gradients unfinished.
    """
    kept, carry = _forward_states(model, layers, segments[:-1], on_segment)
    kept.append([SavedStates() for _ in range(layers)])
    total: Tensor | None = None
    grads: list[Tensor | None] = []
    for index in reversed(range(len(segments))):
        segment, last = segments[index], index == len(segments) - 1
        on_segment()
        if index == 0:
            before_last_backward()
        initial = None
        if carry is not None and index > 0:
            initial = [tuple(_leaf(s, read=last) for s in state) for state in carry]
        saved = kept.pop()
        for part in (part for states in saved for part in states.parts):
            if part.initial_state is not None:
                part.initial_state = to_device(part.initial_state, segment.tokens.device)
        out = model(segment.tokens, segment.labels, segment.doc_ids, initial, saved, output_final_state=not last)
        final_state = [] if last else [s for state in out.final_state for s in state]
        pairs = [(s, g) for s, g in zip(final_state, grads, strict=True) if s is not None and g is not None]
        with torch.autograd.set_multithreading_enabled(False):  # waking a second thread dominates on short slices
            torch.autograd.backward([out.loss * scale, *(s for s, _ in pairs)], [None, *(g for _, g in pairs)])
        grads = [] if initial is None else [None if s is None else s.grad for state in initial for s in state]
        loss = out.loss.detach()
        total = loss if total is None else total + loss
    assert total is not None
    return total
