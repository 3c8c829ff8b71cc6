"""Loss by position in a document, and of a fixed span by its context: the use of a longer past."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from lasptrain.data.dataset import Split
from lasptrain.eval.inference import Reader

BLOCK = 1 << 20  # tokens read at a time
FIRST = 256  # the first bucket of positions ends here
LEAST = 1024  # tokens of the shortest document measured
TARGET = 4096  # tokens whose loss is compared


def documents(split: Split, bos: int, least: int, count: int) -> list[Tensor]:
    """Return the first `count` documents of at least `least` tokens, cut to that many: int64 [least], BOS first.

    A document inside which the split ends lacks its end, nothing else.
    """
    found: list[Tensor] = []
    for document in _documents(split, bos):
        if len(document) >= least:
            found.append(document[:least])
        if len(found) == count:
            break
    return found


def enough_documents(split: Split, bos: int, longest: int, count: int) -> list[Tensor]:
    """Return `documents` of `longest` tokens or, where there are not `count`, of the first halved length that has them.

    All are equally long, so that the mix of documents is the same along a curve. Empty if none has 1,024 tokens.
    """
    length = longest
    while length >= LEAST:
        if len(found := documents(split, bos, length, count)) == count or length // 2 < LEAST:
            return found
        length //= 2
    return []


def _documents(split: Split, bos: int) -> Iterator[Tensor]:
    rest = torch.empty(0, dtype=torch.int64)
    for start in range(0, split.tokens, BLOCK):
        tokens = torch.cat([rest, split.read(start, min(BLOCK, split.tokens - start))])
        edges = (tokens == bos).nonzero().flatten().tolist()
        yield from (tokens[a:b] for a, b in pairwise(edges))
        rest = tokens[edges[-1] :] if edges else tokens
    yield rest


def by_position(reader: Reader, document: Tensor) -> dict[int, tuple[float, int]]:
    """Return nats per token and number of tokens of positions [0, 256), [256, 512), [512, 1024), …, by their end."""
    losses = reader.losses(document)
    result, start, end = {}, 0, FIRST
    while start < len(losses):
        part = losses[start:end]
        result[end] = (float(part.mean()), len(part))
        start, end = end, 2 * end
    return result


def against_context(reader: Reader, document: Tensor) -> dict[int, float]:
    """Return nats per token of the document's last 4,096 tokens, or its last quarter, by tokens of context.

    Contexts are none, a sixteenth of what there is, a quarter, and all; each starts with BOS.
    """
    target = min(TARGET, len(document) // 4)
    available = len(document) - target - 1
    result = {}
    for context in dict.fromkeys((0, available // 16, available // 4, available)):
        tokens = torch.cat([document[:1], document[len(document) - target - context :]])
        result[context] = float(reader.losses(tokens)[-target:].mean())
    return result
