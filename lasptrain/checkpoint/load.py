"""Loading the newest intact step on any mesh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lasptrain.checkpoint import order
from lasptrain.checkpoint.steps import committed, compare_meta, folder_of, log, problems_of, survey, wait_visible
from lasptrain.checkpoint.table import Json
from lasptrain.checkpoint.tensors import Reader, restore
from lasptrain.checkpoint.votes import Group, vote, vote_of_first
from lasptrain.errors import CheckpointError
from lasptrain.run import origin
from lasptrain.run.folder import CHECKPOINTS
from lasptrain.run.origin import Origin


@dataclass(frozen=True)
class Loaded:
    """Result of loading, besides tensors: the step, the `meta` that `save` was given, and the folder they came from."""

    step: int
    meta: Json
    folder: Path


def load(
    run: Path,
    model: nn.Module,
    optimizer: Optimizer | None,
    expect: Callable[[int], Json] = lambda step: {},
    group: Group = None,
    until: int | None = None,
) -> Loaded | None:
    """Load the newest intact step of RUN, not after `until`, into `model` and `optimizer`, on any mesh; None if none.

    Collective over `group` (default: all ranks). A damaged step is named in a warning and the next older one is taken.
    Without an optimizer only the model is read. Nothing on disk changes, and nothing in memory before all checks
    have passed. Raises CheckpointError if there are steps but none is intact, if what was saved as `meta` differs in a
    key that `expect` of the step has, or if names, shapes or dtypes of tensors differ.
    """
    steps = vote_of_first(f"{run}: cannot list checkpoints", lambda: committed(run), group)
    steps = [step for step in steps if until is None or step <= until]
    found: list[str] = []
    for step in steps:
        folder = folder_of(run, step)
        manifest, reader, problems = _verify(folder, step, group)
        if reader is not None:
            compare_meta(folder, expect(step), manifest["meta"])
            restore(reader, model, optimizer, group)
            return Loaded(step, manifest["meta"], folder)
        found = found or problems
        if dist.get_rank(group) == 0:
            log.warning("%s is damaged and not used: %s", folder, "; ".join(problems))
    if steps:
        none = f"{run / CHECKPOINTS}: none of the steps {steps} is intact ({steps[0]}: {'; '.join(found)})"
        raise CheckpointError(f"{none}; move the folder away to start over")
    return None


def load_origin(
    run: Path, model: nn.Module, optimizer: Optimizer, expect: Json, group: Group = None
) -> tuple[Origin, int | None] | None:
    """Load what a new run begins with (RUN/origin.json) into `model`, maybe `optimizer`, on any mesh; None if nothing.
    Returns it with the tokens that it has seen, None where they are not known.

    Collective. Where its decays are not the `decays` of `expect`, those that are not learned stay the recipe's, and a
    warning says so; another names the keys by which the same weights make another `model`. Raises CheckpointError where
    that step is gone or damaged, or names, shapes or dtypes of tensors differ.
    """
    begun = vote_of_first(f"{run}: cannot begin", lambda: origin.read(run), group)
    if begun is None:
        return None
    assert begun.step is not None
    folder = folder_of(begun.run, begun.step)
    manifest, reader, problems = _verify(folder, begun.step, group)
    if reader is None:
        raise CheckpointError(f"{folder}, with which {run} begins: {'; '.join(problems)}; expected it whole")
    there, here = manifest["meta"].get("model", {}), expect.get("model", {})
    other = {key for key in here if key in there and there[key] != here[key]} - {"decay"}  # of which `decays` tell
    if other and dist.get_rank(group) == 0:
        keys = "; ".join(f"model.{key}: {there[key]} there, {here[key]} here" for key in sorted(other))
        log.warning("%s is of another model: %s", folder, keys)
    same = bool(manifest["meta"].get("decays") == expect.get("decays"))
    fixed = any(True for _ in model.buffers())  # decays that are learned are parameters, and come with the weights
    if not same and fixed and dist.get_rank(group) == 0:
        log.warning("%s has other decays than the recipe, whose own are taken", folder)
    restore(reader, model, optimizer if begun.optimizer else None, group, buffers=same)
    earlier = order.before(begun.run, manifest["meta"])
    return begun, None if earlier is None else earlier + sum(order.tokens(manifest["meta"], begun.step).values())


def _verify(folder: Path, step: int, group: Group) -> tuple[Json, Reader | None, list[str]]:
    """Return manifest, reader and no problems of a step, or no reader; the same on every rank. Ranks share hashing."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    what = f"{folder} cannot be read"
    manifest, problem, seen = vote_of_first(what, lambda: survey(folder, step), group)
    if problem:
        return manifest, None, [problem]
    wait_visible(folder, seen)
    own = sorted(manifest["files"].items())[rank::world]
    found = vote(what, lambda: [p for name, entry in own for p in problems_of(folder / name, entry)], group)
    if problems := [problem for problems in found for problem in problems]:
        return manifest, None, problems
    reader: Reader | None = None

    def open_table() -> None:
        nonlocal reader
        reader = Reader(folder, manifest["files"])

    try:
        vote("table of tensors", open_table, group)
    except CheckpointError as error:
        return manifest, None, [str(error)]
    return manifest, reader, []
