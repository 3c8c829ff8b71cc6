"""Documents that cannot be learnt without a long memory: facts hidden in real text, and asked for at its end.

| kind | hidden | asked |
|---|---|---|
| passkey | one number under a name | the number (arXiv:2305.16300) |
| recall | several keys, each with a value | some of the values, by key (associative recall, arXiv:2312.04927) |
| tracking | a chain of assignments, beside others | every variable that holds a value (RULER, arXiv:2404.06654) |

A document is a pure function of (seed, its number), and its answers stand in its text, so that training is next-token
prediction as ever.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from lasptrain.errors import DataError, SetupError

Kind = Literal["passkey", "recall", "tracking"]
Facts = tuple[list[str], str]  # sentences to hide, in this order, and the questions with their answers

CONSONANTS, VOWELS = "bcdfghjklmnprstvz", "aeiou"


def _word(of: random.Random) -> str:
    """A name that no text has: three syllables and two digits."""
    syllables = (of.choice(CONSONANTS) + of.choice(VOWELS) for _ in range(3))
    return "".join(syllables) + str(of.randrange(10, 100))


def _words(of: random.Random, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[_word(of)] = None
    return list(found)


def _number(of: random.Random) -> str:
    return str(of.randrange(10_000, 100_000))


def _passkey(of: random.Random) -> Facts:
    key = _number(of)
    return [
        f"The pass key is {key}. Remember it. {key} is the pass key."
    ], f"What is the pass key? The pass key is {key}."


def _recall(of: random.Random, pairs: int = 8, asked: int = 4) -> Facts:
    found = {word: _number(of) for word in _words(of, pairs)}
    questions = of.sample(sorted(found), asked)
    return (
        [f"The value of {key} is {value}." for key, value in found.items()],
        " ".join(f"What is the value of {key}? The value of {key} is {found[key]}." for key in questions),
    )


def _tracking(of: random.Random, chains: int = 2, length: int = 4) -> Facts:
    names, values = _words(of, chains * length), [_number(of) for _ in range(chains)]
    groups = [names[i * length : (i + 1) * length] for i in range(chains)]
    lines = []
    for group, value in zip(groups, values, strict=True):
        lines.append([f"VAR {name} = {before}." for name, before in zip(group, [value, *group], strict=False)])
    turns = [chain for chain in range(chains) for _ in range(length)]
    of.shuffle(turns)
    hidden = [lines[turn].pop(0) for turn in turns]
    return hidden, f"Which variables hold {values[0]}? These hold {values[0]}: {', '.join(groups[0])}."


FACTS: dict[Kind, Callable[[random.Random], Facts]] = {"passkey": _passkey, "recall": _recall, "tracking": _tracking}


def document(kind: Kind, text: str, characters: int, seed: int, number: int) -> str:
    """Document `number`: about `characters` of `text`, from a place of its own on, with facts hidden between its lines.

    `text` goes round where it is shorter.
    """
    source = random.Random(f"{seed} {kind} {number}")
    hidden, asked = FACTS[kind](source)
    length = max(0, characters - sum(map(len, hidden)) - len(asked))
    start = source.randrange(len(text))
    filler = (text[start:] + text * (length // len(text) + 1))[:length]
    edges = [i + 1 for i, letter in enumerate(filler) if letter == "\n"] or [0]
    places = sorted(source.choice(edges) for _ in hidden)
    parts, at = [], 0
    for place, sentence in zip(places, hidden, strict=True):
        parts += [filler[at:place], sentence + "\n"]
        at = place
    return "".join([*parts, filler[at:].rstrip("\n"), "\n", asked])


def documents(kind: Kind, texts: Sequence[str], characters: int, count: int, seed: int) -> Iterator[str]:
    """`count` documents over `texts`, one after another. Raises DataError where these hold nothing."""
    text = "\n".join(texts)
    if not text.strip():
        raise DataError("0 characters of text to hide facts in")
    return (document(kind, text, characters, seed, number) for number in range(count))


def write(file: Path, found: Iterator[str]) -> int:
    """Writes documents as JSON lines to a new file, complete or not at all; how many."""
    if file.exists():
        raise SetupError(f"{file}: it exists; documents are written to a new file")
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.partial")
    try:
        with part.open("w", encoding="utf-8") as lines:
            count = sum(1 for text in found if lines.write(json.dumps({"text": text}, ensure_ascii=False) + "\n"))
        part.rename(file)
    finally:
        part.unlink(missing_ok=True)
    return count
