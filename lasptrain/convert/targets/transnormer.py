"""The layout of OpenNLPLab's TransNormerLLM, from `tnl`; the class travels with the export."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from lasptrain.architectures.tnl import Tnl
from lasptrain.convert.libraries.transformers import EMBEDDING, TRANSFORMERS
from lasptrain.convert.rules import Rule, ends, implied, renamed, rows, shaped
from lasptrain.convert.target import Demands, Json, Target, demand

CODE = "modeling_transnormer.py"
DEMANDS: Demands = {
    "linear_act_fun": ("swish", "swish"),
    "norm_type": ("simplermsnorm", "simplermsnorm"),
    "no_scale_embedding": (False, False),
    "bias": (False, False),
}
NAMES = {
    "token_mixer.out_proj.weight": "mixer.out.weight",
    "channel_mixer.l1.weight": "mlp.gate.weight",
    "channel_mixer.l2.weight": "mlp.up.weight",
    "channel_mixer.l3.weight": "mlp.down.weight",
}


def reasons(model: Tnl) -> Iterator[str]:
    """Yield softmax layers, heads of other widths, and other decays."""
    if model.softmax:
        yield f"its layers are all linear, model.softmax = {list(model.softmax)}"
    if model.heads * model.K != model.dim or model.heads * model.V != model.dim:
        yield "it has key and value dims of model.dim / model.heads only"
    if model.decay != "tnl":
        yield f"model.decay is {model.decay}; its layout means tnl"


def config(model: Tnl) -> Json:
    """Return the keys of TransnormerConfig."""
    module = CODE.removesuffix(".py")
    return {
        "auto_map": {
            "AutoConfig": f"{module}.TransnormerConfig",
            "AutoModelForCausalLM": f"{module}.TransnormerForCausalLM",
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


def keys(config: Json, where: str) -> Json:
    """Return the model that a TransnormerConfig describes."""
    demand(config, DEMANDS, where)
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


def rules(model: Tnl, names: Collection[str]) -> list[Rule]:
    """Rename tensors, with q, k, v and gate in one; decays follow from the number of heads and layers."""
    table = ends(EMBEDDING, None, tie=model.tie)
    for i in range(model.layers):
        own, to = f"layers.{i}.", f"model.layers.{i}."
        qkvu = [f"{own}mixer.{part}.weight" for part in ("q", "k", "v", "gate")]
        table.append(rows(f"{to}token_mixer.qkvu_proj.weight", *qkvu))
        if i in model.lrpe:
            theta = f"{own}mixer.lrpe.theta"
            table.append(shaped(f"{to}token_mixer.lrpe.theta", theta, (model.heads, 1, model.K), full_precision=True))
        table += renamed(NAMES, to, own)
        if (slope := f"{own}mixer.slope") in names:
            table.append(implied(slope))
    return table


TARGET = Target(
    name="transnormer",
    arch="tnl",
    runs_in="transformers with trust_remote_code",
    advice=f"Needs `trust_remote_code=True`: `{CODE}` in this folder is the model.",
    reasons=reasons,
    model_type="transnormer",
    loads_as="TransnormerForCausalLM",
    config=config,
    code=CODE,
    rules=rules,
    free=("auto_map", "init_std"),
    embedding=EMBEDDING,
    keys=keys,
    library=TRANSFORMERS,
)
