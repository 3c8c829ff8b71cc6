"""One question to a model, and how text is made as long as asked: whole units, counted in tokens, never cut."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from data_tools.tokenizer import PIECE, Tokenizer, cut, cuts_safely
from lasptrain.errors import RecipeError

SENTENCE = re.compile(r"(?:[^\n.,]+|[.,](?! ))*(?:\n|[.,]|\Z)")  # a piece of a text, of which many are alike
PROBE = 'One, two. The pass key is 12345.\nWhat is it? VAR A = 3, {"a-1": "b"},\n1. w 2. x It is'


@dataclass(frozen=True)
class Sample:
    """A prompt of token ids (BOS first) and what should follow it.

    `labels[0]` should follow the prompt, `labels[j + 1]` should follow `inputs[j]`; IGNORED ones are not asked.
    """

    prompt: list[int]
    inputs: list[int]
    labels: list[int]
    references: tuple[str, ...] = ()  # what a generated answer is compared with; none: nothing is generated
    budget: int = 0  # tokens generated
    metric: str = "match_all"
    depth: float | None = None  # where the answer stands, 0 at the beginning
    distance: int | None = None  # tokens between it and the question's end
    control: list[int] | None = None  # the same prompt without it


@dataclass(frozen=True)
class SampleRequest:
    """Request to a task: make sample `index`, at most `length` tokens with its answer."""

    tokenizer: Tokenizer
    length: int
    index: int
    seed: int = 0
    depths: int = 10  # places where a single needle is put, depth 0 to 1, in the order of `spread`
    text: tuple[str, ...] = ()  # sentences of the user's text, for haystacks

    def random(self, task: str) -> random.Random:
        """Draws that depend on nothing but seed, task, length and index."""
        return random.Random(f"{self.seed}/{task}/{self.length}/{self.index}")

    @property
    def depth(self) -> float:
        """Depth of a single needle, 0 to 1."""
        return spread(self.depths)[self.index % self.depths] / max(self.depths - 1, 1)


@functools.cache
def spread(count: int) -> list[int]:
    """0 … count - 1 so that any first few cover the whole: both ends, then the middle of gap after gap."""
    order, gaps = [0, count - 1][:count], [(0, count - 1)]
    for low, high in gaps:
        if high - low > 1:
            middle = (low + high) // 2
            order.append(middle)
            gaps += (low, middle), (middle, high)
    return order


@dataclass(frozen=True)
class PromptDraft:
    """Text of a sample: up to the end of what answers it, what follows that, and the whole without that."""

    before: str
    after: str
    without: str | None = None

    @property
    def text(self) -> str:
        return self.before + self.after


@dataclass(frozen=True)
class Question:
    """A question about a draft, and its answer."""

    answer: str  # appended to the prompt as it stands: with its leading space
    references: tuple[str, ...]
    budget: int
    metric: str = "match_all"
    depth: float | None = None


@dataclass(frozen=True)
class Encoder:
    """A tokenizer for long texts that repeat themselves: every sentence is encoded once."""

    tokenizer: Tokenizer
    known: dict[str, list[int]] = field(default_factory=dict)

    def __call__(self, text: str) -> list[int]:
        """Ids of a text of any length, without BOS."""
        return [i for piece in self._pieces(text) for i in piece]

    def count(self, text: str) -> int:
        """Number of ids of a text."""
        return sum(map(len, self._pieces(text)))

    def _pieces(self, text: str) -> Iterator[list[int]]:
        known = self.known
        for sentence in SENTENCE.findall(text) if self._safe else [text]:
            if sentence not in known:
                known[sentence] = self._encode(sentence)
            yield known[sentence]

    def _encode(self, text: str) -> list[int]:
        encode = self.tokenizer.encode
        if len(text) <= PIECE or not self._safe:
            return encode(text)
        return [i for piece in cut(text) for i in encode(piece)]

    @functools.cached_property
    def _safe(self) -> bool:
        """True if the tokenizer may be given a text in pieces."""
        return cuts_safely(self.tokenizer, [PROBE])


def growing(items: Iterable[str]) -> Callable[[int], list[str]]:
    """A function that gives the first n of an endless series, each made once."""
    source, made = iter(items), list[str]()

    def first(count: int) -> list[str]:
        made.extend(islice(source, max(0, count - len(made))))
        return made[:count]

    return first


def fill(ask: SampleRequest, draft: Callable[[int], PromptDraft], question: Question, least: int = 1) -> Sample:
    """The sample whose draft has as many units of haystack as fit: BOS + prompt + budget ≤ length (RULER's rule).

    `draft(n)` has n units. Raises RecipeError where not even `least` fit.
    """
    encoder = Encoder(ask.tokenizer)
    room = ask.length - max(question.budget, encoder.count(question.answer) + 1) - 1

    @functools.cache
    def size(units: int) -> int:
        return encoder.count(draft(units).text)

    if size(least) > room:
        needed = ask.length + size(least) - room
        raise RecipeError(f"--lengths: {ask.length} tokens are too few for this task; expected at least {needed}")
    units, probe = least, least + 16
    for _ in range(4):  # about linear: the slope seen so far says where to look next
        slope = max((size(probe) - size(units)) / (probe - units), 1e-3) if probe != units else 1.0
        units, probe = probe, max(least, probe + int((room - size(probe)) / slope))
    units = probe
    while size(units) > room:
        units -= 1
    while size(units + 1) <= room:
        units += 1
    return written(encoder, draft(units), question)


def written(encoder: Encoder, draft: PromptDraft, question: Question) -> Sample:
    """A draft in tokens. Prompt and answer are encoded as one text and split where the prompt's own ids end."""
    own = encoder(draft.text)
    joint = encoder(draft.text + question.answer)
    same = len(own) if joint[: len(own)] == own else _common(own, joint)
    answer, bos = joint[same:], encoder.tokenizer.bos
    return Sample(
        prompt=[bos, *own[:same]],
        inputs=answer[:-1],
        labels=answer,
        references=question.references,
        budget=question.budget,
        metric=question.metric,
        depth=question.depth,
        distance=encoder.count(draft.after),
        control=None if draft.without is None else [bos, *encoder(draft.without)],
    )


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def haystack(head: str, items: Sequence[str], needles: Collection[int], separator: str, tail: str) -> PromptDraft:
    """The items as one text between head and tail; those at the indices `needles` hold the answer."""
    first = min(needles)
    rest = separator.join(["", *items[first + 1 :]])
    without = [item for i, item in enumerate(items) if i not in needles]
    return PromptDraft(head + separator.join(items[: first + 1]), rest + tail, head + separator.join(without) + tail)
