"""AdamW or Muon, the learning rate as a function of the step, and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lasptrain.parallel.shard import bump_parameter_versions, full_tensor, local
from lasptrain.recipe.sections import Optim
from lasptrain.training.muon import Muon, matrices, muon_groups

FUSED = {"cpu", "cuda"}  # device types that have the fused kernel


def build_optimizer(model: nn.Module, cfg: Optim, dtype: torch.dtype = torch.float32) -> AdamW | Muon:
    """Return the optimizer of the trainable parameters of `model`, plain or sharded; call after sharding.

    With Muon `matrices` have groups of their own, and are orthogonalised in `dtype`; all else has AdamW. Matrices
    decay. Vectors (norms, biases) and what a module calls `undecayed` (angles, taps) do not: pulling them to zero has
    no meaning.
    """
    parts = {weight: rows for weight, rows in matrices(model).items() if weight.requires_grad and cfg.kind == "muon"}
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    owners = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        path, _, part = name.rpartition(".")
        if parameter.requires_grad and parameter not in parts:
            free = parameter.ndim < 2 or part in getattr(owners[path], "undecayed", ())
            (others if free else decaying).append(parameter)
    fused = all(parameter.device.type in FUSED for parameter in decaying + others)
    adamw: dict[str, Any] = {"lr": cfg.lr, "betas": cfg.betas, "eps": cfg.eps, "fused": fused}
    groups: list[dict[str, Any]] = [
        {"params": decaying, "weight_decay": cfg.weight_decay, **adamw},
        {"params": others, "weight_decay": 0.0, **adamw},
    ]
    groups = [group for group in groups if group["params"]]
    if not parts:
        return bump_parameter_versions(AdamW(groups, **adamw))
    options = {"lr": cfg.lr, "weight_decay": cfg.weight_decay, "momentum": cfg.momentum, "dtype": dtype}
    return bump_parameter_versions(Muon([*muon_groups(parts, **options), *groups]))


def initialise_state(optimizer: Optimizer) -> None:
    """Create the state that the first step would create, so that a state exists to be saved or loaded into."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not (state := optimizer.state[parameter]):
                state.update(initial_state(parameter, group))


def initial_state(parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """Return the state of a parameter of the group before its first step."""
    if "momentum" in group:
        return {"momentum_buffer": torch.zeros_like(parameter, memory_format=torch.preserve_format)}
    step_beside = group["fused"] or group["capturable"] or parameter.is_meta
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device if step_beside else "cpu"),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }


def learning_rate(cfg: Optim, steps: int, step: int) -> float:
    """Return the learning rate of update `step`, 0 being the first of `steps`.

    The first `warmup` updates rise linearly to `lr`. From there `cosine` falls to `min_lr * lr` over the rest, `wsd`
    stays there and falls linearly over the last `decay` updates (a fifth of all if None), `constant` stays. The lowest
    value belongs to the update after the last one, so no update is wasted on a rate of zero.
    """
    warm = min(1.0, (step + 1) / cfg.warmup) if cfg.warmup else 1.0
    match cfg.schedule:
        case "cosine":
            fall = (1 - math.cos(math.pi * _progress(step, cfg.warmup, steps))) / 2
        case "wsd":
            length = math.ceil(steps / 5) if cfg.decay is None else cfg.decay
            fall = _progress(step, steps - length, steps)
        case "constant":
            fall = 0.0
    return cfg.lr * warm * (1 - (1 - cfg.min_lr) * fall)


def jump(cfg: Optim, there: int, here: int, step: int) -> str | None:
    """Return a message if the learning rate jumps where a run of `there` steps continues from `step` as one of `here`.

    None if it is the same.
    """
    old, new = (learning_rate(cfg, steps, step) for steps in (there, here))
    if old == new:
        return None
    return (
        f"learning rate of step {step + 1}: {new:.2e} with train.steps = {here}, {old:.2e} with the {there} before; "
        f"schedule {cfg.schedule} depends on train.steps, constant does not, wsd not before its decay"
    )


def _progress(step: int, first: int, end: int) -> float:
    """Return the position of `step` between `first` and `end`, within [0, 1]."""
    return min(max((step - first) / max(end - first, 1), 0.0), 1.0)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Give every parameter group the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def joint_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all gradients together, a scalar, sharded where they are.

    In fp64, because long sums in fp32 come out differently for a shard and for the whole, and scale all that follows.
    """
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients down to the global L2 norm `max_norm` (0: leave them) and return the norm they had.

    The norm is a local scalar, at least fp32, the same on every rank; it takes one all-reduce where gradients are
    sharded. It is not finite if any gradient is not, and then the gradients are lost.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    wide = torch.promote_types(gradients[0].dtype, torch.float32)
    norm = full_tensor(joint_norm(gradients)).to(wide)
    if max_norm > 0:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([local(gradient) for gradient in gradients], scale)
    return norm
