"""KimiLinearForCausalLM of transformers without experts, from `kda` without softmax layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from lasptrain.architectures.kda import Kda
from lasptrain.convert.libraries.servers import llama_cpp, nothing, sglang, vllm
from lasptrain.convert.libraries.transformers import (
    EMBEDDING,
    FULL,
    LINEAR,
    MLP,
    NORM,
    NORMS,
    SIZES,
    TRANSFORMERS,
    kinds,
    refuse_unknown,
    silent,
    without_silent,
)
from lasptrain.convert.rules import Rule, convolutions, copies, ends, renamed, rows, shaped
from lasptrain.convert.target import Demands, Json, Target, demand
from lasptrain.errors import ConvertError

DEMANDS: Demands = {
    "hidden_act": ("silu", "silu"),
    "attention_bias": (False, False),
    "tie_word_embeddings": (False, False),
    "q_lora_rank": (None, None),
    "mla_use_nope": (True, True),
    "moe_layer_freq": (1, 1),
}
LATENT = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}  # of the silent layer
ROUNDED = "matrices are rounded, `A_log` and `dt_bias` are not"
GATED_EPS = 1e-5  # of vLLM, whatever the configuration says
NO_EXPERTS = {  # llama.cpp asks for these even where there are none
    "moe_intermediate_size": 1,
    "num_shared_experts": 0,
    "routed_scaling_factor": 1.0,
    "moe_router_activation_func": "sigmoid",
}
FLAT = {"linear_head_dim": "head_dim", "linear_num_heads": "num_heads"}
FLAT["linear_conv_kernel_dim"] = "short_conv_kernel_size"
NESTED = ("kda_layers", "full_attn_layers", *FLAT.values())
EXPERTS = (  # keys that say nothing where all MLPs are dense
    *("moe_intermediate_size", "num_experts", "num_local_experts", "num_experts_per_token", "num_experts_per_tok"),
    *("num_shared_experts", "n_shared_experts", "num_expert_group", "n_group", "topk_group", "routed_scaling_factor"),
    *("moe_renormalize", "norm_topk_prob", "moe_router_activation_func", "use_grouped_topk", "topk_method"),
)
FREE = (*EXPERTS, "qk_head_dim", "head_dim", "model_max_length", "pretraining_tp", "num_nextn_predict_layers")
READ = (*SIZES, *DEMANDS, *LATENT, *FLAT, "mlp_layer_types", "linear_attn_config", "first_k_dense_replace")
LINEAR_NAMES = {
    "q_proj.weight": "q.weight",
    "k_proj.weight": "k.weight",
    "v_proj.weight": "v.weight",
    "f_a_proj.weight": "decay_proj.down.weight",
    "f_b_proj.weight": "decay_proj.up.weight",
    "g_a_proj.weight": "gate.down.weight",
    "g_b_proj.weight": "gate.up.weight",
    "b_proj.weight": "beta.weight",
    "o_norm.weight": "norm.weight",
    "o_proj.weight": "out.weight",
}


def reasons(model: Kda) -> Iterator[str]:
    """Yield softmax layers, and mixers of another kind."""
    if model.softmax:
        yield f"its softmax layers are MLA, which is not trained here; model.softmax = {list(model.softmax)}"
    if model.K != model.V:
        yield f"key dim {model.K} and value dim {model.V} differ"
    if not model.conv:
        yield "its q, k and v pass a convolution, model.conv is 0"
    if model.gate != "sigmoid":
        yield f"its gate is sigmoid, not {model.gate}"


def config(model: Kda) -> Json:
    """Return the keys of KimiLinearConfig, and once more as Moonshot, vLLM, SGLang and llama.cpp read them.

    The class has no tied head: whatever this says, a file without one gets random numbers there.
    """
    layers = kinds(model.layers, ())
    return {
        "hidden_size": model.dim,
        "intermediate_size": model.mlp,
        "num_hidden_layers": len(layers),
        "layer_types": layers,
        "mlp_layer_types": ["dense"] * len(layers),
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.heads,
        "linear_head_dim": model.K,
        "linear_num_heads": model.heads,
        "linear_conv_kernel_dim": model.conv,
        "linear_attn_config": {
            "kda_layers": list(range(1, len(layers))),
            "full_attn_layers": [len(layers)],
            "num_heads": model.heads,
            "head_dim": model.K,
            "short_conv_kernel_size": model.conv,
        },
        **LATENT,
        "q_lora_rank": None,
        "mla_use_nope": True,
        "head_dim": LATENT["qk_nope_head_dim"] + LATENT["qk_rope_head_dim"],
        "first_k_dense_replace": len(layers),
        "moe_layer_freq": 1,
        **NO_EXPERTS,
        "attention_bias": False,
        "rms_norm_eps": model.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }


def _vllm(model: Kda, tokenizer: str) -> Iterator[str]:
    """Yield an eps that its gated norm has not."""
    if model.norm_eps != GATED_EPS:
        yield f"its gated norm has an eps of {GATED_EPS:g}, model.norm_eps is {model.norm_eps:g}"


def keys(config: Json, where: str) -> Json:
    """Return the model that a KimiLinearConfig describes; a softmax layer at its end must be the silent one."""
    refuse_unknown(config, (*READ, *FREE), where)
    nested = config.get("linear_attn_config") or {}
    refuse_unknown(nested, NESTED, f"{where}: linear_attn_config")
    demand(config, DEMANDS, where)
    count = config.get("num_hidden_layers", 27)
    layers = config.get("layer_types") or _pattern(count, nested)
    dense = config.get("mlp_layer_types") or ["dense"] * min(config.get("first_k_dense_replace", 1), count)
    if len(dense) < count or set(dense) != {"dense"}:
        raise ConvertError(f"{where}: mlp_layer_types names experts; expected dense, our model has none")
    softmax = [i for i, kind in enumerate(layers) if kind == FULL]
    if softmax not in ([], [count - 1]) or (softmax and not _like_silent(config)):
        raise ConvertError(f"{where}: layer_types has MLA at {softmax}; expected none, it is not trained here")
    sizes = {key: nested.get(other, config.get(key)) for key, other in FLAT.items()}
    head_dim = sizes["linear_head_dim"] or 128
    return {
        "arch": "kda",
        "dim": config.get("hidden_size", 2304),
        "layers": count - len(softmax),
        "heads": sizes["linear_num_heads"] or 32,
        "key_dim": head_dim,
        "value_dim": head_dim,
        "mlp": config.get("intermediate_size", 9216),
        "conv": sizes["linear_conv_kernel_dim"] or 4,
        "norm_eps": config.get("rms_norm_eps", 1e-5),
        "decay": "paper",
        "tie": False,
    }


def _pattern(count: int, nested: Json) -> list[str]:
    """Return the layers that a configuration without them has: as listed from 1, or a softmax layer every fourth."""
    if {"full_attn_layers", "kda_layers"} <= nested.keys():
        return [FULL if i + 1 in nested["full_attn_layers"] else LINEAR for i in range(count)]
    return [FULL if i and i % 4 == 0 else LINEAR for i in range(count)]


def _like_silent(config: Json) -> bool:
    return all(config.get(key, value) == value for key, value in LATENT.items())


def rules(model: Kda, names: Collection[str]) -> list[Rule]:
    """Rename tensors, with a convolution each for q, k and v; a tied head is written once more."""
    table = ends(EMBEDDING, NORM, tie=False)
    if model.tie:
        table = [rows(NORM, "norm.weight"), copies(EMBEDDING, "lm_head.weight", "embed.weight")]
    for i in range(model.layers):
        own, to = f"layers.{i}.", f"model.layers.{i}."
        table += renamed(NORMS | MLP, to, own) + _linear(model, f"{to}self_attn.", f"{own}mixer.")
    return table + _silent(model)


def _linear(model: Kda, to: str, own: str) -> list[Rule]:
    convs = [f"{to}{part}_conv1d.weight" for part in "qkv"]
    slope = f"{own}decay.log_slope"
    return [
        *renamed(LINEAR_NAMES, to, own),
        convolutions(convs, f"{own}conv.weight", [model.heads * model.K] * 3),
        rows(f"{to}dt_bias", f"{own}decay.bias", full_precision=True),
        shaped(f"{to}A_log", slope, (1, 1, model.heads, 1), full_precision=True),
    ]


def _silent(model: Kda) -> list[Rule]:
    """An MLA layer of zeros: cached tokens are counted there."""
    dim, heads, (rank, plain, shared, values) = model.dim, model.heads, LATENT.values()
    zeros = {
        "self_attn.q_proj": (heads * (plain + shared), dim),
        "self_attn.kv_a_proj_with_mqa": (rank + shared, dim),
        "self_attn.kv_b_proj": (heads * (plain + values), rank),
        "self_attn.o_proj": (dim, heads * values),
        "mlp.gate_proj": (model.mlp, dim),
        "mlp.up_proj": (model.mlp, dim),
        "mlp.down_proj": (dim, model.mlp),
    }
    ones = {"self_attn.kv_a_layernorm": (rank,), "input_layernorm": (dim,), "post_attention_layernorm": (dim,)}
    return silent(f"model.layers.{model.layers}.", zeros, ones)


def canonical(name: str) -> str:
    """Return the released name of a tensor of a dense MLP that transformers' `save_pretrained` wrote."""
    return name.replace(".block_sparse_moe.", ".mlp.")


TARGET = Target(
    name="kimi_linear",
    arch="kda",
    hf=True,
    runs_in="transformers",
    services=(vllm(ROUNDED, _vllm), sglang(ROUNDED), llama_cpp(nothing)),
    advice="Needs transformers 5.24 or later. Load it in fp32: in bf16 decays are rounded, which moves logits by "
    "about 1 %.",
    reasons=reasons,
    model_type="kimi_linear",
    loads_as="KimiLinearForCausalLM",
    config=config,
    rules=rules,
    free=FREE,
    canonical=canonical,
    embedding=EMBEDDING,
    keys=keys,
    reading=without_silent,
    library=TRANSFORMERS,
    reaches=("linear_conv_kernel_dim",),
)
