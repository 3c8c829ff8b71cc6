"""flash-linear-attention: names, keys and limits that its classes share."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from lasptrain.architectures.base import Architecture
from lasptrain.convert.rules import Rule, ends, implied, renamed
from lasptrain.convert.target import Json, Library

RUNS_IN = "flash-linear-attention"
ADVICE = (
    "Needs flash-linear-attention and a GPU. `generate()` reads its text again at each token (`use_cache` is false in "
    "`generation_config.json`): with transformers 5.24 flash-linear-attention 0.6.0 loses its cache there."
)
GENERATION = {"use_cache": False}  # its cache is lost in generate() of transformers 5.24
FREE = ("attn_mode", "fuse_norm")
DEMANDS = {
    "num_kv_heads": (None, None),
    "hidden_act": ("swish", "swish"),
    "norm_eps": (1e-6, 1e-6),
    "elementwise_affine": (True, True),
    "attn": (None, None),
}
EMBEDDING, NORM = "model.embeddings.weight", "model.norm.weight"
NAMES = {
    "attn_norm.weight": "norm1.weight",
    "mlp_norm.weight": "norm2.weight",
    "attn.q_proj.weight": "mixer.q.weight",
    "attn.k_proj.weight": "mixer.k.weight",
    "attn.v_proj.weight": "mixer.v.weight",
    "attn.o_proj.weight": "mixer.out.weight",
    "mlp.gate_proj.weight": "mlp.gate.weight",
    "mlp.up_proj.weight": "mlp.up.weight",
    "mlp.down_proj.weight": "mlp.down.weight",
}


def prepare(model: Any) -> None:
    """Move a model to the GPU, if there is one, and take the kernels that do not multiply in TF32."""
    import torch

    model.to("cuda" if torch.cuda.is_available() else "cpu")
    for layer in model.model.layers:
        layer.attn.mode = "fused_recurrent"


FLA = Library("fla.models", "flash-linear-attention", gpu_only=True, prepare=prepare)


def reasons(model: Architecture) -> Iterator[str]:
    """Yield softmax layers, and widths that are no fraction of the model's that gives them back when rounded down."""
    if model.softmax:
        yield f"its layers are all linear, model.softmax = {list(model.softmax)}"
    for width in (model.heads * model.K, model.heads * model.V):
        if int(model.dim * (width / model.dim)) != width:
            yield f"{width} channels are no multiple of model.dim = {model.dim} that it can express"


def config(model: Architecture) -> Json:
    """Return the keys of config.json that all classes have."""
    return {
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


def sizes(config: Json, *, heads: int, ratio: int, expand_v: float) -> Json:
    """Return a model's sizes, with the given defaults of a class; the MLP is 2/3 · ratio · width, up to 256 · n."""
    dim, heads = config.get("hidden_size", 2048), config.get("num_heads", heads)
    ratio = config.get("hidden_ratio") or ratio
    return {
        "dim": dim,
        "layers": config.get("num_hidden_layers", 24),
        "heads": heads,
        "key_dim": round(dim * config.get("expand_k", 1.0)) // heads,
        "value_dim": round(dim * config.get("expand_v", expand_v)) // heads,
        "mlp": config.get("intermediate_size") or 256 * math.ceil(int(dim * ratio * 2 / 3) / 256),
        "tie": config.get("tie_word_embeddings", False),
    }


def rules(model: Architecture, names: Collection[str], further: Mapping[str, str]) -> list[Rule]:
    """Return the rules of all classes; `further`: those of a class's own tensors in a layer, each with ours."""
    table = ends(EMBEDDING, NORM, tie=model.tie)
    for i in range(model.layers):
        own = f"layers.{i}."
        table += renamed({**NAMES, **further}, f"model.layers.{i}.", own)
        if (slope := f"{own}mixer.slope") in names:
            table.append(implied(slope))
    return table
