"""The order of a proof: jobs of one process and of all ranks, whose checks become a certificate."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_tools.dataset import left_out, open_dataset
from lasptrain.certify import documents, export, kernel, layout, resume, smallest, update
from lasptrain.certify.certificate import Certificate
from lasptrain.certify.check import Check, failed
from lasptrain.certify.trial import Trial, fit
from lasptrain.console.progress import asking, preparing
from lasptrain.errors import RecipeError
from lasptrain.parallel.collectives import all_gather_object
from lasptrain.parallel.mesh import device, peak_memory
from lasptrain.process import signals
from lasptrain.process.local_ranks import TrialFailure, check_gpus, trials
from lasptrain.process.scratch import scratch
from lasptrain.recipe.schema import Recipe
from lasptrain.recipe.sections import Data

SILENCE = 1800.0  # seconds that one stage may take
Stage = tuple[str, str]  # a check, and the name of a part of it

NAMES = (layout.NAME, documents.NAME, kernel.NAME, update.NAME, resume.NAME, export.NAME)
REFERENCES: dict[str, Callable[[Trial], list[Check]]] = {layout.NAME: layout.reference, update.NAME: update.reference}
ON_RANKS: dict[Stage, Callable[[Trial], list[Check]]] = {
    (layout.NAME, "on ranks"): layout.check,
    (documents.NAME, "on ranks"): documents.check,
    (kernel.NAME, "on ranks"): kernel.check,
    (update.NAME, "on ranks"): update.check,
    (resume.NAME, "undisturbed"): resume.undisturbed,
    (resume.NAME, "until it is killed"): resume.killed,
    (resume.NAME, "continued"): resume.continued,
}
AFTER: dict[str, Callable[[Trial], list[Check]]] = {resume.NAME: resume.elsewhere, export.NAME: export.check}
BREAKS: dict[str, Callable[[Trial, Recipe], bool]] = {
    layout.NAME: layout.breaks,
    documents.NAME: documents.breaks,
    update.NAME: update.breaks,
}


def prove(
    recipe: Recipe, ranks: int, tokens: int | None = None, layers: int | None = None, only: Sequence[str] = ()
) -> Certificate:
    """Return the certificate of a recipe on `ranks` processes of this machine; `only` some checks, if any are named.

    Raises RecipeError for a check that does not exist, the errors of `trial.fit`, DataError for data that cannot be
    prepared, and Stopped where a signal ends it; then nothing of it is left.
    """
    if unknown := [name for name in only if name not in NAMES]:
        raise RecipeError(f"--check: found {unknown[0]!r}; expected {', '.join(NAMES)}")
    wanted = [name for name in NAMES if name in (only or NAMES)]
    began = time.monotonic()
    check_gpus(ranks)
    trial, sizes = fit(recipe, ranks, Path(), tokens, layers)
    _prepare(recipe.data)
    with signals.recorded(), scratch() as folder:
        trial = trial._replace(folder=folder)
        stages = _stages(wanted)
        checks, peak = list[Check](), 0
        with asking(len(stages), 0, True) as show:
            for job in ("alone", "ranks", "after"):
                given = [stage for stage in stages if stage[0] == job]
                if given:
                    show(f"{given[0][1]}: {given[0][2]}", 0)
                for number, (found, memory) in enumerate(_run(1 if job != "ranks" else ranks, trial, given)):
                    checks, peak = checks + found, max(peak, memory)
                    following = given[number + 1] if number + 1 < len(given) else given[number]
                    show(f"{following[1]}: {following[2]}", 1)
        checks.sort(key=lambda one: NAMES.index(one.check))
        broken = [name for name in BREAKS if any(one.check == name and one.verdict == "fails" for one in checks)]
        least = {name: _smallest(trial, ranks, name) for name in broken}
    return Certificate(recipe, trial, ranks, sizes, checks, least, time.monotonic() - began, peak)


def _prepare(data: Data) -> None:
    """Prepare the data, before there are ranks. Raises DataError."""
    with preparing() as progress:
        dataset = open_dataset(data, progress)
    for line in left_out(data, dataset.members):
        sys.stderr.write(f"{line}\n")


def _stages(wanted: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return the parts of the wanted checks: the job they run in, the check, and what they are."""
    needed = [*wanted, *([resume.NAME] if export.NAME in wanted and resume.NAME not in wanted else [])]
    alone = [("alone", name, "one process") for name in REFERENCES if name in needed]
    on_ranks = [("ranks", *stage) for stage in ON_RANKS if stage[0] in needed]
    return [*alone, *on_ranks, *(("after", name, "one process") for name in AFTER if name in needed)]


def perform(trial: Trial, job: str, check: str, part: str) -> tuple[list[dict[str, Any]], int]:
    """Run one part of a check on this rank; return its checks as JSON, and the peak of memory in bytes: of the rank
    whose GPU holds most, or of all ranks together on CPUs.
    """
    tables: dict[str, Any] = {"alone": REFERENCES, "after": AFTER}
    function = ON_RANKS[check, part] if job == "ranks" else tables[job][check]
    found = [one._asdict() for one in function(trial)]
    peaks = all_gather_object(peak_memory(device()))
    return found, max(peaks) if device().type == "cuda" else sum(peaks)


def _run(ranks: int, trial: Trial, given: Sequence[tuple[str, str, str]]) -> Iterator[tuple[list[Check], int]]:
    """Yield the checks of each part and the peak of memory; one that does not end as it should has failed."""
    arguments = [(trial, *stage) for stage in given]
    for (_, _, check, part), found in trials(ranks, perform, arguments, silence=SILENCE):
        if not isinstance(found, TrialFailure):
            made, peak = found
            yield [Check(**one) for one in made], peak
        elif (check, part) == (resume.NAME, "until it is killed") and "SIGKILL" in found.reason:
            yield [], 0
        else:
            yield [failed(check, part, "an end of its own", found.reason)], 0


def _smallest(trial: Trial, ranks: int, name: str) -> str:
    """Return the smallest layout in which a check fails, in words: of all ranks, then of fewer."""
    if name == layout.NAME:
        list(trials(1, layout.leave, [(trial, layout.TOGETHER)], silence=SILENCE))
    ((_, found),) = trials(ranks, reduced, [(trial, name)], silence=SILENCE)
    if isinstance(found, TrialFailure):
        return f"not found: {found.reason}"
    if found is None:
        return f"none: it holds exactly, in {trial.strict}, and fails in {trial.recipe.train.precision} only"
    least = Recipe.model_validate(found)
    for fewer, candidate in smallest.on_fewer_ranks(least):
        ((_, breaks),) = trials(fewer, still_breaks, [(trial, candidate, name)], silence=SILENCE)
        if breaks is True:
            least = candidate
            break
    return smallest.told(least)


def reduced(trial: Trial, name: str) -> dict[str, Any] | None:
    """Return the recipe of the smallest layout of these ranks in which a check fails, as JSON; None where it does not
    fail in exact numbers. Collective.
    """
    if not BREAKS[name](trial, trial.exact):
        return None
    return smallest.smallest(trial.exact, lambda recipe: BREAKS[name](trial, recipe)).model_dump(mode="json")


def still_breaks(trial: Trial, recipe: Recipe, name: str) -> bool:
    """Return True if a check fails in a layout of the recipe. Collective."""
    return BREAKS[name](trial, recipe)
