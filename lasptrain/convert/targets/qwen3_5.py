"""Qwen3_5ForCausalLM of transformers, dense and text only, from `gdn`, with softmax layers or without."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from lasptrain.architectures.gdn import Gdn
from lasptrain.convert.libraries.servers import llama_cpp, sglang, vllm
from lasptrain.convert.libraries.transformers import (
    EMBEDDING,
    FULL,
    MLP,
    NORM,
    NORMS,
    SIZES,
    TRANSFORMERS,
    kinds,
    refuse_unknown,
    silent,
    softmax_keys,
    without_silent,
)
from lasptrain.convert.rules import Rule, ends, renamed, rows, rows_by_head, shaped
from lasptrain.convert.target import Demands, Json, Target, demand, unlike_softmax

DEMANDS: Demands = {
    "hidden_act": ("silu", "silu"),
    "attention_bias": (False, False),
    "attn_output_gate": (True, True),
    "output_gate_type": ("swish", "swish"),
}
SOFTMAX_IS = {"qk_norm": "head", "softmax_gate": True, "softmax_norm": "before", "sliding_window": None}
FREE = ("mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")
READ = (*SIZES, *DEMANDS, "partial_rotary_factor", "full_attention_interval")
ROPE = ("rope_type", "rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")  # mrope: of images
OUTER = (
    *("text_config", "vision_config", "image_token_id", "video_token_id"),
    *("vision_start_token_id", "vision_end_token_id", "language_model_only"),
)
ROUNDED = "`dt_bias` is rounded"
PART = 0.25  # of a head's channels that are rotated, where a configuration does not say
SILENT = {"head_dim": 64, "num_key_value_heads": 1}
LINEAR_NAMES = {
    "in_proj_z.weight": "gate.weight",
    "in_proj_b.weight": "beta.weight",
    "in_proj_a.weight": "decay_proj.weight",
    "out_proj.weight": "out.weight",
}
SOFTMAX_NAMES = {
    "k_proj.weight": "k.weight",
    "v_proj.weight": "v.weight",
    "o_proj.weight": "out.weight",
    "q_norm.weight": "q_norm.weight",
    "k_norm.weight": "k_norm.weight",
}


def reasons(model: Gdn) -> Iterator[str]:
    """Yield mixers and softmax layers of another kind."""
    yield from unlike_softmax(model, SOFTMAX_IS)
    if model.softmax and model.rotary and int(model.head_dim * model.rotary_fraction) != model.rotated:
        yield f"it rotates int({model.rotary_fraction:g} × {model.head_dim}) channels, our model {model.rotated}"
    if not model.conv:
        yield "its q, k and v pass a convolution, model.conv is 0"
    if model.gate != "silu":
        yield f"its gate is silu, not {model.gate}"
    if model.negative_eigenvalues:
        yield "its beta is below 1, model.negative_eigenvalues is true"
    if not model.centred_norms:
        yield "its norms multiply by 1 + weight, model.centred_norms is false"
    if model.output_eps != model.norm_eps:
        yield f"its norms have one eps, model.output_norm_eps is {model.output_eps:g}, not {model.norm_eps:g}"


def config(model: Gdn) -> Json:
    """Return the keys of Qwen3_5TextConfig.

    Of no positions it knows one form only, a part of zero channels. The interval of regular stacks is for llama.cpp.
    """
    layers = kinds(model.layers, model.softmax)
    fraction = model.rotary_fraction if model.rotary else 0.0
    fraction = fraction if model.softmax else PART
    full = [i for i, kind in enumerate(layers) if kind == FULL]
    step = full[0] + 1
    found: Json = {
        "hidden_size": model.dim,
        "intermediate_size": model.mlp,
        "num_hidden_layers": len(layers),
        "layer_types": layers,
        "num_attention_heads": model.query_heads,
        "num_key_value_heads": model.kv_heads or model.query_heads,
        "head_dim": model.head_dim,
        "linear_num_key_heads": model.Hk,
        "linear_num_value_heads": model.heads,
        "linear_key_head_dim": model.K,
        "linear_value_head_dim": model.V,
        "linear_conv_kernel_dim": model.conv,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": model.rotary or 10000.0,
            "partial_rotary_factor": fraction,
        },
        "partial_rotary_factor": fraction,
        "attention_bias": False,
        "attn_output_gate": True,
        "mamba_ssm_dtype": "float32",  # of states, in vLLM and SGLang
        "rms_norm_eps": model.norm_eps,
        "hidden_act": "silu",
    }
    found |= {"full_attention_interval": step} if full == list(range(step - 1, len(layers), step)) else {}
    return found if model.softmax else found | SILENT


def _positions(model: Gdn, tokenizer: str) -> Iterator[str]:
    """Yield softmax layers without positions, whose form transformers alone reads."""
    if model.softmax and model.rotary is None:
        yield "its softmax layers are rotary, model.rotary is null"


def _llama_cpp(model: Gdn, tokenizer: str) -> Iterator[str]:
    """Yield what its class has not."""
    yield from _positions(model, tokenizer)
    if model.K != model.V:
        yield f"key dim {model.K} and value dim {model.V} differ"


def keys(config: Json, where: str) -> Json:
    """Return the model that a Qwen3_5TextConfig describes."""
    refuse_unknown(config, (*READ, *FREE), where)
    refuse_unknown(config.get("rope_parameters") or {}, ROPE, f"{where}: rope_parameters")
    demand(config, DEMANDS, where)
    layers, heads = config.get("num_hidden_layers", 32), config.get("num_attention_heads", 16)
    interval = config.get("full_attention_interval", 4)
    every = kinds(layers, range(interval - 1, layers, interval))[:layers]
    softmax = [i for i, kind in enumerate(config.get("layer_types") or every) if kind == FULL]
    found = {
        "arch": "gdn",
        "dim": config.get("hidden_size", 4096),
        "layers": layers,
        "heads": config.get("linear_num_value_heads", 32),
        "key_heads": config.get("linear_num_key_heads", 16),
        "key_dim": config.get("linear_key_head_dim", 128),
        "value_dim": config.get("linear_value_head_dim", 128),
        "mlp": config.get("intermediate_size", 12288),
        "conv": config.get("linear_conv_kernel_dim", 4),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "centred_norms": True,
        "decay": "paper",
        "tie": config.get("tie_word_embeddings", False),
    }
    if not softmax:
        return found
    ropes: Json = config.get("rope_parameters") or config.get("rope_scaling") or {}
    part: Any = ropes.get("partial_rotary_factor", config.get("partial_rotary_factor", PART))
    found |= softmax_keys({"num_key_value_heads": 4} | config, softmax, heads, where, rotary=part > 0)
    found |= {"rotary_fraction": float(part)} if part else {}
    found |= {"softmax_heads": heads, "softmax_dim": config.get("head_dim", 256)}
    return found | {"qk_norm": "head", "softmax_gate": True}


def rules(model: Gdn, names: Collection[str]) -> list[Rule]:
    """Rename tensors, with q, k and v in one, and those of a softmax layer's queries and gate by head."""
    table = ends(EMBEDDING, NORM, tie=model.tie)
    for i in range(model.layers):
        own, to = f"layers.{i}.", f"model.layers.{i}."
        table += renamed(NORMS | MLP, to, own)
        if i in model.softmax:
            table += _softmax(model, f"{to}self_attn.", f"{own}attn.")
        else:
            table += _linear(model, f"{to}linear_attn.", f"{own}mixer.")
    return table if model.softmax else table + _silent(model)


def _softmax(model: Gdn, to: str, own: str) -> list[Rule]:
    both = [f"{own}q.weight", f"{own}gate.weight"]
    return [rows_by_head(f"{to}q_proj.weight", both, model.query_heads), *renamed(SOFTMAX_NAMES, to, own)]


def _linear(model: Gdn, to: str, own: str) -> list[Rule]:
    return [
        rows(f"{to}in_proj_qkv.weight", *(f"{own}{part}.weight" for part in "qkv")),
        *renamed(LINEAR_NAMES, to, own),
        shaped(f"{to}conv1d.weight", f"{own}conv.weight", (model.channels, 1, model.conv)),
        rows(f"{to}norm.weight", f"{own}norm.weight", full_precision=True),
        rows(f"{to}dt_bias", f"{own}decay.bias", full_precision=True),
        rows(f"{to}A_log", f"{own}decay.log_slope", full_precision=True),
    ]


def _silent(model: Gdn) -> list[Rule]:
    """A softmax layer of zeros: cached tokens are counted there."""
    dim, head = model.dim, SILENT["head_dim"]
    wide, narrow = model.query_heads * head, SILENT["num_key_value_heads"] * head
    zeros = {
        "self_attn.q_proj": (2 * wide, dim),
        "self_attn.k_proj": (narrow, dim),
        "self_attn.v_proj": (narrow, dim),
        "self_attn.o_proj": (dim, wide),
        "self_attn.q_norm": (head,),
        "self_attn.k_norm": (head,),
        "mlp.gate_proj": (model.mlp, dim),
        "mlp.up_proj": (model.mlp, dim),
        "mlp.down_proj": (dim, model.mlp),
        "input_layernorm": (dim,),
        "post_attention_layernorm": (dim,),
    }
    return silent(f"model.layers.{model.layers}.", zeros, {})


def unwrapped(config: Json, where: str) -> Json:
    """Return the text model's part of the configuration of a model that sees, too."""
    if "text_config" not in config:
        return config
    refuse_unknown(config, OUTER, where)
    text: Json = config["text_config"]
    return {"tie_word_embeddings": config.get("tie_word_embeddings", False)} | text


def canonical(name: str) -> str | None:
    """Return the text model's name of a tensor of a model that sees, too; those that see or draft have none."""
    if name.startswith(("model.visual.", "mtp.")):
        return None
    return name.replace("model.language_model.", "model.", 1)


TARGET = Target(
    name="qwen3_5",
    arch="gdn",
    hf=True,
    runs_in="transformers",
    services=(vllm(ROUNDED, _positions), sglang(ROUNDED, _positions), llama_cpp(_llama_cpp, flags=" --no-mtp")),
    advice="Needs transformers 5 or later. Load it in fp32: the class takes bf16 for all of its tensors, `A_log` and "
    "`dt_bias` too, which alone moves logits by about 1 %.",
    reasons=reasons,
    model_type="qwen3_5_text",
    loads_as="Qwen3_5ForCausalLM",
    config=config,
    rules=rules,
    also=("qwen3_5",),
    unwrapped=unwrapped,
    canonical=canonical,
    free=FREE,
    embedding=EMBEDDING,
    keys=keys,
    reading=without_silent,
    library=TRANSFORMERS,
    reaches=("linear_conv_kernel_dim",),
)
