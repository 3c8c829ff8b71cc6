"""`lasptrain bench parity`: the same training on every layout, and the differences of its losses (as in the paper).

Sums in another order differ by rounding. The size of that alone is measured too: the reference in two segments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lasptrain import train
from lasptrain.bench.result import Column, Result, table
from lasptrain.bench.steps import reset
from lasptrain.errors import RecipeError, SetupError
from lasptrain.parallel import mesh
from lasptrain.parallel.mesh import device_name
from lasptrain.process.local_ranks import TrialFailure, trials
from lasptrain.recipe.resolve import resolve_mesh
from lasptrain.recipe.schema import Recipe
from lasptrain.training.job import build

KINDS = ("ddp", "zero1", "zero2", "zero3", "hsdp")


class Layout(NamedTuple):
    """Data parallelism, sp ranks and segments of a training."""

    kind: str
    sp: int
    segments: int = 1

    def __str__(self) -> str:
        cut = f", {self.segments} segments" if self.segments > 1 else ""
        return f"{self.kind}, sp {self.sp}{cut}"


class Curve(NamedTuple):
    """The loss of every step."""

    layout: str
    losses: list[float]


def layouts(ranks: int, kinds: Sequence[str] = KINDS) -> list[Layout]:
    """Layouts to compare: the reference, data parallelism alone; the same in two segments, whose other order of sums
    shows the size of rounding; then each of `kinds` without and with sequence parallelism.
    """
    spread = [Layout(kind, sp) for kind in kinds for sp in dict.fromkeys((1, ranks))]
    reference = Layout("ddp", 1)
    return [reference, Layout("ddp", 1, segments=2), *(layout for layout in spread if layout != reference)]


def measure(recipe: Recipe, ranks: int, steps: int, kinds: Sequence[str] = KINDS) -> Iterator[Result[Curve]]:
    """Yield losses of the first `steps` updates on every layout: same data, same seed, same global batch, which is the
    recipe's, rounded up to a multiple of the ranks.

    Starts one process per rank on this machine; each value holds all curves so far. Raises RecipeError for a kind that
    does not exist, the errors of `resolve_mesh` where the recipe does not fit a layout, and those of `trials`.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise RecipeError(f"--kind: found {kind!r}; expected one of {', '.join(KINDS)}")
    chosen = layouts(ranks, kinds)
    recipes = [_laid_out(recipe, layout, ranks) for layout in chosen]
    for one in recipes:
        resolve_mesh(one, ranks)
    curves: list[Curve] = []
    given = [(one, steps) for one in recipes]
    for layout, (_, made) in zip(chosen, trials(ranks, _curve, given, silence=None), strict=True):
        if isinstance(made, TrialFailure):
            raise made.error or SetupError(f"{layout}: {made.reason}")
        curves = [*curves, Curve(str(layout), made[1])]
        yield result(made[0], ranks, curves)


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
    job = build(recipe)
    losses = [float(train.train_step(job, step)["loss"] or 0.0) for step in range(steps)]
    job.loader.close()
    return device_name(), losses


def differences(curves: list[Curve]) -> list[float]:
    """Largest absolute difference of each curve from the first, over all steps."""
    reference = curves[0].losses
    return [max(abs(a - b) for a, b in zip(curve.losses, reference, strict=True)) for curve in curves]


def result(device: str, ranks: int, curves: list[Curve]) -> Result[Curve]:
    """Return a result whose table has each layout's difference, also relative to that of two segments: rounding."""
    apart = differences(curves)
    rounding = apart[1] if len(apart) > 1 else 0.0
    columns: list[Column[tuple[Curve, float]]] = [
        ("layout", lambda row: row[0].layout, "<"),
        ("first loss", lambda row: row[0].losses[0], ".6f"),
        ("last loss", lambda row: row[0].losses[-1], ".6f"),
        ("max |Δ loss|", lambda row: row[1], ".1e"),
        ("× rounding", lambda row: row[1] / rounding if rounding else None, ".2f"),
    ]
    title = f"{len(curves[0].losses)} steps on {ranks} × {device}"
    shown = table(title, zip(curves, apart, strict=True), columns)
    return Result(curves, [shown], {"device": device, "ranks": ranks}, "curves")
