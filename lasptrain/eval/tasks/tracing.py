"""RULER's variable tracking (arXiv:2404.06654): one chain of assignments in noise, after a worked example."""

from __future__ import annotations

import random
import string
from itertools import pairwise

from data_tools.synthetic import NOISE
from lasptrain.eval.tasks.sample import PromptDraft, Question, Sample, SampleRequest, fill, haystack

NAMES = 5
BUDGET = 30
EXAMPLE_LINES = 10

HEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
TAIL = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above."
    " Answer: According to the chain(s) of variable assignment in the text above, "
    "{count} variables are assigned the value {value}, they are: "
)


def variables(ask: SampleRequest) -> Sample:
    """Five names, the first given a value, each further one the name before; asked is who has the value."""
    draw = ask.random("vt")
    example, names_there = _chain(draw, 3)
    places = sorted(draw.random() for _ in example)
    shown = _text("", example, names_there, places, EXAMPLE_LINES).text + " ".join(names_there) + "\n\n"
    chain, names = _chain(draw, 5)
    places = sorted(draw.random() for _ in chain)
    question = Question(" ".join(names), tuple(names), BUDGET)
    return fill(ask, lambda lines: _text(shown, chain, names, places, lines), question)


def _chain(draw: random.Random, letters: int) -> tuple[list[str], list[str]]:
    """The statements and the names."""
    names: list[str] = []
    while len(names) < NAMES:
        name = "".join(draw.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    value = draw.randint(10_000, 99_999)
    return [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in pairwise(names))], names


def _text(shown: str, chain: list[str], names: list[str], places: list[float], lines: int) -> PromptDraft:
    items = [NOISE] * lines
    at = [int(place * (lines + 1)) + number for number, place in enumerate(places)]
    for place, statement in zip(at, chain, strict=True):
        items.insert(place, statement)
    value = chain[0].rsplit(" ", 1)[-1]
    return haystack(shown + HEAD, items, at, "\n", TAIL.format(value=value, count=len(names)))
