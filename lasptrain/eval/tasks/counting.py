"""RULER's aggregation tasks (arXiv:2404.06654): which words are the most common."""

from __future__ import annotations

import math
import random
import string

from lasptrain.eval.tasks.sample import PromptDraft, Question, Sample, SampleRequest, fill, growing
from lasptrain.eval.tasks.words import distinct, endless

COMMON = 10
ZETA_2 = math.pi**2 / 6

CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
    " Answer: The top 10 words that appear most often in the list are:"
)
FWE = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)


def common_words(ask: SampleRequest) -> Sample:
    """Ten words 30 times each among others 3 times each (6 and 1 below 4,096 tokens), after a worked example."""
    draw = ask.random("cwe")
    often, seldom = (30, 3) if ask.length >= 4096 else (6, 1)
    example = distinct(draw, 40 if ask.length >= 4096 else 20)
    shown = _list(draw.random(), example, *((10, 3) if ask.length >= 4096 else (3, 1)))
    shown += " " + _numbered(example[:COMMON]) + "\n"
    words, order = growing(endless(random.Random(draw.random()))), draw.random()
    answers = words(COMMON)

    def draft(units: int) -> PromptDraft:
        return PromptDraft(shown + _list(order, words(COMMON + units), often, seldom), "")

    return fill(ask, draft, Question(" " + _numbered(answers), tuple(answers), 120))


def _list(seed: float, words: list[str], often: int, seldom: int) -> str:
    listed = words[:COMMON] * often + words[COMMON:] * seldom
    random.Random(seed).shuffle(listed)
    return CWE.format(context=_numbered(listed))


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def frequent_words(ask: SampleRequest) -> Sample:
    """Coded words; the one of rank r appears ⌊N r⁻² / ζ(2)⌋ times, rank 1 is written `...`; asked are ranks 2 to 4."""
    draw = ask.random("fwe")
    vocabulary: list[str] = ["..."]
    seen = set(vocabulary)
    while len(vocabulary) < max(4, (ask.length - 50) // 50):
        word = "".join(draw.choices(string.ascii_lowercase, k=6))
        if word not in seen:
            seen.add(word)
            vocabulary.append(word)
    order = draw.random()

    def draft(units: int) -> PromptDraft:
        counts = [int(units / (rank * rank) / ZETA_2) for rank in range(1, len(vocabulary) + 1)]
        words = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
        random.Random(order).shuffle(words)
        return PromptDraft(FWE.format(context=" ".join(words)), "")

    answers = vocabulary[1:4]
    return fill(ask, draft, Question(" " + ", ".join(answers), tuple(answers), 50), least=64)
