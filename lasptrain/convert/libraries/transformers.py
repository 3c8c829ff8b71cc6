"""transformers: names and keys of its classes with softmax layers, those of Llama."""

from __future__ import annotations

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
