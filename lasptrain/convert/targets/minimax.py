"""MiniMaxForCausalLM of transformers, from `minimax`, with softmax layers too."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from lasptrain.architectures.minimax import MiniMax
from lasptrain.convert.libraries.servers import LLAMA_CPP, SGLANG, VLLM, unserved
from lasptrain.convert.libraries.transformers import EMBEDDING, NORM, NORMS, SOFTMAX, TRANSFORMERS, rope, softmax_keys
from lasptrain.convert.rules import Rule, constant, ends, fixed, halves, implied, renamed, rows, rows_by_head
from lasptrain.convert.target import Demands, Json, Target, demand, unlike_plain_softmax
from lasptrain.errors import ConvertError

if TYPE_CHECKING:
    from torch import Tensor

DEMANDS: Demands = {"hidden_act": ("silu", "silu"), "rms_norm_eps": (1e-5, 1e-5)}
IN_VLLM = "it has no MiniMaxForCausalLM since 0.24, and 0.23 cannot load the decays that transformers keeps in the file"
IN_SGLANG = "it has no MiniMaxForCausalLM"
IN_LLAMA_CPP = "it has no MiniMaxForCausalLM; its MiniMaxText01ForCausalLM is another layout"
BLOCK = 256  # tokens
COMPUTED = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
LINEAR = {
    "self_attn.output_gate.weight": "mixer.gate.weight",
    "self_attn.out_proj.weight": "mixer.out.weight",
    "self_attn.norm.weight": "mixer.norm.weight",
}


def reasons(model: MiniMax) -> Iterator[str]:
    """Yield other decays and shapes of heads, and softmax layers that its cache or its positions do not fit."""
    yield from unlike_plain_softmax(model)
    if model.decay != "minimax_hf":
        yield f"model.decay is {model.decay}; it computes minimax_hf"
    if model.K != model.V:
        yield f"key dim {model.K} and value dim {model.V} differ"
    if model.softmax and model.dim // model.heads != model.K:
        yield f"key dim {model.K} is not that of its softmax layers, {model.dim // model.heads}"
    if model.softmax and model.rotary is None:
        yield "its softmax layers are rotary, model.rotary is null"
    if model.softmax and 0 not in model.softmax:
        yield f"it counts cached tokens in layer 0, model.softmax = {list(model.softmax)} leaves it out"
    if model.mlp % 2:
        yield f"model.mlp = {model.mlp} has no halves"


def config(model: MiniMax) -> Json:
    """Keys as transformers names them, and as vLLM and MiniMax's own code do, which have other names for the same."""
    kinds = [int(i in model.softmax) for i in range(model.layers)]
    factors: Json = {}
    for name, older in (("linear_attn", "linear_attention"), ("full_attn", "full_attention"), ("mlp", "mlp")):
        for letter, factor in (("alpha", model.residual), ("beta", 1.0)):
            factors |= {f"{name}_{letter}_factor": factor, f"layernorm_{older}_{letter}": factor}
    return {
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
        "block_size": BLOCK,
        "postnorm": True,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        **rope(model.rotary or 10000.0),
        **factors,
    }


def keys(config: Json, where: str) -> Json:
    """Return the model that a MiniMaxConfig describes: of one expert, or of two that every token uses."""
    demand(config, DEMANDS, where)
    layers, heads = config.get("num_hidden_layers", 32), config.get("num_attention_heads", 32)
    dim = config.get("hidden_size", 4096)
    kinds = config.get("layer_types") or ["linear_attention" if i % 2 else "full_attention" for i in range(layers)]
    softmax = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    experts, asked = config.get("num_local_experts", 8), config.get("num_experts_per_tok", 2)
    if experts not in (1, 2) or asked != experts:
        raise ConvertError(f"{where}: num_local_experts is {experts}, {asked} a token; expected 1 and 1, or 2 and 2")
    key_dim = config.get("head_dim") or dim // heads
    found = {
        "arch": "minimax",
        "dim": dim,
        "layers": layers,
        "heads": heads,
        "key_dim": key_dim,
        "value_dim": key_dim,
        "mlp": experts * config.get("intermediate_size", 14336),
        "alpha": float(_alpha(config, len(softmax) < layers, bool(softmax), where)),
        "tie": config.get("tie_word_embeddings", False),
    }
    if not softmax:
        return found
    demand(config, {"head_dim": (dim // heads, dim // heads)} if config.get("head_dim") else {}, where)
    found |= softmax_keys(config, softmax, heads, where, rotary=True, theta=1e6)
    sliding_window = config.get("sliding_window")
    return found if sliding_window is None else found | {"sliding_window": sliding_window}


def _alpha(config: Json, linear: bool, softmax: bool, where: str) -> float:
    """Return the one factor of all residuals. ConvertError where they differ, or where branches have factors too."""
    names = [name for name, there in (("linear_attn", linear), ("full_attn", softmax), ("mlp", True)) if there]
    demand(config, {f"{name}_beta_factor": (1, 1) for name in names}, where)
    alphas = {f"{name}_alpha_factor": config.get(f"{name}_alpha_factor", 1) for name in names}
    if len(set(alphas.values())) > 1:
        raise ConvertError(f"{where}: {', '.join(f'{key} is {value}' for key, value in alphas.items())}; expected one")
    return float(alphas["mlp_alpha_factor"])


def rules(model: MiniMax, names: Collection[str]) -> list[Rule]:
    """Rename tensors, with q, k and v in one; the MLP is two experts of half its width, both used by every token."""
    table = ends(EMBEDDING, NORM, tie=model.tie)
    for i in range(model.layers):
        own, to = f"layers.{i}.", f"model.layers.{i}."
        if i in model.softmax:
            table += renamed(SOFTMAX, to, own)
        else:
            qkv = [f"{own}mixer.{part}.weight" for part in "qkv"]
            table.append(rows_by_head(f"{to}self_attn.qkv_proj.weight", qkv, model.heads))
            table += [*renamed(LINEAR, to, own), implied(f"{own}mixer.slope"), *_buffers(model, i, to)]
        table += renamed(NORMS, to, own) + _experts(model, f"{to}block_sparse_moe.", f"{own}mlp.")
    return table


def _buffers(model: MiniMax, layer: int, to: str) -> list[Rule]:
    """Make what transformers computes as well, and keeps beside weights: where it is missing, a warning says so."""

    def value(name: str) -> Callable[[], Tensor]:
        def make() -> Tensor:
            import torch

            slope = torch.tensor(model.decays(1)[layer])[:, None, None]
            token = torch.arange(1, BLOCK + 1)
            match name:
                case "query_decay":
                    return (-slope * token[:, None]).exp()
                case "key_decay":
                    return (-slope * (BLOCK - token[:, None])).exp()
                case "diagonal_decay":
                    return (-slope * (token[:, None] - token)).exp().tril()[None]
            return slope

        return make

    return [fixed(f"{to}self_attn.{name}", value(name), full_precision=True) for name in COMPUTED]


def _experts(model: MiniMax, to: str, own: str) -> list[Rule]:
    """Two experts, weighted ½ each by a zero router, so their outputs are doubled."""
    table = [constant(f"{to}gate.weight", (2, model.dim), 0.0)]
    for theirs, ours, dim, factor in (("w1", "gate", 0, 1.0), ("w3", "up", 0, 1.0), ("w2", "down", 1, 2.0)):
        experts = [f"{to}experts.{expert}.{theirs}.weight" for expert in (0, 1)]
        table.append(halves(*experts, source=f"{own}{ours}.weight", dim=dim, factor=factor))
    return table


def reading(table: list[Rule], config: Json, model: MiniMax) -> list[Rule]:
    """Read the MLP from the only expert, where there is one, and ignore its router, which has no choice."""
    if config.get("num_local_experts", 8) != 1:
        return table
    return [_one_expert(rule, model) if _of_experts(rule) else rule for rule in table]


def _of_experts(rule: Rule) -> bool:
    return bool(rule.targets) and ".block_sparse_moe." in rule.targets[0]


def _one_expert(rule: Rule, model: MiniMax) -> Rule:
    if rule.sources:
        return rows(rule.targets[0], *rule.sources)
    return replace(constant(rule.targets[0], (1, model.dim), 0.0), back=lambda ys, shapes: [])


TARGET = Target(
    name="minimax",
    arch="minimax",
    hf=True,
    runs_in="transformers",
    services=(unserved(VLLM, IN_VLLM), unserved(SGLANG, IN_SGLANG), unserved(LLAMA_CPP, IN_LLAMA_CPP)),
    advice="Needs transformers 5 or later. For long contexts load it in fp32: in bf16 the decays are rounded.",
    reasons=reasons,
    model_type="minimax",
    loads_as="MiniMaxForCausalLM",
    config=config,
    rules=rules,
    embedding=EMBEDDING,
    keys=keys,
    reading=reading,
    computed=COMPUTED,
    library=TRANSFORMERS,
    reaches=("sliding_window", "block_size"),
)
