"""Folders that others wrote: the model that a config.json describes, and the differences of its tensors from ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from lasptrain.convert.configs import Json
from lasptrain.convert.tables import Rule, Shapes, rows
from lasptrain.errors import ConvertError
from lasptrain.recipe.sections import Model

COMPUTED = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")  # buffers of minimax, from its configuration
EMBEDDINGS = ("model.embed_tokens.weight", "model.embeddings.weight", "embed.weight")
KINDS = {
    "granitemoehybrid": "granitemoehybrid",
    "minimax": "minimax",
    "linear_attn": "linear_attn",
    "retnet": "retnet",
    "transnormer": "transnormer",
    "lasptrain": "safetensors",
}
"""The target of a `model_type`."""

# By key: the default of the configuration, and the value that our model needs.
_GRANITE: dict[str, tuple[Any, Any]] = {
    "num_local_experts": (8, 0),
    "hidden_act": ("silu", "silu"),
    "rms_norm_eps": (1e-6, 1e-5),
    "attention_bias": (False, False),
    "mamba_conv_bias": (True, True),
    "mamba_proj_bias": (False, False),
}
_MINIMAX = {"hidden_act": ("silu", "silu"), "rms_norm_eps": (1e-5, 1e-5)}
_FLA = {
    "num_kv_heads": (None, None),
    "hidden_act": ("swish", "swish"),
    "norm_eps": (1e-6, 1e-6),
    "elementwise_affine": (True, True),
    "attn": (None, None),
}
_RETNET = _FLA | {
    "feature_map": (None, None),
    "use_short_conv": (False, False),
    "use_output_gate": (True, True),
    "fuse_norm": (True, True),
}
_LINEAR = _FLA | {
    "feature_map": ("elementwise_product", "elu"),
    "norm_q": (False, False),
    "norm_k": (False, False),
}
_TRANSNORMER = {
    "linear_act_fun": ("swish", "swish"),
    "norm_type": ("simplermsnorm", "simplermsnorm"),
    "no_scale_embedding": (False, False),
    "bias": (False, False),
}


def model(config: Json, shapes: Shapes, where: str) -> Model:
    """Return the model that `config` describes, for tensors of these shapes.

    A missing key has its class's default. ConvertError names the key that our models cannot express.
    """
    kind = config.get("model_type")
    try:
        match kind:
            case "granitemoehybrid":
                keys = _granite(config, where)
            case "minimax":
                keys = _minimax(config, where)
            case "linear_attn":
                keys = _linear(config, where)
            case "retnet":
                keys = _retnet(config, where)
            case "transnormer":
                keys = _transnormer(config, where)
            case "lasptrain":
                keys = config["model"]
            case _:
                raise ConvertError(f"{where}: model_type is {kind!r}; expected {', '.join(KINDS)}")
        made = Model.model_validate({"vocab": _rows(shapes, where)} | keys)
    except (KeyError, TypeError, ZeroDivisionError, ValidationError) as error:
        reason = str(error).replace("\n", " ")
        raise ConvertError(f"{where}: describes no model ({type(error).__name__}: {reason})") from None
    for key, text in made.problems():
        raise ConvertError(f"{where}: describes no model of ours: {key}: {text}")
    return made


def _rows(shapes: Shapes, where: str) -> int:
    """Return the rows of the embedding."""
    for name in EMBEDDINGS:
        if name in shapes:
            return shapes[name][0]
    raise ConvertError(f"{where}: no tensor beside it is named {' or '.join(EMBEDDINGS)}")


def _demand(config: Json, demanded: Mapping[str, tuple[Any, Any]], where: str) -> None:
    for key, (default, wanted) in demanded.items():
        if (found := config.get(key, default)) != wanted:
            raise ConvertError(f"{where}: {key} is {found!r}; expected {wanted!r}, our model has nothing else")


def _granite(config: Json, where: str) -> Json:
    _demand(config, _GRANITE, where)
    layers, heads = config.get("num_hidden_layers", 32), config.get("mamba_n_heads", 128)
    kinds = config.get("layer_types") or config.get("layers_block_type") or ["linear_attention"] * layers
    softmax = [i for i, kind in enumerate(kinds) if kind in ("attention", "full_attention")]
    dim = config.get("hidden_size", 4096)
    value_dim = config.get("mamba_d_head", "auto")
    value_dim = config.get("mamba_expand", 2) * dim // heads if value_dim == "auto" else value_dim
    demanded = {"mamba_n_groups": (1, heads)}
    if softmax:
        demanded |= {"num_attention_heads": (32, heads), "head_dim": (dim // heads, dim // heads)}
    _demand(config, demanded, where)
    limit = config.get("time_step_limit")
    if limit is not None and (limit[0] > 0 or str(limit[1]) not in ("inf", "Infinity", "{'__float__': 'Infinity'}")):
        raise ConvertError(f"{where}: time_step_limit is {limit}; expected none, our steps have no limits")
    keys = {
        "arch": "ssd",
        "dim": dim,
        "layers": layers,
        "heads": heads,
        "key_dim": config.get("mamba_d_state", 256),
        "value_dim": value_dim,
        "mlp": config.get("shared_intermediate_size", 1024),
        "conv": config.get("mamba_d_conv", 4),
        "data_dependent": True,
        "decay": "learned",
        "tie": config.get("tie_word_embeddings", False),
    }
    return keys | _softmax(config, softmax, heads, where, rotary=config.get("position_embedding_type") == "rope")


def _softmax(config: Json, layers: list[int], heads: int, where: str, *, rotary: bool, theta: float = 10000.0) -> Json:
    """Return the recipe's keys for softmax layers, none if there are no such layers."""
    if not layers:
        return {}
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rotary and (kind := rope.get("rope_type", "default")) != "default":
        raise ConvertError(f"{where}: rope_type is {kind!r}; expected 'default', our model has nothing else")
    base = rope.get("rope_theta") or config.get("rope_theta") or theta
    return {
        "softmax": layers,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "rotary": float(base) if rotary else None,
    }


def _minimax(config: Json, where: str) -> Json:
    _demand(config, _MINIMAX, where)
    layers, heads = config.get("num_hidden_layers", 32), config.get("num_attention_heads", 32)
    dim = config.get("hidden_size", 4096)
    kinds = config.get("layer_types") or ["linear_attention" if i % 2 else "full_attention" for i in range(layers)]
    softmax = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    experts, asked = config.get("num_local_experts", 8), config.get("num_experts_per_tok", 2)
    if experts not in (1, 2) or asked != experts:
        raise ConvertError(f"{where}: num_local_experts is {experts}, {asked} a token; expected 1 and 1, or 2 and 2")
    key_dim = config.get("head_dim") or dim // heads
    keys = {
        "arch": "minimax",
        "dim": dim,
        "layers": layers,
        "heads": heads,
        "key_dim": key_dim,
        "value_dim": key_dim,
        "mlp": experts * config.get("intermediate_size", 14336),
        "alpha": float(_alpha(config, len(softmax) < layers, bool(softmax), where)),
        "tie": config.get("tie_word_embeddings", False),
    }
    if not softmax:
        return keys
    _demand(config, {"head_dim": (dim // heads, dim // heads)} if config.get("head_dim") else {}, where)
    keys |= _softmax(config, softmax, heads, where, rotary=True, theta=1e6)
    sliding_window = config.get("sliding_window")
    return keys if sliding_window is None else keys | {"sliding_window": sliding_window}


def _alpha(config: Json, linear: bool, softmax: bool, where: str) -> float:
    """Return the one factor of all residuals. ConvertError where they differ, or where branches have factors too."""
    names = [name for name, there in (("linear_attn", linear), ("full_attn", softmax), ("mlp", True)) if there]
    _demand(config, {f"{name}_beta_factor": (1, 1) for name in names}, where)
    alphas = {f"{name}_alpha_factor": config.get(f"{name}_alpha_factor", 1) for name in names}
    if len(set(alphas.values())) > 1:
        raise ConvertError(f"{where}: {', '.join(f'{key} is {value}' for key, value in alphas.items())}; expected one")
    return float(alphas["mlp_alpha_factor"])


def _fla_sizes(config: Json, dim: int, layers: int, heads: int, ratio: int, expand_v: float) -> Json:
    """Return sizes, with the given defaults of a class; the MLP is 2/3 · ratio · width, up to a multiple of 256."""
    dim, layers = config.get("hidden_size", dim), config.get("num_hidden_layers", layers)
    heads = config.get("num_heads", heads)
    ratio = config.get("hidden_ratio") or ratio
    return {
        "dim": dim,
        "layers": layers,
        "heads": heads,
        "key_dim": round(dim * config.get("expand_k", 1.0)) // heads,
        "value_dim": round(dim * config.get("expand_v", expand_v)) // heads,
        "mlp": config.get("intermediate_size") or 256 * math.ceil(int(dim * ratio * 2 / 3) / 256),
        "tie": config.get("tie_word_embeddings", False),
    }


def _linear(config: Json, where: str) -> Json:
    _demand(config, _LINEAR, where)
    normalizer = config.get("norm_feature_map", False)
    keys = {"arch": "linear_transformer", "decay": "none", "normalizer": normalizer}
    return keys | _fla_sizes(config, 2048, 24, 4, 4, 1.0)


def _retnet(config: Json, where: str) -> Json:
    _demand(config, _RETNET, where)
    return {"arch": "retnet"} | _fla_sizes(config, 2048, 24, 8, 2, 2.0)


def _transnormer(config: Json, where: str) -> Json:
    _demand(config, _TRANSNORMER, where)
    layers = config["decoder_layers"]
    flags = config.get("linear_use_lrpe_list") or [1] + [0] * (layers - 1)
    return {
        "arch": "tnl",
        "dim": config["decoder_embed_dim"],
        "layers": layers,
        "heads": config["decoder_attention_heads"],
        "mlp": config["glu_dim"],
        "lrpe": [i for i, flag in enumerate(flags) if flag],
        "tie": config.get("tie_word_embeddings", True),
    }


def table(ours: list[Rule], config: Json, cfg: Model) -> list[Rule]:
    """Return our table of rules, changed to read a folder of others."""
    match config.get("model_type"):
        case "granitemoehybrid":
            return [_multiplied(rule, config, cfg) for rule in ours if not _is_silent(rule, cfg)]
        case "minimax" if config.get("num_local_experts", 8) == 1:
            return [_one_expert(rule, cfg) for rule in ours]
    return ours


def _is_silent(rule: Rule, cfg: Model) -> bool:
    """True for rules of the zero layer that our export adds at the end."""
    return rule.targets[0].startswith(f"model.layers.{cfg.layers}.") if rule.targets else False


def _multiplied(rule: Rule, config: Json, cfg: Model) -> Rule:
    """Fold Granite's factors of embeddings, branches, attention scores and logits into our weights."""
    embed = config.get("embedding_multiplier", 1.0)
    logits = config.get("logits_scaling", 1.0) * (embed if cfg.tie else 1.0)
    branch = config.get("residual_multiplier", 1.0)
    scores = config.get("attention_multiplier", 1.0) * (cfg.dim / cfg.heads) ** 0.5

    def factor(source: str) -> float:
        if source.endswith((".out.weight", ".down.weight")):
            return float(branch)
        exact = {"embed.weight": embed, "norm.weight": 1 / logits}
        return float(scores if source.endswith("attn.q.weight") else exact.get(source, 1.0))

    factors = [factor(source) for source in rule.sources]

    def back(ys: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
        return [x if f == 1 else x * f for x, f in zip(rule.back(ys, shapes), factors, strict=True)]

    return replace(rule, back=back)


def _one_expert(rule: Rule, cfg: Model) -> Rule:
    """Read the MLP from the only expert, and ignore its router, which has no choice."""
    if not rule.targets or ".block_sparse_moe." not in rule.targets[0]:
        return rule
    if rule.sources:
        return rows(rule.targets[0], *rule.sources)
    return replace(rule, to=lambda _: [torch.zeros(1, cfg.dim)], back=lambda _, __: [])


def without_computed(shapes: Shapes) -> Shapes:
    """Drop tensors that a library computes from its configuration but saves nevertheless."""
    return {name: shape for name, shape in shapes.items() if not name.endswith(COMPUTED)}
