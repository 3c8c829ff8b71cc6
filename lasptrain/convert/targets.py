"""Export formats, and the reasons why a model does not fit one. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from lasptrain.errors import ConvertError, RecipeError
from lasptrain.recipe.sections import Model

WITHOUT_CUSTOM_CODE = {"ssd": "granitemoehybrid", "minimax": "minimax"}  # the target `hf`, by architecture
RUNS_IN = {
    "safetensors": "lasptrain",
    "granitemoehybrid": "transformers; not tried: vLLM, SGLang, llama.cpp",
    "minimax": "transformers; not tried: vLLM, SGLang",
    "linear_attn": "flash-linear-attention",
    "retnet": "flash-linear-attention",
    "transnormer": "transformers with trust_remote_code",
}


def resolve(name: str, model: Model) -> str:
    """Return the target of `--to name` for this model. RecipeError for an unknown name, ConvertError with the reason
    where the model cannot be expressed there.
    """
    target = WITHOUT_CUSTOM_CODE.get(model.arch) if name == "hf" else name
    possible = ", ".join(target for target, reason in refusals(model).items() if reason is None)
    if target is None:
        raise ConvertError(f"--to hf: arch {model.arch} has no class there without custom code; expected {possible}")
    if target not in RUNS_IN:
        raise RecipeError(f"--to {name}: unknown; expected {possible}")
    reason = refusals(model)[target]
    if reason is not None:
        raise ConvertError(f"--to {name}: {reason}; expected {possible}")
    return target


def lines(model: Model) -> Iterator[str]:
    """Yield a line for each target: its library, or the reason why the model does not fit; `hf` beside its target."""
    for target, reason in refusals(model).items():
        name = f"{target} (hf)" if WITHOUT_CUSTOM_CODE.get(model.arch) == target else target
        yield f"{name}: {RUNS_IN[target] if reason is None else f'no, {reason}'}"


def refusals(model: Model) -> dict[str, str | None]:
    """Return for each target the reason why this model cannot be expressed there, None where it can."""
    return {target: next(_reasons(target, model), None) for target in RUNS_IN}


def _reasons(target: str, model: Model) -> Iterator[str]:
    arch = {
        "granitemoehybrid": "ssd",
        "minimax": "minimax",
        "linear_attn": "linear_transformer",
        "retnet": "retnet",
        "transnormer": "tnl",
    }.get(target, model.arch)
    if model.arch != arch:
        yield f"{target} is arch {arch}, not {model.arch}"
    wide = model.heads * model.V
    match target:
        case "granitemoehybrid":
            if model.softmax and model.sliding_window is not None:
                yield f"its softmax layers see all tokens, not model.sliding_window = {model.sliding_window}"
            if wide % model.dim:
                yield f"model.heads × value dim = {wide} is no multiple of model.dim = {model.dim}"
            if model.dim % model.heads:
                yield f"model.heads = {model.heads} do not divide model.dim = {model.dim}"
            if model.K & (model.K - 1):
                yield f"key dim {model.K} is no power of two"
        case "minimax":
            if model.decay != "minimax_hf":
                yield f"model.decay is {model.decay}; it computes minimax_hf"
            if model.K != model.V:
                yield f"key dim {model.K} and value dim {model.V} differ"
            if model.softmax and model.dim // model.heads != model.K:
                yield f"key dim {model.K} is not that of its softmax layers, {model.dim // model.heads}"
            if model.softmax and model.rotary is None:
                yield "its softmax layers are rotary, model.rotary is null"
            if model.softmax and 0 not in model.softmax:
                yield f"it counts cached tokens in layer 0, model.softmax = {list(model.softmax)} leaves it out"
            if model.mlp % 2:
                yield f"model.mlp = {model.mlp} has no halves"
        case "linear_attn" | "retnet":
            for width in (model.heads * model.K, wide):
                if int(model.dim * (width / model.dim)) != width:
                    yield f"{width} channels are no multiple of model.dim = {model.dim} that it can express"
            if target == "retnet" and model.decay != "retnet":
                yield f"model.decay is {model.decay}; its kernel computes retnet"
        case "transnormer":
            if model.heads * model.K != model.dim or wide != model.dim:
                yield "it has key and value dims of model.dim / model.heads only"
            if model.decay != "tnl":
                yield f"model.decay is {model.decay}; its layout means tnl"
