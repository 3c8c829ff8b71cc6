"""`lasptrain bench ablation`: the gain of fused kernels and kept states in whole steps (as in the LASP paper)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lasptrain import ops, train
from lasptrain.bench.rivals import Pending, whole_windows
from lasptrain.bench.steps import reset, shared, timed, turns
from lasptrain.parallel import mesh
from lasptrain.parallel.mesh import Mesh, device_name
from lasptrain.parallel.recurrence import SavedStates, ShardedRecurrence
from lasptrain.parallel.scan import SCANS
from lasptrain.process.local_ranks import on_ranks
from lasptrain.recipe.schema import Recipe
from lasptrain.training.job import build


@dataclass(frozen=True)
class Row:
    """Whole steps with one kernel, with or without kept states."""

    kernel: str
    kept: bool
    tokens_per_s: float  # per rank
    memory: int  # peak, bytes


class Recomputing(ShardedRecurrence):
    """Recurrence that keeps no states for the backward, and so summarises and exchanges again there."""

    def begin(
        self,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        doc_ids: Tensor | None,
        *,
        angle: Tensor | None = None,
        carry: Tensor | None = None,
        memory: SavedStates | None = None,
        output_final_state: bool = False,
    ) -> Any:
        whole_windows("ablation", doc_ids, carry, output_final_state)
        return Pending(k, v, log_decay, angle)

    def finish(self, pending: Any, q: Tensor) -> tuple[Tensor, Tensor | None]:
        def run(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, angle: Tensor | None) -> Tensor:
            begun = ShardedRecurrence.begin(self, k, v, log_decay, None, angle=angle)
            return ShardedRecurrence.finish(self, begun, q)[0]

        o: Tensor = checkpoint(run, q, *pending, use_reentrant=False, preserve_rng_state=False)
        return o, None


def measure(recipe: Recipe, ranks: int, tokens: int) -> tuple[str, list[Row]]:
    """Return the device, and rows for unfused and fused kernels without and with kept states, `tokens` per rank.

    Starts one process per rank on this machine, which share one window per step in one segment without documents.
    """
    device, rows = on_ranks(ranks, _rank, recipe, ranks, tokens)
    return device, [Row(**row) for row in rows]


def _rank(recipe: Recipe, ranks: int, tokens: int) -> tuple[str, list[dict[str, Any]]]:
    device = mesh.device()
    fused = ops.select("auto", device)
    unfused = "chunked" if fused == "triton" else "reference"
    forms = [(kernel, kept) for kernel in (unfused, fused) for kept in (False, True)]
    return device_name(), [asdict(_row(recipe, ranks, tokens, *form)) for form in forms]


def _row(recipe: Recipe, ranks: int, tokens: int, kernel: str, kept: bool) -> Row:
    device = mesh.device()
    reset(device)
    one = shared(recipe, tokens, ranks, "ring", reset_at_documents=False)
    one = one.replace(train={"kernel": kernel})
    made = ShardedRecurrence if kept else Recomputing

    def attention(kernel: str, mesh: Mesh) -> ShardedRecurrence:
        return made(kernel, SCANS["ring"](mesh.sp_group, device))

    job = build(one, attention)
    seconds, memory = timed(lambda step: float(train.train_step(job, step)["step_time"] or 0), device, turns(tokens))
    job.loader.close()
    return Row(kernel, kept, tokens / seconds, memory)


def report(device: str, ranks: int, tokens: int, rows: list[Row]) -> Table:
    """A table with a line for each row, beside the first."""
    table = Table(title=f"whole steps, {tokens:,} tokens per rank, {ranks} × {device}")
    for column in ("kernel", "states kept", "tokens/s per rank", "× first", "peak GiB"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for row in rows:
        gain = f"{row.tokens_per_s / rows[0].tokens_per_s:.2f}"
        speed, memory = f"{row.tokens_per_s:,.0f}", f"{row.memory / 2**30:.1f}"
        table.add_row(row.kernel, "yes" if row.kept else "no", speed, gain, memory)
    return table


def write(file: Path, device: str, ranks: int, tokens: int, rows: list[Row]) -> None:
    """Write the rows as JSON."""
    head = {"device": device, "torch": torch.__version__, "ranks": ranks, "tokens": tokens}
    file.write_text(json.dumps({**head, "rows": [asdict(row) for row in rows]}, indent=1))
