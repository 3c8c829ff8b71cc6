"""The exclusive scan of states over the ranks of an sp group: LASP's ring, LASP-2's all-gather, ZeCO's all-scan.

Rank r contributes the affine map S ↦ transition_r · S + state_r of its slice and gets its initial state,

    initial_0 = carry,    initial_{r+1} = transition_r · initial_r + state_r,    final = initial_sp,

where carry is the segment's initial state and final the next segment's. Backward is the same scan from the right with
transposed transitions: state_r is then the gradient that the slice's own outputs send to its initial state.

States are [B, H, K, V]; of transitions the scan knows that they apply. One rank is the scan over one element.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lasptrain.cost import links
from lasptrain.parallel.collectives import all_gather
from lasptrain.parallel.p2p import Messages, between
from lasptrain.parallel.transition import Transition


class Scanned(NamedTuple):
    """The result of a scan on this rank; None is a state of zeros."""

    initial_state: Tensor | None
    final_state: Tensor | None


class Message(NamedTuple):
    """An exchange of one message with nothing to compute; `arrived` waits for it."""

    arrived: Callable[[], Tensor | None]

    def wait(self) -> Scanned:
        return Scanned(self.arrived(), None)


class Exchange:
    """An exchange of messages with work between them: on a GPU on a stream of its own, elsewhere within `wait`.

    Tensors that it reads are kept until the wait. Its results are allocated on its stream, and memory that this stream
    frees is only reused by a later exchange, which first waits for all work queued on the current stream.
    """

    def __init__(self, body: Callable[[], Scanned], stream: torch.cuda.Stream | None, needs: tuple[Tensor | None, ...]):
        self._body: Callable[[], Scanned] | None = body
        self._stream = stream
        if stream is None:
            return
        self._needs = needs
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            self._result = body()
        self._done = stream.record_event()
        self._body = None

    def wait(self) -> Scanned:
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
    ) -> Exchange | Message:
        """Begin the scan; all ranks give the same `reverse`, `output_final_state` and presence of carry."""
        ...

    def reads(self, *, carried: bool, output_final_state: bool, reverse: bool = False) -> int:
        """Return how much of this rank's map `start` and its like on other ranks read.

        0 where nothing is passed on, 1, the state alone, where nothing enters what is passed on, else 2, the transition
        too. `carried`: a carry is given.
        """
        ...


class _Scan:
    """Parts common to all scans: group, stream and counters."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device):
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" and self.size > 1 else None
        self.bytes_sent = 0
        self.calls = 0

    def reads(self, *, carried: bool, output_final_state: bool, reverse: bool = False) -> int:
        first, last = (self.size - 1, 0) if reverse else (0, self.size - 1)
        if self.rank == last and not output_final_state:
            return 0
        return 1 if self.rank == first and not carried else 2

    def _exchange(self, body: Callable[[], Scanned], needs: tuple[Tensor | None, ...]) -> Exchange:
        self.calls += 1
        return Exchange(body, self.stream, needs)


class Ring(_Scan):
    """LASP (arXiv:2404.02882): each rank receives from its neighbour, folds in its slice, and sends on.

    Rank 0 holds carry and final state in both directions.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device):
        super().__init__(group, device)
        self.device = device
        self.messages: Messages  # set by the first `start`

    def start(
        self,
        state: Tensor,
        transition: Transition,
        carry: Tensor | None,
        *,
        reverse: bool = False,
        output_final_state: bool = True,
    ) -> Exchange | Message:
        first, last = (self.size - 1, 0) if reverse else (0, self.size - 1)
        if self.group is not None and self.size > 1:
            self.messages = between(self.group, self.device, state.nbytes)
        if self._is_message(carry, output_final_state) and self.rank in (first, last):
            return self._message(state, first, last)

        def body() -> Scanned:
            start = None if carry is None else self._move(carry, 0, first)
            initial_state, final_state = self._chain(state, transition, start, first, last, output_final_state)
            return Scanned(
                initial_state,
                self._move(final_state, last, 0) if final_state is not None and output_final_state else None,
            )

        return self._exchange(body, (state, *transition.tensors, carry))

    def _is_message(self, carry: Tensor | None, output_final_state: bool) -> bool:
        """Return True if the ends of the chain have one message to send or receive, and nothing to compute."""
        return self.size > 1 and carry is None and not output_final_state

    def _message(self, state: Tensor, first: int, last: int) -> Message:
        """Send the state to the second rank, or receive it from the last but one."""
        step = 1 if first < last else -1
        self.calls += 1
        if self.rank == last:
            return Message(self.messages.recv(state, last - step))
        self.bytes_sent += state.numel() * state.element_size()
        return Message(self.messages.send(state, first + step))

    def _chain(
        self,
        state: Tensor,
        transition: Transition,
        start: Tensor | None,
        first: int,
        last: int,
        output_final_state: bool,
    ) -> Scanned:
        """Pass the state from rank `first` to `last`, starting from `start`; the last folds if `output_final_state`."""
        step = 1 if first <= last else -1
        if transition.forgets and self.rank != last:  # no need to wait for what enters
            self._send(state, self.rank + step)
        initial_state = start if self.rank == first else self._receive(state, self.rank - step)
        if self.rank == last and not output_final_state:
            return Scanned(initial_state, None)
        final_state = transition.apply(initial_state, state)
        if not transition.forgets and self.rank != last:
            self._send(final_state, self.rank + step)
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
    longer than one transfer of a state. Two ranks have nothing to send on, so their state stays whole.
    """

    def _is_message(self, carry: Tensor | None, output_final_state: bool) -> bool:
        return links.parts(self.size) == 1 and super()._is_message(carry, output_final_state)

    def _chain(
        self,
        state: Tensor,
        transition: Transition,
        start: Tensor | None,
        first: int,
        last: int,
        output_final_state: bool,
    ) -> Scanned:
        parts = state.chunk(links.parts(self.size), dim=-1)
        starts = [None] * len(parts) if start is None else start.chunk(links.parts(self.size), dim=-1)
        passed = [
            super(AllScan, self)._chain(part, transition, begin, first, last, output_final_state)
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
    ) -> Exchange:
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

        return self._exchange(body, (state, *transition.tensors, carry))

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
