"""Recurrent generation: every token is a slice of length one; memory per token is constant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lasptrain.eval.inference import Reader, Snapshot
from lasptrain.models.language_model import LanguageModel


@dataclass(frozen=True)
class Sampling:
    """Choice of the next token: the likeliest at temperature 0, else drawn from softmax(logits / temperature)."""

    temperature: float = 0.0
    top_p: float = 1.0  # draw only from the likeliest tokens that together reach this probability
    seed: int = 0


GREEDY = Sampling()
COLDEST = 1e-6  # below it, logits divided by the temperature may overflow


def generate(
    model: LanguageModel, prompt: Sequence[int], count: int, *, temperature: float = 0.8, seed: int = 0
) -> list[int]:
    """Return `count` token ids that continue `prompt`; the model is whole on this rank."""
    past = Reader(model).read(torch.tensor([list(prompt)]))
    return decode(model, past, count, Sampling(temperature, seed=seed))[0]


@torch.no_grad()
def decode(
    model: LanguageModel,
    past: Snapshot,
    count: int,
    sampling: Sampling = GREEDY,
    stop: int | None = None,
    ended: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """Return up to `count` token ids for each of the B texts of `past`; a row ends before the id `stop`.

    `ended` gets each row after each token until it returns true; once it has for all rows, generation stops.
    """
    generator = torch.Generator(past.logits.device).manual_seed(sampling.seed)
    carry, logits = past.carry, past.logits
    drawn: list[Tensor] = []
    over = [False] * len(logits)
    for i in range(count):
        if i:
            x, carry = model.hidden(drawn[-1], carry=carry, output_final_state=True)
            logits = model.logits(x[:, -1])
        drawn.append(choose(logits, sampling, generator))
        if stop is not None or ended is not None:
            rows = torch.cat(drawn, 1).tolist()
            over = [done or row[-1] == stop or _ends(row, ended) for row, done in zip(rows, over, strict=True)]
            if all(over):
                break
    rows = torch.cat(drawn, 1).tolist() if drawn else [[] for _ in past.logits]
    return [row[: row.index(stop)] if stop in row else row for row in rows]


def _ends(row: list[int], ended: Callable[[list[int]], bool] | None) -> bool:
    return ended is not None and ended(row)


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Choose the next tokens, int64 [B, 1], from logits [B, vocab]."""
    if sampling.temperature < COLDEST:
        return logits.argmax(-1, keepdim=True)
    p, order = (logits / sampling.temperature).softmax(-1).sort(-1, descending=True)
    beyond = p.cumsum(-1) - p >= sampling.top_p  # the first that reaches top_p stays
    beyond[..., 0] = False
    p = p.masked_fill(beyond, 0)
    return order.gather(-1, torch.multinomial(p, 1, generator=generator))
