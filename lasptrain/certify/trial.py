"""The recipe as it is certified: its layout as it stands, in windows and layers that this machine runs in a minute."""

from __future__ import annotations

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
SEGMENTS = 4  # of a window, at most: a first one, ones between, a last one
SHORT, SHORTEST = 256, 32  # tokens of a slice, below which layers go first, and below which nothing goes
STEPS = 4  # updates of the longest check


class Trial(NamedTuple):
    """A recipe to be certified: mesh and segment are numbers; `strict` is the precision of exact comparisons."""

    recipe: Recipe
    strict: str
    folder: Path  # where jobs leave what others compare with

    @property
    def exact(self) -> Recipe:
        """The recipe in the precision of exact comparisons."""
        return self.recipe.replace(train={"precision": self.strict})

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
    """Return the recipe of one process that sums in another order: in two segments, and with other chunks of the loss.

    Softmax layers that see the whole window allow one segment only.
    """
    window = recipe.data.window
    whole = window % 2 or (recipe.model.softmax and recipe.model.sliding_window is None)
    segment = window if whole else window // 2
    return recipe.replace(train={"segment": segment, "loss_chunk": max(16, recipe.train.loss_chunk // 3)})


class Limits(NamedTuple):
    """The limits of a trial: FLOP of a pass, and bytes of memory (None: unknown) for each or all of the ranks."""

    work: float
    memory: int | None
    shared: bool  # all ranks take theirs from the same memory

    def needed(self, recipe: Recipe, vocab: int, ranks: int) -> int:
        """Return the bytes that the largest job needs: one process with the whole window, or all ranks together."""
        plain, window = alone(recipe), recipe.data.window
        whole = sum(plan.memory(plain, vocab, 1, 1, window).values())
        assert isinstance(recipe.mesh.sp, int) and isinstance(recipe.train.segment, int)
        length = recipe.train.segment // recipe.mesh.sp
        return max(whole, ranks * sum(plan.memory(plain, vocab, 1, 1, length).values())) if self.shared else whole

    def fits(self, recipe: Recipe, vocab: int, ranks: int) -> bool:
        """Return True if a trial stays below both."""
        step = recipe.train.batch * recipe.data.window
        flops = plan.flops_per_token(recipe.model, vocab, recipe.data.window) * step
        return flops <= self.work and self.holds(recipe, vocab, ranks)

    def holds(self, recipe: Recipe, vocab: int, ranks: int) -> bool:
        """Return True if memory is enough."""
        return self.memory is None or self.needed(recipe, vocab, ranks) <= plan.HEADROOM * self.memory


def limits(device: torch.device) -> Limits:
    """Return those of this machine."""
    if device.type == "cuda":
        return Limits(WORK["cuda"], meshes.free_memory(device), shared=False)
    info = Path("/proc/meminfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    found = (1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return Limits(WORK["cpu"], next(found, None), shared=True)


def fit(
    recipe: Recipe, ranks: int, folder: Path, tokens: int | None = None, layers: int | None = None
) -> tuple[Trial, list[Size]]:
    """Return the trial of a recipe on `ranks`, and its sizes; `tokens` and `layers` take the place of what fits.

    Raises RecipeError for ones that do not fit the layout, ResourceError where nothing fits memory, and the errors of
    `resolve_mesh`.
    """
    device = meshes.device()
    within = limits(device)
    vocab = resolve_vocabulary(recipe.model, load_tokenizer(recipe.data.tokenizer).vocab_size)
    dp, sp = resolve_mesh(recipe, ranks)
    available = None if within.shared else within.memory
    laid = plan.layout(plan.with_reduction(recipe, vocab, dp, sp, available), dp, sp, vocab, available)
    segments = max(n for n in range(1, SEGMENTS + 1) if laid.segments % n == 0)
    batch = max(2, dp * recipe.train.micro_batch * min(2, laid.micro_batches))
    kernel = ops.select(recipe.train.kernel, device, recipe.model.kernels)
    strict = "fp32" if kernel == "triton" else "fp64"
    fixed = plan.with_reduction(recipe, vocab, dp, sp, available).replace(
        data={"repeat": True},
        mesh={"dp": dp, "sp": sp, "scan": links.with_scan(recipe, sp, laid.segment).mesh.scan},
        train={"batch": batch, "profile": (), "steps": max(STEPS, recipe.train.steps)},
        eval={"window": None, "tasks": (), "every": 0},
    )
    for window, depth in _candidates(recipe, sp * segments, tokens, layers):
        segment = window // segments
        chunk = min(recipe.train.loss_chunk, recipe.train.micro_batch * segment // sp)
        sized = fixed.replace(data={"window": window}, train={"segment": segment, "loss_chunk": chunk})
        chosen = sized.model_copy(update={"model": with_layers(recipe.model, depth)})
        if within.fits(chosen.replace(train={"precision": strict}), vocab, ranks):
            break
    if not within.holds(chosen.replace(train={"precision": strict}), vocab, ranks):
        found = f"{chosen.model.layers} layers and windows of {chosen.data.window:,} tokens"
        raise ResourceError(f"certify: {found} do not fit memory on one process; expected fewer: --layers, --tokens")
    sizes = [
        Size("tokens of a window", recipe.data.window, chosen.data.window),
        Size("segments of a window", laid.segments, segments),
        Size("layers", recipe.model.layers, chosen.model.layers),
        Size("windows of a step", recipe.train.batch, batch),
    ]
    return Trial(chosen, strict, folder), sizes


def _candidates(recipe: Recipe, unit: int, tokens: int | None, layers: int | None) -> Iterator[tuple[int, int]]:
    """Yield windows and layers, the largest first: shorter windows, then fewer layers, then shorter windows still.

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
