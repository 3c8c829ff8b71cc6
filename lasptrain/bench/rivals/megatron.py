"""Megatron-style sequence parallelism (arXiv:2205.05198) for linear attention, with weights actually split.

Ranks hold a slice of the tokens where a block works token by token, and a slice of the heads and of the MLP's width, of
all tokens, in between. So each half of a block gathers activations and scatters sums, T·D elements of T tokens per rank
to every other rank: 4·(n − 1)·T·D forward and as many backward per block, and no rank holds less than the window's
activations over n. It takes no more ranks than there are heads.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from data_tools.dataset import open_dataset
from lasptrain import ops
from lasptrain.architectures.linear_transformer import LinearTransformer as Undecayed
from lasptrain.architectures.tnl import Tnl
from lasptrain.bench.rivals.local import Local
from lasptrain.bench.rivals.pending import Pending, begun, whole_windows
from lasptrain.bench.rivals.traffic import Traffic, exchange
from lasptrain.data.loader import Slice
from lasptrain.errors import RecipeError, SetupError
from lasptrain.models.language_model import LanguageModel, initial_values
from lasptrain.models.layers import Mlp, Phases
from lasptrain.models.linear_transformer import LinearTransformer
from lasptrain.models.mixer import Context, State
from lasptrain.models.tnl import TransNormer
from lasptrain.ops.cross_entropy import IGNORED
from lasptrain.parallel import mesh as meshes
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.parallel.shard import fill
from lasptrain.recipe.resolve import with_vocabulary
from lasptrain.recipe.schema import Recipe
from lasptrain.training import job
from lasptrain.training.optimizer import build_optimizer

# The split dim of parameters and buffers of a mixer or MLP; those not named here are whole on every rank.
SPLIT = dict.fromkeys(("q.weight", "k.weight", "v.weight", "gate.weight", "up.weight", "lrpe.theta", "slope"), 0)
SPLIT |= dict.fromkeys(("out.weight", "down.weight"), 1)


def split_dim(name: str) -> int | None:
    """The dim along which the parameter or buffer of this name is split; None if it is whole."""
    return next((dim for end, dim in SPLIT.items() if name.endswith(f".{end}")), None)


def share(name: str, value: Tensor, traffic: Traffic) -> Tensor:
    """This rank's part of a full-size parameter, buffer or gradient."""
    dim = split_dim(name)
    return value if dim is None else value.chunk(traffic.size, dim)[traffic.rank]


def _gather(x: Tensor, traffic: Traffic) -> Tensor:
    """Gather [B, T, …] of slices → [B, n·T, …] of the window."""
    return exchange(x, traffic.gather, traffic.reduce_scatter)


def _scatter(x: Tensor, traffic: Traffic) -> Tensor:
    """Sum [B, n·T, …] over ranks → [B, T, …] of this rank's slice."""
    return exchange(x, traffic.reduce_scatter, traffic.gather)


class _Heads:
    """Drop-in for `ShardedRecurrence` that holds whole windows of its own heads and runs `local` over them."""

    def __init__(self, local: Local):
        self.local, self.scan = local, Traffic(None)

    def begin(self, *window: Any, **state: Any) -> Pending:
        return begun("megatron", *window, **state)

    def finish(self, pending: Pending, q: Tensor) -> tuple[Tensor, None]:
        return self.local(q, pending.k, pending.v, pending.log_decay), None


class _Whole:
    """A mixer of this rank's heads, between a gather of its input's slices and a scatter of its sums."""

    traffic: Traffic

    def forward(self, h: Tensor, phases: Phases | None, context: Context) -> tuple[Tensor, State]:
        whole_windows("megatron", context.doc_ids, context.carry[0], context.output_final_state)
        y, state = super().forward(_gather(h, self.traffic), phases, context)  # type: ignore[misc]
        return _scatter(y, self.traffic), state


class _TransNormer(_Whole, TransNormer):
    """TNL mixer; its norm is over all heads, so their squares are summed over ranks."""

    def prepare(self, length: int) -> Phases | None:
        return super().prepare(length * self.traffic.size)

    def output(self, o: Tensor, gate: Tensor) -> Tensor:
        o = o.flatten(2)
        wide = o.to(torch.promote_types(o.dtype, torch.float32))
        squares = wide.square().sum(-1, keepdim=True)
        total = exchange(squares, self.traffic.sum, self.traffic.sum)
        scale = torch.rsqrt(total / (o.shape[-1] * self.traffic.size) + 1e-6)
        y: Tensor = self.out(gate * (wide * scale).to(o.dtype))
        return y


class _LinearTransformer(_Whole, LinearTransformer):
    """Mixer of a linear transformer, which splits by heads alone."""


class _Mlp(Mlp):
    """This rank's part of an MLP's width."""

    traffic: Traffic

    def forward(self, x: Tensor) -> Tensor:
        return _scatter(self.inner(_gather(x, self.traffic)), self.traffic)

    def inner(self, x: Tensor) -> Tensor:
        """Compute the part between the exchanges."""
        return super().forward(x)


def split_model(recipe: Recipe, traffic: Traffic, kernel: str, local: Local | None = None) -> LanguageModel:
    """Return this rank's part of the recipe's model, on the meta device; its vocabulary is a number.

    Raises SetupError where heads or the MLP's width do not divide by ranks, or the architecture cannot be split.
    """
    model, n = recipe.model, traffic.size
    for key, size in (("heads", model.heads), ("mlp", model.mlp)):
        if size % n:
            raise SetupError(f"megatron: model.{key} = {size} does not go to {n} ranks; expected a multiple")
    if not isinstance(model, Tnl | Undecayed):
        raise SetupError(f"megatron: model.arch = {model.arch} is not split; expected tnl or linear_transformer")
    attention = ShardedRecurrence(kernel) if local is None else cast(ShardedRecurrence, _Heads(local))
    whole = job.language_model(recipe, attention)
    with torch.device("meta"):
        for index, block in enumerate(whole.blocks):
            block.mixer, block.mlp = (
                _mixer(model, index, n, attention),
                _Mlp(model.dim, model.mlp // n, activate=model.gated_mlp),
            )
            for part in (block.mixer, block.mlp):
                part.traffic = traffic
                part.to(torch.promote_types(whole.dtype, torch.float32))
    return whole


def _mixer(
    model: Tnl | Undecayed, index: int, ranks: int, attention: ShardedRecurrence
) -> _TransNormer | _LinearTransformer:
    sizes = (model.dim, model.heads // ranks, model.K, model.V)
    if isinstance(model, Tnl):
        lrpe, decayed = index in model.lrpe, model.decay != "none"
        return _TransNormer(*sizes, lrpe=lrpe, decayed=decayed, attention=attention)
    return _LinearTransformer(*sizes, normalizer=model.normalizer, attention=attention)


def shares(recipe: Recipe, traffic: Traffic, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yield this rank's part of the initial weights and buffers, by name."""
    whole = job.language_model(recipe, ShardedRecurrence("chunked"))
    for name, value in initial_values(whole, recipe.train.seed, device):
        yield name, share(name, value, traffic)


def reduce_gradients(model: LanguageModel, traffic: Traffic) -> Tensor:
    """Sum gradients of whole parameters over ranks; return the norm of all gradients, a scalar in fp64."""
    squares = {True: torch.zeros((), dtype=torch.float64, device=model.embed.weight.device)}
    squares[False] = squares[True].clone()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        split = split_dim(name) is not None
        if not split:
            parameter.grad = traffic.sum(parameter.grad)
        squares[split] += parameter.grad.square().sum(dtype=torch.float64)
    return (traffic.sum(squares[True]) + squares[False]).sqrt()


class Megatron:
    """Training of a recipe with windows and weights split over `group`.

    Args:
        recipe: one window per step, in one segment, without documents.
        local: attention over the heads of a rank, instead of the recipe's kernel.
    """

    def __init__(self, recipe: Recipe, group: dist.ProcessGroup, local: Local | None = None):
        if recipe.optim.kind == "muon":
            raise RecipeError("optim.kind: found 'muon'; Megatron's ranks hold parts of matrices, expected adamw")
        device, self.traffic = meshes.device(), Traffic(group)
        dataset = open_dataset(recipe.data)
        recipe = self.recipe = with_vocabulary(recipe, dataset.vocab_size)
        mesh = meshes.build(1, self.traffic.size)
        self.model = split_model(recipe, self.traffic, ops.select(recipe.train.kernel, device), local)
        self.model.to_empty(device=device)
        with torch.no_grad():
            fill(self.model, shares(recipe, self.traffic, device))
        if recipe.train.compile:
            self._fuse()
        self.optimizer = build_optimizer(self.model, recipe.optim)
        window = recipe.data.window
        self.loader = job.open_loader(recipe, dataset, mesh, "train", window, recipe.train.batch, window)
        self.device = device

    def _fuse(self) -> None:
        """Compile the parts between exchanges; all blocks share the graphs."""
        for block in self.model.blocks:
            for owner, part in ((block.mixer, "project"), (block.mlp, "inner"), (block.norm1, "forward")):
                setattr(owner, part, torch.compile(getattr(owner, part), fullgraph=True, dynamic=False))

    def step(self, number: int) -> float:
        """Make update `number`; return its seconds."""
        began = time.perf_counter()
        (micro_batch,) = self.loader.step(number)
        (piece,) = micro_batch
        self.backward(piece.to(self.device, non_blocking=True))
        norm = reduce_gradients(self.model, self.traffic)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, (self.recipe.optim.clip / (norm + 1e-6)).clamp(max=1.0).float())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        meshes.synchronize(self.device)
        return time.perf_counter() - began

    def backward(self, piece: Slice) -> None:
        """Compute this slice's gradients of the mean loss over the window."""
        total = self.traffic.sum((piece.labels != IGNORED).sum())
        with torch.autograd.set_multithreading_enabled(False):
            loss = self.model(piece.tokens, piece.labels).loss
            (loss / total).backward()
