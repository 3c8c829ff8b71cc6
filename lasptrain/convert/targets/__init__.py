"""Export targets, one file each, and the one that a model goes to. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

from lasptrain.architectures.base import Architecture
from lasptrain.convert.target import Target
from lasptrain.errors import ConvertError, RecipeError

NAMES = (
    "safetensors",
    "granitemoehybrid",
    "minimax",
    "olmo_hybrid",
    "qwen3_5",
    "kimi_linear",
    "linear_attn",
    "retnet",
    "transnormer",
)
TARGETS: dict[str, Target] = {name: import_module(f"{__name__}.{name}").TARGET for name in NAMES}
MODEL_TYPES = {
    kind: target
    for target in sorted(TARGETS.values(), key=lambda target: target.arch is None)
    for kind in (target.model_type, *target.also)
}
"""The target of a `model_type` in config.json; our own last."""


def resolve(name: str, model: Architecture) -> Target:
    """Return the target of `--to name` for this model. RecipeError for an unknown name, ConvertError with the reason
    where the model cannot be expressed there.
    """
    hf = _candidates(model)
    target = _hf(model) if name == "hf" else TARGETS.get(name)
    possible = ", ".join(target for target, reason in refusals(model).items() if reason is None)
    if target is None and name == "hf":
        raise ConvertError(f"--to hf: arch {model.arch} has no class there without custom code; expected {possible}")
    if target is None:
        raise RecipeError(f"--to {name}: unknown; expected {possible}")
    found = refusals(model)
    reason = found[target.name]
    if reason is not None:
        if name == "hf" and len(hf) > 1:
            reason = "; ".join(f"{candidate.name}: {found[candidate.name]}" for candidate in hf)
        raise ConvertError(f"--to {name}: {reason}; expected {possible}")
    return target


def lines(model: Architecture) -> Iterator[str]:
    """Yield a line for each target: its library, or the reason why the model does not fit; `hf` beside its target."""
    for name, reason in refusals(model).items():
        target = TARGETS[name]
        shown = f"{name} (hf)" if target is _hf(model) else name
        yield f"{shown}: {target.runs_in if reason is None else f'no, {reason}'}"


def refusals(model: Architecture) -> dict[str, str | None]:
    """Return for each target the reason why this model cannot be expressed there, None where it can."""
    return {name: target.refusal(model) for name, target in TARGETS.items()}


def _hf(model: Architecture) -> Target | None:
    """Return the target that needs no custom code: the first of this architecture that fits, else its first."""
    candidates = _candidates(model)
    return next((target for target in candidates if target.refusal(model) is None), next(iter(candidates), None))


def _candidates(model: Architecture) -> list[Target]:
    return [target for target in TARGETS.values() if target.hf and target.expresses(model.arch)]
