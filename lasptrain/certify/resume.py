"""A resumed run is the uninterrupted run: to the bit on the same mesh, to a tolerance on another."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from lasptrain import files, train
from lasptrain.certify.check import Check, Error, failed, finite, judge, not_run, ratio
from lasptrain.certify.kept import Whole
from lasptrain.certify.measured import opened
from lasptrain.certify.trial import STEPS, Trial, alone
from lasptrain.checkpoint.load import load
from lasptrain.checkpoint.saver import Saver
from lasptrain.checkpoint.tensors import present, tensors_of
from lasptrain.errors import CheckpointError
from lasptrain.parallel.collectives import all_gather_object
from lasptrain.parallel.replicas import checksum
from lasptrain.recipe.loading import dump_saved
from lasptrain.recipe.schema import Recipe
from lasptrain.run import folder as runs
from lasptrain.training.job import Job, fingerprint_of

NAME = "resume"
SAVED = 2  # updates before the checkpoint
CONTINUED, RUN_THROUGH = f"updates {SAVED + 1} and on", "the run without a break"
RUN, RECORD, STATE = "run", "undisturbed.json", "saved.json"
TOLERANCES = {"fp64": 1e-8, "fp32": 1e-4, "bf16": 5e-3}  # of losses on another mesh


class Course(NamedTuple):
    """Losses and gradient norms of updates, and a checksum of each rank's weights after them."""

    losses: list[float]
    norms: list[float]
    weights: list[int]


def undisturbed(trial: Trial) -> list[Check]:
    """Train without a break, and leave the course."""
    with opened(trial.recipe) as job:
        files.replace(trial.folder / RECORD, json.dumps(_course(job, 0)._asdict()))
    return []


def _course(job: Job, start: int) -> Course:
    """Make the updates from `start` on. Collective."""
    made = [train.train_step(job, step) for step in range(start, STEPS)]
    losses, norms = ([float(one[key] or 0.0) for one in made] for key in ("loss", "grad_norm"))
    return Course(losses, norms, all_gather_object(checksum(job.model)))


def kill() -> NoReturn:
    """End this rank as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def killed(trial: Trial, end: Callable[[], None] = kill) -> list[Check]:
    """Train, save after SAVED updates, and `end` in the middle of the next one."""
    run = trial.folder / RUN
    run.mkdir(exist_ok=True)
    with opened(trial.recipe) as job:
        files.replace(run / runs.RECIPE, dump_saved(job.recipe))
        saver = Saver(run, job.model, job.optimizer, job.recipe.checkpoint, None)
        for step in range(SAVED):
            train.train_step(job, step)
        files.replace(trial.folder / STATE, json.dumps(digests(job)))
        train.save(job, saver, SAVED)
        saver.wait(last=True)
        saver.close()
        train.train_step(replace(job, on_segment=end), SAVED)
    return [failed(NAME, "kill -9 in the middle of an update", "an end of all ranks", "the update went on")]


def digests(job: Job) -> dict[str, str]:
    """Return the SHA-256 of every weight and moment, whole, by its name in a checkpoint. Collective."""
    state = Whole(present(tensors_of(job.model, job.optimizer)))
    own = {name: hashlib.sha256(bits(x)).hexdigest() for name, x in state.items()}
    return dict(item for found in all_gather_object(own) for item in found.items())


def bits(x: Tensor) -> memoryview:
    """Return the bytes of a tensor."""
    return x.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def continued(trial: Trial) -> list[Check]:
    """Continue on this mesh and compare with the undisturbed course, to the bit. Collective."""
    about = f"{CONTINUED} after kill -9 in the middle of one: losses, norms, weights"
    try:
        odd_state, found = _resumed(trial, trial.recipe)
    except CheckpointError as missing:
        return [failed(NAME, about, RUN_THROUGH, str(missing))]
    want = _undisturbed(trial)
    pairs = zip(found.losses + found.norms, want.losses + want.norms, strict=True)
    error = max(finite(abs(a - b)) for a, b in pairs)
    odd = [rank for rank, (a, b) in enumerate(zip(found.weights, want.weights, strict=True)) if a != b]
    note = f"other weights on rank {', '.join(map(str, odd))}" if odd else ""
    return [
        _restored("on this mesh", odd_state),
        judge(NAME, about, RUN_THROUGH, Error(error if error or not odd else 1.0), 0.0, note),
    ]


def elsewhere(trial: Trial) -> list[Check]:
    """Continue on one process and compare losses with the undisturbed course. Collective."""
    about = f"{CONTINUED} on another mesh, one process: losses"
    if trial.recipe.mesh.dp == trial.recipe.mesh.sp == 1:
        return [not_run(NAME, about, RUN_THROUGH, "one rank has no other mesh; --nproc 2")]
    try:
        odd_state, found = _resumed(trial, alone(trial.recipe))
    except CheckpointError as missing:
        return [failed(NAME, about, RUN_THROUGH, str(missing))]
    want = _undisturbed(trial)
    error = max(map(ratio, found.losses, want.losses))
    tolerance = TOLERANCES[trial.recipe.train.precision]
    return [
        _restored("on another mesh, one process", odd_state),
        judge(NAME, about, RUN_THROUGH, Error(error), tolerance),
    ]


def _restored(where: str, odd: list[str]) -> Check:
    """Return the check of a state that was loaded, of which the tensors `odd` are others. Collective."""
    error = Error(float(len(odd)), odd[0] if odd else None)
    return judge(NAME, f"weights and moments that are loaded {where}", "those that were saved", error, 0.0)


def _resumed(trial: Trial, recipe: Recipe) -> tuple[list[str], Course]:
    """Continue the run that was ended; return the names of tensors that are not as they were, and the course.

    Raises CheckpointError where nothing was saved. Collective.
    """
    run = trial.folder / RUN
    with opened(recipe) as job:
        loaded = load(run, job.model, job.optimizer, partial(fingerprint_of, job))
        if loaded is None or loaded.step != SAVED:
            raise CheckpointError(f"found no checkpoint of update {SAVED}; the run that was ended left none")
        saved, found = json.loads((trial.folder / STATE).read_text()), digests(job)
        odd = sorted(name for name in saved.keys() | found.keys() if saved.get(name) != found.get(name))
        job.guard.restore(loaded.meta.get("guard", {}))
        return odd, _course(job, SAVED)


def _undisturbed(trial: Trial) -> Course:
    """Return the undisturbed course from update SAVED on."""
    record: dict[str, Any] = json.loads((trial.folder / RECORD).read_text())
    return Course(record["losses"][SAVED:], record["norms"][SAVED:], record["weights"])
