"""An update is that of one process: loss, norm before clipping, moments and weights; and replicas are equal."""

from __future__ import annotations

import json
from typing import NamedTuple

from lasptrain import files, train
from lasptrain.certify.check import (
    FLOOR,
    Check,
    Error,
    distance,
    distances,
    failed,
    finite,
    judge,
    largest,
    not_run,
    ratio,
    relative,
)
from lasptrain.certify.kept import Kept, Whole
from lasptrain.certify.measured import opened, slope_error, stirred
from lasptrain.certify.text import windows_of
from lasptrain.certify.trial import Trial, alone
from lasptrain.checkpoint.tensors import present, tensors_of
from lasptrain.errors import ReplicasError
from lasptrain.parallel import replicas
from lasptrain.parallel.collectives import all_gather_object
from lasptrain.recipe.schema import Recipe
from lasptrain.recipe.sections import REPLICATED
from lasptrain.training.job import Job

UPDATES = 2  # the second reads what the first has written
LOOSER = 10  # times the tolerance of one pass
MOVES = {"fp64": 1e-6, "fp32": 5e-3}  # AdamW divides by the size of a gradient, however small, and so moves the next
SLOPE_PRECISION, LENGTH, SLOPE = "fp64", 1e-6, 1e-5  # of a difference of losses; its tolerance
TENSORS, NUMBERS = "update", "update.json"
NAME, OTHERS, ONE = "update", "those on other ranks", f"{UPDATES} updates of one process"
SHARDED = "no rank holds the weights of another"
CLIP = 0.5  # of the first norm, so that gradients are clipped


class Updated(NamedTuple):
    """The state after some updates: losses and norms of each, tensors by name in a checkpoint, those that are here."""

    losses: list[float]
    norms: list[float]
    tensors: Whole


def reference(trial: Trial) -> list[Check]:
    """Leave the updates of one process, whose gradients are compared with the slope of its loss."""
    recipe = alone(trial.exact)
    clip = recipe.optim.clip
    if clip:
        with opened(recipe) as job:
            clip = CLIP * run(job, 1).norms[0]
    with opened(recipe.replace(optim={"clip": clip})) as job:
        after = run(job, UPDATES)
        Kept(trial.folder / TENSORS).put(after.tensors)
        weights = ((f"model.{name}", value) for name, value in stirred(job))
        moved = {name: distance(after.tensors[name], value).difference for name, value in weights}
    numbers = {"clip": clip, "losses": after.losses, "norms": after.norms, "moved": moved}
    files.replace(trial.folder / NUMBERS, json.dumps(numbers))
    return slope(trial)


def slope(trial: Trial) -> list[Check]:
    """Compare the gradients of one process with the slope of its loss, along a direction that changes every weight.

    Always in fp64, for which Triton has no kernels: a difference of losses in fp32 is mostly rounding.
    """
    kernel = trial.recipe.train.kernel if trial.strict == SLOPE_PRECISION else "chunked"
    recipe = alone(trial.recipe.replace(train={"precision": SLOPE_PRECISION, "kernel": kernel}))
    with opened(recipe) as job:
        error = slope_error(job, windows_of(job.loader, 0), LENGTH)
    about = f"gradient along a random direction, {SLOPE_PRECISION}"
    return [judge(NAME, about, "the slope of the loss, one process", Error(error), SLOPE)]


def run(job: Job, updates: int) -> Updated:
    """Make updates from the stirred weights, as `pretrain` makes them. Raises ReplicasError. Collective."""
    made = [train.train_step(job, step) for step in range(updates)]
    replicas.compare(job.model, job.mesh, job.recipe.parallel.data_parallel, updates)
    losses, sizes = ([float(one[key] or 0.0) for one in made] for key in ("loss", "grad_norm"))
    state = present(tensors_of(job.model, job.optimizer))
    return Updated(losses, sizes, Whole({name: x for name, x in state.items() if not name.endswith(".step")}))


def check(trial: Trial) -> list[Check]:
    """Compare the layout's updates with what `reference` left. Collective."""
    return compared(trial, trial.exact)


def breaks(trial: Trial, recipe: Recipe) -> bool:
    """Return True if updates differ in this layout of the recipe, documents as in the reference. Collective."""
    same_text = recipe.data.reset_at_documents == trial.recipe.data.reset_at_documents
    return same_text and any(one.verdict == "fails" for one in compared(trial, recipe))


def replicated(recipe: Recipe) -> bool:
    """Return True if several ranks hold the same weights."""
    ranks = recipe.mesh.dp if recipe.parallel.data_parallel == "hsdp" else 2
    several = (recipe.mesh.dp, recipe.mesh.sp) != (1, 1)
    return several and ranks != 1 and recipe.parallel.data_parallel in (*REPLICATED, "hsdp")


def compared(trial: Trial, recipe: Recipe) -> list[Check]:
    """Return the checks of a layout's updates. Collective."""
    about, numbers = "weights of replicas", json.loads((trial.folder / NUMBERS).read_text())
    with opened(recipe.replace(optim={"clip": numbers["clip"]})) as job:
        try:
            found = run(job, UPDATES)
        except ReplicasError as error:
            return [failed(NAME, about, OTHERS, str(error))]
        want = Kept(trial.folder / TENSORS)
        apart = distances(found.tensors, want, [name for name in want if name in found.tensors])
    if missing := set(want).difference(*all_gather_object(list(apart))):
        return [failed(NAME, "weights and moments", ONE, f"on no rank: {', '.join(sorted(missing))}")]
    loss, norm = (
        max(map(ratio, *pair)) for pair in ((found.losses, numbers["losses"]), (found.norms, numbers["norms"]))
    )
    moments = relative({name: one for name, one in apart.items() if name.startswith("optimizer.")})
    least, moved = FLOOR * max(numbers["moved"].values()), numbers["moved"]
    weights = {name: one.difference for name, one in apart.items() if name.startswith("model.")}
    moves = {name: finite(difference / max(moved.get(name, 0.0), least)) for name, difference in weights.items()}
    clipped = f"gradient norm before clipping to {numbers['clip']:.3g}"
    loose = trial.tolerance * LOOSER
    return [
        judge(NAME, about, OTHERS, Error(0.0), 0.0) if replicated(recipe) else not_run(NAME, about, OTHERS, SHARDED),
        judge(NAME, f"losses, {trial.strict}", ONE, Error(loss), loose),
        judge(NAME, f"{clipped}, {trial.strict}", ONE, Error(norm), loose),
        judge(NAME, f"moments of gradients, {trial.strict}", ONE, largest(moments), MOVES[trial.strict]),
        judge(NAME, f"moves of weights, {trial.strict}", ONE, largest(moves), MOVES[trial.strict]),
    ]
