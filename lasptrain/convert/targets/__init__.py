"""Export targets, one file each, and the one that a model goes to. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

from lasptrain.architectures.base import Architecture
from lasptrain.convert.libraries.servers import SOURCES
from lasptrain.convert.target import Service, Target
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
    target = _hf(model) if name == "hf" else TARGETS.get(name)
    possible = ", ".join(target for target, reason in refusals(model).items() if reason is None)
    if target is None and name == "hf":
        raise ConvertError(f"--to hf: arch {model.arch} has no class there without custom code; expected {possible}")
    if target is None:
        raise RecipeError(f"--to {name}: unknown; expected {possible}")
    reason = refusals(model)[target.name]
    if reason is not None:
        reason = _unfit(model) if name == "hf" else reason
        raise ConvertError(f"--to {name}: {reason}; expected {possible}")
    return target


def lines(model: Architecture) -> Iterator[str]:
    """Yield a line for each target of the arch: its library, or the reason why not; the others in one line.

    `hf` stands beside its target.
    """
    others = [name for name, target in TARGETS.items() if not target.expresses(model.arch)]
    for name, reason in refusals(model).items():
        if name in others:
            continue
        target = TARGETS[name]
        shown = f"{name} (hf)" if target is _hf(model) else name
        yield f"{shown}: {target.runs_in if reason is None else f'no, {reason}'}"
    if others:
        yield f"of another arch than {model.arch}: {', '.join(others)}"


def served(model: Architecture, tokenizer: str) -> dict[str, Service | str]:
    """Return for each server how it serves this model's export to `hf`, or the reason why it does not."""
    return {server: _service(server, model, tokenizer) for server in SOURCES}


def servers(model: Architecture, tokenizer: str) -> Iterator[str]:
    """Yield a line for servers: the class as which they serve the model, or the reason why not."""
    target, told = _hf(model), dict[str, list[str]]()
    for server, found in served(model, tokenizer).items():
        if isinstance(found, str) or target is None:
            line = f"no, {found}"
        else:
            line = ", ".join(filter(None, ("yes", f"as {target.loads_as}", found.proviso(tokenizer))))
        told.setdefault(line, []).append(server)
    for line, names in told.items():
        yield f"{', '.join(names)}: {line}"


def _service(server: str, model: Architecture, tokenizer: str) -> Service | str:
    target = _hf(model)
    services = {service.server: service for service in target.services} if target else {}
    if target is None or server not in services:
        return f"it has no class for arch {model.arch}"
    if target.refusal(model) is not None:
        return f"--to hf: {_unfit(model)}"
    return next(services[server].reasons(model, tokenizer), services[server])


def _unfit(model: Architecture) -> str:
    """Return why each class of transformers for this architecture cannot express the model."""
    found = {target.name: target.refusal(model) for target in _candidates(model)}
    if len(found) == 1:
        return str(*found.values())
    return "; ".join(f"{name}: {reason}" for name, reason in found.items())


def refusals(model: Architecture) -> dict[str, str | None]:
    """Return for each target the reason why this model cannot be expressed there, None where it can."""
    return {name: target.refusal(model) for name, target in TARGETS.items()}


def _hf(model: Architecture) -> Target | None:
    """Return the target that needs no custom code: the first of this architecture that fits, else its first."""
    candidates = _candidates(model)
    return next((target for target in candidates if target.refusal(model) is None), next(iter(candidates), None))


def _candidates(model: Architecture) -> list[Target]:
    return [target for target in TARGETS.values() if target.hf and target.expresses(model.arch)]
