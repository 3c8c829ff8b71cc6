"""Scores of predictions by the field's own rules, and confidence intervals of their means."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence

CONTROL = re.compile(r"[\x00-\x1f]")
Z = 1.959963984540054  # two-sided 95 %
RESAMPLES = 2000


def clean(prediction: str) -> str:
    """Clean as RULER (arXiv:2404.06654) does before comparing: control characters become line ends, edges are cut."""
    return CONTROL.sub("\n", prediction.strip()).strip()


def match_all(prediction: str, references: Sequence[str]) -> float:
    """RULER's `string_match_all`: the part of the references that the prediction contains, letter case aside."""
    text = clean(prediction).lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def match_part(prediction: str, references: Sequence[str]) -> float:
    """RULER's `string_match_part`: 1 if it contains any of them. (lm-evaluation-harness divides by their number.)"""
    text = clean(prediction).lower()
    return float(any(reference.lower() in text for reference in references))


def first_int(prediction: str, references: Sequence[str]) -> float:
    """1 if the first run of digits is the answer; `0123` is not `123`."""
    found = re.search(r"\d+", prediction)
    return float(found is not None and found[0] == references[0])


def word(prediction: str, references: Sequence[str]) -> float:
    """InfiniteBench (arXiv:2402.13718), key-value retrieval: the answer is one of the words, punctuation aside."""
    words = re.sub(r"[^\w\s-]", " ", prediction).split()
    return float(references[0] in words)


def f1(prediction: str, references: Sequence[str]) -> float:
    """SQuAD's (arXiv:1606.05250) token F1 with the best reference; articles, case and punctuation aside."""
    return max(_f1(_words(prediction), _words(reference)) for reference in references)


def _words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", re.sub(r"[^\w\s]", "", text.lower())).split()


def _f1(found: list[str], expected: list[str]) -> float:
    if not found or not expected:
        return float(found == expected)
    common = sum(min(found.count(one), expected.count(one)) for one in set(found))
    return 2 * common / (len(found) + len(expected))


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "match_all": match_all,
    "match_part": match_part,
    "first_int": first_int,
    "word": word,
    "f1": f1,
}


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95 % interval of a proportion of n trials (Wilson 1927)."""
    p, z2 = successes / n, Z * Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float] | None:
    """95 % interval of a mean, by resampling the values 2,000 times; None where they do not differ, as one does not."""
    if len(set(values)) < 2:
        return None
    draw = random.Random(f"bootstrap/{seed}")
    n = len(values)
    means = sorted(sum(draw.choices(values, k=n)) / n for _ in range(RESAMPLES))
    return means[round(0.025 * RESAMPLES)], means[round(0.975 * RESAMPLES) - 1]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of values from 0 to 1: Wilson's where every one is 0 or 1, and where none differs from
    the others, as nothing in between can spread wider; else the bootstrap's.
    """
    resampled = None if all(value in (0.0, 1.0) for value in values) else bootstrap(values)
    return resampled or wilson(sum(values), len(values))
