"""Matrix products with weights, in the precision of the activations: weights are cast once per update.

Weights and their gradients are at least fp32; products take operands in the dtype of x and accumulate in fp32.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from lasptrain.ops import fake, operator


class Linear(nn.Linear):
    """y = x Wᵀ with W [out, in], without bias."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)
        self.operand: Tensor | None = None  # the weight in the precision of products
        self._made_of: tuple[int, int] | None = None  # address and version of the weight it was cast from

    def cast(self, dtype: torch.dtype) -> None:
        """Refresh the weight's copy in `dtype`. Does nothing where it is up to date, or where FSDP casts."""
        weight = self.weight
        if weight.dtype == dtype or hasattr(weight, "full_tensor"):
            return
        if self.operand is None or self.operand.dtype != dtype or self.operand.device != weight.device:
            self.operand, self._made_of = torch.empty_like(weight, dtype=dtype, requires_grad=False), None
        present = weight.data_ptr(), weight._version
        if self._made_of != present:
            self.operand.copy_(weight.detach())
            self._made_of = present

    def forward(self, x: Tensor) -> Tensor:
        return multi_linear(x, self)[0]


class HasWeight(Protocol):
    """A weight [out, in], and its copy in the precision of products if there is one."""

    @property
    def weight(self) -> Tensor: ...

    @property
    def operand(self) -> Tensor | None: ...


def multi_linear(x: Tensor, *layers: HasWeight) -> tuple[Tensor, ...]:
    """Return x Wᵀ [..., out] for each layer, of one x [..., in], whose gradient is summed inside the products."""
    weights = [layer.weight for layer in layers]
    operands = [layer.weight if layer.operand is None else layer.operand for layer in layers]
    operands = [operand if operand.dtype == x.dtype else operand.to(x.dtype) for operand in operands]
    if not torch.is_grad_enabled():  # torch.compile before 2.12 cannot trace a Function there
        return tuple(F.linear(x, operand) for operand in operands)
    y: tuple[Tensor, ...] = _Products.apply(x, *weights, *(o.detach() for o in operands))  # type: ignore[no-untyped-call]
    return y


class _Products(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(tensors) // 2
        operands = tensors[count:]
        ctx.save_for_backward(x, *operands)
        ctx.dtypes = tuple(weight.dtype for weight in tensors[:count])
        return tuple(F.linear(x, operand) for operand in operands)

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *operands = ctx.saved_tensors
        flat = [g.flatten(0, -2) for g in dy]
        rows = x.flatten(0, -2)
        dweights = [weight_gradient(g, rows, dtype) for g, dtype in zip(flat, ctx.dtypes, strict=True)]
        dx = input_gradient(flat, operands).view(x.shape)
        return dx, *dweights, *(None for _ in operands)


@operator
def input_gradient(dy: list[Tensor], weights: list[Tensor]) -> Tensor:
    """Return Σ dy W [T, in] of several dy [T, out] and W [out, in]; each product adds to the sum of those before it."""
    dx = dy[0] @ weights[0]
    for g, weight in zip(dy[1:], weights[1:], strict=True):
        dx.addmm_(g, weight)
    return dx


@fake("input_gradient")
def _(dy: list[Tensor], weights: list[Tensor]) -> Tensor:
    return dy[0].new_empty(dy[0].shape[0], weights[0].shape[1])


@operator
def weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return dyᵀ x [out, in] of dy [T, out] and x [T, in] in `dtype`, accumulated in at least fp32."""
    if dtype == x.dtype:
        return dy.T @ x
    if x.is_cuda:
        return torch.mm(dy.T, x, out_dtype=dtype)
    return dy.T.to(dtype) @ x.to(dtype)


@fake("weight_gradient")
def _(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(dy.shape[1], x.shape[1], dtype=dtype)
