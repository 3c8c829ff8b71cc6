"""Functions of whole matrices that ranks share, by rows or as replicas: one rank works on each, in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from lasptrain.parallel.collectives import all_gather


def in_turn(
    function: Callable[[Tensor], Tensor],
    read: Callable[[list[Tensor]], Tensor],
    matrices: list[Tensor],
    elements: int,
    replicas: dist.ProcessGroup | None = None,
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Yield some of the matrices after others, with `function` of what `read` returns for them.

    Rank r of W works on matrices r, r + W, … whole; the next ones are on their way meanwhile. Collective over the ranks
    that share rows, or over `replicas`. A rank that shares no rows and has no replicas works on all matrices.

    Args:
        function: of whole matrices [n, rows, columns], each by itself; the same on every rank.
        read: of some matrices, what function is to be applied to: its rows that are here, [n, rows here, columns];
            what is yielded has this shape too.
        matrices: of one shape, sharded alike by rows, or not sharded.
        elements: of matrices that a rank works on at a time.
        replicas: of ranks that have all rows, and what `read` returns, alike.
    """
    deal = _Rows.of(matrices[0]) or _Replicas.of(replicas)
    count = max(1, elements // matrices[0].numel()) * (1 if deal is None else deal.ranks)
    rounds = [matrices[start : start + count] for start in range(0, len(matrices), count)]
    if deal is None:
        yield from ((some, function(read(some))) for some in rounds)
        return
    gathered: Callable[[], Tensor] | None = None
    scattered: Callable[[], Tensor] | None = None
    for number in range(len(rounds) + 2):
        following = deal.gather(read(rounds[number])) if number < len(rounds) else None
        leaving = None if gathered is None else deal.scatter(function(gathered()), len(rounds[number - 1]))
        if scattered is not None:
            yield rounds[number - 2], scattered()
        gathered, scattered = following, leaving


class _Rows(NamedTuple):
    """Rows of a matrix by rank of a group."""

    group: dist.ProcessGroup
    rank: int
    rows: list[int]

    @classmethod
    def of(cls, like: Tensor) -> _Rows | None:
        """Return those of a parameter whose rows are sharded over several ranks; None for any other."""
        if not isinstance(like, DTensor):
            return None
        # HSDP shards over one axis of the mesh, and replicates over the other.
        (axis,) = (axis for axis, placement in enumerate(like.placements) if isinstance(placement, Shard))
        mesh, total = like.device_mesh, like.shape[0]
        if mesh.size(axis) == 1:
            return None
        most = -(-total // mesh.size(axis))
        rows = [min(most, max(0, total - rank * most)) for rank in range(mesh.size(axis))]
        assert like.to_local().shape[0] == rows[mesh.get_local_rank(axis)]
        return cls(mesh.get_group(axis), mesh.get_local_rank(axis), rows)

    @property
    def ranks(self) -> int:
        return len(self.rows)

    def gather(self, stack: Tensor) -> Callable[[], Tensor]:
        """Begin to send this rank's rows of matrices [n, rows here, columns]; what is returned waits for its own ones,
        whole.
        """
        n, _, columns = stack.shape
        mine = len(range(self.rank, n, self.ranks))
        sent = [stack[owner :: self.ranks] for owner in range(self.ranks)]
        shapes = [(mine, rows, columns) for rows in self.rows]
        received = self._exchange(sent, shapes)
        return lambda: torch.cat(received(), dim=1)

    def scatter(self, whole: Tensor, n: int) -> Callable[[], Tensor]:
        """Begin to send the rows of this rank's matrices to where they belong; what is returned waits for its rows of
        all n.
        """
        ranks, here, columns = self.ranks, self.rows[self.rank], whole.shape[2]
        shapes = [(len(range(owner, n, ranks)), here, columns) for owner in range(ranks)]
        received = self._exchange(list(whole.split(self.rows, dim=1)), shapes)

        def take() -> Tensor:
            stack = whole.new_empty(n, here, columns)
            for owner, part in enumerate(received()):
                stack[owner::ranks] = part
            return stack

        return take

    def _exchange(self, sent: list[Tensor], shapes: list[tuple[int, int, int]]) -> Callable[[], list[Tensor]]:
        """Send a tensor to each rank; what is returned waits for theirs, of these shapes."""
        sizes = [count * rows * columns for count, rows, columns in shapes]
        given = torch.cat([x.flatten() for x in sent])
        found = given.new_empty(sum(sizes))
        work: Any = dist.all_to_all_single(
            found, given, sizes, [x.numel() for x in sent], group=self.group, async_op=True
        )

        def wait() -> list[Tensor]:
            work.wait()
            return [part.view(shape) for part, shape in zip(found.split(sizes), shapes, strict=True)]

        return wait


class _Replicas(NamedTuple):
    """Ranks of a group that have the same matrices."""

    group: dist.ProcessGroup
    rank: int
    ranks: int

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> _Replicas | None:
        """Return those of a group of several ranks."""
        if group is None or dist.get_world_size(group) == 1:
            return None
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def gather(self, stack: Tensor) -> Callable[[], Tensor]:
        """Return what takes this rank's own of matrices [n, rows, columns]."""
        return lambda: stack[self.rank :: self.ranks]

    def scatter(self, whole: Tensor, n: int) -> Callable[[], Tensor]:
        """Begin to send this rank's matrices to all; what is returned waits for all n."""
        most = -(-n // self.ranks)
        given = whole.new_zeros(most, *whole.shape[1:])
        given[: len(whole)] = whole
        found = given.new_empty(self.ranks * most, *whole.shape[1:])
        work: Any = all_gather(found, given, group=self.group, async_op=True)

        def take() -> Tensor:
            work.wait()
            by_turn: Tensor = found.unflatten(0, (self.ranks, most)).transpose(0, 1).flatten(0, 1)
            return by_turn[:n]

        return take
