"""Retrieval outside RULER: passkey, key–value pairs, a copy over a distance, associative recall of random tokens."""

from __future__ import annotations

import json
import random
import uuid
from itertools import count, cycle
from typing import Any

import torch

from data_tools import synthetic
from data_tools.synthetic import NOISE
from lasptrain.eval.tasks.sample import PromptDraft, Question, Sample, SampleRequest, fill, growing, haystack
from lasptrain.ops.cross_entropy import IGNORED

COPIED = 512
KEYS, SHOWN = 16, 4  # of pairs
ALPHA = 0.01


def passkey(ask: SampleRequest) -> Sample:
    """Five digits in noise (landmark attention, arXiv:2305.16300)."""
    key = ask.random("passkey").randint(10_000, 99_999)
    head = (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
        "I will quiz you about the important information there.\n"
    )
    sentences = [f"{sentence}." for sentence in NOISE.rstrip(".").split(". ")]

    hay = growing(cycle(sentences))

    def draft(units: int) -> PromptDraft:
        at = round(ask.depth * units)
        noise = hay(units)
        needle = f"The pass key is {key}. Remember it. {key} is the pass key."
        parts = [" ".join(noise[:at]), needle, " ".join(noise[at:])]
        return haystack(head, parts, {1}, "\n", "\nWhat is the pass key? The pass key is")

    return fill(ask, draft, Question(f" {key}", (str(key),), 6, "first_int", ask.depth))


def key_values(ask: SampleRequest) -> Sample:
    """One JSON object of uuids and the value of one key (InfiniteBench, arXiv:2402.13718)."""
    draw = ask.random("kv_retrieval")
    key, value, source = _uuid(draw), _uuid(draw), random.Random(draw.random())
    others = growing(_pair(_uuid(source), _uuid(source)) for _ in count())
    head = "Extract the value corresponding to the specified key in the JSON object below.\n\n{"
    tail = f'}}\n\nKey: "{key}"\nThe value associated with the specified key is:'

    def draft(units: int) -> PromptDraft:
        pairs = others(units)
        at = round(ask.depth * units)
        pairs.insert(at, _pair(key, value))
        return haystack(head, pairs, {at}, ",\n", tail)

    return fill(ask, draft, Question(f" {json.dumps(value)}", (value,), 50, "word", ask.depth))


def _uuid(draw: random.Random) -> str:
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def _pair(key: str, value: str) -> str:
    return f"{json.dumps(key)}: {json.dumps(value)}"


def pairs(ask: SampleRequest) -> Sample:
    """Keys with their capitals, as `data synth --kind pairs` makes them, in noise: one of 16, each shown four times."""
    draw = ask.random("pairs")
    found = synthetic.pairs(draw, KEYS)
    stream = [key for key in found for _ in range(SHOWN)]
    draw.shuffle(stream)
    asked, facts = draw.choice(stream), " ".join(key + found[key] for key in stream)

    def draft(units: int) -> PromptDraft:
        at = round(ask.depth * units)
        return haystack("", [*[NOISE] * at, facts, *[NOISE] * (units - at)], {at}, " ", f" {asked}")

    return fill(ask, draft, Question(found[asked], (found[asked],), 1, depth=ask.depth))


def copy(ask: SampleRequest) -> Sample:
    """Random tokens R, other random tokens, R again: 512 of them, or an eighth of a short length."""
    draw = ask.random("copy")
    ids = _ordinary(ask)
    tokens = min(COPIED, ask.length // 8)
    copied = draw.choices(ids, k=tokens)
    filler = draw.choices(ids, k=ask.length - 2 * tokens - 1)
    bos = ask.tokenizer.bos
    return Sample(
        prompt=[bos, *copied, *filler],
        inputs=copied[:-1],
        labels=copied,
        depth=0.0,
        distance=len(filler),
        control=[bos, *filler],
    )


def mqar(ask: SampleRequest) -> Sample:
    """Multi-query associative recall of length / 16, at most 64, pairs."""
    pairs = min(64, ask.length // 16)
    ids = _ordinary(ask)
    generator = torch.Generator().manual_seed(ask.random("mqar").getrandbits(63))
    made, labels = associations(1, ask.length - 1, pairs, len(ids), generator)
    context, bos = 2 * pairs, ask.tokenizer.bos
    answers = [label if label == IGNORED else ids[label] for label in labels[0, context:].tolist()]
    tokens = [ids[token] for token in made[0].tolist()]
    return Sample(prompt=[bos, *tokens[:context]], inputs=tokens[context:], labels=[IGNORED, *answers])


def _ordinary(ask: SampleRequest) -> list[int]:
    """All ids but BOS."""
    return [i for i in range(ask.tokenizer.vocab_size) if i != ask.tokenizer.bos]


def associations(
    count: int, length: int, pairs: int, vocab: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """MQAR (arXiv:2312.04927): tokens and labels of `count` sequences, int64 [count, length], where the generator is.

    Keys from [1, V/2), values from [V/2, V), none twice: k₁v₁…k_Nv_N, then every key once at an even offset drawn
    without replacement with p(g) ∝ g^(α−1), so that most come soon; its label, at its own position, is its value. All
    other tokens are random.
    """
    half, context = vocab // 2, 2 * pairs
    on: dict[str, Any] = {"generator": generator, "device": generator.device}
    keys = 1 + torch.rand(count, half - 1, **on).topk(pairs).indices
    values = half + torch.rand(count, vocab - half, **on).topk(pairs).indices
    tokens = torch.randint(vocab, (count, length), **on)
    labels = torch.full((count, length), IGNORED, device=generator.device)
    tokens[:, 0:context:2], tokens[:, 1:context:2] = keys, values
    gaps = torch.arange(1, (length - context) // 2 + 1, device=generator.device)
    weights = gaps.double() ** (ALPHA - 1)
    places = context + 2 * torch.multinomial(weights.expand(count, -1), pairs, generator=generator)
    tokens.scatter_(1, places, keys)
    labels.scatter_(1, places, values)
    return tokens, labels
