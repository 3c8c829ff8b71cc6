"""Recurrent generation: the prompt is one slice, every further token a slice of length one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lasptrain.models.language_model import LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel, prompt: Sequence[int], count: int, *, temperature: float = 0.8, seed: int = 0
) -> list[int]:
    """`count` token ids that continue `prompt`; memory per token is constant.

    Args:
        model: on one device, not spread over ranks.
        temperature: of the softmax that is sampled from; 0 takes the likeliest token.
    """
    device = model.embed.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = torch.tensor([list(prompt)], device=device)
    carry = None
    result: list[int] = []
    for _ in range(count):
        x, carry = model.hidden(tokens, carry=carry, leave=True)
        logits = model.logits(x[:, -1])
        if temperature == 0:
            tokens = logits.argmax(-1, keepdim=True)
        else:
            tokens = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        result.append(int(tokens))
    return result
