"""`lasptrain bench kernels`: our kernels, public ones and the floors, in one run on one GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasptrain.bench.result import Column, Result, table
from lasptrain.cost.gpus import Rates
from lasptrain.errors import SetupError
from lasptrain.ops import delta_rule
from lasptrain.ops.precision import DTYPES
from lasptrain.parallel.recurrence import ShardedRecurrence

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
SIDE = 8192  # of the matrices whose product is timed
CHUNK = 64  # tokens per chunk of the product floor


class Row(NamedTuple):
    """One implementation at one length: medians in ms, memory beyond its inputs in GB."""

    name: str
    tokens: int
    forward: float
    both: float | None  # forward and backward
    extra: float | None
    replayed: float | None = None  # forward and backward from a CUDA graph: the kernels alone, without their launches
    failure: str | None = None  # why there is no backward


def measure(
    tokens: Sequence[int], heads: int, dim: int, dtype: str, decay: str, documents: int, op: str = "linear"
) -> Result[Row]:
    """Measure every length, ours first, and the rates that bound them.

    Inputs are q, k, v [1, T, H, D], normal. `op` is linear, or gdn: the delta rule with keys of length one and beta in
    (0, 1). `decay` is none, head (a slope of 2^(−8(h+1)/H)) or token (per head and token, with gradient): for linear
    that slope times a number in (0, 1), for gdn of mean 0.05. Backward runs on the calling thread, as in training.
    Raises SetupError without a GPU.
    """
    rates = measure_rates(dtype)
    rows = []
    with torch.autograd.set_multithreading_enabled(False):
        for length in tokens:
            implementations, learned = _implementations(length, heads, decay, documents, op)
            for name, forward in implementations.items():
                rows.append(_row(name, forward, learned, length, heads, dim, DTYPES[dtype], op == "gdn"))
    return result(torch.cuda.get_device_name(), rows, rates, heads, dim, dtype, decay, op)


def check_gpu() -> None:
    """Raise SetupError without a GPU."""
    if not torch.cuda.is_available():
        raise SetupError("found no CUDA device to measure")


def measure_rates(dtype: str) -> Rates:
    """Measure the current GPU's rates, products in `dtype`; SetupError without a GPU."""
    check_gpu()
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    a, b = torch.randn(2, SIDE, SIDE, device="cuda").to(DTYPES[dtype])
    product = median_ms(lambda: a @ b, warmup=100, rep=300)
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = median_ms(lambda: target.copy_(source))
    return Rates(2 * SIDE**3 / product * 1e3, 2 * source.numel() / copy * 1e3, memory)


GATES = 0.05  # mean slope of gdn's decays per token, as in the other library's own benchmark


def _implementations(
    tokens: int, heads: int, decay: str, documents: int, op: str
) -> tuple[dict[str, Forward], list[Tensor]]:
    """Implementations by name, and the inputs they differentiate besides q, k and v: beta, a log decay per token."""
    slope = torch.tensor([2.0 ** (-8 * (h + 1) / heads) for h in range(heads)], device="cuda")
    each = torch.rand(1, tokens, heads, device="cuda")
    per_token = -(2 * GATES * each if op == "gdn" else slope * each)
    log_decay = {"none": None, "head": -slope, "token": per_token.requires_grad_()}[decay]
    learned = [log_decay] if log_decay is not None and log_decay.requires_grad else []
    doc_ids, edges = None, None
    if documents:
        starts = torch.zeros(1, tokens, dtype=torch.int32, device="cuda")
        starts[0, torch.randperm(tokens, device="cuda")[:documents]] = 1
        doc_ids = starts.cumsum(1, dtype=torch.int32)
        inner = starts[0].nonzero().flatten()
        edges = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), tokens)]).unique()
    if op == "gdn":
        beta = torch.rand(1, tokens, heads, device="cuda").requires_grad_()
        return _delta(beta, log_decay, doc_ids, edges), [beta, *learned]
    attention = ShardedRecurrence("triton")

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.finish(attention.begin((k, v, log_decay), doc_ids), q)[0]

    found: dict[str, Forward] = {"lasptrain": ours}
    if find_spec("fla") is None:
        return found, learned
    from fla.ops.linear_attn import chunk_linear_attn
    from fla.ops.simple_gla import chunk_simple_gla

    options: dict[str, Any] = {"scale": 1.0, "cu_seqlens": edges}
    if decay == "none":
        found["fla chunk_linear_attn"] = lambda q, k, v: chunk_linear_attn(q, k, v, normalize=False, **options)[0]
    elif decay == "head":
        found["fla chunk_simple_gla"] = lambda q, k, v: chunk_simple_gla(q, k, v, g_gamma=log_decay, **options)[0]
    else:
        found["fla chunk_simple_gla, gated"] = lambda q, k, v: chunk_simple_gla(q, k, v, g=log_decay, **options)[0]
    return found, learned


def _delta(beta: Tensor, log_decay: Tensor | None, doc_ids: Tensor | None, edges: Tensor | None) -> dict[str, Forward]:
    """Implementations of the delta rule by name; the other library takes FlashQLA's, where that is installed."""
    attention = ShardedRecurrence("triton")

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.finish(attention.begin((k, v, beta, log_decay), doc_ids, rule=delta_rule), q)[0]

    found: dict[str, Forward] = {"lasptrain": ours}
    if find_spec("fla") is None:
        return found
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        g = torch.zeros_like(beta) if log_decay is None else log_decay.expand_as(beta)
        o: Tensor = chunk_gated_delta_rule(q, k, v, g, beta.to(q.dtype), scale=1.0, cu_seqlens=edges)[0]
        return o

    backend = "FlashQLA" if find_spec("flash_qla") is not None else "fla"
    return found | {f"{backend} chunk_gated_delta_rule": theirs}


def _row(
    name: str,
    forward: Forward,
    learned: list[Tensor],
    tokens: int,
    heads: int,
    dim: int,
    dtype: torch.dtype,
    unit: bool,
) -> Row:
    """Measure one implementation; `unit`: on q and k of length one."""
    q, k, v = (torch.randn(1, tokens, heads, dim, device="cuda", dtype=dtype) for _ in range(3))
    if unit:
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    do = torch.randn_like(q)

    def both() -> None:
        torch.autograd.grad(forward(q, k, v), (q, k, v, *learned), do)

    with torch.no_grad():
        one_way = median_ms(lambda: forward(q, k, v))
    try:
        both()
    except RuntimeError as error:  # fla refuses what the installed Triton would compile wrongly
        return Row(name, tokens, one_way, None, None, failure=str(error))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    extra = torch.cuda.max_memory_allocated() - before
    return Row(name, tokens, one_way, median_ms(both), extra / 1e9, _replayed(both))


def _replayed(call: Callable[[], None]) -> float | None:
    """Median ms from a CUDA graph; None where the call waits for the GPU and so cannot be captured."""
    from triton.testing import do_bench_cudagraph

    try:
        ms: float = do_bench_cudagraph(call, rep=50, return_mode="median")
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return ms


def median_ms(call: Callable[[], object], warmup: int = 25, rep: int = 100) -> float:
    """Return the median ms of a call; `warmup` and `rep` are ms too."""
    from triton.testing import do_bench

    ms: float = do_bench(call, warmup=warmup, rep=rep, return_mode="median")
    return ms


def floors(tokens: int, heads: int, dim: int, dtype: str, rates: Rates, op: str = "linear") -> list[Row]:
    """Lower bounds of times. Memory: read q, k, v and write o; with backward also read them and do again and write
    dq, dk, dv. Products: those of a chunkwise algorithm with chunks of CHUNK tokens; of gdn the sequential form's.
    """
    tensor = tokens * heads * dim * DTYPES[dtype].itemsize / rates.copies * 1e3
    product = 2 * tokens * heads * dim * (CHUNK + dim) / rates.products * 1e3
    forward, both = (10.8 / 3.15, 42 / 3.15) if op == "gdn" else (2, 7)  # a chunk of D = 128 has 3.15 million
    return [
        Row("memory floor", tokens, 4 * tensor, 11 * tensor, None),
        Row("product floor", tokens, forward * product, both * product, None),
    ]


def result(
    device: str, rows: list[Row], rates: Rates, heads: int, dim: int, dtype: str, decay: str, op: str = "linear"
) -> Result[Row]:
    """Return a result whose table has every time beside the floors and, for ours, beside the fastest other."""
    least = {row.tokens: floors(row.tokens, heads, dim, dtype, rates, op) for row in rows}
    shown = [row for length in least for row in (*(one for one in rows if one.tokens == length), *least[length])]

    def above(row: Row) -> float | None:
        floor = least[row.tokens][0].both
        return row.both and floor and row.both / floor

    def gain(row: Row, time: Callable[[Row], float | None]) -> float | None:
        ours, *others = [time(one) for one in rows if one.tokens == row.tokens]
        found = [other for other in others if other is not None]
        return min(found) / ours if found and ours and row.name == rows[0].name else None

    columns: list[Column[Row]] = [
        ("tokens", lambda row: row.tokens, ","),
        ("", lambda row: row.name, "<"),
        ("forward ms", lambda row: row.forward, ".3f"),
        ("× floor", lambda row: row.forward / least[row.tokens][0].forward, ".2f"),
        ("both ms", lambda row: row.both, ".3f"),
        ("× floor", above, ".2f"),
        ("speed-up", lambda row: gain(row, lambda one: one.both), ".2f"),
        ("replayed ms", lambda row: row.replayed, ".3f"),
        ("speed-up", lambda row: gain(row, lambda one: one.replayed), ".2f"),
        ("GB", lambda row: row.extra, ".2f"),
    ]
    gates = f" of mean -{GATES:g}" if (op, decay) == ("gdn", "token") else ""
    title = (
        f"{op}, H {heads}, D {dim}, {dtype}, decay {decay}{gates}; "
        f"copies {rates.copies / 1e12:.2f} TB/s, products {rates.products / 1e12:.0f} TFLOP/s"
    )
    failures = sorted({row.failure for row in rows if row.failure})
    made = table(title, shown, columns, "\n".join(failures))
    return Result(rows, [made], {"device": device, **rates._asdict()})
