"""`lasptrain bench ablation`: the gain of fused kernels and kept states in whole steps (as in the LASP paper)."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lasptrain import ops
from lasptrain.bench.result import Column, Result, table
from lasptrain.bench.rivals.pending import begun
from lasptrain.bench.steps import repeats_for, shared, trained
from lasptrain.parallel import mesh
from lasptrain.parallel.mesh import Mesh, device_name
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.parallel.scan import SCANS
from lasptrain.process.local_ranks import on_ranks
from lasptrain.recipe.schema import Recipe


class Row(NamedTuple):
    """Whole steps with one kernel, with or without kept states."""

    kernel: str
    kept: bool
    tokens_per_s: float  # per rank
    memory: int  # peak, bytes


class Recomputing(ShardedRecurrence):
    """Recurrence that keeps no states for the backward, and so summarises and exchanges again there."""

    def begin(self, *window: Any, **state: Any) -> Any:
        return begun("ablation", *window, **state)

    def finish(self, pending: Any, q: Tensor) -> tuple[Tensor, Tensor | None]:
        def run(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, angle: Tensor | None) -> Tensor:
            started = ShardedRecurrence.begin(self, (k, v, log_decay), None, angle=angle)
            return ShardedRecurrence.finish(self, started, q)[0]

        o: Tensor = checkpoint(run, q, *pending, use_reentrant=False, preserve_rng_state=False)
        return o, None


def measure(recipe: Recipe, ranks: int, tokens: int) -> Result[Row]:
    """Measure unfused and fused kernels without and with kept states, `tokens` per rank.

    Starts one process per rank on this machine, which share one window per step in one segment without documents.
    """
    device, rows = on_ranks(ranks, _rank, recipe, ranks, tokens)
    return result(device, ranks, tokens, [Row(*row) for row in rows])


def _rank(recipe: Recipe, ranks: int, tokens: int) -> tuple[str, list[Row]]:
    fused = ops.select("auto", mesh.device())
    unfused = "chunked" if fused == "triton" else "reference"
    forms = [(kernel, kept) for kernel in (unfused, fused) for kept in (False, True)]
    return device_name(), [_row(recipe, ranks, tokens, *form) for form in forms]


def _row(recipe: Recipe, ranks: int, tokens: int, kernel: str, kept: bool) -> Row:
    one = shared(recipe, tokens, ranks, "ring", reset_at_documents=False).replace(train={"kernel": kernel})
    made = ShardedRecurrence if kept else Recomputing

    def attention(kernel: str, of: Mesh) -> ShardedRecurrence:
        return made(kernel, SCANS["ring"](of.sp_group, mesh.device()))

    _, seconds, memory = trained(one, repeats_for(tokens), attention)
    return Row(kernel, kept, tokens / seconds, memory)


def result(device: str, ranks: int, tokens: int, rows: list[Row]) -> Result[Row]:
    """Return a result whose table has every row beside the first."""
    columns: list[Column[Row]] = [
        ("kernel", lambda row: row.kernel, "<"),
        ("states kept", lambda row: "yes" if row.kept else "no", ""),
        ("tokens/s per rank", lambda row: row.tokens_per_s, ",.0f"),
        ("× first", lambda row: row.tokens_per_s / rows[0].tokens_per_s, ".2f"),
        ("peak GiB", lambda row: row.memory / 2**30, ".1f"),
    ]
    title = f"whole steps, {tokens:,} tokens per rank, {ranks} × {device}"
    return Result(rows, [table(title, rows, columns)], {"device": device, "ranks": ranks, "tokens": tokens})
