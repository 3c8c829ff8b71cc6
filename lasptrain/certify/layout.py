"""Every layout is one device: loss and gradients against one process and one segment."""

from __future__ import annotations

from pathlib import Path

import torch

from lasptrain.certify.check import Check, Error, judge, norms, not_run, of_parameters, of_tokens
from lasptrain.certify.measured import Measured, measure, mine, opened
from lasptrain.certify.text import Edge, edges, windows_of, with_documents
from lasptrain.certify.trial import Trial, alone, chunked_otherwise
from lasptrain.ops.precision import DTYPES
from lasptrain.recipe.schema import Recipe
from lasptrain.training.job import Job

NAME, ONE = "layout", "one process, one segment"
FLOOR = 1e-6  # of the largest gradient: smaller ones are measured against it
FP32 = float(torch.finfo(torch.float32).eps)
SPREAD = 4.0  # times the rounding of one process
EXACT, OWN, OTHERWISE, TOGETHER = "exact", "own", "otherwise", "together"  # references, by file


def same(recipe: Recipe) -> bool:
    """Return True if the layout is one rank and one segment: nothing to compare."""
    return recipe.mesh.dp == recipe.mesh.sp == 1 and recipe.train.segment == recipe.data.window


def places_of(recipe: Recipe) -> list[Edge]:
    """Return the edges that documents are planted on."""
    assert isinstance(recipe.mesh.sp, int) and isinstance(recipe.train.segment, int)
    return edges(recipe.data.window, recipe.mesh.sp, recipe.data.window // recipe.train.segment)


def read(job: Job, places: list[Edge]) -> torch.Tensor:
    """Read the first step's windows; every second one has documents at `places`."""
    return with_documents(windows_of(job.loader, 0), job.dataset.bos, job.dataset.vocab_size, places)


def run(recipe: Recipe, places: list[Edge]) -> tuple[Measured, torch.Tensor]:
    """Measure a recipe on these ranks; return that, and which tokens [windows, N] are this rank's."""
    with opened(recipe) as job:
        return measure(job, read(job, places)), mine(job)


def reference(trial: Trial) -> list[Check]:
    """Leave what one process computes, exactly and in the recipe's precision twice."""
    if not same(trial.recipe):
        for name in (EXACT, OWN, OTHERWISE):
            leave(trial, name)
    return []


def leave(trial: Trial, name: str) -> None:
    """Leave one of the references: what one process computes."""
    exact, own = alone(trial.exact), alone(trial.recipe)
    match name:
        case "exact":
            recipe = exact
        case "together":
            recipe = exact.replace(data={"reset_at_documents": False})
        case "own":
            recipe = own
        case _:
            recipe = chunked_otherwise(own)
    run(recipe, places_of(trial.recipe))[0].save(_file(trial, name))


def _file(trial: Trial, name: str) -> Path:
    return trial.folder / f"{name}.safetensors"


def check(trial: Trial) -> list[Check]:
    """Compare the layout with what `reference` left. Collective."""
    if same(trial.recipe):
        why = "one rank and one segment: nothing to compare; --nproc 2 gives two ranks, train.segment segments"
        return [not_run(NAME, "loss and gradients", ONE, why)]
    return [*exact(trial), *own(trial)]


def exact(trial: Trial) -> list[Check]:
    """Compare strictly: losses, the gradient at every token, the gradient of every parameter."""
    found, here = run(trial.exact, places_of(trial.recipe))
    want = Measured.load(_file(trial, EXACT))
    return compare(found, want, here, trial.tolerance, trial.strict)


def compare(found: Measured, want: Measured, here: torch.Tensor, tolerance: float, precision: str) -> list[Check]:
    """Return the checks of one measurement against another."""
    loss = Error(float((found.loss - want.loss).abs() / want.loss.abs()))
    scale = float(want.token_losses.abs().max())
    losses = of_tokens((found.token_losses - want.token_losses).abs() / scale, here, tolerance)
    size = float(want.token_gradients.norm(dim=-1).max())
    tokens = of_tokens((found.token_gradients - want.token_gradients).norm(dim=-1) / size, here, tolerance)
    parameters = of_parameters(found.gradients, want.gradients, norms(want.gradients, FLOOR))
    return [
        judge(NAME, f"mean loss, {precision}", ONE, loss, tolerance),
        judge(NAME, f"loss of every token, {precision}", ONE, losses, tolerance),
        judge(NAME, f"gradient at every token, {precision}", ONE, tokens, tolerance),
        judge(NAME, f"gradient of every parameter, {precision}", ONE, parameters, tolerance),
    ]


def own(trial: Trial) -> list[Check]:
    """Compare in the recipe's precision: rounding may take the layout SPREAD times as far from the exact numbers as it
    takes two runs of one process that sum in different chunks.
    """
    precision = trial.recipe.train.precision
    found, _ = run(trial.recipe, places_of(trial.recipe))
    exact, one, other = (Measured.load(_file(trial, name)) for name in (EXACT, OWN, OTHERWISE))
    sizes = norms(exact.gradients, FLOOR)
    parameters = of_parameters(found.gradients, exact.gradients, sizes)
    rounding = max(of_parameters(plain.gradients, exact.gradients, sizes).size for plain in (one, other))
    loss, *plain_losses = (abs(float(x.loss / exact.loss) - 1) for x in (found, one, other))
    least = float(torch.finfo(DTYPES[precision]).eps)
    least_loss = max(least / 32, min(least, FP32))  # losses are summed in at least fp32, whatever activations are
    against = f"{ONE}, {trial.strict}; {SPREAD:g} × its own rounding"
    apart = "one process in two chunkings is up to {:.1e} off"
    return [
        judge(
            NAME,
            f"mean loss, {precision}",
            against,
            Error(loss),
            SPREAD * max(*plain_losses, least_loss),
            apart.format(max(plain_losses)),
        ),
        judge(
            NAME,
            f"gradient of every parameter, {precision}",
            against,
            parameters,
            SPREAD * max(rounding, least),
            apart.format(rounding),
        ),
    ]


def breaks(trial: Trial, recipe: Recipe) -> bool:
    """Return True if the exact comparison fails for another layout of the recipe. Collective."""
    found, here = run(recipe, places_of(trial.recipe))
    want = Measured.load(_file(trial, EXACT if recipe.data.reset_at_documents else TOGETHER))
    return any(one.verdict == "fails" for one in compare(found, want, here, trial.tolerance, trial.strict))
