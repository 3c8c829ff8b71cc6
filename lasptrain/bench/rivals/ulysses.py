"""DeepSpeed-Ulysses (arXiv:2309.14509) for linear attention: ranks trade slices of all heads for all tokens of some.

A drop-in for `lasptrain.parallel.recurrence.ShardedRecurrence`, to compare with. It sends activations, so its traffic
grows with the window: per layer and rank 4·B·T·H·D·(n − 1)/n elements forward and as many backward, for T tokens per
rank and n ranks; and it takes no more ranks than there are heads.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from lasptrain.bench.rivals.local import Local
from lasptrain.bench.rivals.pending import Pending, begun, rotated
from lasptrain.bench.rivals.traffic import Traffic, exchange
from lasptrain.errors import SetupError
from lasptrain.parallel.recurrence import ShardedRecurrence


class Ulysses:
    """The recurrence of one model over an sp group.

    Args:
        kernel: name of a kernel of `lasptrain.ops`, which runs over the whole window.
        group: the sp group.
        local: attention over the whole window, instead of the kernel.
    """

    def __init__(self, kernel: str, group: dist.ProcessGroup, local: Local | None = None):
        self.scan = Traffic(group)
        attention = ShardedRecurrence(kernel)

        def whole(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
            return attention.finish(attention.begin((k, v, log_decay), None), q)[0]

        self.local: Local = local or whole

    def begin(self, *window: Any, **state: Any) -> Pending:
        """Trade k [B, T, H, K] and v [B, T, H, V]. Windows of one segment and without documents only: SetupError."""
        k, v, log_decay, angle = begun("ulysses", *window, **state)
        heads, ranks = k.shape[2], self.scan.size
        if heads % ranks:
            raise SetupError(f"ulysses: {heads} heads do not go to {ranks} ranks; expected a multiple")
        mine = None
        if log_decay is not None:
            mine = log_decay.chunk(ranks, dim=-1)[self.scan.rank].contiguous()
        return Pending(self._gather(rotated(k, angle, self.scan.rank)), self._gather(v), mine, angle)

    def finish(self, pending: Pending, q: Tensor) -> tuple[Tensor, None]:
        """Outputs [B, T, H, V] for q [B, T, H, K]."""
        q = self._gather(rotated(q, pending.angle, self.scan.rank))
        o = self.local(q, pending.k, pending.v, pending.log_decay)
        scattered = self._all_to_all(o.unflatten(1, (self.scan.size, -1)).movedim(1, 0))
        return scattered.movedim(0, 2).flatten(2, 3), None

    def _gather(self, x: Tensor) -> Tensor:
        """Trade [B, T, H, ·] of a slice → [B, n·T, H/n, ·] of the window."""
        parts = x.unflatten(2, (self.scan.size, -1)).movedim(2, 0)
        return self._all_to_all(parts).movedim(0, 1).flatten(1, 2)

    def _all_to_all(self, parts: Tensor) -> Tensor:
        return exchange(parts, self.scan.all_to_all, self.scan.all_to_all)
