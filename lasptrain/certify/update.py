"""An update is that of one process: loss, norm before clipping, moments and weights; and replicas are equal."""

from __future__ import annotations

import json
from typing import NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

from lasptrain import files, train
from lasptrain.certify.check import Check, Error, failed, judge, norms, not_run, of_parameters
from lasptrain.certify.measured import opened
from lasptrain.certify.trial import Trial, alone
from lasptrain.checkpoint.tensors import present, tensors_of
from lasptrain.errors import ReplicasError
from lasptrain.parallel import replicas
from lasptrain.parallel.shard import full_tensor
from lasptrain.recipe.schema import Recipe
from lasptrain.recipe.sections import REPLICATED
from lasptrain.training.job import Job

UPDATES = 2  # the second reads what the first has written
SIGNS = 1e3  # times the error of a gradient is that of a step of AdamW, which divides by its size
FLOOR = 1e-6
TENSORS, NUMBERS = "update.safetensors", "update.json"
NAME, OTHERS, ONE = "update", "those on other ranks", f"{UPDATES} updates of one process"
SHARDED = "no rank holds the weights of another"
CLIP = 0.5  # of the first norm, so that gradients are clipped


class Updated(NamedTuple):
    """The state after some updates: losses and norms of each, tensors by name in a checkpoint, whole."""

    losses: list[float]
    norms: list[float]
    tensors: dict[str, Tensor]


def reference(trial: Trial) -> list[Check]:
    """Leave the updates of one process."""
    recipe = alone(trial.exact)
    clip = recipe.optim.clip and CLIP * run(recipe, 1).norms[0]
    after = run(recipe.replace(optim={"clip": clip}), UPDATES)
    with opened(recipe) as job:
        start = _tensors(job)
    moved = {name: float((x - start[name]).double().norm()) for name, x in after.tensors.items()}
    save_file({name: x.contiguous() for name, x in after.tensors.items()}, trial.folder / TENSORS)
    numbers = {"clip": clip, "losses": after.losses, "norms": after.norms, "moved": moved}
    files.replace(trial.folder / NUMBERS, json.dumps(numbers))
    return []


def run(recipe: Recipe, updates: int) -> Updated:
    """Make updates from the stirred weights, as `pretrain` makes them. Raises ReplicasError. Collective."""
    with opened(recipe) as job:
        made = [train.train_step(job, step) for step in range(updates)]
        replicas.compare(job.model, job.mesh, recipe.parallel.data_parallel, updates)
        losses, sizes = ([float(one[key] or 0.0) for one in made] for key in ("loss", "grad_norm"))
        return Updated(losses, sizes, _tensors(job))


def _tensors(job: Job) -> dict[str, Tensor]:
    """Return copies of weights and moments, whole, those that some rank has here. Collective."""
    found = present(tensors_of(job.model, job.optimizer))
    return {name: full_tensor(x).cpu().clone() for name, x in found.items() if not name.endswith(".step")}


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
    """Return the checks of a layout's updates."""
    about, numbers = "weights of replicas", json.loads((trial.folder / NUMBERS).read_text())
    try:
        found = run(recipe.replace(optim={"clip": numbers["clip"]}), UPDATES)
    except ReplicasError as error:
        return [failed(NAME, about, OTHERS, str(error))]
    want = load_file(trial.folder / TENSORS)
    norm = max(abs(a / b - 1) for a, b in zip(found.norms, numbers["norms"], strict=True))
    loss = max(abs(a / b - 1) for a, b in zip(found.losses, numbers["losses"], strict=True))
    here = {name: x for name, x in want.items() if name in found.tensors}
    weights = {name: x for name, x in here.items() if name.startswith("model.") and numbers["moved"][name] > 0}
    moments = {name: x for name, x in here.items() if name.startswith("optimizer.")}
    loose = trial.tolerance * SIGNS
    clipped = f"gradient norm before clipping to {numbers['clip']:.3g}"
    moment = of_parameters(found.tensors, moments, norms(moments, FLOOR))
    moves = of_parameters(found.tensors, weights, numbers["moved"])
    return [
        judge(NAME, about, OTHERS, Error(0.0), 0.0) if replicated(recipe) else not_run(NAME, about, OTHERS, SHARDED),
        judge(NAME, f"losses, {trial.strict}", ONE, Error(loss), loose),
        judge(NAME, f"{clipped}, {trial.strict}", ONE, Error(norm), loose),
        judge(NAME, f"moments of gradients, {trial.strict}", ONE, moment, loose),
        judge(NAME, f"moves of weights, {trial.strict}", ONE, moves, loose),
    ]
