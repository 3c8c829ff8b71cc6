"""The language model: embedding, blocks of mixer and MLP, norm, head, loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch import config as functorch

from lasptrain.architectures.base import Architecture
from lasptrain.errors import RecipeError
from lasptrain.models import softmax
from lasptrain.models.layers import Mlp, norm
from lasptrain.models.linear import Linear
from lasptrain.models.mixer import Context, Kinds, Mixer, State
from lasptrain.models.start import Start, generator, initial
from lasptrain.ops.cross_entropy import chunked_cross_entropy, token_losses
from lasptrain.parallel.place import Place, enter
from lasptrain.parallel.recurrence import SavedStates, ShardedRecurrence
from lasptrain.parallel.signals import Signals

GRAPHS = 64  # of a part of a block: one for each shape of slices, in stages and in held-out windows


class Output(NamedTuple):
    """`loss`: sum over valid labels, [B·T] per token, or None without labels. `final_state`: one per layer.

    `z_loss`: the part of the sum that is the z-loss, without gradient; None if there is none.
    """

    loss: Tensor | None
    final_state: list[State]
    z_loss: Tensor | None = None


class Block(nn.Module):
    """x += mixer(norm1(x)); x += mlp(norm2(x)).

    With `alpha` the residual carries the normalised value: h = norm1(x); x = α h + mixer(h); the same for the MLP.
    With `after` norms stand behind: x += norm1(mixer(x)); x += norm2(mlp(x)).
    `recompute` calls `mix`: directly, or under activation checkpointing.
    """

    mixer: Mixer  # of a recurrence
    attn: Mixer  # softmax attention

    def __init__(
        self,
        norm1: nn.Module,
        mixer: Mixer,
        norm2: nn.Module,
        mlp: nn.Module,
        *,
        alpha: float | None = None,
        after: bool = False,
    ):
        super().__init__()
        self.mixer_name = "attn" if isinstance(mixer, softmax.Softmax) else "mixer"  # in checkpoints
        self.norm1, self.norm2, self.mlp, self.alpha, self.after = norm1, norm2, mlp, alpha, after
        self.add_module(self.mixer_name, mixer)
        self.recompute: Callable[..., Any] = lambda function, *args: function(*args)

    def forward(self, x: Tensor, context: Context, only_state: bool = False) -> tuple[Tensor, State]:
        """Return x [B, T, D] after the block and the mixer's final state; `only_state` leaves x as it is."""
        prepared: Any = self.token_mixer.prepare(x.shape[1])  # only the mixer knows what they are
        if only_state:
            h = x if self.after else self.norm1(x)
            return x, self.token_mixer.state(h, prepared, context._replace(output_final_state=True))
        x, final_state = self.recompute(self.mix, x, prepared, context)
        return x, final_state

    @property
    def token_mixer(self) -> Mixer:
        """The layer that moves information between tokens."""
        mixer: Mixer = getattr(self, self.mixer_name)
        return mixer

    def mix(self, x: Tensor, prepared: Any, context: Context) -> tuple[Tensor, State]:
        h = x if self.after else self.norm1(x)
        y, final_state = self.token_mixer(h, prepared, context)
        return self.feed(x if self.alpha is None else h, self.norm1(y) if self.after else y), final_state

    def feed(self, x: Tensor, y: Tensor) -> Tensor:
        """Run the second half: both residual additions and the MLP."""
        z: Tensor
        if self.after:
            x = x + y
            z = x + self.norm2(self.mlp(x))
            return z
        if self.alpha is None:
            x = x + y
            z = x + self.mlp(self.norm2(x))
            return z
        h = self.norm2(self.alpha * x + y)
        z = self.alpha * h + self.mlp(h)
        return z

    def compile_parts(self) -> None:
        """Compile the parts between exchanges and kernels; all blocks share the graphs.

        Pointwise results that enter matrix products are recomputed in the backward, not kept: a quarter of all memory.
        """
        from torch._dynamo import config  # slow to import

        config.recompile_limit = max(config.recompile_limit, GRAPHS)
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
        z_loss: factor of log² Z in the summed loss.
    """

    elementwise: ClassVar[Kinds] = {"embed": "embedding", "head": "head"}

    def __init__(
        self,
        cfg: Architecture,
        window: int,
        attention: ShardedRecurrence,
        *,
        dtype: torch.dtype = torch.float32,
        loss_chunk: int = 2048,
        z_loss: float = 0.0,
    ):
        super().__init__()
        assert isinstance(cfg.vocab, int)
        self.cfg, self.window, self.dtype, self.loss_chunk, self.z_loss = cfg, window, dtype, loss_chunk, z_loss
        self.attention = attention
        self.scale = cfg.embedding_scale
        self.embed = nn.Embedding(cfg.vocab, cfg.dim)
        self.layers = nn.ModuleList(_block(cfg, i, attention) for i in range(cfg.layers))
        self.norm = norm(cfg.norm, cfg.dim)
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
        signals: Signals | None = None,
    ) -> Output:
        """Run one slice: tokens [B, T] int64, labels [B, T] int64 (−100: ignored), doc_ids [B, T] int32.

        Args:
            carry: per layer, the segment's initial state; None at a window's start.
            saved: per layer, keeps the initial state, and provides it in a recomputation.
            output_final_state: whether the final states are wanted.
            per_token: cross-entropies [B·T] without gradient instead of the summed loss.
            signals: of the head, to report to; those of a layer are in its `saved`.
        """
        x, final_state = self.hidden(tokens, doc_ids, carry, saved, output_final_state, only_state=labels is None)
        if labels is None:
            return Output(None, final_state)
        given = self.norm(x).flatten(0, 1), self.head_weight, labels.flatten(), self.loss_chunk
        if per_token:
            return Output(token_losses(*given), final_state)
        loss = chunked_cross_entropy(*given, self.z_loss, None if signals is None else signals.logits)
        return Output(loss.total, final_state, loss.z_loss)

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
        saved = [SavedStates(again=False) for _ in self.layers] if saved is None else saved
        place = self._place(tokens.shape[1], doc_ids, carry, saved)
        for i, layer in enumerate(self.blocks):
            initial = (None, None) if carry is None else carry[i]
            context = Context(doc_ids, initial, saved[i], output_final_state, place)
            x, state = layer(x, context, only_state and i + 1 == len(self.layers))
            final_state.append(state)
        return x, final_state

    def _place(
        self, length: int, doc_ids: Tensor | None, carry: Sequence[State] | None, saved: Sequence[SavedStates]
    ) -> Place | None:
        """Return the place of the slice, which softmax layers share; the first of them carries and saves it."""
        if not self.cfg.softmax:
            return None
        first = self.cfg.softmax[0]
        if saved[first].place is None:
            before = None if carry is None else carry[first][-1]
            saved[first].place = enter(before, doc_ids, length, self.attention.scan)
        return saved[first].place

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
        return torch.tensor(self.cfg.decays(self.window), dtype=torch.float32)


def on_meta(
    cfg: Architecture,
    window: int,
    attention: ShardedRecurrence,
    *,
    dtype: torch.dtype = torch.float32,
    loss_chunk: int = 2048,
    z_loss: float = 0.0,
) -> LanguageModel:
    """A `LanguageModel` on the meta device, its parameters in at least fp32."""
    with torch.device("meta"):
        model = LanguageModel(cfg, window, attention, dtype=dtype, loss_chunk=loss_chunk, z_loss=z_loss)
        return model.to(torch.promote_types(dtype, torch.float32))


def _mixer_of(cfg: Architecture) -> Callable[[Architecture, int, ShardedRecurrence], Mixer]:
    """Return the function that makes the architecture's mixers. RecipeError where its module does not have it."""
    place = cfg.implementation
    try:
        make: Callable[[Architecture, int, ShardedRecurrence], Mixer] = import_module(place).mixer
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and not f"{place}.".startswith(f"{error.name}."):
            raise
        found = f"{cfg.arch} has its layers in {place}, which does not load: {error}"
        raise RecipeError(f"model.arch: {found}; expected a module with a function mixer") from None
    return make


def _block(cfg: Architecture, index: int, attention: ShardedRecurrence) -> Block:
    make = softmax.mixer if index in cfg.softmax else _mixer_of(cfg)
    mixer = make(cfg, index, attention)
    norm1, norm2 = norm(cfg.norm, cfg.dim), norm(cfg.norm, cfg.dim)
    after = index in cfg.softmax and cfg.softmax_norm == "after"
    return Block(norm1, mixer, norm2, Mlp(cfg.dim, cfg.mlp, activate=cfg.gated_mlp), alpha=cfg.residual, after=after)


def initial_values(model: LanguageModel, seed: int, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yield initial full-size parameters and persistent buffers by name, one at a time.

    Each has a generator of its own, seeded by (seed, name), so every layout of ranks starts from the same weights.
    Matrices are N(0, 0.02²), norm weights one; a module with other values has a method `initial`.
    """
    slopes = dict(zip((f"layers.{index}" for index in range(len(model.layers))), model.decays(), strict=True))
    owners = dict(model.named_modules())
    for name, value in model.state_dict(keep_vars=True).items():
        path, _, part = name.rpartition(".")
        layer = ".".join(path.split(".")[:2])
        start = Start(value.shape, slopes.get(layer), generator(seed, name, device), device)
        yield name, initial(owners[path], part, start)
