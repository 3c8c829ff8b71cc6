"""Contents of a target's config.json, with which it computes the same as our model. No torch."""

from __future__ import annotations

from typing import Any

from lasptrain.errors import ConvertError
from lasptrain.recipe.sections import Model

Json = dict[str, Any]
UNBOUNDED = 1 << 24  # positions of a model without a limit; other runtimes refuse longer prompts

# Keys that do not change the result.
_FREE = {"architectures", "auto_map", "dtype", "max_position_embeddings", "slopes"}
_FREE |= {"attn_mode", "fuse_norm", "hidden_act", "initializer_range", "init_std"}


def config(target: str, model: Model, special: Json, dtype: str, window: int = UNBOUNDED) -> Json:
    """Return the config.json of `model` for a target of `targets.RUNS_IN`.

    Args:
        special: its keys for the ids of tokens that begin, end and pad a text.
        dtype: of the tensors, such as float32.
        window: tokens of a training window, beyond which softmax layers never saw.
    """
    common: Json = {"vocab_size": model.vocab, "tie_word_embeddings": model.tie, "dtype": dtype} | special
    common |= {"max_position_embeddings": window if model.softmax else UNBOUNDED}
    match target:
        case "granitemoehybrid":
            return common | _granite(model)
        case "linear_attn":
            return common | _fla(model, "LinearAttentionForCausalLM") | _linear_attn(model)
        case "minimax":
            return common | _minimax(model)
        case "retnet":
            return common | _fla(model, "RetNetForCausalLM") | {"feature_map": None, "use_output_gate": True}
        case "transnormer":
            return common | _transnormer(model)
    return common | {"model_type": "lasptrain", "model": model.model_dump(mode="json")}


def generation(target: str) -> Json:
    """Return the keys of generation_config.json besides special tokens.

    flash-linear-attention reads its text again at each token: its cache is lost in generate() of transformers 5.24.
    """
    return {"do_sample": False} | ({"use_cache": False} if target in ("linear_attn", "retnet") else {})


def check(target: str, found: Json, model: Model, where: str) -> None:
    """Raise ConvertError where a config.json differs from ours for `model` in a key that both have."""
    kind = found.get("model_type")
    expected = config(target, model, {}, "")
    for key, value in expected.items():
        if key not in _FREE and key in found and found[key] != value:
            raise ConvertError(f"{where}: {key} is {found[key]!r}, the recipe's model has {value!r}")
    if kind != expected["model_type"]:
        raise ConvertError(f"{where}: model_type is {kind!r}; expected {expected['model_type']!r}")


def check_compatible(target: str, theirs: Model, ours: Model, where: str) -> None:
    """Raise ConvertError where a folder's model and the recipe's differ in a key of `target`'s config.json."""
    check(target, config(target, theirs, {}, ""), ours, where)


def _granite(model: Model) -> Json:
    kinds = ["attention" if i in model.softmax else "mamba" for i in range(model.layers)]
    kinds += [] if model.softmax else ["attention"]  # the silent one, see `tables.granite`
    return {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        "hidden_size": model.dim,
        "num_hidden_layers": len(kinds),
        "layer_types": kinds,
        "num_attention_heads": model.heads,
        "num_key_value_heads": (model.kv_heads or model.heads) if model.softmax else 1,
        "intermediate_size": model.mlp,
        "shared_intermediate_size": model.mlp,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "mamba_n_heads": model.heads,
        "mamba_n_groups": model.heads,
        "mamba_d_state": model.K,
        "mamba_d_head": model.V,
        "mamba_expand": model.heads * model.V // model.dim,
        "mamba_d_conv": model.conv or 4,
        "mamba_chunk_size": 256,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "attention_multiplier": (model.dim // model.heads) ** -0.5,
        "attention_bias": False,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        **_positions(model),
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    }


def _minimax(model: Model) -> Json:
    """Keys as transformers names them, and as vLLM and MiniMax's own code do, which have other names for the same."""
    kinds = [int(i in model.softmax) for i in range(model.layers)]
    factors: Json = {}
    for name, older in (("linear_attn", "linear_attention"), ("full_attn", "full_attention"), ("mlp", "mlp")):
        for letter, factor in (("alpha", model.residual), ("beta", 1.0)):
            factors |= {f"{name}_{letter}_factor": factor, f"layernorm_{older}_{letter}": factor}
    return {
        "architectures": ["MiniMaxForCausalLM"],
        "model_type": "minimax",
        "hidden_size": model.dim,
        "num_hidden_layers": model.layers,
        "layer_types": ["full_attention" if kind else "linear_attention" for kind in kinds],
        "attn_type_list": kinds,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads or model.heads,
        "head_dim": model.K,
        "rotary_dim": model.K,
        "intermediate_size": model.mlp // 2,
        "num_local_experts": 2,
        "num_experts_per_tok": 2,
        "sliding_window": model.sliding_window,
        "block_size": 256,
        "postnorm": True,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        **_rope(model.rotary or 10000.0),
        **factors,
    }


def _positions(model: Model) -> Json:
    if not model.softmax or model.rotary is None:
        return {"position_embedding_type": None}
    return {"position_embedding_type": "rope"} | _rope(model.rotary)


def _rope(base: float) -> Json:
    """Rotary positions, in the keys of transformers 5 and of older readers."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": base}, "rope_theta": base}


def _fla(model: Model, architecture: str) -> Json:
    return {
        "architectures": [architecture],
        "model_type": {"RetNetForCausalLM": "retnet"}.get(architecture, "linear_attn"),
        "attn_mode": "chunk",
        "hidden_size": model.dim,
        "num_hidden_layers": model.layers,
        "num_heads": model.heads,
        "num_kv_heads": None,
        "expand_k": model.heads * model.K / model.dim,
        "expand_v": model.heads * model.V / model.dim,
        "hidden_ratio": None,
        "intermediate_size": model.mlp,
        "hidden_act": "swish",
        "norm_eps": 1e-6,
        "elementwise_affine": True,
        "fuse_norm": True,
        "attn": None,
    }


def _linear_attn(model: Model) -> Json:
    return {
        "feature_map": "elu",
        "tie_feature_map_qk": False,
        "norm_q": False,
        "norm_k": False,
        "norm_feature_map": model.normalizer,
    }


def _transnormer(model: Model) -> Json:
    return {
        "architectures": ["TransnormerForCausalLM"],
        "model_type": "transnormer",
        "auto_map": {
            "AutoConfig": "modeling_transnormer.TransnormerConfig",
            "AutoModelForCausalLM": "modeling_transnormer.TransnormerForCausalLM",
        },
        "decoder_embed_dim": model.dim,
        "decoder_layers": model.layers,
        "decoder_attention_heads": model.heads,
        "hidden_dim": model.dim,
        "glu_dim": model.mlp,
        "linear_act_fun": "swish",
        "norm_type": "simplermsnorm",
        "linear_use_lrpe_list": [int(i in model.lrpe) for i in range(model.layers)],
        "no_scale_embedding": False,
        "bias": False,
        "init_std": 0.02,
    }
