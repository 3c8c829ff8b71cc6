"""Ring Attention (arXiv:2310.01889) for linear attention: keys and values go round, queries stay.

A drop-in for `lasptrain.parallel.recurrence.ShardedRecurrence`, to compare with. Its traffic grows with the window:
per layer and rank, for n ranks, (n − 1) times k and v forward and again backward, and n times their gradients in at
least fp32. The next block travels while one is worked on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lasptrain.bench.rivals.local import LeftProduct
from lasptrain.bench.rivals.pending import Pending, begun, rotated
from lasptrain.bench.rivals.traffic import Traffic
from lasptrain.ops import state_dtype
from lasptrain.parallel.recurrence import ShardedRecurrence

# Output of queries over a block of keys and values that begins so many tokens to their left.
Block = Callable[[Tensor, Tensor, Tensor, Tensor | None, int], Tensor]


class RingAttention:
    """The recurrence of one model over an sp group.

    Args:
        kernel: name of a kernel of `lasptrain.ops`, for the rank's own block.
        group: the sp group.
        left: work from the left, quadratic in the window, as the LASP paper ran it; else a block becomes a state.
    """

    def __init__(self, kernel: str, group: dist.ProcessGroup, left: bool = False):
        self.scan = Traffic(group)
        attention = ShardedRecurrence(kernel)

        def block(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, behind: int) -> Tensor:
            if behind:
                return _through_state(q, k, v, log_decay, behind)
            return attention.finish(attention.begin((k, v, log_decay), None), q)[0]

        self.block: Block = LeftProduct() if left else block

    def begin(self, *window: Any, **state: Any) -> Pending:
        """Keep k [B, T, H, K] and v [B, T, H, V]. Windows of one segment and without documents only: SetupError."""
        return begun("ring_attention", *window, **state)

    def finish(self, pending: Pending, q: Tensor) -> tuple[Tensor, None]:
        """Outputs [B, T, H, V] for q [B, T, H, K]."""
        o: Tensor = _Round.apply(q, *pending, self)  # type: ignore[no-untyped-call]
        return o, None

    def part(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, angle: Tensor | None, distance: int
    ) -> Tensor:
        """Output of queries over the block of the rank `distance` to the left."""
        return self.block(q, rotated(k, angle, -distance), v, log_decay, distance * q.shape[1])


def _through_state(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, behind: int) -> Tensor:
    """Output of queries over a block through its state, decayed by the distance; linear in the block's length."""
    wide = state_dtype(q)
    token = torch.arange(q.shape[1], device=q.device)
    rate = (q.new_zeros(q.shape[2]) if log_decay is None else log_decay).double()
    fold, lead = ((rate * lag[:, None]).exp().to(wide)[..., None] for lag in (len(token) - 1 - token, token + 1))
    passed = (rate * (behind - len(token))).exp().to(wide)[:, None, None]
    state = torch.einsum("bthk,bthv->bhkv", k.to(wide) * fold, v.to(wide)) * passed
    return torch.einsum("bthk,bhkv->bthv", q.to(wide) * lead, state).to(v.dtype)


class _Round(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, angle: Tensor | None, ring: RingAttention
    ) -> Tensor:
        ctx.ring = ring
        ctx.save_for_backward(q, k, v, log_decay, angle)
        size, rank = ring.scan.size, ring.scan.rank
        o = torch.zeros_like(v, dtype=state_dtype(v))
        for distance in range(size):
            coming = ring.scan.ring_exchange(k, v) if distance + 1 < size else None
            if distance <= rank:
                o += ring.part(q, k, v, log_decay, angle, distance)
            if coming is not None:
                k, v = coming.wait()
        return o.to(v.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, angle = ctx.saved_tensors
        ring, wide = ctx.ring, state_dtype(q)
        size, rank = ring.scan.size, ring.scan.rank
        dtypes = k.dtype, v.dtype
        dq = torch.zeros_like(q, dtype=wide)
        dangle = None if angle is None else torch.zeros_like(angle)
        sums = [torch.zeros_like(x, dtype=wide) for x in (k, v)]
        travelling = None
        for distance in range(size):
            coming = ring.scan.ring_exchange(k, v) if distance + 1 < size else None
            found = _gradients(ring, (q, k, v, angle), log_decay, do, distance) if distance <= rank else None
            if travelling is not None:
                sums = travelling.wait()
            if found is not None:
                dq += found[0]
                sums = [total + part for total, part in zip(sums, found[1:3], strict=True)]
                if dangle is not None:
                    dangle += found[3]
            travelling = ring.scan.ring_exchange(*sums)  # gradients travel with their block; after the last rank, home
            if coming is not None:
                k, v = coming.wait()
        assert travelling is not None
        dk, dv = (x.to(dtype) for x, dtype in zip(travelling.wait(), dtypes, strict=True))
        return dq.to(q.dtype), dk, dv, None, dangle, None


def _gradients(
    ring: RingAttention,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    log_decay: Tensor | None,
    do: Tensor,
    distance: int,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and of the angle, if there is one, from one block."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    q, k, v, angle = leaves
    assert q is not None and k is not None and v is not None
    with torch.enable_grad():
        o = ring.part(q, k, v, log_decay, angle, distance)
    return torch.autograd.grad(o, [x for x in leaves if x is not None], do, materialize_grads=True)
