"""`lasptrain bench parity`: the same training on every layout, and how far its losses are apart (as in the paper)."""

from __future__ import annotations

import gc
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.table import Table

from lasptrain import train
from lasptrain.bench.ranks import device_name, on_ranks
from lasptrain.recipe import Recipe, resolve_mesh

KINDS = ("ddp", "zero1", "zero2", "zero3", "hsdp")


@dataclass(frozen=True)
class Layout:
    """How a training is spread over ranks and cut into segments."""

    kind: str
    sp: int
    segments: int = 1

    def __str__(self) -> str:
        cut = f", {self.segments} segments" if self.segments > 1 else ""
        return f"{self.kind}, sp {self.sp}{cut}"


@dataclass(frozen=True)
class Curve:
    """The loss of every step."""

    layout: str
    losses: list[float]


@dataclass(frozen=True)
class Results:
    """All curves, the reference first, and where they were made."""

    device: str
    ranks: int
    curves: list[Curve]


def layouts(ranks: int) -> list[Layout]:
    """The reference, data parallelism alone; the same in two segments, whose other order of sums shows how much is
    rounding; then every kind without and with sequence parallelism.
    """
    spread = [Layout(kind, sp) for kind in KINDS for sp in dict.fromkeys((1, ranks))]
    return [*spread[:1], Layout("ddp", 1, segments=2), *spread[1:]]


def measure(recipe: Recipe, ranks: int, steps: int) -> Results:
    """Losses of the first `steps` updates on every layout: same data, same seed, same global batch.

    Starts one process per rank on this machine. Raises what `resolve_mesh` does where the recipe does not fit a layout.
    """
    recipes = [_laid_out(recipe, layout) for layout in layouts(ranks)]
    for one in recipes:
        resolve_mesh(one, ranks)
    device, losses = on_ranks(ranks, _curves, recipes, steps)
    curves = [Curve(str(layout), line) for layout, line in zip(layouts(ranks), losses, strict=True)]
    return Results(device, ranks, curves)


def _laid_out(recipe: Recipe, layout: Layout) -> Recipe:
    segment = recipe.data.window // layout.segments
    return recipe.model_copy(
        update={
            "mesh": recipe.mesh.model_copy(update={"dp": "auto", "sp": layout.sp}),
            "parallel": recipe.parallel.model_copy(update={"data_parallel": layout.kind}),
            "train": recipe.train.model_copy(update={"segment": segment}),
        }
    )


def _curves(recipes: list[Recipe], steps: int) -> tuple[str, list[list[float]]]:
    return device_name(), [_losses(recipe, steps) for recipe in recipes]


def _losses(recipe: Recipe, steps: int) -> list[float]:
    job = train.build(recipe)
    losses = [float(train.one_step(job, step)["loss"] or 0.0) for step in range(steps)]
    job.loader.close()
    del job
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return losses


def differences(curves: list[Curve]) -> list[float]:
    """The largest difference of each curve from the first, over all steps."""
    reference = curves[0].losses
    return [max(abs(a - b) for a, b in zip(curve.losses, reference, strict=True)) for curve in curves]


def report(results: Results) -> Table:
    """A line per layout."""
    steps = len(results.curves[0].losses)
    table = Table(title=f"{steps} steps on {results.ranks} × {results.device}")
    for column in ("layout", "first loss", "last loss", "max |Δ loss|"):
        table.add_column(column, justify="left" if column == "layout" else "right", no_wrap=True)
    for curve, difference in zip(results.curves, differences(results.curves), strict=True):
        table.add_row(curve.layout, f"{curve.losses[0]:.6f}", f"{curve.losses[-1]:.6f}", f"{difference:.1e}")
    return table


def write(file: Path, results: Results) -> None:
    """All losses as JSON."""
    file.write_text(json.dumps(asdict(results), indent=1))
