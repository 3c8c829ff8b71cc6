"""Decay schedules: slope s = −ln a per layer and head, by name; and the key that chooses one."""

import math
from collections.abc import Iterator
from typing import Literal

from lasptrain.architectures.base import Architecture
from lasptrain.architectures.section import optional

Schedule = Literal["tnl", "minimax_hf", "tnl_paper", "alibi", "retnet", "window", "none"]


def _alibi(heads: int) -> list[float]:
    """Return 2^(−8(h+1)/H); for an H that is not a power of two, filled up as in ALiBi (arXiv:2108.12409)."""
    power = 2 ** math.floor(math.log2(heads))
    base = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    if power == heads:
        return base
    return base + _alibi(2 * power)[0::2][: heads - power]


def slopes(schedule: str, layers: int, heads: int, window: int) -> list[list[float]]:
    """Return slopes [layers][heads], all ≥ 0. Raises ValueError for an unknown schedule.

    Args:
        schedule: `tnl` (released TransNormerLLM), `minimax_hf` (MiniMax in transformers: as `tnl`, but for the last
            layer and for head counts that are not powers of two), `tnl_paper` (arXiv:2307.14995), `alibi`, `retnet`
            (arXiv:2307.08621), `window` (the slowest head keeps 1/1000 over the whole window), `learned`
            (begins as `window`), `none`.
        window: tokens of a training window; `window` and `learned` only.
    """
    match schedule:
        case "none":
            return [[0.0] * heads] * layers
        case "alibi":
            return [_alibi(heads)] * layers
        case "tnl":
            return [[b * (1 - i / max(layers - 1, 1) + 1e-5) for b in _alibi(heads)] for i in range(layers)]
        case "minimax_hf":
            return [
                [2.0 ** (-8.0 * (h + 1) / heads) * (1 - i / (layers - 1 + 1e-5) + 1e-5) for h in range(heads)]
                for i in range(layers)
            ]
        case "tnl_paper":
            return [[8 * h / heads * (1 - i / layers) for h in range(heads)] for i in range(layers)]
        case "retnet":
            return [[-math.log1p(-(2.0 ** (-5 - h))) for h in range(heads)]] * layers
        case "window" | "learned":
            fastest, slowest = 0.5, min(0.5, math.log(1000) / window)
            ratio = slowest / fastest
            return [[fastest * ratio ** (h / max(heads - 1, 1)) for h in range(heads)]] * layers
        case _:
            raise ValueError(f"decay schedule {schedule!r}")


class Decaying(Architecture):
    """An architecture whose decays follow a schedule, constant or not."""

    decay: Schedule = optional("tnl", "schedule of the decays by layer and head")

    def decays(self, window: int) -> list[list[float]]:
        """Return the schedule's slopes by layer and head."""
        return slopes(self.decay, self.layers, self.heads, window)

    def description(self) -> Iterator[tuple[str, str]]:
        """Yield the schedule beside the heads."""
        (title, heads), *rest = super().description()
        yield title, f"{heads}, decay {self.decay}"
        yield from rest
