"""Models against their definitions, written out once more without scan, chunks or slices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lasptrain import architectures
from lasptrain.architectures.decay import slopes
from lasptrain.architectures.linear_transformer import LinearTransformer as Undecayed
from lasptrain.architectures.minimax import MiniMax
from lasptrain.architectures.ssd import Ssd
from lasptrain.cost import plan
from lasptrain.eval.generate import generate
from lasptrain.models.language_model import LanguageModel, initial_values
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.parallel.shard import fill

CPU = torch.device("cpu")
DISTANCES = (4096, 32768, 131072, 1 << 20, 1 << 22)
B1 = (16, 16)  # layers, heads of the 1B model


@pytest.mark.parametrize(
    ("schedule", "shape", "window", "heads"),
    [
        ("tnl", (24, 8), 0, (24, 9, 8, 8, 6)),
        ("tnl", B1, 0, (33, 16, 16, 15, 11)),
        ("tnl", (30, 32), 0, (98, 35, 32, 30, 22)),
        ("tnl_paper", B1, 0, (16, 16, 16, 16, 16)),
        ("alibi", B1, 0, (0, 0, 0, 0, 0)),
        ("retnet", B1, 0, (176, 128, 96, 48, 16)),
        ("window", B1, 1 << 22, (144, 96, 80, 32, 16)),
        ("none", B1, 0, (256,) * 5),
    ],
)
def test_heads_that_still_see(schedule: str, shape: tuple[int, int], window: int, heads: tuple[int, ...]) -> None:
    table = [slope for layer in slopes(schedule, *shape, window) for slope in layer]
    found = tuple(sum(math.exp(-slope * distance) >= 0.999e-3 for slope in table) for distance in DISTANCES)
    assert found == heads


def test_head_counts_that_are_no_power_of_two_follow_alibi() -> None:
    expected = [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625, 0.7071, 0.3536, 0.1768, 0.0884]
    assert slopes("alibi", 1, 12, 0)[0] == pytest.approx(expected, abs=5e-5)


def test_the_slopes_of_minimax_in_transformers_differ_in_the_last_layer() -> None:
    assert slopes("minimax_hf", 1, 12, 0)[0][:3] == pytest.approx([0.63, 0.397, 0.25], abs=5e-4)
    ours, theirs = slopes("tnl", *B1, 0), slopes("minimax_hf", *B1, 0)
    assert theirs[0] == pytest.approx(ours[0]) and theirs[8] == pytest.approx(ours[8], rel=1e-5)
    assert theirs[15][0] / ours[15][0] == pytest.approx(1 + 1 / 15, rel=1e-4)


def test_the_slopes_of_a_model_are_those_of_the_released_one() -> None:
    table = slopes("tnl", *B1, 0)
    assert table[0][0] == pytest.approx(2**-0.5 * 1.00001)
    assert table[15][15] == pytest.approx(2**-8 * 1e-5)


Arch = Literal[
    "tnl",
    "linear_transformer",
    "ssd",
    "data-dependent ssd",
    "convolved ssd",
    "learned ssd",
    "retnet",
    "minimax",
    "sliding ssd",
    "hybrid minimax",
]


ATTENTION = {"dim": 16, "heads": 4}  # keys of 4 channels


def model(arch: Arch, normalizer: bool = False, tie: bool = True) -> LanguageModel:
    own: dict[str, dict[str, object]] = {
        "tnl": {"decay": "tnl", "lrpe": (0, 2)},
        "linear_transformer": {"decay": "none", "normalizer": normalizer},
        "ssd": {},
        "retnet": {},
        "minimax": {},
        "sliding ssd": {**ATTENTION, "softmax": [0, 2], "kv_heads": 2, "sliding_window": 7},
        "hybrid minimax": {**ATTENTION, "softmax": [1], "rotary": None, "alpha": 1.5, "decay": "window"},
        "data-dependent ssd": {"data_dependent": True},
        "convolved ssd": {"data_dependent": True, "conv": 3},
        "learned ssd": {"data_dependent": True, "decay": "learned"},
    }
    sizes = {"dim": 12, "layers": 3, "heads": 3, "key_dim": 4, "value_dim": 5, "mlp": 10, "vocab": 23, "tie": tie}
    cfg = architectures.model({"arch": arch.split()[-1], **sizes, **own[arch]})
    made = LanguageModel(cfg, 64, ShardedRecurrence("chunked"), dtype=torch.float64).double()
    g = torch.Generator().manual_seed(3)
    for name, value in initial_values(made, 3, CPU):
        value = value * 20 if name.endswith("weight") and value.dim() > 1 else value
        if ".dt." in name or ".conv." in name or (".norm" in name and arch.endswith(("ssd", "retnet", "minimax"))):
            value = value + torch.randn(value.shape, generator=g)
        fill(made, [(name, value)])
    return made


def norm(x: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def weights(slope: Tensor, doc_ids: Tensor) -> Tensor:
    """[H, T, T]: what token j weighs in token i."""
    place = torch.arange(len(doc_ids))
    lag = (place[:, None] - place).double()
    visible = (lag >= 0) & (doc_ids[:, None] == doc_ids)
    return torch.where(visible, torch.exp(-slope[:, None, None] * lag), 0.0)


def attend(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("ihk,jhk,hij,jhv->ihv", q, k, w, v)


def turned(x: Tensor, theta: Tensor) -> Tensor:
    angle = torch.arange(1000, 1000 + len(x)).double()[:, None, None] * theta
    return torch.cat([x * angle.cos(), x * angle.sin()], dim=-1)


def tnl_logits(m: LanguageModel, tokens: Tensor, doc_ids: Tensor) -> Tensor:
    """MODELS: TransNormerLLM with absolute positions that do not even start at zero."""
    p = dict(m.named_parameters())
    x = math.sqrt(12) * p["embed.weight"][tokens]
    for i, slope in enumerate(m.decays().double()):
        w = {n.removeprefix(f"layers.{i}."): v for n, v in p.items() if n.startswith(f"layers.{i}.")}
        h = norm(x)
        q, k = (F.silu(h @ w[f"mixer.{n}.weight"].T).view(-1, 3, 4) for n in "qk")
        v, u = h @ w["mixer.v.weight"].T, h @ w["mixer.gate.weight"].T
        if "mixer.lrpe.theta" in w:
            q, k = turned(q, w["mixer.lrpe.theta"]), turned(k, w["mixer.lrpe.theta"])
        o = norm(attend(q, k, v.view(-1, 3, 5), weights(slope, doc_ids)).flatten(1))
        x = x + (u * o) @ w["mixer.out.weight"].T
        h = norm(x)
        x = x + (h @ w["mlp.gate.weight"].T * (h @ w["mlp.up.weight"].T)) @ w["mlp.down.weight"].T
    return norm(x) @ p.get("head.weight", p["embed.weight"]).T


def linear_transformer_logits(m: LanguageModel, tokens: Tensor, doc_ids: Tensor) -> Tensor:
    p = dict(m.named_parameters())
    x = p["embed.weight"][tokens]
    for i in range(3):
        w = {n.removeprefix(f"layers.{i}."): v for n, v in p.items() if n.startswith(f"layers.{i}.")}
        h = norm(x) * w["norm1.weight"]
        q, k = ((F.elu(h @ w[f"mixer.{n}.weight"].T) + 1).view(-1, 3, 4) for n in "qk")
        v = (h @ w["mixer.v.weight"].T).view(-1, 3, 5)
        visible = weights(torch.zeros(3), doc_ids)
        o = attend(q, k, v, visible)
        o = (
            o / attend(q, k, torch.ones_like(v[..., :1]), visible)
            if isinstance(m.cfg, Undecayed) and m.cfg.normalizer
            else o / 2
        )
        x = x + (norm(o) * w["mixer.norm.weight"]).flatten(1) @ w["mixer.out.weight"].T
        h = norm(x) * w["norm2.weight"]
        x = x + (F.silu(h @ w["mlp.gate.weight"].T) * (h @ w["mlp.up.weight"].T)) @ w["mlp.down.weight"].T
    return norm(x) * p["norm.weight"] @ p.get("head.weight", p["embed.weight"]).T


def softmax_output(m: LanguageModel, h: Tensor, w: Mapping[str, Tensor], doc_ids: Tensor) -> Tensor:
    """Attention with rotation as complex numbers, at absolute positions that do not even start at zero."""
    place = torch.arange(len(h))
    theta = 0.0 if m.cfg.rotary is None else m.cfg.rotary ** (-torch.arange(2).double() / 2)
    angle = (1000 + place).double()[:, None, None] * theta * torch.ones(2)
    q, k, v = ((h @ w[f"attn.{n}.weight"].T).view(len(h), -1, 4) for n in "qkv")
    q, k = (torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle) for x in (q, k))
    lag = place[:, None] - place
    visible = (lag >= 0) & (lag < (m.cfg.sliding_window or 1000)) & (doc_ids[:, None] == doc_ids)
    heads = []
    for head in range(4):
        shared = head * k.shape[1] // 4
        score = (q[:, head] @ k[:, shared].conj().T).real / 2
        heads.append(score.masked_fill(~visible, -torch.inf).softmax(-1) @ v[:, shared])
    return torch.cat(heads, dim=1) @ w["attn.out.weight"].T


def minimax_logits(m: LanguageModel, tokens: Tensor, doc_ids: Tensor) -> Tensor:
    """The residual carries the normalised value."""

    def scaled(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight

    p = dict(m.named_parameters())
    heads = m.cfg.heads
    assert isinstance(m.cfg, MiniMax)
    alpha = m.cfg.alpha or 6**0.25
    x = p["embed.weight"][tokens]
    for i, slope in enumerate(m.decays().double()):
        w = {n.removeprefix(f"layers.{i}."): v for n, v in p.items() if n.startswith(f"layers.{i}.")}
        h = scaled(x, w["norm1.weight"])
        if i in m.cfg.softmax:
            y = softmax_output(m, h, w, doc_ids)
        else:
            q, k, v = (F.silu(h @ w[f"mixer.{n}.weight"].T).view(len(h), heads, -1) for n in "qkv")
            o = scaled(attend(q, k, v, weights(slope, doc_ids)).flatten(1), w["mixer.norm.weight"], 1e-6)
            y = (torch.sigmoid(h @ w["mixer.gate.weight"].T) * o) @ w["mixer.out.weight"].T
        h = scaled(alpha * h + y, w["norm2.weight"])
        x = alpha * h + (F.silu(h @ w["mlp.gate.weight"].T) * (h @ w["mlp.up.weight"].T)) @ w["mlp.down.weight"].T
    return scaled(x, p["norm.weight"]) @ p.get("head.weight", p["embed.weight"]).T


def ssd_logits(m: LanguageModel, tokens: Tensor, doc_ids: Tensor) -> Tensor:
    """A token at a time: the step scales what is written and says how much is forgotten."""

    def scaled(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    p = dict(m.named_parameters())
    cfg = m.cfg
    assert isinstance(cfg, Ssd)
    heads = m.cfg.heads
    x = p["embed.weight"][tokens]
    for i, slope in enumerate(m.decays().double()):
        w = {n.removeprefix(f"layers.{i}."): v for n, v in p.items() if n.startswith(f"layers.{i}.")}
        h = scaled(x, w["norm1.weight"])
        if i in m.cfg.softmax:
            x = x + softmax_output(m, h, w, doc_ids)
            h = scaled(x, w["norm2.weight"])
            x = x + (F.silu(h @ w["mlp.gate.weight"].T) * (h @ w["mlp.up.weight"].T)) @ w["mlp.down.weight"].T
            continue
        multi_linear = torch.cat([h @ w[f"mixer.{n}.weight"].T for n in "vkq"], dim=1)
        if cfg.conv:
            seen = torch.zeros_like(multi_linear)
            for t, lag in product(range(len(h)), range(3)):
                if t >= lag and doc_ids[t - lag] == doc_ids[t]:
                    seen[t] += multi_linear[t - lag] * w["mixer.conv.weight"][:, 2 - lag]
            multi_linear = seen + w["mixer.conv.bias"]
        channels = [5 * heads, 4 * heads, 4 * heads]
        v, k, q = (F.silu(x).view(len(h), heads, -1) for x in multi_linear.split(channels, dim=1))
        slope = w["mixer.dt.log_slope"].exp() if cfg.decay == "learned" else slope
        step = torch.ones(len(h), heads, dtype=torch.float64)
        if cfg.data_dependent:
            step = F.softplus(h @ w["mixer.dt.weight"].T + w["mixer.dt.bias"])
        state, outputs = torch.zeros(heads, 4, 5, dtype=torch.float64), []
        for t in range(len(h)):
            kept = torch.exp(-slope * step[t]) if t and doc_ids[t] == doc_ids[t - 1] else torch.zeros(heads)
            state = kept[:, None, None] * state + torch.einsum("hk,hv->hkv", k[t], step[t][:, None] * v[t])
            outputs.append(torch.einsum("hk,hkv->hv", q[t], state))
        o = torch.stack(outputs) * F.silu(h @ w["mixer.gate.weight"].T).view(-1, heads, 5)
        x = x + scaled(o, w["mixer.norm.weight"].view(heads, 5)).flatten(1) @ w["mixer.out.weight"].T
        h = scaled(x, w["norm2.weight"])
        x = x + (F.silu(h @ w["mlp.gate.weight"].T) * (h @ w["mlp.up.weight"].T)) @ w["mlp.down.weight"].T
    return scaled(x, p["norm.weight"]) @ p.get("head.weight", p["embed.weight"]).T


def retnet_logits(m: LanguageModel, tokens: Tensor, doc_ids: Tensor) -> Tensor:
    """RetNet as complex numbers that turn, with absolute positions that do not even start at zero."""
    angle = torch.arange(1000, 1000 + len(tokens)).double()[:, None] * 10000.0 ** (-torch.arange(2).double() / 2)

    def turning(x: Tensor) -> Tensor:
        first, second = x.view(-1, 3, 4).chunk(2, dim=-1)
        return torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)[:, None]

    p = dict(m.named_parameters())
    x = p["embed.weight"][tokens]
    for i, slope in enumerate(m.decays().double()):
        w = {n.removeprefix(f"layers.{i}."): v for n, v in p.items() if n.startswith(f"layers.{i}.")}
        h = norm(x) * w["norm1.weight"]
        q, k = (turning(h @ w[f"mixer.{n}.weight"].T) for n in "qk")
        score = torch.einsum("ihk,jhk->hij", q, k.conj()).real / 2
        v, gate = h @ w["mixer.v.weight"].T, h @ w["mixer.gate.weight"].T
        o = torch.einsum("hij,hij,jhv->ihv", score, weights(slope, doc_ids), v.view(len(h), 3, -1))
        o = (norm(o) * w["mixer.norm.weight"]).flatten(1) * F.silu(gate)
        x = x + o @ w["mixer.out.weight"].T
        h = norm(x) * w["norm2.weight"]
        x = x + (F.silu(h @ w["mlp.gate.weight"].T) * (h @ w["mlp.up.weight"].T)) @ w["mlp.down.weight"].T
    return norm(x) * p["norm.weight"] @ p.get("head.weight", p["embed.weight"]).T


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(
    ("arch", "normalizer"),
    [
        ("ssd", False),
        ("data-dependent ssd", False),
        ("convolved ssd", False),
        ("learned ssd", False),
        ("retnet", False),
        ("minimax", False),
        ("sliding ssd", False),
        ("hybrid minimax", False),
        ("tnl", False),
        ("linear_transformer", False),
        ("linear_transformer", True),
    ],
)
def test_a_model_is_its_definition(arch: Arch, normalizer: bool, tie: bool) -> None:
    m = model(arch, normalizer, tie)
    tokens = torch.randint(23, (1, 90), generator=torch.Generator().manual_seed(1))
    doc_ids = torch.zeros(1, 90, dtype=torch.int32)
    doc_ids[0, 50:] = 1
    with torch.no_grad():
        found = m.norm(m.hidden(tokens, doc_ids)[0])[0] @ m.head_weight.T
        definitions = {
            "tnl": tnl_logits,
            "ssd": ssd_logits,
            "linear_transformer": linear_transformer_logits,
            "retnet": retnet_logits,
            "minimax": minimax_logits,
        }
        expected = definitions[m.cfg.arch](m, tokens[0], doc_ids[0])
    assert float((found - expected).norm() / expected.norm()) < 1e-6  # slopes are fp32 numbers


def test_a_data_dependent_model_begins_as_its_twin_of_constant_decay() -> None:
    tokens = torch.randint(23, (1, 40), generator=torch.Generator().manual_seed(1))
    found = []
    for made in (model("data-dependent ssd"), model("ssd")):
        fill(made, initial_values(made, 3, CPU))
        with torch.no_grad():
            found.append(made.hidden(tokens)[0])
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 1e-7


@pytest.mark.parametrize("arch", ["tnl", "linear_transformer", "ssd", "convolved ssd", "retnet"])
def test_generation_is_the_forward_pass(arch: Arch) -> None:
    m = model(arch)
    tokens = [3, 1, 4, 1, 5]
    continued = generate(m, tokens, 12, temperature=0)
    with torch.no_grad():
        for _ in range(12):
            tokens.append(int(m.logits(m.hidden(torch.tensor([tokens]))[0][:, -1]).argmax()))
    assert continued == tokens[5:]
    assert generate(m, [3], 8, seed=1) == generate(m, [3], 8, seed=1)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(
    "arch",
    ["tnl", "linear_transformer", "ssd", "convolved ssd", "learned ssd", "retnet", "sliding ssd", "hybrid minimax"],
)
def test_a_plan_counts_the_parameters(arch: Arch, tie: bool) -> None:
    m = model(arch, tie=tie)
    assert sum(plan.parameters(m.cfg, 23).values()) == sum(p.numel() for p in m.parameters())


def test_weights_do_not_depend_on_the_order_of_their_making() -> None:
    values = dict(initial_values(model("tnl"), 3, CPU))
    again = dict(reversed(list(initial_values(model("tnl"), 3, CPU))))
    other = dict(initial_values(model("tnl"), 4, CPU))
    name = "layers.1.mixer.q.weight"
    assert torch.equal(values[name], again[name]) and not torch.equal(values[name], other[name])
    assert not torch.equal(values[name], values["layers.2.mixer.q.weight"])
