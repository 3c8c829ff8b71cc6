"""`lasptrain bench parity`: the same training on every layout, and the differences of its losses (as in the paper).

Sums in another order differ by rounding. The size of that alone is measured too: the reference in two segments.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from lasptrain import train
from lasptrain.bench.steps import reset
from lasptrain.errors import RecipeError, SetupError
from lasptrain.parallel import mesh
from lasptrain.parallel.mesh import device_name
from lasptrain.process.local_ranks import Failure, trials
from lasptrain.recipe.resolve import resolve_mesh
from lasptrain.recipe.schema import Recipe
from lasptrain.training.job import build

KINDS = ("ddp", "zero1", "zero2", "zero3", "hsdp")


@dataclass(frozen=True)
class Layout:
    """Data parallelism, sp ranks and segments of a training."""

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
    """All curves, the reference first, and the device they were made on."""

    device: str
    ranks: int
    curves: list[Curve]


def layouts(ranks: int, kinds: Sequence[str] = KINDS) -> list[Layout]:
    """Layouts to compare: the reference, data parallelism alone; the same in two segments, whose other order of sums
    shows the size of rounding; then each of `kinds` without and with sequence parallelism.
    """
    spread = [Layout(kind, sp) for kind in kinds for sp in dict.fromkeys((1, ranks))]
    reference = Layout("ddp", 1)
    return [reference, Layout("ddp", 1, segments=2), *(layout for layout in spread if layout != reference)]


def measure(recipe: Recipe, ranks: int, steps: int, kinds: Sequence[str] = KINDS) -> Iterator[Results]:
    """Yield losses of the first `steps` updates on every layout: same data, same seed, same global batch, which is the
    recipe's, rounded up to a multiple of the ranks.

    Starts one process per rank on this machine; each value holds all curves so far. Raises RecipeError for a kind that
    does not exist, the errors of `resolve_mesh` where the recipe does not fit a layout, and those of `on_ranks`.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise RecipeError(f"--kind: found {kind!r}; expected one of {', '.join(KINDS)}")
    chosen = layouts(ranks, kinds)
    recipes = [_laid_out(recipe, layout, ranks) for layout in chosen]
    for one in recipes:
        resolve_mesh(one, ranks)
    found = Results("", ranks, [])
    given = [(one, steps) for one in recipes]
    for layout, (_, made) in zip(chosen, trials(ranks, _curve, given, silence=None), strict=True):
        if isinstance(made, Failure):
            raise made.error or SetupError(f"{layout}: {made.reason}")
        found = Results(made[0], ranks, [*found.curves, Curve(str(layout), made[1])])
        yield found


def _laid_out(recipe: Recipe, layout: Layout, ranks: int) -> Recipe:
    segment = recipe.data.window // layout.segments
    batch = -(-recipe.train.batch // ranks) * ranks
    return recipe.replace(
        data={"repeat": True},
        mesh={"dp": "auto", "sp": layout.sp},
        parallel={"data_parallel": layout.kind},
        train={"segment": segment, "batch": batch},
    )


def _curve(recipe: Recipe, steps: int) -> tuple[str, list[float]]:
    reset(mesh.device())
    return device_name(), _losses(recipe, steps)


def _losses(recipe: Recipe, steps: int) -> list[float]:
    job = build(recipe)
    losses = [float(train.train_step(job, step)["loss"] or 0.0) for step in range(steps)]
    job.loader.close()
    return losses


def differences(curves: list[Curve]) -> list[float]:
    """Largest absolute difference of each curve from the first, over all steps."""
    reference = curves[0].losses
    return [max(abs(a - b) for a, b in zip(curve.losses, reference, strict=True)) for curve in curves]


def report(results: Results) -> Table:
    """A table with a line per layout: its difference, also relative to that of two segments, which is rounding."""
    steps = len(results.curves[0].losses)
    table = Table(title=f"{steps} steps on {results.ranks} × {results.device}")
    for column in ("layout", "first loss", "last loss", "max |Δ loss|", "× rounding"):
        table.add_column(column, justify="left" if column == "layout" else "right", no_wrap=True)
    apart = differences(results.curves)
    rounding = apart[1] if len(apart) > 1 else 0.0
    for curve, difference in zip(results.curves, apart, strict=True):
        ratio = f"{difference / rounding:.2f}" if rounding else ""
        table.add_row(curve.layout, f"{curve.losses[0]:.6f}", f"{curve.losses[-1]:.6f}", f"{difference:.1e}", ratio)
    return table


def write(file: Path, results: Results) -> None:
    """Write all losses as JSON."""
    file.write_text(json.dumps(asdict(results), indent=1))
