"""Signals of a model's health at one step: what layers report while it is taken, and gradients by kind of parameter.

They are those of the step's whole batch, on any mesh, in any number of segments. `run/README.md` says what each means.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lasptrain.parallel import signals
from lasptrain.parallel.shard import full_tensor
from lasptrain.parallel.signals import Signals
from lasptrain.recipe.schema import Recipe
from lasptrain.training.muon import elementwise
from lasptrain.training.optimizer import joint_norm

# The kind of a parameter that no `elementwise` names, by the parts of its name; what is left are a mixer's matrices.
KINDS = {
    "norms": {"norm", "norm1", "norm2", "q_norm", "k_norm"},
    "mlp": {"mlp"},
    "convolutions": {"conv"},
    "positions": {"lrpe", "rotary"},
}
REST = "attention"


class Health:
    """The signals of one step, to be taken once and read once, on all ranks alike."""

    def __init__(self, layers: int) -> None:
        self.signals = [Signals() for _ in range(layers + 1)]  # the last of the head
        self._norms: dict[str, Tensor] = {}

    @torch.no_grad()
    def gradients(self, model: nn.Module) -> None:
        """Take the norms of the gradients by kind of parameter, before they are clipped."""
        found: dict[str, list[Tensor]] = {}
        for parameter, kind in kinds(model).items():
            if parameter.grad is not None:
                found.setdefault(kind, []).append(parameter.grad)
        self._norms = {kind: full_tensor(joint_norm(gradients)) for kind, gradients in found.items()}

    def read(self) -> dict[str, float]:
        """Return all signals by name. Collective."""
        signals.reduce(self.signals)
        *layers, head = self.signals
        digits = len(str(len(layers) - 1))
        found = {f"{name}/{i:0{digits}}": value for i, one in enumerate(layers) for name, value in _of_layer(one)}
        if "logit" in head.maxima:
            found["logit_max"] = head.maxima["logit"]
        found |= {f"grad_norm/{kind}": norm for kind, norm in self._norms.items()}
        names = sorted(found)
        return dict(zip(names, torch.stack([found[name].double() for name in names]).tolist(), strict=True))


def due(recipe: Recipe, step: int) -> Health | None:
    """Return where to put the signals of update `step`, counted from 1; None where they are not asked for."""
    every = recipe.track.health_every
    return Health(recipe.model.layers) if every and step % every == 0 else None


def kinds(model: nn.Module) -> dict[Tensor, str]:
    """Return the kind of each parameter."""
    named = ((set(name.split(".")), parameter) for name, parameter in model.named_parameters())
    found = {x: next((kind for kind, words in KINDS.items() if parts & words), REST) for parts, x in named}
    return found | elementwise(model)


def _of_layer(layer: Signals) -> Iterator[tuple[str, Tensor]]:
    sums, maxima = layer.sums, layer.maxima
    if "rate" in sums:
        memory = (sums["tokens"] / sums["rate"]).flatten()
        yield from {"memory_min": memory.amin(), "memory": memory.quantile(0.5), "memory_max": memory.amax()}.items()
    if "beta" in sums:
        yield "beta", sums["beta"] / sums["betas"]
        yield "beta_above_one", sums["above_one"] / sums["betas"]
    if "state" in sums:
        yield "state_norm", (sums["state"] / sums["states"]).sqrt()
    if "query" in maxima:
        query, key = maxima["query"], maxima["key"]
        yield "logit_bound", (query.view(len(key), -1) * key[:, None]).amax()
