"""flash-linear-attention's LinearAttention, from `linear_transformer`."""

from __future__ import annotations

from collections.abc import Collection

from lasptrain.architectures.linear_transformer import LinearTransformer
from lasptrain.convert.libraries import fla
from lasptrain.convert.rules import Rule
from lasptrain.convert.target import Json, Target, demand

DEMANDS = fla.DEMANDS | {
    "feature_map": ("elementwise_product", "elu"),
    "norm_q": (False, False),
    "norm_k": (False, False),
}


def config(model: LinearTransformer) -> Json:
    """Return the keys of LinearAttentionConfig."""
    return fla.config(model) | {
        "feature_map": "elu",
        "tie_feature_map_qk": False,
        "norm_q": False,
        "norm_k": False,
        "norm_feature_map": model.normalizer,
    }


def keys(config: Json, where: str) -> Json:
    """Return the model that a LinearAttentionConfig describes."""
    demand(config, DEMANDS, where)
    normalizer = config.get("norm_feature_map", False)
    own = {"arch": "linear_transformer", "decay": "none", "normalizer": normalizer}
    return own | fla.sizes(config, heads=4, ratio=4, expand_v=1.0)


def rules(model: LinearTransformer, names: Collection[str]) -> list[Rule]:
    """Rename tensors; decays, which are none, are left out."""
    return fla.rules(model, names, {"attn.norm.weight": "mixer.norm.weight"})


TARGET = Target(
    name="linear_attn",
    arch="linear_transformer",
    runs_in=fla.RUNS_IN,
    advice=fla.ADVICE,
    reasons=fla.reasons,
    model_type="linear_attn",
    loads_as="LinearAttentionForCausalLM",
    config=config,
    generation=fla.GENERATION,
    rules=rules,
    free=fla.FREE,
    embedding=fla.EMBEDDING,
    keys=keys,
    library=fla.FLA,
)
