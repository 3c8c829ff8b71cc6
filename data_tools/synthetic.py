"""Documents that cannot be learnt without a long memory: facts hidden in real text, and asked for at its end; or
nothing but facts, that come again and again.

| kind | hidden | asked |
|---|---|---|
| passkey | one number under a name | the number (arXiv:2305.16300) |
| recall | 1 to 256 keys, each with a value | all values, by key (associative recall, arXiv:2312.04927) |
| tracking | a chain of assignments, beside others | every variable that holds a value (RULER, arXiv:2404.06654) |
| pairs | keys of one or two letters, each with a capital: `abQ` | the capital, at every return of a key |

In `pairs` every third or fourth letter, but for noise that is soon known by heart, can only be known by recall, and
some keys return soon, some late: what the frequent ones teach is used for the rare ones.

A document is a pure function of (seed, its number), and its answers stand in its text, so that training is next-token
prediction as ever.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lasptrain.errors import DataError, SetupError
from lasptrain.files import whole

Kind = Literal["passkey", "recall", "tracking", "pairs"]
Facts = tuple[list[str], list[tuple[str, list[str]]]]  # sentences to hide, in this order; questions, with their answers

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."  # RULER's
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LONG_KEYS = [a + b for a in LETTERS for b in LETTERS]
FEWEST_KEYS, MOST_KEYS = 2, 512
CONSONANTS, VOWELS = "bcdfghjklmnprstvz", "aeiou"
NOISY = 0.75  # of documents of pairs
MOST_PAIRS, LEAST_CHARACTERS_PER_PAIR = 256, 250


def _word(of: random.Random) -> str:
    """Draw a name that no text has: three syllables and two digits."""
    syllables = (of.choice(CONSONANTS) + of.choice(VOWELS) for _ in range(3))
    return "".join(syllables) + str(of.randrange(10, 100))


def _words(of: random.Random, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[_word(of)] = None
    return list(found)


def _number(of: random.Random) -> str:
    return str(of.randrange(10_000, 100_000))


def _passkey(of: random.Random, characters: int) -> Facts:
    key = _number(of)
    return [f"The pass key is {key}. Remember it. {key} is the pass key."], [
        ("What is the pass key? The pass key is", [key])
    ]


def _recall(of: random.Random, characters: int) -> Facts:
    most = max(1, min(MOST_PAIRS, characters // LEAST_CHARACTERS_PER_PAIR))
    pairs = round(math.exp(of.uniform(0, math.log(most))))
    found = {word: _number(of) for word in _words(of, pairs)}
    questions = of.sample(sorted(found), pairs)
    return (
        [f"The value of {key} is {value}." for key, value in found.items()],
        [(f"What is the value of {key}? The value of {key} is", [found[key]]) for key in questions],
    )


def _tracking(of: random.Random, characters: int, chains: int = 2, length: int = 4) -> Facts:
    names, values = _words(of, chains * length), [_number(of) for _ in range(chains)]
    groups = [names[i * length : (i + 1) * length] for i in range(chains)]
    lines = []
    for group, value in zip(groups, values, strict=True):
        lines.append([f"VAR {name} = {before}." for name, before in zip(group, [value, *group], strict=False)])
    turns = [chain for chain in range(chains) for _ in range(length)]
    of.shuffle(turns)
    hidden = [lines[turn].pop(0) for turn in turns]
    return hidden, [(f"Which variables hold {values[0]}? These hold {values[0]}:", groups[0])]


def pairs(of: random.Random, count: int, keys: Sequence[str] = LONG_KEYS) -> dict[str, str]:
    """Draw so many different keys, each with a capital letter."""
    return {key: of.choice(LETTERS).upper() for key in of.sample(keys, count)}


FACTS: dict[Kind, Callable[[random.Random, int], Facts]] = {
    "passkey": _passkey,
    "recall": _recall,
    "tracking": _tracking,
}


class Document(NamedTuple):
    """A text with facts hidden in it, and the questions at its end."""

    body: str
    questions: list[tuple[str, list[str]]]  # and their answers
    gap: str = "\n"  # before the questions
    step: str = " "  # before an answer

    @property
    def row(self) -> dict[str, Any]:
        """Row of training text: all questions with their answers."""
        end = "." if self.step else ""
        asked = " ".join(f"{question}{self.step}{', '.join(answers)}{end}" for question, answers in self.questions)
        return {"text": f"{self.body}{self.gap}{asked}"}

    @property
    def prompt(self) -> dict[str, Any]:
        """Row of prompts (`lasptrain eval --file`): the first question."""
        question, answers = self.questions[0]
        prompt = f"{self.body}{self.gap}{question}"
        if not self.step:
            return {"prompt": prompt, "answers": answers, "budget": 1, "gap": ""}
        return {"prompt": prompt, "answers": answers, "budget": 8 + 8 * len(answers)}


def _repeated(of: random.Random, characters: int) -> Document:
    """Draw about as many characters of pairs, and one more as a question.

    Half of the documents have keys of one letter, and some have two keys only, which are learnt first. The mean time
    until a key returns is spread evenly, by its logarithm, up to about half of the document, so that every distance is
    asked for. In three of four documents, if they are long enough, noise parts them in up to four places, and leaves
    them a half to a fiftieth of all: distance without anything to be remembered.
    """
    keys = of.choice((list(LETTERS), LONG_KEYS))
    facts_share = math.exp(-of.uniform(math.log(2), math.log(50))) if of.random() < NOISY else 1.0
    noise = round(characters * (1 - facts_share)) // (len(NOISE) + 1)
    slots = max(2, (characters - noise * (len(NOISE) + 1)) // (len(keys[0]) + 2))
    most = max(2, min(MOST_KEYS, len(keys), slots // 3))
    found = pairs(of, round(math.exp(of.uniform(math.log(min(FEWEST_KEYS, most)), math.log(most)))), keys)
    rarest = math.log(max(1, slots / len(found)))
    weights = [math.exp(-of.uniform(0, rarest)) for _ in found]
    stream = of.choices(list(found), weights, k=slots - 1)
    facts, asked = [key + found[key] for key in stream], of.choice(stream)
    for units in _split(of, noise):
        facts.insert(of.randint(1, len(facts)), " ".join([NOISE] * units))
    return Document(" ".join(facts), [(asked, [found[asked]])], " ", "")


def _split(of: random.Random, count: int) -> list[int]:
    """Split `count` into up to four random parts."""
    edges = sorted({0, count, *(of.randint(0, count) for _ in range(of.randrange(4)))})
    return [b - a for a, b in pairwise(edges)]


def document(kind: Kind, text: str, lengths: tuple[int, int], seed: int, number: int) -> Document:
    """Make document `number`: `text` from a random place on, with facts hidden between its lines.

    Its characters are drawn from `lengths`, so that documents of 1 to 2, 2 to 4, … thousand hold the same
    share of all text: the many short ones teach what the few long ones then ask for. `text` goes round where it is
    shorter.
    """
    source = random.Random(f"{seed} {kind} {number}")
    shortest, longest = lengths
    characters = round(1 / source.uniform(1 / longest, 1 / shortest))
    if kind == "pairs":
        return _repeated(source, characters)
    hidden, questions = FACTS[kind](source, characters)
    asked = len(Document("", questions).row["text"])
    length = max(0, characters - sum(map(len, hidden)) - asked)
    start = source.randrange(len(text))
    filler = text[start : start + length]
    filler += (text * (-(-length // len(text))))[: length - len(filler)] if len(filler) < length else ""
    edges = [i + 1 for i, letter in enumerate(filler) if letter == "\n"] or [0]
    places = sorted(source.choice(edges) for _ in hidden)
    parts, at = [], 0
    for place, sentence in zip(places, hidden, strict=True):
        parts += [filler[at:place], sentence + "\n"]
        at = place
    return Document("".join([*parts, filler[at:].rstrip("\n")]), questions)


def documents(kind: Kind, texts: Sequence[str], lengths: tuple[int, int], count: int, seed: int) -> Iterator[Document]:
    """Make `count` documents over `texts`, one after another. Raises DataError where these hold nothing."""
    text = "\n".join(texts)
    if kind != "pairs" and not text.strip():
        raise DataError("0 characters of text to hide facts in")
    return (document(kind, text, lengths, seed, number) for number in range(count))


def write(file: Path, rows: Iterator[dict[str, Any]]) -> int:
    """Write JSON lines to a new file, complete or not at all. Returns their number; raises SetupError if it exists."""
    if file.exists():
        raise SetupError(f"{file}: it exists; documents are written to a new file")
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as part, part.open("w", encoding="utf-8") as lines:
        return sum(1 for row in rows if lines.write(json.dumps(row, ensure_ascii=False) + "\n"))
