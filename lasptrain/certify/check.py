"""A check: what was compared with what, the largest error and its place, the tolerance, the verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lasptrain.parallel.collectives import all_gather_object

Verdict = Literal["holds", "fails", "not run"]


class Check(NamedTuple):
    """One comparison. `not run` says why in `note`, and is no success."""

    check: str
    compared: str
    reference: str  # with what
    verdict: Verdict
    error: float | None = None
    tolerance: float | None = None
    rank: int | None = None  # of the largest error, like the next three
    parameter: str | None = None  # or another tensor, by name
    window: int | None = None
    token: int | None = None
    note: str = ""

    def where(self) -> str:
        """Return the place of the largest error, in words."""
        token = None if self.token is None else f"window {self.window} token {self.token}"
        rank = None if self.rank is None else f"rank {self.rank}"
        return ", ".join(part for part in (rank, self.parameter, token) if part)


class Error(NamedTuple):
    """The largest error on this rank and its place; `first` and `last` (window, token) beyond the tolerance."""

    size: float
    parameter: str | None = None
    window: int | None = None
    token: int | None = None
    first: tuple[int, int] | None = None
    last: tuple[int, int] | None = None


NONE = Error(0.0)


def not_run(check: str, compared: str, reference: str, why: str) -> Check:
    """Return a check that says why it was not run."""
    return Check(check, compared, reference, "not run", note=why)


def failed(check: str, compared: str, reference: str, why: str) -> Check:
    """Return a check that could not be finished, which is a failure."""
    return Check(check, compared, reference, "fails", note=why)


def judge(check: str, compared: str, reference: str, own: Error, tolerance: float, note: str = "") -> Check:
    """Return the check of the largest error over all ranks. Collective."""
    errors = all_gather_object(own)
    rank = max(range(len(errors)), key=lambda number: errors[number].size)
    size, parameter, window, token, *_ = errors[rank]
    wrong = [number for number, error in enumerate(errors) if not error.size <= tolerance]
    notes = [note, *([f"on rank {', '.join(map(str, wrong))}" if len(wrong) < len(errors) else "on every rank"])]
    first = min(((*error.first, number) for number, error in enumerate(errors) if error.first), default=None)
    last = max(((*error.last, number) for number, error in enumerate(errors) if error.last), default=None)
    if first and last:
        notes.append(
            "from {} to {}".format(*("window {} token {} (rank {})".format(*place) for place in (first, last)))
        )
    told = "; ".join(part for part in notes if part) if wrong else note
    verdict: Verdict = "fails" if wrong else "holds"
    return Check(check, compared, reference, verdict, size, tolerance, rank, parameter, window, token, told)


def of_tokens(errors: Tensor, mine: Tensor, tolerance: float) -> Error:
    """Return the largest of errors [windows, N] at this rank's tokens `mine` [windows, N]; one that is NaN is ∞."""
    errors = torch.where(mine, errors.nan_to_num(nan=math.inf, posinf=math.inf), -1.0)
    window, token = divmod(int(errors.argmax()), errors.shape[1])
    wrong = (errors > tolerance).nonzero().tolist()
    first, last = (tuple(wrong[0]), tuple(wrong[-1])) if wrong else (None, None)
    return Error(float(errors[window, token]), None, window, token, first, last)


def of_parameters(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], sizes: Mapping[str, float]) -> Error:
    """Return the largest of |found − wanted| / size over tensors by name; one that is missing or NaN is ∞."""
    errors = {}
    for name, want in wanted.items():
        if name not in found or found[name].shape != want.shape:
            errors[name] = math.inf
            continue
        difference = float((found[name].double() - want.to(found[name].device).double()).norm())
        errors[name] = difference / sizes[name] if math.isfinite(difference) else math.inf
    worst = max(errors, key=lambda name: errors[name])
    return Error(errors[worst], worst)


def norms(tensors: Mapping[str, Tensor], floor: float) -> dict[str, float]:
    """Return the norms of tensors by name, at least `floor` of the largest: what is zero has no relative error."""
    sizes = {name: float(x.double().norm()) for name, x in tensors.items()}
    least = max(floor * max(sizes.values()), 1e-300)
    return {name: max(size, least) for name, size in sizes.items()}
