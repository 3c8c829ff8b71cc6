"""Every layout is one device: loss and gradients against one process and one segment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasptrain import files
from lasptrain.certify.check import Check, Error, distances, finite, judge, largest, not_run, of_tokens, ratio, relative
from lasptrain.certify.measured import Measured, measure, mine, opened
from lasptrain.certify.text import Edges, edges, windows_of, with_documents
from lasptrain.certify.trial import Trial, alone, chunked_otherwise
from lasptrain.ops.precision import DTYPES
from lasptrain.recipe.schema import Recipe
from lasptrain.training.job import Job

NAME, ONE = "layout", "one process, one segment"
FP32 = float(torch.finfo(torch.float32).eps)
SPREAD = 4.0  # times the rounding of one process
MOST = 0.9 / SPREAD  # of rounding: a gradient that is lost is 1 off
EXACT, TOGETHER, ROUNDING = "exact", "together", "rounding.json"  # references, by file


def same(recipe: Recipe) -> bool:
    """Return True if the recipe is one rank, one segment and no other choice: nothing to compare."""
    return recipe == alone(recipe)


def places_of(recipe: Recipe) -> Edges:
    """Return the edges that documents are planted on."""
    assert isinstance(recipe.mesh.sp, int) and isinstance(recipe.train.segment, int)
    return edges(recipe.data.window, recipe.mesh.sp, recipe.data.window // recipe.train.segment)


def read(job: Job, places: Edges) -> Tensor:
    """Read the first step's windows; every second one has documents at `places`."""
    return with_documents(windows_of(job.loader, 0), job.dataset.bos, job.dataset.vocab_size, places)


class Deviation(NamedTuple):
    """Differences from what is exact: of tokens relative to the largest of all, of parameters each to its own."""

    loss: float
    token_losses: Tensor  # [windows, N]
    token_gradients: Tensor  # [windows, N]
    parameters: Mapping[str, float]

    def in_units(self, unit: Rounding) -> Deviation:
        """Return the differences in rounding errors."""
        parameters = {name: error / unit.parameters[name] for name, error in self.parameters.items()}
        tokens = (self.token_losses / unit.token_losses, self.token_gradients / unit.token_gradients)
        return Deviation(self.loss / unit.loss, *tokens, parameters)


class Rounding(NamedTuple):
    """Rounding errors of one process, at least that of a number: units of comparison in the recipe's precision."""

    loss: float
    token_losses: float
    token_gradients: float
    parameters: dict[str, float]

    @classmethod
    def of(cls, runs: list[Deviation], precision: str) -> Rounding:
        """Return the largest of some runs. That of a parameter is at least the median's: it may be small by chance."""
        least = float(torch.finfo(DTYPES[precision]).eps)
        least_loss = max(least / 32, min(least, FP32))  # losses are summed in at least fp32, whatever activations are
        own = {name: max(finite(run.parameters[name]) for run in runs) for name in runs[0].parameters}
        usual = max(least, median(own.values()))
        losses, gradients = (
            max(finite(float(x.max())) for x in found)
            for found in zip(*((run.token_losses, run.token_gradients) for run in runs), strict=True)
        )
        return cls(
            min(MOST, max(least_loss, *(finite(run.loss) for run in runs))),
            min(MOST, max(least, losses)),
            min(MOST, max(least, gradients)),
            {name: min(MOST, max(usual, error)) for name, error in own.items()},
        )


def deviation(found: Measured, want: Measured) -> Deviation:
    """Return how far a measurement is from another. Collective."""
    losses = (found.token_losses - want.token_losses).abs() / want.token_losses.abs().max()
    sizes = want.token_gradients.norm(dim=-1)
    tokens = (found.token_gradients - want.token_gradients).norm(dim=-1) / sizes.max()
    parameters = relative(distances(found.gradients, want.gradients))
    return Deviation(ratio(float(found.loss), float(want.loss)), losses, tokens, parameters)


def reference(trial: Trial) -> list[Check]:
    """Leave what one process computes, and how far two runs of it in the recipe's precision are from that."""
    if same(trial.recipe):
        return []
    leave(trial, EXACT)
    if trial.is_exact:
        return []
    own, exact = alone(trial.recipe), Measured.load(trial.folder / EXACT)
    runs = []
    for recipe in (own, chunked_otherwise(own)):
        with opened(recipe) as job:
            runs.append(deviation(measure(job, read(job, places_of(trial.recipe))), exact))
    unit = Rounding.of(runs, trial.recipe.train.precision)
    files.replace(trial.folder / ROUNDING, json.dumps(unit._asdict()))
    return []


def leave(trial: Trial, name: str) -> None:
    """Leave one of the exact references, with documents apart as in the recipe, or together."""
    recipe = alone(trial.exact)
    if name == TOGETHER:
        recipe = recipe.replace(data={"reset_at_documents": False})
    with opened(recipe) as job:
        measure(job, read(job, places_of(trial.recipe))).save(trial.folder / name)


def check(trial: Trial) -> list[Check]:
    """Compare the layout with what `reference` left. Collective."""
    if same(trial.recipe):
        why = "one rank and one segment: nothing to compare; --nproc 2 gives two ranks, train.segment segments"
        return [not_run(NAME, "loss and gradients", ONE, why)]
    return exact(trial) + ([] if trial.is_exact else own(trial))


def exact(trial: Trial) -> list[Check]:
    """Compare strictly: losses, the gradient at every token, the gradient of every parameter. Collective."""
    return compared(trial, trial.exact, trial.folder / EXACT)


def compared(trial: Trial, recipe: Recipe, reference: Path) -> list[Check]:
    """Return the strict comparison of a layout. Collective."""
    with opened(recipe) as job:
        found = measure(job, read(job, places_of(trial.recipe)))
        apart = deviation(found, Measured.load(reference))
        return judged(apart, mine(job), trial.tolerance, trial.strict, ONE)


def judged(apart: Deviation, here: Tensor, tolerance: float, precision: str, against: str) -> list[Check]:
    """Return the checks of a measurement of which the tokens `here` are this rank's. Collective."""
    found = {
        "mean loss": Error(apart.loss),
        "loss of every token": of_tokens(apart.token_losses, here, tolerance),
        "gradient at every token": of_tokens(apart.token_gradients, here, tolerance),
        "gradient of every parameter": largest(apart.parameters),
    }
    return [judge(NAME, f"{what}, {precision}", against, error, tolerance) for what, error in found.items()]


def own(trial: Trial) -> list[Check]:
    """Compare in the recipe's precision: rounding may take the layout SPREAD times as far from the exact numbers as it
    takes two runs of one process that sum in different chunks. Collective.
    """
    numbers: dict[str, Any] = json.loads((trial.folder / ROUNDING).read_text())
    against = f"{ONE}, {trial.strict}; in roundings of one process"
    with opened(trial.recipe) as job:
        found = measure(job, read(job, places_of(trial.recipe)))
        apart = deviation(found, Measured.load(trial.folder / EXACT)).in_units(Rounding(**numbers))
        return judged(apart, mine(job), SPREAD, trial.recipe.train.precision, against)


def breaks(trial: Trial, recipe: Recipe) -> bool:
    """Return True if the exact comparison fails for another layout of the recipe. Collective."""
    reference = trial.folder / (EXACT if recipe.data.reset_at_documents else TOGETHER)
    return any(one.verdict == "fails" for one in compared(trial, recipe, reference))
