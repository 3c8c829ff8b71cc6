"""transformers: names and keys of its classes with softmax layers, those of Llama."""

from __future__ import annotations

from collections.abc import Collection

from lasptrain.architectures.base import Architecture
from lasptrain.convert.rules import Rule, Shapes, constant
from lasptrain.convert.target import Json, Library
from lasptrain.errors import ConvertError

TRANSFORMERS = Library("transformers", "'lasptrain[convert]'")

EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"
NORMS = {"input_layernorm.weight": "norm1.weight", "post_attention_layernorm.weight": "norm2.weight"}
SOFTMAX = {
    "self_attn.q_proj.weight": "attn.q.weight",
    "self_attn.k_proj.weight": "attn.k.weight",
    "self_attn.v_proj.weight": "attn.v.weight",
    "self_attn.o_proj.weight": "attn.out.weight",
}
MLP = {
    "mlp.gate_proj.weight": "mlp.gate.weight",
    "mlp.up_proj.weight": "mlp.up.weight",
    "mlp.down_proj.weight": "mlp.down.weight",
}
LINEAR, FULL = "linear_attention", "full_attention"
SETTINGS = {  # of all configurations: none changes the result
    *("transformers_version", "architectures", "dtype", "torch_dtype", "model_type", "_name_or_path", "auto_map"),
    *("output_hidden_states", "output_attentions", "return_dict", "chunk_size_feed_forward", "is_encoder_decoder"),
    *("id2label", "label2id", "problem_type", "initializer_range", "use_cache", "attention_dropout"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "vocab_size", "tie_word_embeddings"),
}
SIZES = {  # read of stacks with both kinds of layers
    *("hidden_size", "intermediate_size", "num_hidden_layers", "layer_types", "hidden_act", "rms_norm_eps"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias"),
    *("rope_parameters", "rope_scaling", "rope_theta"),
    *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    "linear_conv_kernel_dim",
}


def refuse_unknown(config: Json, read: Collection[str], where: str) -> None:
    """Raise ConvertError for a key that is neither read nor null, false or empty: it may change the result."""
    for key, found in config.items():
        if key not in SETTINGS.union(read) and found is not None and found is not False and found != []:
            raise ConvertError(f"{where}: {key} is {found!r}; expected none, our model knows no such key")


def kinds(layers: int, softmax: Collection[int]) -> list[str]:
    """Return `layer_types`; a stack without softmax layers gets a silent one at its end."""
    found = [FULL if i in softmax else LINEAR for i in range(layers)]
    return found if softmax else [*found, FULL]


def silent(to: str, zeros: Shapes, ones: Shapes) -> list[Rule]:
    """Make a layer that adds nothing: weights of zero, and of one, by name behind the prefix `to`."""
    weights = [(name, shape, 0.0) for name, shape in zeros.items()] + [
        (name, shape, 1.0) for name, shape in ones.items()
    ]
    return [constant(f"{to}{name}.weight", shape, number) for name, shape, number in weights]


def without_silent(table: list[Rule], config: Json, model: Architecture) -> list[Rule]:
    """Return a table for a folder of others whose stack has no silent layer, if it has none."""
    if config.get("num_hidden_layers") != model.layers:
        return table
    return [rule for rule in table if not any(x.startswith(f"model.layers.{model.layers}.") for x in rule.targets)]


def rope(base: float) -> Json:
    """Rotary positions, in the keys of transformers 5 and of older readers."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": base}, "rope_theta": base}


def softmax_keys(
    config: Json, layers: list[int], heads: int, where: str, *, rotary: bool, theta: float = 10000.0
) -> Json:
    """Return the recipe's keys for softmax layers, none if there are no such layers."""
    if not layers:
        return {}
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rotary and (kind := found.get("rope_type", "default")) != "default":
        raise ConvertError(f"{where}: rope_type is {kind!r}; expected 'default', our model has nothing else")
    base = found.get("rope_theta") or config.get("rope_theta") or theta
    return {
        "softmax": layers,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "rotary": float(base) if rotary else None,
    }
