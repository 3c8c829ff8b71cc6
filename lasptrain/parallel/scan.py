"""The exclusive scan of states over the ranks of an sp group: LASP's ring, LASP-2's all-gather, ZeCO's all-scan.

Rank r contributes the affine map S ↦ transition_r · S + state_r of its slice and gets its initial state,

    initial_0 = carry,    initial_{r+1} = transition_r · initial_r + state_r,    final = initial_sp,

where carry is the segment's initial state and final the next segment's. Backward is the same scan from the right with
transposed transitions: state_r is then the gradient that the slice's own outputs send to its initial state.

States are [B, H, K, V]; of transitions the scan knows that they apply. One rank is the scan over one element.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lasptrain.cost import links
from lasptrain.parallel.collectives import all_gather
from lasptrain.parallel.p2p import Messages, between
from lasptrain.parallel.transition import Transition

T_co = TypeVar("T_co", covariant=True)


class Scanned(NamedTuple):
    """The result of a scan on this rank; None is a state of zeros."""

    initial_state: Tensor | None
    final_state: Tensor | None


class Message(NamedTuple):
    """An exchange of one message with nothing to compute; `arrived` waits for it."""

    arrived: Callable[[], Tensor | None]

    def wait(self) -> Scanned:
        return Scanned(self.arrived(), None)


class Exchange(Generic[T_co]):
    """An exchange of messages with work between them: on a GPU on a stream of its own, elsewhere within `wait`.

    The body's needs are kept until the wait. Its results are allocated on its stream, and memory that this stream
    frees is only reused by a later exchange, which first waits for all work queued on the current stream.
    """

    def __init__(self, body: Callable[[], T_co], stream: torch.cuda.Stream | None, needs: tuple[object, ...]):
        self._body: Callable[[], T_co] | None = body
        self._stream = stream
        if stream is None:
            return
        self._needs = needs
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            self._result = body()
        self._done = stream.record_event()
        self._body = None

    def wait(self) -> T_co:
        """Return the result, ready for use on the current stream."""
        if self._body is not None:
            self._result, self._body = self._body(), None
        elif self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._done)
            self._needs = ()
        return self._result


class Scan(Protocol):
    """One way to compute the exclusive scan.

    `carry` and `final_state` belong together: what one call returns as `final_state` the next takes as `carry`, and the
    gradient of the one is what the reversed call takes and returns. Which ranks hold them depends on the scan.
    """

    group: dist.ProcessGroup | None
    size: int  # ranks
    rank: int
    stream: torch.cuda.Stream | None  # of exchanges; None: they run where they are waited for
    bytes_sent: int
    calls: int

    def start(
        self,
        state: Tensor,
        transition: Transition,
        carry: Tensor | None,
        *,
        reverse: bool = False,
        output_final_state: bool = True,
    ) -> Exchange[Scanned] | Message:
        """Begin the scan; all ranks give the same `reverse`, `output_final_state` and presence of carry."""
        ...

    def reads(self, *, carried: bool, output_final_state: bool, reverse: bool = False) -> int:
        """Return how much of this rank's map `start` and its like on other ranks read.

        0 where nothing is passed on, 1, the state alone, where nothing enters what is passed on, else 2, the transition
        too. `carried`: a carry is given.
        """
        ...


class Route(NamedTuple):
    """A rank's place on the way of states in one direction, from rank `first` to rank `last`."""

    first: int
    last: int
    previous: int | None  # None: the way starts here
    next: int | None  # None: it ends here


def _route(rank: int, size: int, reverse: bool) -> Route:
    first, last, step = (size - 1, 0, -1) if reverse else (0, size - 1, 1)
    return Route(first, last, None if rank == first else rank - step, None if rank == last else rank + step)


class _Scan:
    """Parts common to all scans: group, stream, counters, and this rank's route there and back."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device):
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" and self.size > 1 else None
        self.bytes_sent = 0
        self.calls = 0
        self._routes = (_route(self.rank, self.size, False), _route(self.rank, self.size, True))

    def reads(self, *, carried: bool, output_final_state: bool, reverse: bool = False) -> int:
        route = self._routes[reverse]
        if route.next is None and not output_final_state:
            return 0
        return 1 if route.previous is None and not carried else 2

    def _exchange(self, body: Callable[[], Scanned], needs: tuple[object, ...]) -> Exchange[Scanned]:
        self.calls += 1
        return Exchange(body, self.stream, needs)


class Ring(_Scan):
    """LASP (arXiv:2404.02882): each rank receives from its neighbour, folds in its slice, and sends on.

    Rank 0 holds carry and final state in both directions.

    | | first rank | ranks between | last rank |
    |---|---|---|---|
    | no carry, no final state | sends its state | receive, fold, send | receives |
    | carry | receives it from rank 0, folds, sends | | |
    | final state | | | receives, folds, sends to rank 0 |

    The ends of the first row have one message and nothing to compute, and so need no stream.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device):
        super().__init__(group, device)
        self.device = device
        self.messages: Messages  # set by the first `start`

    @property
    def parts(self) -> int:
        """Number of parts in which a state travels."""
        return 1

    def start(
        self,
        state: Tensor,
        transition: Transition,
        carry: Tensor | None,
        *,
        reverse: bool = False,
        output_final_state: bool = True,
    ) -> Exchange[Scanned] | Message:
        route = self._routes[reverse]
        if self.group is not None and self.size > 1:
            self.messages = between(self.group, self.device, state.nbytes)
        if carry is None and not output_final_state and self.parts == 1:
            if route.previous is None and route.next is not None:
                return self._post(state, route.next)
            if route.previous is not None and route.next is None:
                return self._await(state, route.previous)
        body = partial(self._pass, state, transition, carry, route, output_final_state)
        return self._exchange(body, (state, transition, carry))

    def _post(self, state: Tensor, to: int) -> Message:
        self.calls += 1
        self.bytes_sent += state.numel() * state.element_size()
        return Message(self.messages.send(state, to))

    def _await(self, like: Tensor, source: int) -> Message:
        self.calls += 1
        return Message(self.messages.recv(like, source))

    def _pass(
        self, state: Tensor, transition: Transition, carry: Tensor | None, route: Route, output_final_state: bool
    ) -> Scanned:
        """Bring the carry to the route's start, the state along it, and the final state home."""
        start = None if carry is None else self._move(carry, 0, route.first)
        initial_state, final_state = self._chain(state, transition, start, route, output_final_state)
        if final_state is None or not output_final_state:
            return Scanned(initial_state, None)
        return Scanned(initial_state, self._move(final_state, route.last, 0))

    def _chain(
        self, state: Tensor, transition: Transition, start: Tensor | None, route: Route, output_final_state: bool
    ) -> Scanned:
        """Pass the state along the route, beginning with `start`; its last rank folds if `output_final_state`."""
        if transition.forgets and route.next is not None:  # no need to wait for what enters
            self._send(state, route.next)
        initial_state = start if route.previous is None else self._receive(state, route.previous)
        if route.next is None and not output_final_state:
            return Scanned(initial_state, None)
        final_state = transition.apply(initial_state, state)
        if not transition.forgets and route.next is not None:
            self._send(final_state, route.next)
        return Scanned(initial_state, final_state)

    def _move(self, x: Tensor, source: int, target: int) -> Tensor:
        """Move x from rank `source` to `target`; on other ranks only the shape of the result means anything."""
        if source != target and self.rank == source:
            self._send(x, target)
        if source != target and self.rank == target:
            return self._receive(x, source)
        return x

    def _send(self, x: Tensor, to: int) -> None:
        self.bytes_sent += x.numel() * x.element_size()
        self.messages.send(x, to)()

    def _receive(self, like: Tensor, source: int) -> Tensor:
        return self.messages.recv(like, source)()


class AllScan(Ring):
    """ZeCO (arXiv:2507.01004): the ring with the state cut along V.

    A rank sends its first columns on while the next are still on their way to it, so that a long chain takes little
    longer than one transfer of a state. Two ranks have nothing to send on, so their state stays whole. Transitions act
    from the left, so each part passes by itself.
    """

    @property
    def parts(self) -> int:
        return links.parts(self.size)

    def _chain(
        self, state: Tensor, transition: Transition, start: Tensor | None, route: Route, output_final_state: bool
    ) -> Scanned:
        parts = state.chunk(self.parts, dim=-1)
        starts = [None] * len(parts) if start is None else start.chunk(self.parts, dim=-1)
        passed = [
            super(AllScan, self)._chain(part, transition, begin, route, output_final_state)
            for part, begin in zip(parts, starts, strict=True)
        ]
        return Scanned(_joined([one.initial_state for one in passed]), _joined([one.final_state for one in passed]))


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    """Join parts along V; they are all present or all absent."""
    present = [part for part in parts if part is not None]
    return torch.cat(present, dim=-1) if len(present) > 1 else present[0] if present else None


class AllGather(_Scan):
    """LASP-2 (arXiv:2502.07563): all ranks gather all states and transitions, and each folds what lies before it.

    Carry and final state are the same on every rank.
    """

    def start(
        self,
        state: Tensor,
        transition: Transition,
        carry: Tensor | None,
        *,
        reverse: bool = False,
        output_final_state: bool = True,
    ) -> Exchange[Scanned]:
        order = range(self.size - 1, -1, -1) if reverse else range(self.size)

        def body() -> Scanned:
            maps = self._gather(state, transition)
            initial_state, running = None, carry
            for rank in order:
                if rank == self.rank:
                    initial_state = running
                    if not output_final_state:
                        break
                passed, added = maps[rank]
                running = passed.apply(running, added)
            return Scanned(initial_state, running if output_final_state else None)

        return self._exchange(body, (state, transition, carry))

    def _gather(self, state: Tensor, transition: Transition) -> list[tuple[Transition, Tensor]]:
        """Return the maps of all ranks: a transition and a state each."""
        if self.size == 1:
            return [(transition, state)]
        own = [state, *transition.tensors]
        packed = torch.cat([x.flatten() for x in own]) if len(own) > 1 else state.flatten()
        gathered = packed.new_empty(self.size * packed.numel())
        all_gather(gathered, packed, group=self.group)
        self.bytes_sent += packed.numel() * packed.element_size()
        maps = []
        for row in gathered.view(self.size, -1):
            added, *tensors = _unpacked(row, own)
            maps.append((transition.like(tensors), added))
        return maps


def _unpacked(row: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Cut a row of numbers into tensors shaped like those given."""
    parts = row.split([x.numel() for x in like])
    return [part.view_as(x) for part, x in zip(parts, like, strict=True)]


SCANS: dict[str, type[Ring] | type[AllGather]] = {"ring": Ring, "all_gather": AllGather, "all_scan": AllScan}
