"""The recipe as it is certified: its layout as it stands, in windows and layers that this machine runs in a minute."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import ValidationError

from data_tools.tokenizer import load_tokenizer
from lasptrain import architectures, ops
from lasptrain.architectures.base import Architecture
from lasptrain.architectures.nearest import multiples
from lasptrain.cost import links, plan
from lasptrain.errors import RecipeError, ResourceError
from lasptrain.parallel import mesh as meshes
from lasptrain.recipe.resolve import resolve_mesh, resolve_vocabulary
from lasptrain.recipe.schema import Recipe

WORK = {"cpu": 2e10, "cuda": 1e14}  # FLOP of one pass over a step's windows
WEIGHTS = {"cpu": 1e8, "cuda": 5e8}  # that are drawn, updated, saved and read within a minute
PROCESS = 1 << 30  # bytes of a process on a CPU that computes nothing yet, its compiler included
GATHERED = 2 * 8  # bytes of a number of the largest tensor, beside the state: what it should be, and on its way to disk
SEGMENTS = 4  # of a window, at most: a first one, ones between, a last one
FEW = 2  # where embeddings alone are too many weights, which each segment adds to
SHORT, SHORTEST = 256, 16  # tokens of a slice, below which layers go first, and below which nothing goes
STEPS = 4  # updates of the longest check


class Trial(NamedTuple):
    """A recipe to be certified: mesh and segment are numbers; `strict` is the precision of exact comparisons."""

    recipe: Recipe
    strict: str
    folder: Path  # where jobs leave what others compare with
    planned: int = 0  # bytes of memory that the largest job is expected to take

    @property
    def exact(self) -> Recipe:
        """The recipe in the precision of exact comparisons."""
        return self.recipe.replace(train={"precision": self.strict})

    @property
    def is_exact(self) -> bool:
        """True if the recipe has the precision of exact comparisons."""
        return self.recipe.train.precision == self.strict

    @property
    def tolerance(self) -> float:
        """Largest error of an exact comparison, relative to what is compared."""
        return {"fp64": 1e-9, "fp32": 1e-4}[self.strict]


class Size(NamedTuple):
    """A number of the recipe, and the one that is certified in its place."""

    name: str
    recipe: int
    certified: int

    def __str__(self) -> str:
        if self.recipe == self.certified:
            return f"{self.name}: {self.recipe:,}"
        return f"{self.name}: {self.certified:,} of {self.recipe:,}"


def alone(recipe: Recipe) -> Recipe:
    """Return the recipe of the same step for one process and one segment."""
    return recipe.replace(
        mesh={"dp": 1, "sp": 1},
        parallel={"data_parallel": "ddp", "recompute": "none", "reduce": "step"},
        train={"segment": recipe.data.window, "compile": False},
    )


def chunked_otherwise(recipe: Recipe) -> Recipe:
    """Return the recipe of one process that sums in another order: in two segments, other chunks of the loss."""
    window = recipe.data.window
    segment = window if window % 2 else window // 2
    return recipe.replace(train={"segment": segment, "loss_chunk": max(16, recipe.train.loss_chunk // 3)})


class Limits(NamedTuple):
    """The limits of a trial: FLOP of a pass, weights, and bytes of memory and disk (None: unknown)."""

    work: float
    weights: float
    memory: int | None  # for each of the ranks, or all of them
    shared: bool  # all ranks take theirs from the same memory
    disk: int | None

    def needed(self, trial: Recipe, own: str, vocab: int) -> int:
        """Return the bytes of memory that the largest job needs: one process with the whole window, or ranks, each or
        all together. `trial` is in the precision of exact comparisons, `own` that of the recipe.
        """
        dp, sp = trial.mesh.dp, trial.mesh.sp
        assert isinstance(dp, int) and isinstance(sp, int) and isinstance(trial.train.segment, int)
        ranks = dp * sp if self.shared else 1
        plain, window, segment = alone(trial), trial.data.window, trial.train.segment
        saved = trial.replace(train={"precision": own})
        one = sum(plan.memory(plain, vocab, 1, 1, window).values())
        rank = sum(plan.memory(trial, vocab, dp, sp, segment).values())
        saving = sum(plan.memory(saved, vocab, dp, sp, segment).values())
        if self.shared:
            saving += plan.host_memory(saved, vocab, dp, sp, segment)["checkpoint"]
        return max(one + PROCESS + GATHERED * plan.largest(trial.model, vocab), ranks * (max(rank, saving) + PROCESS))

    def written(self, recipe: Recipe, vocab: int) -> int:
        """Return the bytes on disk: gradients, weights and moments of one process, a checkpoint, an export."""
        return sum(plan.parameters(recipe.model, vocab).values()) * (4 * 8 + 3 * 4 + 2 * 4)

    def quick(self, recipe: Recipe, vocab: int) -> bool:
        """Return True if a trial has no more work and weights than a minute allows."""
        step = recipe.train.batch * recipe.data.window
        flops = plan.flops_per_token(recipe.model, vocab, recipe.data.window) * step
        return flops <= self.work and sum(plan.parameters(recipe.model, vocab).values()) <= self.weights

    def lacks(self, recipe: Recipe, own: str, vocab: int) -> str | None:
        """Return what there is too little of, and how much there is; None if memory and disk are enough."""
        needed, written = self.needed(recipe, own, vocab), self.written(recipe, vocab)
        if self.memory is not None and needed > plan.HEADROOM * self.memory:
            return f"{needed / 2**30:.1f} GiB of memory, found {self.memory / 2**30:.1f} GiB free"
        if self.disk is not None and written > plan.HEADROOM * self.disk:
            return f"{written / 2**30:.1f} GiB in {tempfile.gettempdir()}, found {self.disk / 2**30:.1f} GiB free"
        return None


def limits(device: torch.device) -> Limits:
    """Return those of this machine."""
    disk = shutil.disk_usage(tempfile.gettempdir()).free
    if device.type == "cuda":
        return Limits(WORK["cuda"], WEIGHTS["cuda"], meshes.free_memory(device), False, disk)
    return Limits(WORK["cpu"], WEIGHTS["cpu"], meshes.host_memory(), True, disk)


def fit(
    recipe: Recipe, ranks: int, folder: Path, tokens: int | None = None, layers: int | None = None
) -> tuple[Trial, list[Size]]:
    """Return the trial of a recipe on `ranks`, and its sizes; `tokens` and `layers` take the place of what fits.

    Raises RecipeError for ones that do not fit the layout, ResourceError where nothing fits memory, and the errors of
    `resolve_mesh`.
    """
    device, within = meshes.device(), limits(meshes.device())
    vocab = resolve_vocabulary(recipe.model, load_tokenizer(recipe.data.tokenizer).vocab_size)
    dp, sp = resolve_mesh(recipe, ranks)
    available = None if within.shared else within.memory
    recipe = plan.with_prefix(recipe, vocab, dp, sp, available)
    laid = plan.layout(plan.with_reduction(recipe, vocab, dp, sp, available), dp, sp, vocab, available)
    heavy = plan.parameters(recipe.model, vocab)["embedding"] > within.weights
    segments = max(n for n in range(1, (FEW if heavy else SEGMENTS) + 1) if laid.segments % n == 0)
    batch = max(2, dp * recipe.train.micro_batch * min(2, laid.micro_batches))
    kernel = ops.select(recipe.train.kernel, device, recipe.model.kernels)
    strict = "fp32" if kernel == "triton" else "fp64"
    fixed = plan.with_reduction(recipe, vocab, dp, sp, available).replace(
        data={"repeat": True},
        mesh={"dp": dp, "sp": sp, "scan": links.with_scan(recipe, sp, laid.segment).mesh.scan},
        train={"batch": batch, "profile": (), "steps": max(STEPS, recipe.train.steps)},
        eval={"window": None, "tasks": (), "every": 0},
    )
    options = []
    for window, depth in _candidates(recipe, sp * segments, tokens, layers):
        segment = window // segments
        chunk = min(recipe.train.loss_chunk, recipe.train.micro_batch * segment // sp)
        sized = fixed.replace(data={"window": window}, train={"segment": segment, "loss_chunk": chunk})
        options.append(sized.model_copy(update={"model": with_layers(recipe.model, depth)}))
    chosen = _chosen(options, within, strict, vocab)
    sizes = [
        Size("tokens of a window", recipe.data.window, chosen.data.window),
        Size("segments of a window", laid.segments, segments),
        Size("layers", recipe.model.layers, chosen.model.layers),
        Size("windows of a step", recipe.train.batch, batch),
    ]
    planned = within.needed(chosen.replace(train={"precision": strict}), recipe.train.precision, vocab)
    return Trial(chosen, strict, folder, planned), sizes


def _chosen(options: list[Recipe], within: Limits, strict: str, vocab: int) -> Recipe:
    """Return the first that is below all limits; else, of those that memory and disk are enough for, the last that has
    more than one layer, or the last. Raises ResourceError where there is none.
    """
    exact = [(option, option.replace(train={"precision": strict})) for option in options]
    lacking = [within.lacks(trial, option.train.precision, vocab) for option, trial in exact]
    possible = [pair for pair, lack in zip(exact, lacking, strict=True) if lack is None]
    if not possible:
        least = options[-1]
        found = f"{least.model.layers} layers, a vocabulary of {vocab:,} and windows of {least.data.window:,} tokens"
        raise ResourceError(f"certify: {found} need {lacking[-1]}; expected more of it, or less: --layers, --tokens")
    quick = [option for option, trial in possible if within.quick(trial, vocab)]
    deep = [option for option, _ in possible if option.model.layers > 1]
    return quick[0] if quick else (deep or [option for option, _ in possible])[-1]


def _candidates(recipe: Recipe, unit: int, tokens: int | None, layers: int | None) -> Iterator[tuple[int, int]]:
    """Yield windows and layers, the largest first: shorter windows, then fewer layers, then shorter windows still, and
    at last a single layer.

    A window is a multiple of `unit` slices; a dataset that is packed for one window has no other.
    """
    windows = [_window(recipe, unit, tokens)]
    while tokens is None and recipe.data.packing != "best_fit" and windows[-1] // 2 >= unit * SHORTEST:
        windows.append(windows[-1] // 2 // unit * unit)
    depths = [layers or recipe.model.layers]
    while layers is None and depths[-1] >= 4:
        depths.append(depths[-1] // 2)
    long = [window for window in windows if window >= unit * SHORT] or windows[:1]
    yield from ((window, depths[0]) for window in long)
    yield from ((long[-1], depth) for depth in depths[1:])
    yield from ((window, depths[-1]) for window in windows[len(long) :])
    if layers is None and not recipe.model.softmax:
        yield windows[-1], 1


def _window(recipe: Recipe, unit: int, tokens: int | None) -> int:
    """Return the longest window to try. Raises RecipeError for tokens that do not fit."""
    if tokens is None:
        return recipe.data.window
    if recipe.data.packing == "best_fit" and tokens != recipe.data.window:
        found = f"--tokens: {tokens} with data.packing = best_fit, whose dataset has windows of {recipe.data.window}"
        raise RecipeError(f"{found} only; leave it out")
    if tokens % unit or tokens < 2 * unit:
        slices = f"--tokens: {tokens} do not split into {unit} equal slices of 2 or more (mesh.sp × segments)"
        raise RecipeError(f"{slices}; nearest: {multiples(max(tokens, 2 * unit), unit)}")
    return tokens


def with_layers(model: Architecture, layers: int) -> Architecture:
    """Return the model with that many of its first layers; softmax layers stay some of them.

    Raises RecipeError where there are fewer, or a model cannot be that small.
    """
    if layers == model.layers:
        return model
    if not 0 < layers < model.layers:
        raise RecipeError(f"--layers: found {layers}; expected 1 to {model.layers}, the layers of the recipe")
    keys = model.model_dump()
    for key, value in keys.items():
        if isinstance(value, tuple) and value and all(isinstance(index, int) for index in value) and key != "layers":
            keys[key] = tuple(index for index in value if index < layers)
    if model.softmax and not keys["softmax"]:
        keys["softmax"] = (layers - 1,)
    try:
        return architectures.model(keys | {"layers": layers})
    except ValidationError as error:
        raise RecipeError(f"--layers: {layers} do not make a model: {error.errors()[0]['msg']}") from None
