"""Models with gates of the data are what they are defined to be, written out once more, token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lasptrain import architectures
from lasptrain.architectures.delta_rule import GatedByData
from lasptrain.architectures.gdn import Gdn
from lasptrain.models.language_model import LanguageModel, initial_values
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.parallel.shard import fill
from lasptrain.recipe.loading import load
from lasptrain.training.optimizer import build_optimizer
from tests.laws.test_delta_layouts import MODELS as LAYOUTS
from tests.laws.test_delta_layouts import SIZES
from tests.recipe.test_recipe import RECIPES

CPU = torch.device("cpu")
MODELS: dict[str, dict[str, Any]] = {
    **LAYOUTS,
    "gdn, no rotary": {"arch": "gdn", "softmax": [0, 2], "rotary": None, "softmax_heads": 2, "softmax_dim": 10},
    "gdn, partly rotated": {"arch": "gdn", "softmax": [1], "rotary_fraction": 0.5, "qk_norm": "head", "rotary": 50.0},
}


def rms(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def low_rank(w: dict[str, Tensor], name: str) -> Tensor:
    """The product of two matrices, to be multiplied from the left."""
    return w[f"{name}.down.weight"].T @ w[f"{name}.up.weight"].T


def mixed(cfg: Any, w: dict[str, Tensor], h: Tensor) -> Tensor:
    """The mixer's outputs for one document h [T, D]."""
    heads, keys, values = cfg.heads, cfg.K, cfg.V
    shared = heads // (cfg.Hk if isinstance(cfg, Gdn) else heads)
    x = torch.cat([h @ w[f"{part}.weight"].T for part in "qkv"], -1)
    if cfg.conv:
        taps, past = w["conv.weight"], F.pad(x, (0, 0, cfg.conv - 1, 0))
        x = F.silu(torch.stack([(past[t : t + cfg.conv] * taps.T).sum(0) for t in range(len(h))]))
    width = heads // shared * keys
    parts = x.split([width, width, heads * values], -1)
    q, k, v = (part.unflatten(-1, (-1, size)) for part, size in zip(parts, (keys, keys, values), strict=True))
    if cfg.arch != "gla":
        q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
    q, k = q.repeat_interleave(shared, 1) * keys**-0.5, k.repeat_interleave(shared, 1)
    if cfg.arch == "gla":
        logit = h @ low_rank(w, "decay_proj") + w["decay.bias"]
        decay, beta = torch.sigmoid(logit).pow(1 / 16).unflatten(-1, (heads, keys)), None
    else:
        logit = h @ (w["decay_proj.weight"].T if cfg.arch == "gdn" else low_rank(w, "decay_proj"))
        slope = w["decay.log_slope"].exp()[:, None]
        decay = torch.exp(-slope * F.softplus(logit + w["decay.bias"]).unflatten(-1, (heads, -1)))
        beta = torch.sigmoid(h @ w["beta.weight"].T) * (2 if getattr(cfg, "negative_eigenvalues", False) else 1)
    state, outputs = torch.zeros(heads, keys, values, dtype=h.dtype), []
    for t in range(len(h)):
        state = decay[t][..., None] * state
        new = v[t] if beta is None else beta[t][:, None] * (v[t] - torch.einsum("hk,hkv->hv", k[t], state))
        state = state + k[t][..., None] * new[:, None]
        outputs.append(torch.einsum("hk,hkv->hv", q[t], state))
    gate = h @ (low_rank(w, "gate") if cfg.arch == "kda" else w["gate.weight"].T)
    opened = (F.silu if cfg.gate == "silu" else torch.sigmoid)(gate.unflatten(-1, (heads, values)))
    return (rms(torch.stack(outputs), w["norm.weight"], cfg.output_eps) * opened).flatten(1) @ w["out.weight"].T


def attended(cfg: Any, w: dict[str, Tensor], h: Tensor) -> Tensor:
    """Softmax attention's outputs for one document h [T, D]."""
    q, k, v = (h @ w[f"{part}.weight"].T for part in "qkv")
    if cfg.qk_norm == "whole":
        q, k = rms(q, w["q_norm.weight"]), rms(k, w["k_norm.weight"])
    q, k, v = (x.unflatten(-1, (-1, cfg.head_dim)) for x in (q, k, v))
    if cfg.qk_norm == "head":
        q, k = rms(q, w["q_norm.weight"]), rms(k, w["k_norm.weight"])
    place = torch.arange(len(h), dtype=h.dtype)
    if cfg.rotary is not None:
        n = round(cfg.head_dim * cfg.rotary_fraction)
        angle = place[:, None] * cfg.rotary ** (-torch.arange(0, n, 2, dtype=h.dtype) / n)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        q, k = (
            torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)
            for a, b, rest in (x.split([n // 2, n // 2, cfg.head_dim - n], -1) for x in (q, k))
        )
    share = q.shape[1] // k.shape[1]
    scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(share, 1)) * cfg.head_dim**-0.5
    lag = place[:, None] - place
    seen = (lag >= 0) & (lag < (cfg.sliding_window or math.inf))
    o = torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -math.inf).softmax(-1), v.repeat_interleave(share, 1))
    return (o.flatten(1) * (torch.sigmoid(h @ w["gate.weight"].T) if cfg.softmax_gate else 1)) @ w["out.weight"].T


def logits(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Logits of one document [T]."""
    cfg = model.cfg
    p: dict[str, Tensor] = dict(model.named_parameters())
    if cfg.norm.centred:
        p |= {name: 1 + value for name, value in p.items() if "norm" in name and ".mixer." not in name}
    x = p["embed.weight"][tokens]
    for i in range(cfg.layers):
        w = {name.removeprefix(f"layers.{i}."): value for name, value in p.items() if name.startswith(f"layers.{i}.")}
        soft = i in cfg.softmax
        start = "attn." if soft else "mixer."
        own = {name.removeprefix(start): value for name, value in w.items() if name.startswith(start)}

        def mlp(h: Tensor, w: dict[str, Tensor] = w) -> Tensor:
            return (F.silu(h @ w["mlp.gate.weight"].T) * (h @ w["mlp.up.weight"].T)) @ w["mlp.down.weight"].T

        mix = attended if soft else mixed
        if soft and cfg.softmax_norm == "after":
            x = x + rms(mix(cfg, own, x), w["norm1.weight"])
            x = x + rms(mlp(x), w["norm2.weight"])
        else:
            x = x + mix(cfg, own, rms(x, w["norm1.weight"]))
            x = x + mlp(rms(x, w["norm2.weight"]))
    return rms(x, p["norm.weight"]) @ p["head.weight"].T


def made(name: str) -> LanguageModel:
    """A model whose every part matters: large matrices, norms that are not one, gates that depend on the text."""
    cfg = architectures.model(SIZES | MODELS[name])
    model = LanguageModel(cfg, 64, ShardedRecurrence("chunked"), dtype=torch.float64).double()
    g = torch.Generator().manual_seed(3)
    for part, value in initial_values(model, 3, CPU):
        value = value * 20 if value.dim() > 1 and ".conv." not in part else value
        fill(model, [(part, value + torch.randn(value.shape, generator=g) / 4)])
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_its_definition_on_every_document(name: str) -> None:
    model = made(name)
    g = torch.Generator().manual_seed(4)
    tokens = torch.randint(1, 61, (1, 90), generator=g)
    tokens[0, [0, 30, 31]] = 0
    doc_ids = (tokens == 0).cumsum(1).int()
    with torch.no_grad():
        found = model.logits(model.hidden(tokens, doc_ids)[0])[0].double()
        want = torch.cat([logits(model, part) for part in tokens[0].split([30, 1, 59])])
    assert float((found - want).abs().max() / want.abs().max()) < 1e-6  # logits are in fp32


@pytest.mark.parametrize("decay", ["window", "paper"])
@pytest.mark.parametrize("arch", ["gdn", "kda", "gla"])
def test_decays_start_as_the_schedule_says(arch: str, decay: str) -> None:
    cfg = architectures.model({"arch": arch, "decay": decay, "dim": 64, "layers": 2, "heads": 4, "mlp": 8, "vocab": 9})
    assert isinstance(cfg, GatedByData)
    model = LanguageModel(cfg, 1000, ShardedRecurrence("chunked")).float()
    fill(model, initial_values(model, 0, CPU))
    h = torch.randn(1, 200, 64) if decay == "window" else torch.zeros(1, 200, 64)
    mixer: Any = model.blocks[1].token_mixer
    products = [h @ layer.weight.T for layer in mixer._gates()]
    rates = -mixer._written(products, mixer.prepare(200).decay)[1].detach().double()
    slopes = rates.reshape(1, 200, -1).mean(1)[0]  # by head, and by channel
    want = torch.tensor(cfg.decays(1000)[1], dtype=torch.float64)
    if decay == "window" or arch == "gla":
        assert torch.allclose(slopes.reshape(4, -1).mean(-1), want, rtol=1e-5)
        assert float(rates.std(1).max()) < 1e-6
    else:  # steps of 0.001 to 0.1
        ratio = slopes.reshape(4, -1) / want[:, None]
        assert ratio.min() > 0.099 and ratio.max() < 10.1 and ratio.std() > 0.5


def test_taps_gates_and_norms_do_not_decay() -> None:
    model = made("kda")
    decaying, others = build_optimizer(model, load(RECIPES / "quickstart.yaml").optim).param_groups
    free = {id(p) for p in others["params"]}
    named = {name.partition("mixer.")[2] for name, p in model.named_parameters() if id(p) in free and "mixer." in name}
    assert named == {"conv.weight", "decay.bias", "decay.log_slope", "norm.weight"}
    assert decaying["weight_decay"] == 0.1 and others["weight_decay"] == 0.0
