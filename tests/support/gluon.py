"""An interpreter of Gluon programs for Hopper on the CPU, which refuses what would be left to chance on a GPU.

Triton's own interpreter does not run Gluon. Here the text of programs is executed as it stands; only Gluon's modules
are others, those that `Programs` makes, whatever Triton is installed. Programs of a grid run one after the other, all
warps of one as one, in the order of the text; `gluon_memory` knows what a GPU may do out of this order.

Not modelled: layouts and registers, which the compiler checks; barriers that it adds; how long anything takes; the
order of programs; global memory that several write. A name that is missing below is refused.
"""

from __future__ import annotations

import builtins
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tests.support.gluon_memory import Access, Buffer, Hazard, Memory, Phases, need
from tests.support.gluon_values import Layout, Pointer, Value, Whole, elementwise

__all__ = ["Hazard", "Programs"]
HALVES = (torch.bfloat16, torch.float16)


class Product:
    """An accumulator of a product that was issued: nothing but a wait or another product may take it."""

    def __init__(self, result: Tensor, reads: list[Access]):
        self.result, self.reads = result, reads


class Program:
    """One program while it runs: its shared memory and what it has under way."""

    def __init__(self, number: int):
        self.number = number
        self.memory = Memory()
        self.products: list[Product] = []
        self.copies: list[Access] = []
        self.phases: dict[int, Phases] = {}

    def end(self) -> None:
        left = self.products or self.copies or any(of.arriving for of in self.phases.values())
        need(not left, "something is under way at the end")

    def init(self, bar: Buffer, count: int) -> None:
        if count != 1:
            raise NotImplementedError("mbarriers of more than one arrival are not modelled")
        self.memory.access(bar, "warps", writes=True)
        self.phases[bar.span()[0]] = Phases()

    def _phases(self, bar: Buffer) -> Phases:
        need(bar.span()[0] in self.phases, "an mbarrier without init")
        return self.phases[bar.span()[0]]

    def expect(self, bar: Buffer, size: Any, pred: Any = True) -> None:
        if not bool(pred):
            return
        of = self._phases(bar)
        self.memory.check(*bar.span(), "a load", True)
        need(of.begun == of.passed, "an mbarrier is used again before it was waited for")
        of.begun, of.owed = of.begun + 1, int(size)

    def wait(self, bar: Buffer, phase: Any, pred: Any = True) -> None:
        if not bool(pred):
            return
        of = self._phases(bar)
        self.memory.access(bar, "warps")
        need(int(phase) == of.passed & 1, "a wait for a phase that is over")
        need(of.begun > of.passed and of.owed == 0, "a wait without end")
        of.passed += 1
        self.memory.arrived(of.arriving)

    def async_load(self, source: Any, at: Sequence[Any], bar: Buffer, into: Buffer, pred: Any = True) -> None:
        if not bool(pred):
            return
        of, size = self._phases(bar), into.data.numel() * into.data.itemsize
        need(of.begun > of.passed and of.owed >= size, "a load that its mbarrier does not expect")
        need(source.base.dtype == into.data.dtype, "loaded as it is not held")
        of.owed -= size
        of.arriving.append(self.memory.access(into, "a load", writes=True))
        inside, place = window(source, at)
        block = torch.zeros([int(n) for n in source.block_shape], dtype=into.data.dtype)
        block[place] = inside
        into.data.copy_(block.view(into.data.shape))

    def async_store(self, target: Any, at: Sequence[Any], source: Buffer) -> None:
        need(source.data.dtype == target.base.dtype, "copied as it is not held")
        self.copies.append(self.memory.access(source, "a copy"))
        inside, place = window(target, at)
        inside.copy_(source.data.reshape([int(n) for n in target.block_shape])[place])

    def store_wait(self, pendings: int) -> None:
        while len(self.copies) > pendings:
            self.copies.pop(0).over = True

    def multiply(self, a: Any, b: Buffer, acc: Any, *, is_async: bool) -> Product:
        if not is_async:
            raise NotImplementedError("products that are waited for at once are not modelled")
        before = acc.result if isinstance(acc, Product) else acc.data
        need(a.data.dtype == b.data.dtype and a.data.dtype in HALVES, "a product of other dtypes")
        need(before.dtype == torch.float32, "an accumulator of another dtype")
        need(before.shape == (a.data.shape[0], b.data.shape[1]), "an accumulator of another shape")
        reads = [self.memory.access(x, "a product") for x in (a, b) if isinstance(x, Buffer)]
        self.products.append(Product(torch.addmm(before, a.data.float(), b.data.float()), reads))
        return self.products[-1]

    def multiply_wait(self, num_outstanding: int, deps: Sequence[Any] = ()) -> Any:
        while len(self.products) > num_outstanding:
            for read in self.products.pop(0).reads:
                read.over = True
        need(not any(x is y for x in deps for y in self.products), "a product is used that was not waited for")
        done = [Value(x.result) if isinstance(x, Product) else x for x in deps]
        return done[0] if len(done) == 1 else tuple(done)


def window(of: Any, at: Sequence[Any]) -> tuple[Tensor, tuple[slice, ...]]:
    """Return what of a block lies inside the tensor of a descriptor, and its place in the block."""
    units = [of.base.data_ptr(), *(step * of.base.itemsize for step in of.strides[:-1])]
    need(of.strides[-1] == 1 and not any(n % 16 for n in units), "a tensor that is not aligned")
    whole = torch.as_strided(of.base, of.shape, of.strides, of.base.storage_offset())
    inside, place = [], []
    for first, length, size in zip(map(int, at), map(int, of.block_shape), of.shape, strict=True):
        start = min(max(first, 0), size)
        end = max(start, min(first + length, size))
        inside.append(slice(start, end))
        place.append(slice(start - first, end - first) if end > start else slice(0))
    return whole[tuple(inside)], tuple(place)


def scan(x: Value, axis: int, combine: Callable[[Value, Value], Value], reverse: bool = False) -> Value:
    """Return what `combine` makes of each number and all before it, or behind it."""
    if axis != 0:
        raise NotImplementedError("a scan of another axis than the first is not modelled")
    found, step = x.data.flip(0) if reverse else x.data, 1
    while step < len(found):
        found = torch.cat([found[:step], combine(Value(found[:-step]), Value(found[step:])).data])
        step *= 2
    return Value(found.flip(0) if reverse else found)


def constant(x: Any) -> Any:
    if isinstance(x, int) and not isinstance(x, bool):
        return Whole(x)
    if isinstance(x, Layout):
        return x
    raise NotImplementedError("constants other than integers and layouts are not modelled")


def jit(function: Any = None, **_: object) -> Any:
    return function or jit


class Module(ModuleType):
    """A module of Gluon, or what there is of it here."""

    def __init__(self, name: str, **names: Any):
        super().__init__(f"model of {name}")
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{self.__name__} has no {name}")


class Programs:
    """The programs of a text, under their `names`."""

    def __init__(self, text: str, file: str):
        self.running = Program(0)
        self._modules = {module.__name__.removeprefix("model of "): module for module in self._model()}
        self.names: dict[str, Any] = {"__name__": file, "__builtins__": vars(builtins) | {"__import__": self._import}}
        exec(compile(text, file, "exec"), self.names)  # noqa: S102  our own program

    def run(self, name: str, programs: int, arguments: Mapping[str, Any]) -> None:
        """Run so many programs of that name; `arguments` are tensors, descriptors, numbers and constants."""
        function = self.names[name]
        parameters = inspect.signature(function).parameters
        given = {of: self._given(x, parameters[of].annotation is constant) for of, x in arguments.items()}
        for number in range(programs):
            self.running = Program(number)
            function(**given)
            self.running.end()

    @staticmethod
    def _given(x: Any, fixed: bool) -> Any:
        if isinstance(x, Tensor):
            return Pointer(x.view(-1))
        return Value(torch.tensor(x, dtype=torch.int32)) if isinstance(x, int) and not fixed else x

    def _import(self, name: str, names: Any = None, local: Any = None, wanted: Any = (), level: int = 0) -> Any:
        if not name.startswith("triton.experimental"):
            return builtins.__import__(name, names, local, wanted, level)
        if name not in self._modules:
            raise ImportError(f"{name} is not modelled")
        return self._modules[name]

    def _of(self, path: str) -> Callable[..., Any]:
        """Return a function that is a method of the running program, or of a part of it."""
        return lambda *given, **named: operator.attrgetter(path)(self.running)(*given, **named)

    def _model(self) -> list[Module]:
        language = Module(
            "gluon.language",
            constexpr=constant,
            **dict.fromkeys(("NVMMADistributedLayout", "DotOperandLayout", "BlockedLayout", "SliceLayout"), Layout),
            **dict.fromkeys(("NVMMASharedLayout", "SwizzledSharedLayout"), Layout),
            **{name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "int32", "int64")},
            allocate_shared_memory=self._of("memory.allocate"),
            barrier=self._of("memory.barrier"),
            program_id=lambda axis: Value(torch.tensor(self.running.number if axis == 0 else 0, dtype=torch.int32)),
            static_range=range,
            arange=lambda start, end, layout: Value(torch.arange(start, end, dtype=torch.int32)),
            zeros=lambda shape, dtype, layout: Value(torch.zeros([int(n) for n in shape], dtype=dtype)),
            load=lambda at, mask=True, other=0: at.load(mask, other),
            store=lambda at, x: at.store(x),
            **{name: elementwise(getattr(torch, name)) for name in ("abs", "exp2", "where", "minimum", "maximum")},
            sum=lambda x, axis: Value(x.data.sum(axis, dtype=x.data.dtype)),
            associative_scan=scan,
            reshape=lambda x, shape: Value(x.data.reshape([int(n) for n in shape])),
            expand_dims=lambda x, axis: Value(x.data.unsqueeze(axis)),
            convert_layout=lambda x, layout: x,
        )
        mbarrier = Module(
            "mbarrier",
            MBarrierLayout=Layout,
            **{name: self._of(name) for name in ("init", "expect", "wait")},
        )
        tma = Module("tma", **{name: self._of(name) for name in ("async_load", "async_store", "store_wait")})
        hopper = Module(
            "triton.experimental.gluon.language.nvidia.hopper",
            mbarrier=mbarrier,
            tma=tma,
            fence_async_shared=self._of("memory.fence"),
            warpgroup_mma=self._of("multiply"),
            warpgroup_mma_wait=self._of("multiply_wait"),
        )
        gluon = Module("gluon", jit=jit)
        return [
            hopper,
            Module("triton.experimental", gluon=gluon),
            Module("triton.experimental.gluon", language=language),
        ]
