"""GraniteMoeHybridForCausalLM of transformers without experts, from `ssd`, with softmax layers or without."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from lasptrain.architectures.ssd import Ssd
from lasptrain.convert.libraries.servers import llama_cpp, sglang, vllm
from lasptrain.convert.libraries.transformers import EMBEDDING, NORM, NORMS, SOFTMAX, TRANSFORMERS, rope, softmax_keys
from lasptrain.convert.rules import Rule, constant, ends, fixed, logarithm, renamed, rows, rows_above_zeros, shaped
from lasptrain.convert.target import Demands, Json, Target, demand, unlike_plain_softmax
from lasptrain.errors import ConvertError

if TYPE_CHECKING:
    from torch import Tensor

DEMANDS: Demands = {
    "num_local_experts": (8, 0),
    "hidden_act": ("silu", "silu"),
    "rms_norm_eps": (1e-6, 1e-5),
    "attention_bias": (False, False),
    "mamba_conv_bias": (True, True),
    "mamba_proj_bias": (False, False),
}
FACTORS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
UNIT_STEP = math.log(math.e - 1)  # softplus of it is 1
ROUNDED = "`dt_bias` is rounded"
TAPS = 4  # of a convolution that passes its last tap only


def reasons(model: Ssd) -> Iterator[str]:
    """Yield softmax layers with a window, and sizes that its configuration or its norms do not fit."""
    yield from unlike_plain_softmax(model)
    wide = model.heads * model.V
    if model.softmax and model.sliding_window is not None:
        yield f"its softmax layers see all tokens, not model.sliding_window = {model.sliding_window}"
    if wide % model.dim:
        yield f"model.heads × value dim = {wide} is no multiple of model.dim = {model.dim}"
    if model.dim % model.heads:
        yield f"model.heads = {model.heads} do not divide model.dim = {model.dim}"
    if model.K & (model.K - 1):
        yield f"key dim {model.K} is no power of two"


def config(model: Ssd) -> Json:
    """Return the keys of GraniteMoeHybridConfig."""
    kinds = ["attention" if i in model.softmax else "mamba" for i in range(model.layers)]
    kinds += [] if model.softmax else ["attention"]  # the silent one, see `rules`
    return {
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
        "mamba_d_conv": model.conv or TAPS,
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


def _positions(model: Ssd) -> Json:
    if not model.softmax or model.rotary is None:
        return {"position_embedding_type": None}
    return {"position_embedding_type": "rope"} | rope(model.rotary)


def _llama_cpp(model: Ssd, tokenizer: str) -> Iterator[str]:
    """Yield what its class, and its converter for such classes, have not."""
    if model.heads * model.V != 2 * model.dim:
        yield f"model.heads × value dim must be 2 × model.dim = {2 * model.dim}, not {model.heads * model.V}"
    if model.softmax and model.rotary is not None:
        yield "its softmax layers have no positions, model.rotary is not null"
    if isinstance(model.vocab, int) and model.vocab % 8:
        yield f"its converter pads vocabularies to multiples of 8, model.vocab is {model.vocab}"


def keys(config: Json, where: str) -> Json:
    """Return the model that a GraniteMoeHybridConfig describes."""
    demand(config, DEMANDS, where)
    layers, heads = config.get("num_hidden_layers", 32), config.get("mamba_n_heads", 128)
    kinds = config.get("layer_types") or config.get("layers_block_type") or ["linear_attention"] * layers
    softmax = [i for i, kind in enumerate(kinds) if kind in ("attention", "full_attention")]
    dim = config.get("hidden_size", 4096)
    value_dim = config.get("mamba_d_head", "auto")
    value_dim = config.get("mamba_expand", 2) * dim // heads if value_dim == "auto" else value_dim
    demanded = {"mamba_n_groups": (1, heads)}
    if softmax:
        demanded |= {"num_attention_heads": (32, heads), "head_dim": (dim // heads, dim // heads)}
    demand(config, demanded, where)
    for key in FACTORS:
        if not isinstance(factor := config.get(key, 1.0), int | float) or not factor:
            raise ConvertError(f"{where}: {key} is {factor!r}; expected a number, not 0")
    limit = config.get("time_step_limit")
    if limit is not None and (limit[0] > 0 or str(limit[1]) not in ("inf", "Infinity", "{'__float__': 'Infinity'}")):
        raise ConvertError(f"{where}: time_step_limit is {limit}; expected none, our steps have no limits")
    found = {
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
    return found | softmax_keys(config, softmax, heads, where, rotary=config.get("position_embedding_type") == "rope")


def rules(model: Ssd, names: Collection[str]) -> list[Rule]:
    """Rename tensors, with those of a mixer's input, and an MLP's, in one.

    Without a convolution, theirs passes its last tap only; a constant decay is a step of softplus(ln(e − 1)) = 1 and a
    zero matrix. Without softmax layers a zero one is added at the end: transformers counts the tokens in its cache
    there, and refuses to cache without.
    """
    table = ends(EMBEDDING, NORM, tie=model.tie)
    for i in range(model.layers):
        own, to = f"layers.{i}.", f"model.layers.{i}."
        if i in model.softmax:
            table += renamed(SOFTMAX, to, own)
        else:
            table += _mamba(model, own, f"{to}mamba.", dependent=f"{own}mixer.dt.weight" in names)
        table += renamed(NORMS | {"shared_mlp.output_linear.weight": "mlp.down.weight"}, to, own)
        table.append(rows(f"{to}shared_mlp.input_linear.weight", f"{own}mlp.gate.weight", f"{own}mlp.up.weight"))
    return table if model.softmax else table + _silent(model)


def _mamba(model: Ssd, own: str, to: str, dependent: bool) -> list[Rule]:
    heads = model.heads
    channels = heads * (model.V + 2 * model.K)
    parts = [f"{own}mixer.{part}.weight" for part in ("gate", "v", "k", "q")]
    if dependent:
        step = [
            rows(f"{to}in_proj.weight", *parts, f"{own}mixer.dt.weight"),
            rows(f"{to}dt_bias", f"{own}mixer.dt.bias", full_precision=True),
        ]
    else:
        step = [
            rows_above_zeros(f"{to}in_proj.weight", parts, heads),
            constant(f"{to}dt_bias", (heads,), UNIT_STEP, full_precision=True),
        ]
    if model.conv:
        convolution = [
            shaped(f"{to}conv1d.weight", f"{own}mixer.conv.weight", (channels, 1, model.conv)),
            rows(f"{to}conv1d.bias", f"{own}mixer.conv.bias"),
        ]
    else:
        convolution = [
            fixed(f"{to}conv1d.weight", lambda: _last_tap(channels)),
            constant(f"{to}conv1d.bias", (channels,), 0.0),
        ]
    return [
        *step,
        *convolution,
        rows(f"{to}A_log", f"{own}mixer.dt.log_slope", full_precision=True)
        if model.decay == "learned"
        else logarithm(f"{to}A_log", f"{own}mixer.slope"),
        constant(f"{to}D", (heads,), 0.0, full_precision=True),
        rows(f"{to}norm.weight", f"{own}mixer.norm.weight"),
        rows(f"{to}out_proj.weight", f"{own}mixer.out.weight"),
    ]


def _last_tap(channels: int) -> Tensor:
    import torch

    return torch.eye(TAPS)[-1].expand(channels, 1, TAPS)


def _silent(model: Ssd) -> list[Rule]:
    """A softmax layer with one key head whose matrices are zero."""
    head, to = model.dim // model.heads, f"model.layers.{model.layers}."
    zeros = {
        "self_attn.q_proj": (model.dim, model.dim),
        "self_attn.k_proj": (head, model.dim),
        "self_attn.v_proj": (head, model.dim),
        "self_attn.o_proj": (model.dim, model.dim),
        "shared_mlp.input_linear": (2 * model.mlp, model.dim),
        "shared_mlp.output_linear": (model.dim, model.mlp),
    }
    norms = [constant(f"{to}{norm}", (model.dim,), 1.0) for norm in NORMS]
    return norms + [constant(f"{to}{name}.weight", shape, 0.0) for name, shape in zeros.items()]


def reading(table: list[Rule], config: Json, model: Ssd) -> list[Rule]:
    """Read a folder without the silent layer, and fold Granite's four factors into our weights."""
    silent = f"model.layers.{model.layers}."
    return [_multiplied(rule, config, model) for rule in table if not any(x.startswith(silent) for x in rule.targets)]


def _multiplied(rule: Rule, config: Json, model: Ssd) -> Rule:
    """Fold factors of embeddings, branches, attention scores and logits into a rule's weights."""
    embed = config.get("embedding_multiplier", 1.0)
    logits = config.get("logits_scaling", 1.0) * (embed if model.tie else 1.0)
    branch = config.get("residual_multiplier", 1.0)
    scores = config.get("attention_multiplier", 1.0) * (model.dim / model.heads) ** 0.5

    def factor(source: str) -> float:
        if source.endswith((".out.weight", ".down.weight")):
            return float(branch)
        exact = {"embed.weight": embed, "norm.weight": 1 / logits}
        return float(scores if source.endswith("attn.q.weight") else exact.get(source, 1.0))

    factors = [factor(source) for source in rule.sources]

    def back(ys: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
        return [x if f == 1 else x * f for x, f in zip(rule.back(ys, shapes), factors, strict=True)]

    return replace(rule, back=back)


TARGET = Target(
    name="granitemoehybrid",
    arch="ssd",
    hf=True,
    runs_in="transformers",
    services=(vllm(ROUNDED), sglang(ROUNDED), llama_cpp(_llama_cpp, pieces=True)),
    advice="Needs transformers 5 or later. For long contexts load it in fp32, or keep `A_log` and "
    "`dt_bias` fp32: in bf16 the decays are off by up to 6 %.",
    reasons=reasons,
    model_type="granitemoehybrid",
    loads_as="GraniteMoeHybridForCausalLM",
    config=config,
    rules=rules,
    embedding=EMBEDDING,
    keys=keys,
    reading=reading,
    library=TRANSFORMERS,
    reaches=("mamba_d_conv", "mamba_chunk_size"),
)
