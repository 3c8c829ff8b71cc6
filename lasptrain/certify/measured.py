"""One pass of training over a step's windows: the losses and gradients that `pretrain` computes, by token and name."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lasptrain import train
from lasptrain.certify.check import finite
from lasptrain.certify.kept import Kept, Whole
from lasptrain.certify.text import Held
from lasptrain.data.loader import MicroBatch
from lasptrain.models.language_model import initial_values
from lasptrain.models.start import generator
from lasptrain.ops.cross_entropy import IGNORED
from lasptrain.parallel.shard import fill, reshard
from lasptrain.recipe.schema import Recipe
from lasptrain.training.job import Job, build
from lasptrain.training.validation import token_losses

NOISE = 0.02  # added to every weight: none is left at a special value, such as zero
LEFT_OUT = 0.8  # share of labels at a window's start that do not count, falling to none at its end


class Place(NamedTuple):
    """The tokens of this rank in one micro-batch and segment: rows of the global batch, columns of a window."""

    micro_batch: int
    segment: int
    windows: list[int]
    tokens: slice


def places(job: Job) -> Iterator[Place]:
    """Yield the places of this rank's slices."""
    loader, mesh = job.loader, job.mesh
    dp, sp = mesh.length("dp"), mesh.length("sp")
    length = loader.segment // sp
    for i in range(loader.batch // (dp * loader.micro_batch)):
        rows = range(i * loader.micro_batch, (i + 1) * loader.micro_batch)
        windows = [row * dp + mesh.rank("dp") for row in rows]
        for m in range(loader.window // loader.segment):
            start = (m * sp + mesh.rank("sp")) * length
            yield Place(i, m, windows, slice(start, start + length))


def mine(job: Job) -> Tensor:
    """Return True at the tokens [windows, N] of this rank."""
    found = torch.zeros(job.loader.batch, job.loader.window, dtype=torch.bool)
    for place in places(job):
        found[place.windows, place.tokens] = True
    return found


TOKENS = "tokens.safetensors"  # beside the gradients of parameters


class Measured(NamedTuple):
    """Losses and gradients of the global batch; by token they are zero at tokens of other ranks."""

    loss: Tensor  # mean over the labels that count, fp64
    token_losses: Tensor  # [windows, N] of all labels
    token_gradients: Tensor  # [windows, N, D] of the first layer's input
    gradients: Mapping[str, Tensor]  # of the parameters, whole; of a job, until it measures again or is closed

    def save(self, folder: Path) -> None:
        """Write everything to a new folder."""
        folder.mkdir()
        save_file({name: getattr(self, name).contiguous() for name in self._fields[:-1]}, folder / TOKENS)
        Kept(folder / "gradients").put(self.gradients)

    @classmethod
    def load(cls, folder: Path) -> Measured:
        """Read what `save` wrote; gradients when they are asked for."""
        found = load_file(folder / TOKENS)
        loss, token_losses, token_gradients = (found[name] for name in cls._fields[:-1])
        return cls(loss, token_losses, token_gradients, Kept(folder / "gradients"))


@contextmanager
def opened(recipe: Recipe) -> Iterator[Job]:
    """Build a job as `pretrain` does, its weights stirred; let go of it at the end."""
    torch._dynamo.reset()
    job = build(recipe)
    stir(job)
    try:
        yield job
    finally:
        job.loader.close()
        del job
        gc.collect()


def stir(job: Job) -> None:
    """Give every weight its initial value and noise, the same on any layout."""
    fill(job.model, stirred(job))


def stirred(job: Job) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that `stir` gives, by name, whole."""
    known = dict(job.model.named_parameters())
    for name, value in initial_values(job.model, job.recipe.train.seed, job.device):
        if name in known:
            noise = torch.randn(value.shape, generator=generator(0, f"certify {name}", job.device), device=job.device)
            yield name, noise.to(value.dtype).mul_(NOISE).add_(value)


def measure(job: Job, windows: Tensor) -> Measured:
    """Run the step's micro-batches on windows [windows, N + 1]; no weight changes. Collective."""
    job.model.zero_grad(set_to_none=True)
    job.loader.split = Held(windows)
    micro_batches = [tuple(piece.to(job.device) for piece in read) for read in job.loader.read_step(0)]
    losses = torch.zeros(job.loader.batch, job.loader.window, dtype=torch.float64)
    found = list(places(job))
    with torch.no_grad():
        for i, segments in enumerate(micro_batches):
            own = [place for place in found if place.micro_batch == i]
            for place, (_, _, values) in zip(own, token_losses(job.wrapped, segments), strict=True):
                losses[place.windows, place.tokens] = values.double().cpu()
    reshard(job.model)
    with tapped(job.model.layers[0]) as inputs:
        recipe = job.recipe
        unequal = left_out(job, micro_batches)
        loss = train.gradients(job.wrapped, recipe.model.layers, job.mesh, recipe.parallel, unequal).sum()
    by_token = torch.zeros(*losses.shape, recipe.model.dim, dtype=torch.float64)
    order = sorted(found, key=lambda place: (place.micro_batch, -place.segment))
    for place, x in zip(order, inputs, strict=True):
        if x.grad is not None:
            by_token[place.windows, place.tokens] = x.grad.double().cpu() / job.mesh.size
    return Measured(loss.cpu(), losses, by_token, gradients_of(job.model))


def slope_error(job: Job, windows: Tensor, length: float) -> float:
    """Return how far the gradients of one process are from the slope of its mean loss along a random direction, which
    two losses `length` times the direction apart give; relative to the slopes of single parameters. Weights change.
    """
    found, named = measure(job, windows), dict(job.model.named_parameters())
    slopes = [float((found.gradients[name].double() * _direction(job, name)).sum()) for name in named]
    micro_batches = [tuple(piece.to(job.device) for piece in read) for read in job.loader.read_step(0)]
    losses, unequal = [], left_out(job, micro_batches)
    with torch.no_grad():
        for way in (length / 2, -length):
            for name, parameter in named.items():
                parameter.add_(_direction(job, name).to(parameter.dtype), alpha=way)
            losses.append(mean_loss(job, unequal))
    return finite(abs(sum(slopes) - (losses[0] - losses[1]) / length) / math.hypot(*slopes, 1e-300))


def _direction(job: Job, name: str) -> Tensor:
    """Return the direction's part of a parameter, fp64."""
    parameter, random = job.model.get_parameter(name), generator(0, f"direction {name}", job.device)
    return torch.randn(parameter.shape, generator=random, device=job.device).double() * NOISE


def mean_loss(job: Job, micro_batches: list[MicroBatch]) -> float:
    """Return the mean loss of one process over the labels that count; a window is one segment."""
    pieces = [piece for (piece,) in micro_batches]
    losses = [job.wrapped(piece.tokens, piece.labels, piece.doc_ids).loss.double() for piece in pieces]
    return float(sum(losses) / sum((piece.labels != IGNORED).sum() for piece in pieces))


def left_out(job: Job, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
    """Leave some labels out, the same on any layout, so that windows, segments and ranks have unequally many."""
    loader, kept = job.loader, []
    share = LEFT_OUT * (1 - torch.arange(loader.window) / loader.window)
    out = torch.rand(loader.batch, loader.window, generator=torch.Generator().manual_seed(0)) < share
    for i, segments in enumerate(micro_batches):
        own = [place for place in places(job) if place.micro_batch == i]
        pieces = []
        for place, piece in zip(own, segments, strict=True):
            here = out[place.windows, place.tokens].to(piece.labels.device)
            pieces.append(piece._replace(labels=piece.labels.masked_fill(here, IGNORED)))
        kept.append(tuple(pieces))
    return kept


@contextmanager
def tapped(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the inputs of a layer in passes with gradients, and keep the gradients that reach them."""
    inputs: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            arguments[0].retain_grad()
            inputs.append(arguments[0])

    handle = layer.register_forward_pre_hook(keep)
    try:
        yield inputs
    finally:
        handle.remove()


def gradients_of(model: nn.Module) -> Whole:
    """Return the gradients of the parameters, by name; zero where one has none."""
    named = model.named_parameters()
    return Whole({name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in named})
