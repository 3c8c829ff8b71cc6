"""Every layout is one device: loss and gradients against one process and one segment."""

from __future__ import annotations

from pathlib import Path

import torch

from lasptrain.certify.check import Check, Error, judge, norms, not_run, of_parameters, of_tokens
from lasptrain.certify.measured import Measured, measure, mine, opened
from lasptrain.certify.text import Edge, edges, windows_of, with_documents
from lasptrain.certify.trial import Trial, alone, chunked_otherwise
from lasptrain.recipe.schema import Recipe
from lasptrain.training.job import Job

NAME, ONE = "layout", "one process, one segment"
FLOOR = 1e-6  # of the largest gradient: smaller ones are measured against it
SPREAD = 4.0  # times the spread of two runs that sum in another order
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
    """Compare in the recipe's precision with the spread of two equal runs that sum in another order."""
    precision = trial.recipe.train.precision
    found, _ = run(trial.recipe, places_of(trial.recipe))
    want, other = (Measured.load(_file(trial, name)) for name in (OWN, OTHERWISE))
    sizes = norms(want.gradients, FLOOR)
    spread = of_parameters(other.gradients, want.gradients, sizes)
    allowed = SPREAD * max(spread.size, float(torch.finfo(torch.float64).eps))
    loss = Error(float((found.loss - want.loss).abs() / want.loss.abs()))
    loss_spread = float((other.loss - want.loss).abs() / want.loss.abs())
    error = of_parameters(found.gradients, want.gradients, sizes)
    against = f"{ONE}, within {SPREAD:g} × its spread over chunks"
    apart = "two runs of one process in other chunks are {:.1e} apart"
    most = max(SPREAD * loss_spread, allowed)
    return [
        judge(NAME, f"mean loss, {precision}", against, loss, most, apart.format(loss_spread)),
        judge(NAME, f"gradient of every parameter, {precision}", against, error, allowed, apart.format(spread.size)),
    ]


def breaks(trial: Trial, recipe: Recipe) -> bool:
    """Return True if the exact comparison fails for another layout of the recipe. Collective."""
    found, here = run(recipe, places_of(trial.recipe))
    want = Measured.load(_file(trial, EXACT if recipe.data.reset_at_documents else TOGETHER))
    return any(one.verdict == "fails" for one in compare(found, want, here, trial.tolerance, trial.strict))
