"""The language model: embedding, blocks of mixer and MLP, norm, head, loss."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch import config as functorch

from lasptrain.architectures.decay import slopes
from lasptrain.models.convolution import Convolution
from lasptrain.models.layers import Lrpe, Mlp, RMSNorm, SimpleRMSNorm
from lasptrain.models.linear import Linear
from lasptrain.models.linear_transformer import LinearTransformer
from lasptrain.models.minimax import Lightning
from lasptrain.models.mixer import Context, State
from lasptrain.models.retnet import Retention
from lasptrain.models.softmax import Softmax
from lasptrain.models.ssd import EPS, StateSpace, TimeStep
from lasptrain.models.tnl import TransNormer
from lasptrain.ops.cross_entropy import chunked_cross_entropy, token_losses
from lasptrain.parallel.recurrence import SavedStates, ShardedRecurrence
from lasptrain.recipe.sections import Model

INIT_STD = 0.02

Mixer: TypeAlias = TransNormer | LinearTransformer | StateSpace | Retention | Lightning | Softmax


class Output(NamedTuple):
    """`loss`: sum over valid labels, [B·T] per token, or None without labels. `final_state`: one per layer."""

    loss: Tensor | None
    final_state: list[State]


class Block(nn.Module):
    """x += mixer(norm1(x)); x += mlp(norm2(x)).

    With `alpha` the residual carries the normalised value: h = norm1(x); x = α h + mixer(h); the same for the MLP.
    `recompute` calls `mix`: directly, or under activation checkpointing.
    """

    mixer: Mixer  # of a recurrence
    attn: Softmax

    def __init__(self, norm1: nn.Module, mixer: Mixer, norm2: nn.Module, mlp: nn.Module, *, alpha: float | None = None):
        super().__init__()
        self.mixer_name = "attn" if isinstance(mixer, Softmax) else "mixer"  # in checkpoints
        self.norm1, self.norm2, self.mlp, self.alpha = norm1, norm2, mlp, alpha
        self.add_module(self.mixer_name, mixer)
        self.recompute: Callable[..., Any] = lambda function, *args: function(*args)

    def forward(self, x: Tensor, context: Context, only_state: bool = False) -> tuple[Tensor, State]:
        """Return x [B, T, D] after the block and the mixer's final state; `only_state` leaves x as it is."""
        prepared: Any = self.token_mixer.prepare(x.shape[1])  # only the mixer knows what they are
        if only_state:
            return x, self.token_mixer.state(self.norm1(x), prepared, context._replace(output_final_state=True))
        x, final_state = self.recompute(self.mix, x, prepared, context)
        return x, final_state

    @property
    def token_mixer(self) -> Mixer:
        """The layer that moves information between tokens."""
        mixer: Mixer = getattr(self, self.mixer_name)
        return mixer

    def mix(self, x: Tensor, prepared: Any, context: Context) -> tuple[Tensor, State]:
        h = self.norm1(x)
        y, final_state = self.token_mixer(h, prepared, context)
        return self.feed(x if self.alpha is None else h, y), final_state

    def feed(self, x: Tensor, y: Tensor) -> Tensor:
        """Run the second half: both residual additions and the MLP."""
        if self.alpha is None:
            x = x + y
            z: Tensor = x + self.mlp(self.norm2(x))
            return z
        h = self.norm2(self.alpha * x + y)
        z = self.alpha * h + self.mlp(h)
        return z

    def compile_parts(self) -> None:
        """Compile the parts between exchanges and kernels; all blocks share the graphs.

        Pointwise results that enter matrix products are recomputed in the backward, not kept: a quarter of all memory.
        """
        functorch.ban_recompute_materialized_backward = False
        for owner, compiled in (
            (self.token_mixer, self.token_mixer.compiled),
            (self, ("feed",)),
            (self.norm1, ("forward",)),
        ):
            for part in compiled:
                setattr(owner, part, torch.compile(getattr(owner, part), fullgraph=True, dynamic=False))


class LanguageModel(nn.Module):
    """A model of `recipe.model`; built on any device, filled with `initial_values`.

    Args:
        cfg: the recipe's section, `vocab` resolved to a number.
        window: tokens of a window (for the decay schedule `window`).
        attention: the recurrence on this mesh.
        dtype: of activations and matrix products.
        loss_chunk: tokens whose logits exist at a time.
    """

    def __init__(
        self,
        cfg: Model,
        window: int,
        attention: ShardedRecurrence,
        *,
        dtype: torch.dtype = torch.float32,
        loss_chunk: int = 2048,
    ):
        super().__init__()
        assert isinstance(cfg.vocab, int)
        self.cfg, self.window, self.dtype, self.loss_chunk = cfg, window, dtype, loss_chunk
        self.attention = attention
        self.scale = math.sqrt(cfg.dim) if cfg.arch == "tnl" else 1.0
        self.embed = nn.Embedding(cfg.vocab, cfg.dim)
        self.layers = nn.ModuleList(_block(cfg, i, attention) for i in range(cfg.layers))
        self.norm = _norm(cfg)
        self.head = None if cfg.tie else Linear(cfg.dim, cfg.vocab)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        doc_ids: Tensor | None = None,
        carry: Sequence[State] | None = None,
        saved: Sequence[SavedStates] | None = None,
        output_final_state: bool = False,
        per_token: bool = False,
    ) -> Output:
        """Run one slice: tokens [B, T] int64, labels [B, T] int64 (−100: ignored), doc_ids [B, T] int32.

        Args:
            carry: per layer, the segment's initial state; None at a window's start.
            saved: per layer, keeps the initial state, and provides it in a recomputation.
            output_final_state: whether the final states are wanted.
            per_token: losses [B·T] without gradient instead of their sum.
        """
        x, final_state = self.hidden(tokens, doc_ids, carry, saved, output_final_state, only_state=labels is None)
        if labels is None:
            return Output(None, final_state)
        x = self.norm(x).flatten(0, 1)
        loss = (token_losses if per_token else chunked_cross_entropy)(
            x, self.head_weight, labels.flatten(), self.loss_chunk
        )
        return Output(loss, final_state)

    def hidden(
        self,
        tokens: Tensor,
        doc_ids: Tensor | None = None,
        carry: Sequence[State] | None = None,
        saved: Sequence[SavedStates] | None = None,
        output_final_state: bool = False,
        only_state: bool = False,
    ) -> tuple[Tensor, list[State]]:
        """Return activations [B, T, D] before the last norm, and the final states.

        With `only_state` the activations are not wanted, and the last layer computes only its state.
        """
        for module in self.layers.modules():
            if isinstance(module, Linear):
                module.cast(self.dtype)
        x = F.embedding(tokens, self.embed.weight).to(self.dtype) * self.scale
        final_state = []
        for i, layer in enumerate(self.blocks):
            initial = (None, None) if carry is None else carry[i]
            states = SavedStates() if saved is None else saved[i]
            context = Context(doc_ids, initial, states, output_final_state)
            x, state = layer(x, context, only_state and i + 1 == len(self.layers))
            final_state.append(state)
        return x, final_state

    def logits(self, x: Tensor) -> Tensor:
        """Return fp32 logits [..., vocab] of activations x [..., D]."""
        x = self.norm(x)
        return F.linear(x, self.head_weight.to(x.dtype)).float()

    @property
    def head_weight(self) -> Tensor:
        return self.embed.weight if self.head is None else self.head.weight

    @property
    def blocks(self) -> list[Block]:
        """The layers, typed."""
        return [layer for layer in self.layers if isinstance(layer, Block)]

    def decays(self) -> Tensor:
        """Return slopes [layers, heads] in fp32, the initial ones where they are learned."""
        return torch.tensor(slopes(self.cfg.decay, self.cfg.layers, self.cfg.heads, self.window), dtype=torch.float32)


def on_meta(
    cfg: Model, window: int, attention: ShardedRecurrence, *, dtype: torch.dtype = torch.float32, loss_chunk: int = 2048
) -> LanguageModel:
    """A `LanguageModel` on the meta device, its parameters in at least fp32."""
    with torch.device("meta"):
        model = LanguageModel(cfg, window, attention, dtype=dtype, loss_chunk=loss_chunk)
        return model.to(torch.promote_types(dtype, torch.float32))


def _norm(cfg: Model) -> nn.Module:
    match cfg.arch:
        case "tnl":
            return SimpleRMSNorm()
        case "linear_transformer" | "retnet":
            return RMSNorm(cfg.dim)
        case "ssd" | "minimax":
            return RMSNorm(cfg.dim, EPS)


def _block(cfg: Model, index: int, attention: ShardedRecurrence) -> Block:
    sizes = (cfg.dim, cfg.heads, cfg.K, cfg.V)
    alpha = cfg.residual if cfg.arch == "minimax" else None
    mixer: Mixer
    match "softmax" if index in cfg.softmax else cfg.arch:
        case "softmax":
            mixer = Softmax(
                cfg.dim,
                cfg.heads,
                cfg.kv_heads or cfg.heads,
                sliding_window=cfg.sliding_window,
                rotary=cfg.rotary,
                attention=attention,
            )
        case "tnl":
            mixer = TransNormer(*sizes, lrpe=index in cfg.lrpe, decayed=cfg.decay != "none", attention=attention)
        case "linear_transformer":
            mixer = LinearTransformer(*sizes, normalizer=cfg.normalizer, attention=attention)
        case "ssd":
            mixer = StateSpace(
                *sizes,
                data_dependent=cfg.data_dependent,
                learned=cfg.decay == "learned",
                conv=cfg.conv,
                attention=attention,
            )
        case "retnet":
            mixer = Retention(*sizes, decayed=cfg.decay != "none", attention=attention)
        case "minimax":
            mixer = Lightning(*sizes, decayed=cfg.decay != "none", attention=attention)
    return Block(_norm(cfg), mixer, _norm(cfg), Mlp(cfg.dim, cfg.mlp, activate=cfg.arch != "tnl"), alpha=alpha)


def initial_values(model: LanguageModel, seed: int, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yield initial full-size parameters and buffers by name, one at a time.

    Each has a generator of its own, seeded by (seed, name), so every layout of ranks starts from the same weights.
    Matrices are N(0, 0.02²), norm weights one, θ of LRPE 10000^(−2c/(HK)) for channel c of all H·K; a data-dependent
    step begins as one, so that such a model begins as its twin of constant decay; a convolution's weights are uniform
    in ±1/√width, its bias zero. The decay of a layer is a persistent buffer: in a checkpoint the numbers are the
    definition.
    """
    owners = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        path, _, part = name.rpartition(".")
        owner = owners[path]
        empty = torch.empty(parameter.shape, device=device)
        if isinstance(owner, TimeStep) and part == "log_slope":
            yield name, model.decays()[int(path.split(".")[1])].log().to(device)
        elif isinstance(owner, TimeStep):
            first = TimeStep.FIRST_BIAS if part == "bias" else 0.0
            yield name, torch.full(parameter.shape, first, device=device, dtype=torch.float64)
        elif isinstance(owner, Lrpe):
            count = parameter.numel()
            channel = torch.arange(count, dtype=torch.float64, device=device)
            yield name, (10000.0 ** (-2.0 * channel / count)).view(parameter.shape)
        elif isinstance(owner, Convolution):
            bound = parameter.shape[-1] ** -0.5 if part == "weight" else 0.0
            yield name, empty.uniform_(-bound, bound, generator=_generator(seed, name, device))
        elif parameter.dim() == 1:
            yield name, torch.ones(parameter.shape, device=device)
        else:
            yield name, empty.normal_(0.0, INIT_STD, generator=_generator(seed, name, device))
    for layer, slope in zip(model.blocks, model.decays(), strict=True):
        if (buffer := getattr(layer.token_mixer, "slope", None)) is not None:
            yield next(n for n, b in model.named_buffers() if b is buffer), slope


def _generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    """Return a parameter's own generator."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
