"""Words to draw keys from: pairs of common ones, and pronounceable ones without end."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice


def _words(text: str) -> list[str]:
    return text.split()


ADJECTIVES = _words(
    "able acid aged amber ample angry arid avid awake bald basic bold brave brief bright brisk broad calm cheap chief "
    "civil clean clear close cold cool crisp cruel cubic curly damp dark dear deep dense dim dizzy double dry dull "
    "eager early easy empty equal exact faint fair false fancy fast fat fierce final fine firm first fit flat fluid "
    "fond frail free fresh full funny gentle giant glad good grand grave great green grim gross happy hard harsh heavy "
    "high hollow holy honest huge humble icy ideal idle inner jolly keen kind large late lazy lean light little local"
)
NOUNS = _words(
    "acorn actor anchor ankle apple apron arch arrow atlas attic badge bagel baker banjo barn basin basket beach beard "
    "bell bench berry bird blade block boat bone book boot bottle bowl box branch brick bridge broom brush bucket "
    "button cabin cable camel candle canoe canyon carpet castle cave chain chair cherry chest circle clock cloud coast "
    "coin comet copper coral cotton crane crown cup desk diary door dragon drum eagle engine fabric falcon fence ferry "
    "field flame flute forest fossil fox garden gate glove grape guitar hammer harbor hat hill honey horn horse island"
)

ONSETS = _words("b d f g h j k l m n p r s t v w z br dr gr kl pl st tr")
VOWELS = _words("a e i o u")


def key(draw: random.Random) -> str:
    """An adjective-noun pair: one of about 10,000."""
    return f"{draw.choice(ADJECTIVES)}-{draw.choice(NOUNS)}"


def distinct(draw: random.Random, count: int) -> list[str]:
    """So many different words."""
    return list(islice(endless(draw), count))


def endless(draw: random.Random) -> Iterator[str]:
    """Words, none twice: the lists above, shuffled, then pronounceable ones of four syllables (2·10⁸)."""
    words = sorted({*ADJECTIVES, *NOUNS})
    draw.shuffle(words)
    yield from words
    seen = set(words)
    while True:
        word = "".join(draw.choice(ONSETS) + draw.choice(VOWELS) for _ in range(4))
        if word not in seen:
            seen.add(word)
            yield word
