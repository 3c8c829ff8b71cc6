"""`lasptrain bench scale`: one recipe on ever more GPUs of one machine, within a time limit.

Weak scaling (as many tokens for each GPU, by method), strong scaling (one window over all of them), and the longest
windows. Every number of GPUs is a job of its own on the first of them; `plan`'s prediction stands beside each time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from rich.table import Table

from lasptrain.bench.methods import NONE
from lasptrain.bench.result import Column, Result, table
from lasptrain.bench.steps import Repeats, repeats_for, shared, trained, unshared
from lasptrain.cost import gpus, links, plan
from lasptrain.parallel.collectives import all_reduce_max
from lasptrain.parallel.mesh import device_name
from lasptrain.parallel.scan import SCANS
from lasptrain.process.local_ranks import TrialFailure, trials
from lasptrain.recipe.schema import Recipe

Kind = Literal["weak", "strong", "long"]
RATIOS: dict[Kind, list[tuple[str, str]]] = {  # header and format of relative speeds
    "weak": [("speed ÷ none", ".3f")],
    "strong": [("speed ÷ fewest", ".2f")],
    "long": [],
}
LONGEST = 300.0  # seconds that one case may take


class Row(NamedTuple):
    """A case, timed or with the reason why it was not."""

    kind: Kind
    model: str
    method: str  # NONE: a window per rank; a scan or `auto`: one window over all ranks
    ranks: int
    window: int  # tokens
    segment: int = 0  # tokens
    seconds: float | None = None  # of a step
    predicted: float | None = None  # the same by `plan`, where it knows the GPU
    memory: int = 0  # peak of a rank, bytes
    failure: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of a step, over all ranks."""
        return self.window * (self.ranks if self.method == NONE else 1)

    @property
    def speed(self) -> float | None:
        """Tokens/s of all ranks together."""
        return None if self.seconds is None else self.tokens / self.seconds


Case = tuple[Recipe, Row]  # before it is timed


def cases(
    recipe: Recipe,
    counts: Sequence[int],
    weak: Sequence[int],
    strong: Sequence[int],
    long: Sequence[tuple[Recipe, int]],
) -> list[Case]:
    """Cases for each number of ranks: `weak` tokens per rank by every method, windows of `strong` tokens over all
    ranks, and on the most ranks the `long` windows. One rank shares nothing.
    """

    def case(kind: Kind, recipe: Recipe, method: str, ranks: int, window: int) -> Case:
        return recipe, Row(kind, recipe.name, method, ranks, window)

    found = []
    for n in counts:
        methods = [NONE] if n == 1 else [NONE, *SCANS]
        found += [case("weak", recipe, m, n, t if m == NONE else t * n) for t in weak for m in methods]
        found += [case("strong", recipe, "auto", n, window) for window in strong]
    return found + [case("long", one, "auto", max(counts), window) for one, window in long]


def measure(found: Sequence[Case], seconds: float) -> Iterator[Result[Row]]:
    """Time the cases, in order; those that `seconds` leave no time for are not run.

    Starts one process per rank on this machine for each number of ranks; yields all results so far after each case.
    Raises SetupError where there are GPUs, but fewer than ranks.
    """
    deadline = time.time() + seconds
    device, rows = "", list[Row]()
    for n in dict.fromkeys(row.ranks for _, row in found):
        given = [(recipe, row, deadline) for recipe, row in found if row.ranks == n]
        for (_, row, _), made in trials(n, _timed, given, silence=LONGEST):
            if isinstance(made, TrialFailure):
                rows = [*rows, row._replace(failure=made.reason)]
            else:
                device, rows = made[0], [*rows, Row(*made[1])]
            yield result(device, rows)


def _timed(recipe: Recipe, row: Row, deadline: float) -> tuple[str, Row]:
    """Time the case on these ranks, which must all agree that there is time for it; return the device and the row."""
    device, ranks, sharing = device_name(), row.ranks, row.method != NONE
    if sharing and row.window % ranks:
        return device, row._replace(failure=f"{ranks} ranks cannot share it")
    tokens = row.window // ranks if sharing else row.window
    one = shared(recipe, tokens, ranks, row.method) if sharing else unshared(recipe, tokens, ranks)
    rates = gpus.of(device).sustained
    repeats = Repeats(1, 1) if row.kind == "long" else repeats_for(tokens)
    if all_reduce_max(time.time() + sum(repeats) * _least(one, tokens, rates)) > deadline:
        return device, row._replace(failure="no time left")
    job, seconds, memory = trained(one, repeats)
    segment = job.loader.segment
    if rates is not None:
        made, vocab, segments = job.recipe, job.recipe.model.vocab, job.recipe.data.window // segment
        assert isinstance(vocab, int)
        by_method = links.step_seconds(made, vocab, ranks, tokens, rates, segments=segments)
        row = row._replace(predicted=by_method[made.mesh.scan if row.method == "auto" else row.method])
    return device, row._replace(segment=segment, seconds=seconds, memory=memory)


def _least(recipe: Recipe, tokens: int, rates: gpus.Rates | None) -> float:
    """Predicted seconds that a step takes at least; 0 for an unknown GPU or vocabulary."""
    vocab = recipe.model.vocab
    return 0.0 if rates is None or vocab == "auto" else tokens * plan.seconds_per_token(recipe, vocab, 1, rates)


def result(device: str, rows: list[Row]) -> Result[Row]:
    """Return a result with a table for each kind of scaling."""
    found = {kind: [row for row in rows if row.kind == kind] for kind in RATIOS}
    return Result(rows, [_table(device, kind, of) for kind, of in found.items() if of], {"device": device})


def _table(device: str, kind: Kind, rows: list[Row]) -> Table:
    columns: list[Column[Row]] = [
        ("model", lambda row: row.model, "<"),
        ("GPUs", lambda row: row.ranks, ""),
        ("window", lambda row: row.window, ","),
        ("method", lambda row: row.method, "<"),
        ("s a step", lambda row: row.seconds or "–", ".3f"),
        ("tokens/s per GPU", lambda row: row.speed and row.speed / row.ranks, ",.0f"),
        *((head, lambda row: compared(row, rows), form) for head, form in RATIOS[kind]),
        ("plan ÷ time", lambda row: row.predicted and row.seconds and row.predicted / row.seconds, ".2f"),
        ("peak GiB", lambda row: row.seconds and row.memory / 2**30, ".1f"),
    ]
    named = "long windows" if kind == "long" else f"{kind} scaling"
    missing = dict.fromkeys(row.failure for row in rows if row.failure)
    return table(f"{named}, {device}", rows, columns, "; ".join(f"–: {why}" for why in missing))


def compared(row: Row, rows: Sequence[Row]) -> float | None:
    """Relative speed. Weak: to unshared windows, on as many ranks with as many tokens each. Strong: to the fewest
    ranks. None where there is nothing to compare with.
    """
    if row.kind == "weak":
        peers = [one for one in rows if (one.method, one.ranks, one.tokens) == (NONE, row.ranks, row.tokens)]
    else:
        peers = [one for one in rows if one.window == row.window and one.speed]
    base = min(peers, key=lambda one: one.ranks).speed if peers else None
    return None if base is None or row.speed is None else row.speed / base
