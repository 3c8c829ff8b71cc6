"""Tables of names: rules that turn our tensors into a target's, and back.

A table is a list of rules. Every tensor of ours and of the target is in exactly one rule, so a missing or extra one is
an error on either side, and shapes follow from running the same rules on the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lasptrain.convert.files import TensorSpec
from lasptrain.errors import ConvertError
from lasptrain.recipe.sections import Model

Shapes = Mapping[str, tuple[int, ...]]
Forward = Callable[[list[Tensor]], list[Tensor]]
Backward = Callable[[list[Tensor], list[tuple[int, ...]]], list[Tensor]]

NO_DECAY = -30.0  # ln of a slope that stands for zero: decay a = 1 to 1e-13
UNIT_STEP = math.log(math.e - 1)  # softplus of it is 1


@dataclass(frozen=True)
class Rule:
    """`to` makes `targets` from our `sources`; `back` makes our tensors from the target's and our shapes.

    `full_precision`: stays fp32 whatever the dtype of the export.
    """

    targets: tuple[str, ...]
    sources: tuple[str, ...]
    to: Forward
    back: Backward
    full_precision: bool = False


def rows(target: str, *sources: str, full_precision: bool = False) -> Rule:
    """Concatenate the rows of the sources; one source stays as it is."""

    def back(ys: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
        return list(ys[0].split([shape[0] for shape in shapes]))

    return Rule((target,), sources, lambda xs: [torch.cat(xs) if len(xs) > 1 else xs[0]], back, full_precision)


def shaped(target: str, source: str, shape: Sequence[int], full_precision: bool = False) -> Rule:
    """Reshape the source."""
    return Rule(
        (target,),
        (source,),
        lambda xs: [xs[0].reshape(shape)],
        lambda ys, shapes: [ys[0].reshape(shapes[0])],
        full_precision,
    )


def fixed(target: str, value: Callable[[], Tensor], full_precision: bool = False) -> Rule:
    """Make a tensor of the target that is the same for every model."""

    def back(ys: list[Tensor], _: list[tuple[int, ...]]) -> list[Tensor]:
        if not ys[0].is_meta and not torch.equal(ys[0].float(), value()):
            raise ConvertError(f"{target}: holds other numbers than our model has there; it cannot be expressed")
        return []

    return Rule((target,), (), lambda _: [value()], back, full_precision)


def logarithm(target: str, slope: str) -> Rule:
    """Take ln of the slopes; zero becomes NO_DECAY. `back` is inexact, so an export records its slopes as numbers."""
    return Rule(
        (target,),
        (slope,),
        lambda xs: [torch.where(xs[0] > 0, xs[0].log(), NO_DECAY)],
        lambda ys, _: [torch.where(ys[0] > NO_DECAY, ys[0].exp(), 0.0)],
        full_precision=True,
    )


def implied(slope: str) -> Rule:
    """Leave out slopes that the target computes from its configuration."""
    return Rule((), (slope,), lambda _: [], lambda _, shapes: [torch.empty(shapes[0])])


def _mapped(pairs: Mapping[str, str], prefix: str, own: str) -> list[Rule]:
    return [rows(f"{prefix}{target}", f"{own}{source}") for target, source in pairs.items()]


def _ends(embed: str, norm: str | None, cfg: Model) -> list[Rule]:
    """Rules of the embedding, the last norm, and the head unless it is tied."""
    ends = [rows(embed, "embed.weight")]
    ends += [rows(norm, "norm.weight")] if norm else []
    return ends if cfg.tie else [*ends, rows("lm_head.weight", "head.weight")]


def safetensors(cfg: Model, names: Collection[str]) -> list[Rule]:
    """Keep our own names."""
    exact = ("mixer.slope", "mixer.theta", "dt.weight", "dt.bias", "dt.log_slope", "conv.weight", "conv.bias")
    return [rows(name, name, full_precision=name.endswith((*exact, "lrpe.theta"))) for name in names]


def transnormer(cfg: Model, names: Collection[str]) -> list[Rule]:
    """The layout of OpenNLPLab's TransNormerLLM, from `tnl`."""
    table = _ends("model.embed_tokens.weight", None, cfg)
    for i in range(cfg.layers):
        own, to = f"layers.{i}.", f"model.layers.{i}."
        table.append(rows(f"{to}token_mixer.qkvu_proj.weight", *(f"{own}mixer.{x}.weight" for x in _QKVU)))
        if i in cfg.lrpe:
            theta = f"{own}mixer.lrpe.theta"
            table.append(shaped(f"{to}token_mixer.lrpe.theta", theta, (cfg.heads, 1, cfg.K), full_precision=True))
        table += _mapped(_SGLU, to, own)
        if (slope := f"{own}mixer.slope") in names:
            table.append(implied(slope))
    return table


def linear_attn(cfg: Model, names: Collection[str]) -> list[Rule]:
    """flash-linear-attention's LinearAttention, from `linear_transformer`."""
    return _fla(cfg, {"attn.norm.weight": "mixer.norm.weight"}, names)


def retnet(cfg: Model, names: Collection[str]) -> list[Rule]:
    """flash-linear-attention's RetNet."""
    further = {"attn.g_proj.weight": "mixer.gate.weight", "attn.g_norm_swish_gate.weight": "mixer.norm.weight"}
    return _fla(cfg, further, names)


def _fla(cfg: Model, further: dict[str, str], names: Collection[str]) -> list[Rule]:
    table = _ends("model.embeddings.weight", "model.norm.weight", cfg)
    for i in range(cfg.layers):
        own = f"layers.{i}."
        table += _mapped(_FLA | further, f"model.layers.{i}.", own)
        if (slope := f"{own}mixer.slope") in names:
            table.append(implied(slope))
    return table


def granite(cfg: Model, names: Collection[str]) -> list[Rule]:
    """GraniteMoeHybridForCausalLM without experts, from `ssd`, with softmax layers or without.

    Without a convolution, theirs passes its last tap only; a constant decay is a step of softplus(ln(e − 1)) = 1 and a
    zero matrix. Without softmax layers a zero one is added at the end: transformers counts the tokens in its cache
    there, and refuses to cache without.
    """
    table = _ends("model.embed_tokens.weight", "model.norm.weight", cfg)
    for i in range(cfg.layers):
        own, to = f"layers.{i}.", f"model.layers.{i}."
        if i in cfg.softmax:
            table += _mapped(_SOFTMAX, to, own)
        else:
            table += _mamba(cfg, own, f"{to}mamba.", dependent=f"{own}mixer.dt.weight" in names)
        table += _mapped(_NORMS | {"shared_mlp.output_linear.weight": "mlp.down.weight"}, to, own)
        table.append(rows(f"{to}shared_mlp.input_linear.weight", f"{own}mlp.gate.weight", f"{own}mlp.up.weight"))
    return table if cfg.softmax else table + _silent(cfg)


def _silent(cfg: Model) -> list[Rule]:
    """A softmax layer with one key head whose matrices are zero."""
    head, to = cfg.dim // cfg.heads, f"model.layers.{cfg.layers}."
    zeros = {
        "self_attn.q_proj": (cfg.dim, cfg.dim),
        "self_attn.k_proj": (head, cfg.dim),
        "self_attn.v_proj": (head, cfg.dim),
        "self_attn.o_proj": (cfg.dim, cfg.dim),
        "shared_mlp.input_linear": (2 * cfg.mlp, cfg.dim),
        "shared_mlp.output_linear": (cfg.dim, cfg.mlp),
    }
    return [fixed(f"{to}{norm}", lambda: torch.ones(cfg.dim)) for norm in _NORMS] + [
        fixed(f"{to}{name}.weight", partial(torch.zeros, shape)) for name, shape in zeros.items()
    ]


def _mamba(cfg: Model, own: str, to: str, dependent: bool) -> list[Rule]:
    heads = cfg.heads
    channels = heads * (cfg.V + 2 * cfg.K)
    parts = [f"{own}mixer.{part}.weight" for part in ("gate", "v", "k", "q")]
    if dependent:
        step = [
            rows(f"{to}in_proj.weight", *parts, f"{own}mixer.dt.weight"),
            rows(f"{to}dt_bias", f"{own}mixer.dt.bias", full_precision=True),
        ]
    else:
        step = [
            _above_zeros(f"{to}in_proj.weight", parts, heads),
            fixed(f"{to}dt_bias", lambda: torch.full((heads,), UNIT_STEP), full_precision=True),
        ]
    if cfg.conv:
        convolution = [
            shaped(f"{to}conv1d.weight", f"{own}mixer.conv.weight", (channels, 1, cfg.conv)),
            rows(f"{to}conv1d.bias", f"{own}mixer.conv.bias"),
        ]
    else:
        convolution = [
            fixed(f"{to}conv1d.weight", lambda: torch.tensor([0.0, 0, 0, 1]).expand(channels, 1, 4)),
            fixed(f"{to}conv1d.bias", lambda: torch.zeros(channels)),
        ]
    return [
        *step,
        *convolution,
        rows(f"{to}A_log", f"{own}mixer.dt.log_slope", full_precision=True)
        if cfg.decay == "learned"
        else logarithm(f"{to}A_log", f"{own}mixer.slope"),
        fixed(f"{to}D", lambda: torch.zeros(heads), full_precision=True),
        rows(f"{to}norm.weight", f"{own}mixer.norm.weight"),
        rows(f"{to}out_proj.weight", f"{own}mixer.out.weight"),
    ]


def minimax(cfg: Model, names: Collection[str]) -> list[Rule]:
    """MiniMaxForCausalLM, from `minimax`: the MLP as two experts of half its width, both used by every token."""
    table = _ends("model.embed_tokens.weight", "model.norm.weight", cfg)
    for i in range(cfg.layers):
        own, to = f"layers.{i}.", f"model.layers.{i}."
        if i in cfg.softmax:
            table += _mapped(_SOFTMAX, to, own)
        else:
            table.append(_by_head(f"{to}self_attn.qkv_proj.weight", [f"{own}mixer.{x}.weight" for x in "qkv"], cfg))
            table += [*_mapped(_LIGHTNING, to, own), implied(f"{own}mixer.slope")]
        table += _mapped(_NORMS, to, own) + _experts(cfg, f"{to}block_sparse_moe.", f"{own}mlp.")
    return table


def _by_head(target: str, sources: Sequence[str], cfg: Model) -> Rule:
    """Interleave the sources' rows [H·K, D] by head: all sources of head 0, then all of head 1, and so on."""

    def to(xs: list[Tensor]) -> list[Tensor]:
        return [torch.stack([x.unflatten(0, (cfg.heads, -1)) for x in xs], 1).flatten(0, 2)]

    def back(ys: list[Tensor], _: list[tuple[int, ...]]) -> list[Tensor]:
        return [y.flatten(0, 1) for y in ys[0].unflatten(0, (cfg.heads, len(sources), -1)).unbind(1)]

    return Rule((target,), tuple(sources), to, back)


def _experts(cfg: Model, to: str, own: str) -> list[Rule]:
    """Two experts, weighted ½ each by a zero router, so their outputs are doubled; powers of two are exact."""
    halves = [
        _halves(*(f"{to}experts.{expert}.{theirs}.weight" for expert in (0, 1)), source=f"{own}{ours}.weight", dim=dim)
        for theirs, ours, dim in (("w1", "gate", 0), ("w3", "up", 0), ("w2", "down", 1))
    ]
    return [fixed(f"{to}gate.weight", lambda: torch.zeros(2, cfg.dim)), *halves]


def _halves(*targets: str, source: str, dim: int) -> Rule:
    """Split the rows in halves; or the columns, doubling their values."""
    factor = 2.0 if dim == 1 else 1.0
    return Rule(
        targets,
        (source,),
        lambda xs: [x * factor for x in xs[0].chunk(2, dim)],
        lambda ys, _: [torch.cat(ys, dim) / factor],
    )


def _above_zeros(target: str, sources: Sequence[str], count: int) -> Rule:
    """Concatenate the rows of the sources and `count` rows of zeros."""

    def to(xs: list[Tensor]) -> list[Tensor]:
        return [torch.cat([*xs, xs[0].new_zeros(count, xs[0].shape[1])])]

    def back(ys: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
        parts = list(ys[0].split([*(shape[0] for shape in shapes), count]))
        rest = parts.pop()
        if not rest.is_meta and rest.any():
            raise ConvertError(f"{target}: the decay depends on the token, that of the recipe does not")
        return parts

    return Rule((target,), tuple(sources), to, back)


_QKVU = ("q", "k", "v", "gate")
_SGLU = {
    "token_mixer.out_proj.weight": "mixer.out.weight",
    "channel_mixer.l1.weight": "mlp.gate.weight",
    "channel_mixer.l2.weight": "mlp.up.weight",
    "channel_mixer.l3.weight": "mlp.down.weight",
}
_FLA = {
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
_SOFTMAX = {
    "self_attn.q_proj.weight": "attn.q.weight",
    "self_attn.k_proj.weight": "attn.k.weight",
    "self_attn.v_proj.weight": "attn.v.weight",
    "self_attn.o_proj.weight": "attn.out.weight",
}
_LIGHTNING = {
    "self_attn.output_gate.weight": "mixer.gate.weight",
    "self_attn.out_proj.weight": "mixer.out.weight",
    "self_attn.norm.weight": "mixer.norm.weight",
}
_NORMS = {"input_layernorm.weight": "norm1.weight", "post_attention_layernorm.weight": "norm2.weight"}
TABLES: dict[str, Callable[[Model, Collection[str]], list[Rule]]] = {
    "safetensors": safetensors,
    "granitemoehybrid": granite,
    "linear_attn": linear_attn,
    "minimax": minimax,
    "retnet": retnet,
    "transnormer": transnormer,
}


def check_sources(table: Sequence[Rule], names: Collection[str], where: str) -> None:
    """Raise ConvertError where the model's tensors are not exactly those that the table takes."""
    _compare({source for rule in table for source in rule.sources}, set(names), where)


def forms(table: Sequence[Rule], shapes: Shapes, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """Return shape and dtype of every tensor of the target, in the table's order."""
    found: dict[str, TensorSpec] = {}
    for rule in table:
        made = rule.to([torch.empty(shapes[source], device="meta") for source in rule.sources])
        kept = torch.float32 if rule.full_precision else dtype
        found |= {name: TensorSpec(tuple(y.shape), kept) for name, y in zip(rule.targets, made, strict=True)}
    return found


def export(table: Sequence[Rule], read: Callable[[str], Tensor], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the target, with one rule in memory at a time."""
    for rule in table:
        if rule.targets:
            made = rule.to([read(source) for source in rule.sources])
            kept = torch.float32 if rule.full_precision else dtype
            yield from ((name, y.to(kept)) for name, y in zip(rule.targets, made, strict=True))


def check_targets(table: Sequence[Rule], shapes: Shapes, found: Shapes, where: str) -> None:
    """Raise ConvertError where a folder's tensors are not exactly those that the table makes, in name and shape."""
    expected = {name: form.shape for name, form in forms(table, shapes, torch.float32).items()}
    _compare(set(expected), set(found), where)
    for name, shape in expected.items():
        if found[name] != shape:
            raise ConvertError(f"{where}: {name} is {list(found[name])}; expected {list(shape)}")


def _compare(expected: set[str], found: set[str], where: str) -> None:
    problems = [
        f"{word} {', '.join(sorted(names)[:4])}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        for word, names in (("has no", expected - found), ("has unknown", found - expected))
        if names
    ]
    if problems:
        raise ConvertError(f"{where}: {'; '.join(problems)}")
