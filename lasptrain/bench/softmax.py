"""`lasptrain bench softmax`: softmax attention of a slice, beside FlexAttention and PyTorch's own, on one GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from lasptrain.bench.kernels import check_gpu, median_ms
from lasptrain.bench.result import Column, Result, table
from lasptrain.ops import softmax, softmax_reference
from lasptrain.ops.precision import DTYPES
from lasptrain.ops.softmax import Documents

SMALLER = 4  # what is compared with the definition is so much shorter
DOCUMENT = 4096  # tokens, and the mean where lengths are random
WINDOW = 2048
PREFIX = 4  # keys before the slice, in slices


class Sizes(NamedTuple):
    """Heads of q, heads of k and v, and the dim of a head."""

    heads: int
    kv_heads: int
    dim: int


class Case(NamedTuple):
    """A slice's queries and one block of keys."""

    name: str
    queries: int
    keys: int
    query_start: int
    documents: Documents
    window: int | None = None

    @property
    def place(self) -> tuple[Documents, int, int, int | None]:
        return self.documents, self.query_start, 0, self.window

    def pairs(self) -> int:
        """Return the number of pairs of a query and a key that it sees."""
        last = torch.arange(self.query_start, self.query_start + self.queries)
        first = torch.zeros_like(last) if self.documents.start is None else self.documents.start[0].cpu()
        if self.window is not None:
            first = torch.maximum(first, last - self.window + 1)
        return int((last.clamp(max=self.keys - 1) - first + 1).clamp(min=0).sum())

    def flops(self, sizes: Sizes) -> int:
        """Return the FLOPs of the forward's two products, of what is seen; the backward has five."""
        return 4 * self.pairs() * sizes.heads * sizes.dim


Timed: TypeAlias = tuple[Callable[[], object], Callable[[], object]]  # a forward, and a backward alone


class Row(NamedTuple):
    """One implementation of one case: medians in ms, TFLOP/s of what is seen, the largest error of o, dq, dk and dv."""

    case: str
    name: str
    pairs: int
    forward: float | None
    forward_tflops: float | None
    backward: float | None
    backward_tflops: float | None
    error: float | None = None
    failure: str | None = None


def measure(tokens: int, sizes: Sizes, dtype: str, alone: bool = False) -> Result[Row]:
    """Measure a slice of so many tokens in every case, ours first, or only ours. Raises SetupError without a GPU.

    Errors are against the definition in fp64, on a slice of a quarter as many.
    """
    check_gpu()
    rows = []
    smaller = {case.name: case for case in cases(tokens // SMALLER)}
    with torch.autograd.set_multithreading_enabled(False):  # as in training
        for case in cases(tokens):
            error = _error(smaller[case.name], sizes, DTYPES[dtype])
            for name, implementation in list(IMPLEMENTATIONS.items())[: 1 if alone else None]:
                row = _row(case, name, implementation, sizes, DTYPES[dtype])
                rows.append(row._replace(error=error) if name == "lasptrain" else row)
                torch.cuda.empty_cache()
    return result(torch.cuda.get_device_name(), rows, tokens, sizes, dtype)


def cases(tokens: int, device: str = "cuda") -> Iterator[Case]:
    """Yield what is measured of a slice of so many tokens."""
    before = PREFIX * tokens
    yield Case("causal", tokens, tokens, 0, Documents())
    yield Case("prefix", tokens, before, before, Documents())
    yield Case("documents", tokens, tokens, 0, _documents(range(0, tokens, DOCUMENT), tokens, device))
    random = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))
    for name, count in (("random documents", tokens // DOCUMENT), ("1,000 documents", 1000)):
        yield Case(name, tokens, tokens, 0, _documents(random[:count].tolist(), tokens, device))
    yield Case("sliding", tokens, tokens, 0, Documents(), WINDOW)
    yield Case("sliding, with halo", tokens, tokens + WINDOW - 1, WINDOW - 1, Documents(), WINDOW)


def _documents(first: range | list[int], tokens: int, device: str) -> Documents:
    starts = torch.zeros(1, tokens, dtype=torch.int32)
    starts[0, list(first)] = 1
    return Documents.of(starts.cumsum(1).to(device), 0)


def _inputs(case: Case, sizes: Sizes, dtype: torch.dtype) -> list[Tensor]:
    """Return q, k, v and do."""
    g = torch.Generator("cuda").manual_seed(0)
    rows = (
        (case.queries, sizes.heads),
        (case.keys, sizes.kv_heads),
        (case.keys, sizes.kv_heads),
        (case.queries, sizes.heads),
    )
    return [torch.randn(1, *n, sizes.dim, generator=g, device="cuda", dtype=dtype) for n in rows]


def _ours(case: Case, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> Timed:
    o, lse = softmax.forward(q, k, v, *case.place)
    return lambda: softmax.forward(q, k, v, *case.place), lambda: softmax.backward(q, k, v, o, lse, do, *case.place)


def _sdpa(case: Case, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> Timed | None:
    """Time PyTorch's choice of a kernel, where it needs no mask."""
    if case.documents.start is not None or case.window is not None:
        return None
    causal = case.query_start == 0

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    return _by_autograd(attend, q, k, v, do)


def _flex(case: Case, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> Timed:
    start, window = case.documents.start, case.window or case.query_start + case.queries
    torch.compiler.reset()  # it compiles a function only so many times

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        position = case.query_start + i
        near = (j <= position) & (j > position - window)
        return near if start is None else near & (j >= start[0, i])

    mask = torch.compile(create_block_mask)(seen, 1, None, case.queries, case.keys, device="cuda")
    attend: Callable[..., Tensor] = torch.compile(flex_attention)
    return _by_autograd(lambda *x: attend(*x, block_mask=mask, enable_gqa=True), q, k, v, do)


def _by_autograd(attend: Callable[..., Tensor], *inputs: Tensor) -> Timed:
    """Time attention over [B, H, T, D] by its graph."""
    q, k, v, do = (x.transpose(1, 2).detach() for x in inputs)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = attend(*leaves)
    return lambda: attend(*leaves), lambda: torch.autograd.grad(o, leaves, do, retain_graph=True)


IMPLEMENTATIONS: dict[str, Callable[[Case, Tensor, Tensor, Tensor, Tensor], Timed | None]] = {
    "lasptrain": _ours,
    "PyTorch": _sdpa,
    "FlexAttention": _flex,
}


def _row(case: Case, name: str, implementation: Callable[..., Timed | None], sizes: Sizes, dtype: torch.dtype) -> Row:
    """Measure one implementation; of another one, what it cannot do is a row too."""
    row, flops = Row(case.name, name, case.pairs(), None, None, None, None), case.flops(sizes)
    try:
        timed = implementation(case, *_inputs(case, sizes, dtype))
        if timed is None:
            return row._replace(failure="PyTorch: needs a mask of all scores with documents or a window")
        forward, backward = (median_ms(call) for call in timed)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        if name == "lasptrain":
            raise
        return row._replace(failure=f"{name}, {case.name}: {str(error).splitlines()[0]}")
    rates = flops / forward / 1e9, 2.5 * flops / backward / 1e9
    return row._replace(forward=forward, forward_tflops=rates[0], backward=backward, backward_tflops=rates[1])


def _error(case: Case, sizes: Sizes, dtype: torch.dtype) -> float:
    """Return the largest relative error of o, dq, dk and dv against the definition in fp64."""
    q, k, v, do = _inputs(case, sizes, dtype)
    o, lse = softmax.forward(q, k, v, *case.place)
    found = (o, *softmax.backward(q, k, v, o, lse, do, *case.place))
    q, k, v, do = (x.double() for x in (q, k, v, do))
    place = case.documents.start, *case.place[1:]
    o, lse = softmax_reference.forward(q, k, v, *place)
    want = (o, *softmax_reference.backward(q, k, v, o, lse, do, *place))
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, want, strict=True))


def result(device: str, rows: list[Row], tokens: int, sizes: Sizes, dtype: str) -> Result[Row]:
    """Return a result with one table."""
    columns: list[Column[Row]] = [
        ("", lambda row: row.case, "<"),
        ("", lambda row: row.name, "<"),
        ("pairs, millions", lambda row: row.pairs / 1e6, ",.1f"),
        ("forward ms", lambda row: row.forward, ".3f"),
        ("TFLOP/s", lambda row: row.forward_tflops, ".0f"),
        ("backward ms", lambda row: row.backward, ".3f"),
        ("TFLOP/s", lambda row: row.backward_tflops, ".0f"),
        ("error", lambda row: row.error, ".1e"),
    ]
    failures = "\n".join(sorted({row.failure for row in rows if row.failure}))
    title = (
        f"softmax of {tokens:,} queries, {sizes.heads} heads of {sizes.dim}, {sizes.kv_heads} of keys, {dtype}; "
        f"prefix: {PREFIX * tokens:,} keys before them, documents of {DOCUMENT:,}, sliding by {WINDOW:,}"
    )
    facts: dict[str, Any] = {"device": device, "tokens": tokens, **sizes._asdict(), "dtype": dtype}
    return Result(rows, [table(title, rows, columns, failures)], facts)
