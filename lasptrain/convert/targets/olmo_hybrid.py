"""OlmoHybridForCausalLM of transformers, from `gdn`, with softmax layers or without."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from lasptrain.architectures.gdn import Gdn
from lasptrain.convert.libraries.servers import LLAMA_CPP, SGLANG, unserved, vllm
from lasptrain.convert.libraries.transformers import (
    EMBEDDING,
    FULL,
    MLP,
    NORM,
    NORMS,
    SIZES,
    SOFTMAX,
    TRANSFORMERS,
    kinds,
    refuse_unknown,
    silent,
    softmax_keys,
)
from lasptrain.convert.rules import Rule, convolutions, ends, renamed, rows
from lasptrain.convert.target import Demands, Json, Target, demand, unlike_softmax

DEMANDS: Demands = {
    "hidden_act": ("silu", "silu"),
    "attention_bias": (False, False),
    "linear_use_gate": (True, True),
}
SOFTMAX_IS = {
    "qk_norm": "whole",
    "softmax_gate": False,
    "softmax_norm": "after",
    "rotary_fraction": 1.0,
    "sliding_window": None,
}
UNKNOWN = "it has no OlmoHybridForCausalLM; one with the keys of Qwen3.5 it has"
OUTPUT_EPS = 1e-5  # of the gated norm, whatever the configuration says
READ = (*SIZES, *DEMANDS, "linear_allow_neg_eigval")
FREE = ("linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max", "linear_dt_init_floor")
LINEAR_NAMES = {
    "q_proj.weight": "q.weight",
    "k_proj.weight": "k.weight",
    "v_proj.weight": "v.weight",
    "g_proj.weight": "gate.weight",
    "b_proj.weight": "beta.weight",
    "a_proj.weight": "decay_proj.weight",
    "o_norm.weight": "norm.weight",
    "o_proj.weight": "out.weight",
}
NORMS_AFTER = {"post_attention_layernorm.weight": "norm1.weight", "post_feedforward_layernorm.weight": "norm2.weight"}
QK_NORMS = {"self_attn.q_norm.weight": "attn.q_norm.weight", "self_attn.k_norm.weight": "attn.k_norm.weight"}


def reasons(model: Gdn) -> Iterator[str]:
    """Yield mixers and softmax layers of another kind."""
    yield from unlike_softmax(model, SOFTMAX_IS)
    if model.softmax and model.query_channels != model.dim:
        yield f"its softmax layers have model.dim = {model.dim} channels, not {model.query_channels}"
    if not model.mixers:
        yield "it has at least one linear layer"
    if not model.conv:
        yield "its q, k and v pass a convolution, model.conv is 0"
    if model.gate != "silu":
        yield f"its gate is silu, not {model.gate}"
    if model.centred_norms:
        yield "its norms multiply by their weight, model.centred_norms is true"
    if model.output_eps != OUTPUT_EPS:
        yield f"its gated norm has an eps of {OUTPUT_EPS:g}, model.output_norm_eps means {model.output_eps:g}"


def config(model: Gdn) -> Json:
    """Return the keys of OlmoHybridConfig.

    Of no positions it knows one form only, a base of null: other ways to leave them out mean a base of 10,000.
    """
    layers = kinds(model.layers, model.softmax)
    return {
        "hidden_size": model.dim,
        "intermediate_size": model.mlp,
        "num_hidden_layers": len(layers),
        "layer_types": layers,
        "num_attention_heads": model.query_heads if model.softmax else _silent_heads(model),
        "num_key_value_heads": (model.kv_heads or model.query_heads) if model.softmax else 1,
        "linear_num_key_heads": model.Hk,
        "linear_num_value_heads": model.heads,
        "linear_key_head_dim": model.K,
        "linear_value_head_dim": model.V,
        "linear_conv_kernel_dim": model.conv,
        "linear_allow_neg_eigval": model.negative_eigenvalues,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary if model.softmax else None},
        "attention_bias": False,
        "rms_norm_eps": model.norm_eps,
        "hidden_act": "silu",
    }


def _silent_heads(model: Gdn) -> int:
    """Return the heads of the silent layer: of 128 channels where that fits, as kernels have them."""
    return 1 if model.dim % 128 else model.dim // 128


def keys(config: Json, where: str) -> Json:
    """Return the model that an OlmoHybridConfig describes; no `rope_parameters` are no positions, as in releases."""
    refuse_unknown(config, (*READ, *FREE), where)
    refuse_unknown(config.get("rope_parameters") or {}, ("rope_type", "rope_theta"), f"{where}: rope_parameters")
    demand(config, DEMANDS, where)
    layers, heads = config.get("num_hidden_layers", 32), config.get("num_attention_heads", 30)
    dim = config.get("hidden_size", 3840)
    softmax = [i for i, kind in enumerate(config.get("layer_types") or _pattern(layers)) if kind == FULL]
    key_heads = config.get("linear_num_key_heads") or heads
    key_dim = config.get("linear_key_head_dim") or int(0.75 * dim / key_heads)
    base = (config.get("rope_parameters") or {}).get("rope_theta", config.get("rope_theta"))
    found = {
        "arch": "gdn",
        "dim": dim,
        "layers": layers,
        "heads": config.get("linear_num_value_heads") or heads,
        "key_heads": key_heads,
        "key_dim": key_dim,
        "value_dim": config.get("linear_value_head_dim") or 2 * key_dim,
        "mlp": config.get("intermediate_size", 11008),
        "conv": config.get("linear_conv_kernel_dim", 4),
        "negative_eigenvalues": config.get("linear_allow_neg_eigval", True),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "output_norm_eps": OUTPUT_EPS,
        "decay": "paper",
        "tie": config.get("tie_word_embeddings", False),
    }
    demand(config, {"head_dim": (None, dim // heads)} if config.get("head_dim") else {}, where)
    found |= softmax_keys(config, softmax, heads, where, rotary=base is not None)
    return found | {"softmax_heads": heads, "qk_norm": "whole", "softmax_norm": "after"} if softmax else found


def _pattern(layers: int) -> list[str]:
    """Return the layers that a configuration without them has: a softmax layer every fourth, at least one."""
    every = range(3, layers, 4) or [layers - 1]
    return kinds(layers, every)


def rules(model: Gdn, names: Collection[str]) -> list[Rule]:
    """Rename tensors, with a convolution each for q, k and v."""
    table = ends(EMBEDDING, NORM, tie=model.tie)
    for i in range(model.layers):
        own, to = f"layers.{i}.", f"model.layers.{i}."
        if i in model.softmax:
            table += renamed(SOFTMAX | QK_NORMS | NORMS_AFTER | MLP, to, own)
        else:
            table += _linear(model, f"{to}linear_attn.", f"{own}mixer.") + renamed(NORMS | MLP, to, own)
    return table if model.softmax else table + _silent(model)


def _linear(model: Gdn, to: str, own: str) -> list[Rule]:
    keys, values = model.Hk * model.K, model.heads * model.V
    convs = [f"{to}{part}_conv1d.weight" for part in "qkv"]
    return [
        *renamed(LINEAR_NAMES, to, own),
        convolutions(convs, f"{own}conv.weight", (keys, keys, values)),
        rows(f"{to}dt_bias", f"{own}decay.bias", full_precision=True),
        rows(f"{to}A_log", f"{own}decay.log_slope", full_precision=True),
    ]


def _silent(model: Gdn) -> list[Rule]:
    """A softmax layer whose norms, behind its parts, multiply by zero: cached tokens are counted there."""
    dim, head = model.dim, model.dim // _silent_heads(model)
    zeros = {
        "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (head, dim),
        "self_attn.v_proj": (head, dim),
        "self_attn.o_proj": (dim, dim),
        "mlp.gate_proj": (model.mlp, dim),
        "mlp.up_proj": (model.mlp, dim),
        "mlp.down_proj": (dim, model.mlp),
        "post_attention_layernorm": (dim,),
        "post_feedforward_layernorm": (dim,),
    }
    return silent(f"model.layers.{model.layers}.", zeros, {"self_attn.q_norm": (dim,), "self_attn.k_norm": (head,)})


OTHER_NAMES = {
    ".attention_layer_norm.": ".input_layernorm.",
    ".feedforward_layer_norm.": ".post_attention_layernorm.",
    ".linear_attn.out_proj.": ".linear_attn.o_proj.",
    ".linear_attn.norm.": ".linear_attn.o_norm.",
}


def canonical(name: str) -> str:
    """Return the released name of a tensor that transformers' `save_pretrained` or OLMo-core's converter wrote."""
    for other, released in OTHER_NAMES.items():
        name = name.replace(other, released)
    return name


TARGET = Target(
    name="olmo_hybrid",
    arch="gdn",
    hf=True,
    runs_in="transformers",
    services=(vllm("`A_log` and `dt_bias` are rounded"), unserved(SGLANG, UNKNOWN), unserved(LLAMA_CPP, UNKNOWN)),
    advice="Needs transformers 5 or later. Load it in fp32: bf16 rounds its decays, which moves logits by about 1 %.",
    reasons=reasons,
    model_type="olmo_hybrid",
    loads_as="OlmoHybridForCausalLM",
    config=config,
    rules=rules,
    free=FREE,
    canonical=canonical,
    embedding=EMBEDDING,
    keys=keys,
    library=TRANSFORMERS,
    reaches=("linear_conv_kernel_dim",),
)
