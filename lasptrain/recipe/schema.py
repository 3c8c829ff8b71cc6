"""The whole recipe, and the checks between keys of different sections."""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Self

from pydantic import BeforeValidator, SerializeAsAny, model_validator

from lasptrain import architectures
from lasptrain.architectures.base import Architecture
from lasptrain.architectures.nearest import multiples, nearest_fits
from lasptrain.architectures.section import Name, Problem, Section
from lasptrain.recipe.sections import (
    Checkpoint,
    Data,
    Eval,
    Guard,
    Launch,
    Mesh,
    Optim,
    Parallel,
    Track,
    Train,
)


def _model(value: object) -> object:
    """Return the model that keys describe, by their `arch`; anything else as it is."""
    return architectures.model(value) if isinstance(value, Mapping) else value


class Recipe(Section):
    """A whole run. `name` is the file's stem unless written out; it names the run folder."""

    name: Name = "run"
    model: Annotated[SerializeAsAny[Architecture], BeforeValidator(_model)]
    data: Data
    mesh: Mesh = Mesh()
    parallel: Parallel = Parallel()
    optim: Optim
    train: Train
    checkpoint: Checkpoint = Checkpoint()
    guard: Guard = Guard()
    eval: Eval = Eval()
    track: Track = Track()
    launch: Launch = Launch()

    def problems(self) -> Iterator[Problem]:
        """Yield keys of different sections that do not fit each other."""
        yield from _window(self)
        yield from _batch(self)
        yield from _schedule(self)
        kernel, kernels = self.train.kernel, self.model.kernels
        if kernel not in ("auto", *kernels):
            fits = ", ".join(["auto", *kernels[:-1]])
            yield (
                "train.kernel",
                f"found {kernel!r}, which arch {self.model.arch} does not have; expected {fits} or {kernels[-1]}",
            )
        if self.train.compile and self.parallel.recompute == "selective":
            yield "parallel.recompute", "found 'selective' with train.compile = true; expected none or full"

    def replace(self, **sections: Mapping[str, object]) -> Self:
        """The recipe with other values of some keys, unchecked: `replace(train={"segment": 4096})`."""
        changed = {name: getattr(self, name).model_copy(update=dict(keys)) for name, keys in sections.items()}
        return self.model_copy(update=changed)

    def named(self, name: str) -> Self:
        """The recipe under the name of a folder."""
        return self.model_copy(update={"name": recipe_name(name)})

    @model_validator(mode="after")
    def _fits(self) -> Self:
        sections = (self, *(getattr(self, name) for name in SECTIONS))
        if found := [problem for section in sections for problem in section.problems()]:
            raise ValueError("\n".join(f"{key}: {text}" for key, text in found))
        return self


def recipe_name(text: str) -> str:
    """Turn a folder's name into a valid recipe name."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", text).lstrip("._-")[:100] or "run"


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Recipe.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}


def _window(recipe: Recipe) -> Iterator[Problem]:
    window, segment = recipe.data.window, recipe.train.segment
    if window < 2:
        yield "data.window", "1 token has no next one to learn; expected at least 2"
    if segment != "auto" and window % segment:
        nearest = nearest_fits(segment, lambda tokens: window % tokens == 0, window)
        yield "train.segment", f"{segment} tokens do not divide data.window = {window}; nearest: {nearest}"
    elif recipe.mesh.sp != "auto":
        yield from ragged_slices(recipe, recipe.mesh.sp)


def ragged_slices(recipe: Recipe, sp: int) -> Iterator[Problem]:
    """Yield the windows and segments that `sp` ranks cannot share equally."""
    window, segment = recipe.data.window, recipe.train.segment
    ragged = f"tokens do not split into mesh.sp = {sp} equal slices"
    if recipe.eval.window is not None and recipe.eval.window % sp:
        yield "eval.window", f"{recipe.eval.window} {ragged}; nearest: {multiples(recipe.eval.window, sp)}"
    if segment != "auto" and segment % sp:
        nearest = nearest_fits(segment, lambda tokens: window % tokens == 0 and tokens % sp == 0, window)
        windows = f", nor does data.window = {window}; nearest windows: {multiples(window, sp)}"
        fits = f"; nearest that divide data.window: {nearest}" if nearest else windows
        yield "train.segment", f"{segment} {ragged}{fits}"
    elif window % sp:
        yield "data.window", f"{window} {ragged}; nearest: {multiples(window, sp)}"


def _batch(recipe: Recipe) -> Iterator[Problem]:
    batch, micro, dp = recipe.train.batch, recipe.train.micro_batch, recipe.mesh.dp
    ranks = 1 if dp == "auto" else dp
    if batch % (ranks * micro):
        parts = f"micro-batches of {micro}" if ranks == 1 else f"mesh.dp = {ranks} × micro_batch = {micro}"
        yield "train.batch", f"{batch} windows do not split into {parts}; nearest: {multiples(batch, ranks * micro)}"


def _schedule(recipe: Recipe) -> Iterator[Problem]:
    steps, optim = recipe.train.steps, recipe.optim
    if optim.warmup >= steps:
        yield "optim.warmup", f"{optim.warmup} of train.steps = {steps} steps; expected at most {steps - 1}"
    elif optim.decay is not None and optim.warmup + optim.decay > steps:
        found = f"{optim.decay} steps after optim.warmup = {optim.warmup} exceed train.steps = {steps}"
        yield "optim.decay", f"{found}; expected at most {steps - optim.warmup}"
