"""A check: what was compared with what, the largest error and its place, the tolerance, the verdict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
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


FLOOR = 1e-6  # of the largest norm: smaller ones are measured against it
PART = 1 << 22  # numbers of a tensor that are compared at once


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


class Distance(NamedTuple):
    """The norm of a difference, ∞ if it is not finite or there is nothing to compare, and of what it should be."""

    difference: float
    norm: float


def distances(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], names: Iterable[str] | None = None
) -> dict[str, Distance]:
    """Return how far tensors are from those that are wanted, by name, all or some `names`, one after another."""
    pairs = ((name, found.get(name)) for name in (wanted if names is None else names))
    return {name: distance(tensor, wanted[name]) for name, tensor in pairs}


def distance(found: Tensor | None, want: Tensor) -> Distance:
    """Return |found − want| and |want|, summed in fp64 over parts that take little memory, on the device of `found`."""
    if found is None or found.shape != want.shape:
        return Distance(math.inf, float(want.double().norm()))
    pairs = zip(found.flatten().split(PART), want.flatten().split(PART), strict=True)
    parts = [_norms(a.double(), b.to(a.device).double()) for a, b in pairs]
    difference, norm = (math.hypot(*sizes) for sizes in zip(*parts, strict=True))
    return Distance(finite(difference), norm)


def _norms(found: Tensor, want: Tensor) -> tuple[float, float]:
    return float((found - want).norm()), float(want.norm())


def relative(apart: Mapping[str, Distance]) -> dict[str, float]:
    """Return differences relative to norms, of which the smallest counts as FLOOR times the largest: what is zero has
    no relative error.
    """
    least = max(FLOOR * max((one.norm for one in apart.values()), default=0.0), 1e-300)
    return {name: finite(one.difference / max(one.norm, least)) for name, one in apart.items()}


def largest(errors: Mapping[str, float]) -> Error:
    """Return the largest error of tensors by name, none where there are none."""
    worst = max(errors, key=lambda name: errors[name], default=None)
    return Error(0.0) if worst is None else Error(errors[worst], worst)


def of_parameters(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Error:
    """Return the largest relative difference over tensors by name; of one that is missing or NaN it is ∞."""
    return largest(relative(distances(found, wanted)))


def finite(error: float) -> float:
    """Return an error, ∞ if it is NaN, which no comparison finds to be large."""
    return error if math.isfinite(error) else math.inf


def ratio(found: float, wanted: float) -> float:
    """Return |found − wanted| / |wanted|, ∞ where that is no number."""
    if not wanted:
        return math.inf if found else 0.0
    return finite(abs(found - wanted) / abs(wanted))
