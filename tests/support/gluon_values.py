"""Numbers and tensors in registers, and places in global memory, of Gluon programs that `gluon` runs."""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Layout:
    """Anything that says which thread holds or stores what: it makes no difference here."""

    def __init__(self, *_: object, **__: object):
        self.value = self


class Whole(int):
    """A constant of programs."""

    @property
    def value(self) -> int:
        return int(self)


class Value:
    """A number or a tensor in registers."""

    type = SimpleNamespace(layout=Layout())

    def __init__(self, data: Any):
        self.data: Tensor = torch.as_tensor(data)

    def to(self, dtype: torch.dtype) -> Value:
        return Value(self.data.to(dtype))

    def __getitem__(self, at: Any) -> Value:
        return Value(self.data[at])

    def __index__(self) -> int:
        return int(self.data)

    def __bool__(self) -> bool:
        return bool(self.data)

    def __neg__(self) -> Value:
        return Value(-self.data)


def plain(x: Any) -> Any:
    """Return a value, a constant or a number as torch takes it."""
    return x.data if isinstance(x, Value) else x if isinstance(x, bool | int | float) else x.value


def elementwise(function: Callable[..., Tensor]) -> Callable[..., Value]:
    """Return a function of values that computes what one of tensors does."""
    return lambda *given: Value(function(*(torch.as_tensor(plain(x)) for x in given)))


def _operation(name: str, reverse: bool) -> Callable[[Value, Any], Any]:
    function = getattr(operator, f"__{name}__")

    def apply(x: Value, y: Any) -> Any:
        if not isinstance(y, Value | bool | int | float) and not hasattr(y, "value"):
            return NotImplemented
        return Value(function(plain(y), x.data) if reverse else function(x.data, plain(y)))

    return apply


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "lshift", "rshift", "and", "or", "xor"):
    setattr(Value, f"__{_name}__", _operation(_name, False))
    setattr(Value, f"__r{_name}__", _operation(_name, True))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Value, f"__{_name}__", _operation(_name, False))


class Pointer:
    """Places in a tensor in global memory."""

    def __init__(self, of: Tensor, at: Any = 0):
        self.of, self.at = of, torch.as_tensor(at)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.of, self.at + plain(other))

    def __sub__(self, other: Any) -> Pointer:
        return Pointer(self.of, self.at - plain(other))

    def _checked(self, at: Tensor) -> Tensor:
        if not bool(((at >= 0) & (at < self.of.numel())).all()):
            raise IndexError("a place outside a tensor")
        return at

    def load(self, mask: Any = True, other: Any = 0) -> Value:
        """Return what is there, and `other` where `mask` is false."""
        given = torch.as_tensor(plain(mask))
        found = self.of[self._checked(torch.where(given, self.at, 0))]
        return Value(torch.where(given, found, torch.as_tensor(plain(other)).to(found.dtype)))

    def store(self, x: Value) -> None:
        at = self._checked(self.at)
        self.of[at] = x.data.expand(at.shape).to(self.of.dtype)
