"""A document never sees another: tokens of some are changed, and nothing moves in the others, to the bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lasptrain.certify.check import Check, Error, judge, not_run, of_tokens
from lasptrain.certify.layout import places_of
from lasptrain.certify.measured import Measured, measure, mine, opened
from lasptrain.certify.text import Edges, another, documents, planted, windows_of
from lasptrain.certify.trial import Trial
from lasptrain.parallel.collectives import all_gather_object, all_reduce_sum
from lasptrain.recipe.schema import Recipe
from lasptrain.training.job import Job

NAME = "documents"
TURNS = 3  # in each every third document changes: those next to it stay, and those after the next


def check(trial: Trial) -> list[Check]:
    """Change every third document, then the next ones, over all edges of the layout. Collective."""
    if not trial.recipe.data.reset_at_documents:
        why = "data.reset_at_documents = false: documents go on into each other"
        return [not_run(NAME, "losses and gradients of documents", "before others change", why)]
    return run(trial.exact)


def breaks(trial: Trial, recipe: Recipe) -> bool:
    """Return True if a document sees another in this layout of the recipe, and should not. Collective."""
    return recipe.data.reset_at_documents and any(one.verdict == "fails" for one in run(recipe))


def run(recipe: Recipe) -> list[Check]:
    """Return a check of losses, one of gradients, and one that the changes are seen where they may be."""
    places = places_of(recipe)
    with opened(recipe) as job:
        bos, vocab = job.dataset.bos, job.dataset.vocab_size
        text = planted(windows_of(job.loader, 0), bos, vocab, places)
        numbers = documents(text, bos)
        here = mine(job)
        before = _by_token(job, text)
        moved, seen = [], 0
        for turn in range(TURNS):
            changed = (numbers % TURNS == turn) & (text != bos)
            after = _by_token(job, torch.where(changed, another(text, bos, vocab), text))
            kept = here & (numbers[:, :-1] % TURNS != turn)
            moved.append(_moved(before, after, kept))
            seen += int((before.token_losses != after.token_losses)[here & ~kept].sum())
    losses, gradients = map(_joined, zip(*moved, strict=True))
    reached = int(all_reduce_sum(torch.tensor(seen, device=job.device)))
    kinds = ", ".join(dict.fromkeys(edge.kind for found in places[: len(text)] for edge in found))
    over, before_change = f"of documents beside others that change ({kinds})", "before the change"
    return [
        judge(NAME, f"losses {over}", before_change, losses, 0.0, _seen(losses, places)),
        judge(NAME, f"gradients {over}", before_change, gradients, 0.0, _seen(gradients, places)),
        judge(
            NAME, "losses of documents that change", "not those before", Error(float(not reached)), 0.0, f"{reached:,}"
        ),
    ]


def _by_token(job: Job, windows: Tensor) -> Measured:
    """Measure without the gradients of parameters, which take memory. Collective."""
    return measure(job, windows)._replace(gradients={})


def _seen(found: Error, places: Edges) -> str:
    """Say over which edges a document was seen, the same on every rank; nothing where none was. Collective."""
    kinds = [kind for kind in all_gather_object(_edge(found, places)) if kind]
    return f"seen over: {', '.join(dict.fromkeys(kinds))}" if kinds else ""


def _moved(before: Measured, after: Measured, kept: Tensor) -> tuple[Error, Error]:
    """Return the largest change of losses and of gradients at the tokens `kept` [windows, N]."""
    losses = (after.token_losses - before.token_losses).abs()
    gradients = (after.token_gradients - before.token_gradients).norm(dim=-1)
    return _largest(losses, kept), _largest(gradients, kept)


def _joined(errors: Sequence[Error]) -> Error:
    """Return the largest of the errors of all turns, and the first and the last place of any."""
    first = min((error.first for error in errors if error.first), default=None)
    last = max((error.last for error in errors if error.last), default=None)
    return max(errors, key=lambda error: error.size)._replace(first=first, last=last)


def _largest(changes: Tensor, kept: Tensor) -> Error:
    return of_tokens(changes, kept, 0.0) if kept.any() else Error(0.0)


def _edge(found: Error, places: Edges) -> str | None:
    """Return the kind of the edge nearest to what moved, None where nothing did."""
    moved = [place for place in (found.first, found.last) if place is not None]
    near = [(abs(edge.token - token), edge.kind) for window, token in moved for edge in places[window % len(places)]]
    return min(near)[1] if near else None
