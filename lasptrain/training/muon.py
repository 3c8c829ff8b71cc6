"""Muon: the momentum of each matrix, orthogonalised, is its update; all else has AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim import Muon as TorchMuon

from lasptrain.errors import SetupError
from lasptrain.ops.orthogonal import orthogonalised
from lasptrain.parallel.shard import local
from lasptrain.parallel.turns import in_turn

AT_ONCE = 1 << 26  # elements of whole matrices that are worked on together
MATCHING = 0.2  # root mean square of AdamW's updates


class Muon(TorchMuon):
    """Muon (arXiv:2502.16982) for the groups that have a `momentum`, AdamW for the others.

    Groups, states and updates are those of torch.optim.Muon with `adjust_lr_fn="match_rms_adamw"`, which keeps AdamW's
    learning rates, except that matrices of one shape are updated together, in a group's `dtype`, and that of one that
    is packed the `parts`, so many rows each, are matrices by themselves. Ranks that share rows, or are `replicas` of
    each other, work in turn.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]):
        groups = list(groups)
        super().__init__([group for group in groups if "momentum" in group], adjust_lr_fn="match_rms_adamw")
        self._adamw = AdamW([group for group in groups if "momentum" not in group] or [{"params": []}])
        self._adamw.state = self.state
        self.param_groups = groups  # which both have completed

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient. Collective where they are sharded."""
        for group in self.param_groups:
            if "momentum" in group:
                self._update(group)
        self._adamw.step()

    def _update(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        for parameter in parameters:
            if not (state := self.state[parameter]):
                state["momentum_buffer"] = torch.zeros_like(parameter)
        torch._foreach_lerp_(self._momenta(parameters), _gradients(parameters), 1 - group["momentum"])
        torch._foreach_mul_([local(p) for p in parameters], 1 - group["lr"] * group["weight_decay"])
        for same in _by_shape(parameters):
            update, ahead = partial(_orthogonal, group), partial(self._ahead, group)
            for some, updates in in_turn(update, ahead, same, AT_ONCE, group.get("replicas")):
                torch._foreach_add_([local(p) for p in some], list(updates.unbind()), alpha=-group["lr"])

    def _ahead(self, group: dict[str, Any], parameters: list[Tensor]) -> Tensor:
        """Return the rows here of Nesterov's momenta, [n, rows, columns] in the group's dtype."""
        ahead = torch._foreach_lerp(_gradients(parameters), self._momenta(parameters), group["momentum"])
        return torch.stack([x.to(group["dtype"]) for x in ahead])

    def _momenta(self, parameters: list[Tensor]) -> list[Tensor]:
        return [local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [local(parameter.grad) for parameter in parameters if parameter.grad is not None]


def _orthogonal(group: dict[str, Any], whole: Tensor) -> Tensor:
    """Return the updates, before the learning rate, of matrices [n, rows, columns], or of the parts that each packs."""
    shape = group["ns_coefficients"], group["ns_steps"], group["eps"]
    parts = whole.split(group["parts"], dim=1) if group["parts"] else (whole,)
    updates = [orthogonalised(x, *shape) * (MATCHING * math.sqrt(max(x.shape[1:]))) for x in parts]
    return updates[0] if len(updates) == 1 else torch.cat(updates, dim=1)


def elementwise(model: nn.Module) -> dict[Tensor, str]:
    """Return the kinds of the parameters in the submodules that a module calls `elementwise`.

    Raises SetupError where a module names no kinds.
    """
    found: dict[Tensor, str] = {}
    for owner in model.modules():
        named = getattr(owner, "elementwise", {})
        if not isinstance(named, dict):
            told = f"{type(owner).__name__}.elementwise: found {named!r}"
            raise SetupError(
                f"{told}; expected submodules with the kinds of their weights, such as {{'decay': 'decays'}}"
            )
        parts = ((getattr(owner, name), kind) for name, kind in named.items())
        found |= {parameter: kind for part, kind in parts if part is not None for parameter in part.parameters()}
    return found


def matrices(model: nn.Module) -> dict[Tensor, tuple[int, ...]]:
    """Return the weights that are matrices, each with the rows of its `parts`; () for one that is a single matrix.

    They are those of linear layers, but for what is `elementwise`: embedding and head, and what steers decays and beta.
    """
    apart = elementwise(model)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return {module.weight: getattr(module, "parts", ()) for module in linear if module.weight not in apart}


def muon_groups(parts: dict[Tensor, tuple[int, ...]], **options: Any) -> Iterator[dict[str, Any]]:
    """Yield a group of each packing, with these options."""
    for packing in dict.fromkeys(parts.values()):
        yield {"params": [weight for weight in parts if parts[weight] == packing], "parts": packing, **options}


def _by_shape(parameters: list[Tensor]) -> list[list[Tensor]]:
    found: dict[torch.Size, list[Tensor]] = {}
    for parameter in parameters:
        found.setdefault(parameter.shape, []).append(parameter)
    return list(found.values())
