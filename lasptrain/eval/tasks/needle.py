"""Needles in a haystack, as RULER's `niah.py` (arXiv:2404.06654) makes them."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from itertools import cycle
from typing import Literal

from data_tools.synthetic import NOISE
from lasptrain.eval.tasks.sample import PromptDraft, Question, Sample, SampleRequest, fill, growing, haystack
from lasptrain.eval.tasks.words import key

DEPTHS = [round(i * 100 / 39) / 100 for i in range(40)]
BUDGET = 128

Kind = Literal["words", "numbers", "uuids"]


def niah(
    task: str,
    ask: SampleRequest,
    *,
    hay: Literal["noise", "text", "needles"] = "noise",
    names: Kind = "words",
    values: Kind = "numbers",
    keys: int = 1,
    values_per_key: int = 1,
    queries: int = 1,
) -> Sample:
    """`keys` needles of `values_per_key` values each in noise, in the user's text, or among other needles."""
    draw = ask.random(task)
    asked: list[str] = []
    while len(asked) < keys:
        if (name := _draw(draw, names)) not in asked:
            asked.append(name)
    needles = [(name, _draw(draw, values)) for name in asked for _ in range(values_per_key)]
    draw.shuffle(needles)
    single = len(needles) == 1
    places = [ask.depth] if single else sorted(draw.sample(DEPTHS, len(needles)))
    queried = draw.sample(asked, queries)
    wanted = {i for i, (name, _) in enumerate(needles) if name in queried}
    found = [value for name in queried for other, value in needles if other == name]
    head, tail = _prompt(queried, values, several=len(found) > 1)
    text = ask.text if hay == "text" and ask.text else (NOISE,)
    separator = " " if hay == "text" and ask.text else "\n"
    hay_of = growing(
        _distractors(random.Random(draw.random()), names, values, asked) if hay == "needles" else cycle(text)
    )

    def draft(units: int) -> PromptDraft:
        items = hay_of(units)
        marks = set()
        for number, (place, (name, value)) in enumerate(zip(places, needles, strict=True)):
            at = round(place * units) + number
            items.insert(at, _needle(name, value, values))
            if number in wanted:
                marks.add(at)
        return haystack(head, items, marks, separator, tail)

    answer = " " + _listed(found)
    return fill(ask, draft, Question(answer, tuple(found), BUDGET, depth=ask.depth if single else None))


def _needle(name: str, value: str, values: Kind) -> str:
    return f"One of the special magic {values} for {name} is: {value}."


def _distractors(draw: random.Random, names: Kind, values: Kind, asked: list[str]) -> Iterator[str]:
    while True:
        name = _draw(draw, names)
        if name not in asked:
            yield _needle(name, _draw(draw, values), values)


def _draw(draw: random.Random, kind: Kind) -> str:
    match kind:
        case "words":
            return key(draw)
        case "numbers":
            return str(draw.randint(1_000_000, 9_999_999))
        case "uuids":
            return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def _prompt(queried: list[str], values: Kind, several: bool) -> tuple[str, str]:
    """Text before the haystack and after it; in the singular where one value is asked for."""
    some, are, all_, kind = ("Some", "are", "are all", values) if several else ("A", "is", "is", values[:-1])
    query = _listed(queried)
    head = (
        f"{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {kind} afterwards.\n"
    )
    tail = (
        f"\nWhat {all_} the special magic {kind} for {query} mentioned in the provided text?"
        f" The special magic {kind} for {query} mentioned in the provided text {are}"
    )
    return head, tail


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + ", and " + parts[-1]
