"""`lasptrain bench kernels`: our kernels, public ones and the memory floor, in one run on one GPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from lasptrain.errors import SetupError
from lasptrain.parallel.attention import Attention

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One implementation at one length: medians in ms, what it allocates beyond its inputs in GB."""

    name: str
    tokens: int
    forward: float
    both: float  # forward and backward
    extra: float


def measure(
    tokens: Sequence[int], heads: int, dim: int, dtype: str, decay: str, documents: int
) -> tuple[list[Row], float]:
    """Rows for every length, ours first, and the copy bandwidth of this GPU in bytes/s.

    Inputs are q, k, v [1, T, H, D], normal; `decay` is none, head (a slope of 2^(−8(h+1)/H)) or token (per head and
    token, with gradient). Raises SetupError without a GPU.
    """
    if not torch.cuda.is_available():
        raise SetupError("bench kernels: found no CUDA device; it measures GPU kernels")
    rows = []
    for length in tokens:
        implementations, learned = _implementations(length, heads, decay, documents)
        for name, forward in implementations.items():
            rows.append(_row(name, forward, learned, length, heads, dim, DTYPES[dtype]))
    return rows, _copy_bandwidth()


def _implementations(tokens: int, heads: int, decay: str, documents: int) -> tuple[dict[str, Forward], list[Tensor]]:
    """Implementations by name, and what they differentiate besides q, k and v: a log decay per token."""
    slope = torch.tensor([2.0 ** (-8 * (h + 1) / heads) for h in range(heads)], device="cuda")
    log_decay = {
        "none": None,
        "head": -slope,
        "token": (-slope * torch.rand(1, tokens, heads, device="cuda")).requires_grad_(),
    }[decay]
    learned = [log_decay] if log_decay is not None and log_decay.requires_grad else []
    doc = None
    if documents:
        starts = torch.zeros(1, tokens, dtype=torch.int32, device="cuda")
        starts[0, torch.randperm(tokens, device="cuda")[:documents]] = 1
        doc = starts.cumsum(1, dtype=torch.int32)
    attention = Attention("triton")

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.finish(attention.begin(k, v, log_decay, doc), q)[0]

    found: dict[str, Forward] = {"lasptrain": ours}
    if find_spec("fla") is None or documents:
        return found, learned
    from fla.ops.linear_attn import chunk_linear_attn
    from fla.ops.simple_gla import chunk_simple_gla

    if decay == "none":
        found["fla chunk_linear_attn"] = lambda q, k, v: chunk_linear_attn(q, k, v, scale=1.0, normalize=False)[0]
    elif decay == "head":
        found["fla chunk_simple_gla"] = lambda q, k, v: chunk_simple_gla(q, k, v, g_gamma=log_decay, scale=1.0)[0]
    else:
        found["fla chunk_simple_gla, gated"] = lambda q, k, v: chunk_simple_gla(q, k, v, g=log_decay, scale=1.0)[0]
    return found, learned


def _row(
    name: str, forward: Forward, learned: list[Tensor], tokens: int, heads: int, dim: int, dtype: torch.dtype
) -> Row:
    from triton.testing import do_bench

    q, k, v = (torch.randn(1, tokens, heads, dim, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
    do = torch.randn_like(q)

    def both() -> None:
        torch.autograd.grad(forward(q, k, v), (q, k, v, *learned), do)

    both()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    extra = torch.cuda.max_memory_allocated() - before
    with torch.no_grad():
        one_way = do_bench(lambda: forward(q, k, v), warmup=25, rep=100, return_mode="median")
    return Row(name, tokens, one_way, do_bench(both, warmup=25, rep=100, return_mode="median"), extra / 1e9)


def _copy_bandwidth() -> float:
    from triton.testing import do_bench

    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    ms: float = do_bench(lambda: target.copy_(source), warmup=25, rep=100, return_mode="median")
    return 2 * source.numel() / ms * 1e3


def floors(tokens: int, heads: int, dim: int, dtype: str, bandwidth: float) -> tuple[float, float]:
    """ms to read q, k, v and write o; and, backward included, to read them and do again and write dq, dk, dv."""
    tensor = tokens * heads * dim * DTYPES[dtype].itemsize
    return 4 * tensor / bandwidth * 1e3, 11 * tensor / bandwidth * 1e3


def report(rows: Sequence[Row], bandwidth: float, heads: int, dim: int, dtype: str, decay: str) -> Table:
    """A table with every time beside its floor and, for ours, beside the fastest other."""
    table = Table(title=f"H {heads}, D {dim}, {dtype}, decay {decay}; copies {bandwidth / 1e12:.2f} TB/s")
    for column in ("tokens", "", "forward ms", "× floor", "both ms", "× floor", "extra GB", "speed-up"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        one_way, both = floors(row.tokens, heads, dim, dtype, bandwidth)
        others = [other.both for other in rows if other.tokens == row.tokens and other.name != "lasptrain"]
        gain = f"{min(others) / row.both:.2f}" if others and row.name == "lasptrain" else ""
        table.add_row(
            f"{row.tokens:,}",
            row.name,
            f"{row.forward:.3f}",
            f"{row.forward / one_way:.2f}",
            f"{row.both:.3f}",
            f"{row.both / both:.2f}",
            f"{row.extra:.2f}",
            gain,
        )
    return table


def write(file: Path, rows: Sequence[Row], bandwidth: float) -> None:
    """The same as JSON, with the device's name."""
    content = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "bandwidth": bandwidth,
        "rows": [asdict(row) for row in rows],
    }
    file.write_text(json.dumps(content, indent=1))
