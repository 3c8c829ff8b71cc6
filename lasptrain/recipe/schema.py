"""The whole recipe, and the checks between keys of different sections."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Annotated, NamedTuple, Self

from pydantic import BeforeValidator, SerializeAsAny, model_validator

from lasptrain import architectures
from lasptrain.architectures.base import Architecture
from lasptrain.architectures.nearest import multiples, nearest_fits
from lasptrain.architectures.section import Name, Problem, Section, as_tuple, optional
from lasptrain.recipe.sections import (
    Checkpoint,
    Data,
    Eval,
    Guard,
    Launch,
    Mesh,
    Optim,
    Parallel,
    Stage,
    Track,
    Train,
)


def _model(value: object) -> object:
    """Return the model that keys describe, by their `arch`; anything else as it is."""
    return architectures.model(value) if isinstance(value, Mapping) else value


class Span(NamedTuple):
    """Steps `first` + 1 to `end` of a run: a stage of this number, or all of them; and the recipe that they follow."""

    number: int
    first: int
    end: int
    recipe: "Recipe"  # without stages

    @property
    def steps(self) -> int:
        """Number of steps."""
        return self.end - self.first

    @property
    def samples(self) -> int:
        """Number of windows that are read."""
        return self.steps * self.recipe.train.batch

    @property
    def tokens(self) -> int:
        """Number of tokens that are read."""
        return self.samples * self.recipe.data.window


class Recipe(Section):
    """A whole run. `name` is the file's stem unless written out; it names the run folder."""

    name: Name = optional("run", "names the run folder; the file's stem if not given")
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
    stages: Annotated[tuple[Stage, ...], BeforeValidator(as_tuple)] = optional(
        (), "one after another; none: all steps are alike"
    )

    def problems(self) -> Iterator[Problem]:
        """Yield keys of different sections that do not fit each other."""
        yield from _schedule(self)
        yield from _stages(self) if self.stages else _layout(self)
        kernel, kernels = self.train.kernel, self.model.kernels
        if kernel not in ("auto", *kernels):
            fits = ", ".join(["auto", *kernels[:-1]])
            yield (
                "train.kernel",
                f"found {kernel!r}, which arch {self.model.arch} does not have; expected {fits} or {kernels[-1]}",
            )
        if self.train.compile and self.parallel.recompute == "selective":
            yield "parallel.recompute", "found 'selective' with train.compile = true; expected none or full"

    def at(self, number: int) -> Self:
        """The recipe of a stage: with its keys in place of the recipe's, and without stages."""
        changed: dict[str, dict[str, object]] = defaultdict(dict)
        for name, value in self.stages[number].keys.items():
            section, _, key = name.partition(".")
            changed[section][key] = value
        return self.replace(**changed).model_copy(update={"stages": ()})

    def told(self, number: int, text: str) -> str:
        """Return a text on the recipe of a stage with the keys that the stage was given in place of the recipe's."""
        for name in self.stages[number].keys if self.stages else ():
            text = text.replace(name, f"stages[{number}].{name.partition('.')[2]}")
        return text

    def spans(self) -> tuple[Span, ...]:
        """The stages in order; one of all steps where there are none."""
        if not self.stages:
            return (Span(0, 0, self.train.steps, self),)
        ends = list(accumulate(stage.steps for stage in self.stages))
        return tuple(Span(n, end - self.stages[n].steps, end, self.at(n)) for n, end in enumerate(ends))

    @property
    def longest(self) -> Span:
        """The stage with the longest windows, the last of them."""
        return max(self.spans(), key=lambda span: (span.recipe.data.window, span.number))

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


def _stages(recipe: Recipe) -> Iterator[Problem]:
    """Yield stages that do not make up the run, and what does not fit in one of them, by the keys that it was given."""
    spans, steps, window = recipe.spans(), recipe.train.steps, recipe.data.window
    if spans[-1].end != steps:
        found = f"{' + '.join(str(span.steps) for span in spans)} = {spans[-1].end} steps"
        yield "stages", f"{found}, but train.steps = {steps}; expected the same number"
    if (longest := recipe.longest).recipe.data.window != window:
        found = f"found {window}; expected {longest.recipe.data.window}, the window of stages[{longest.number}]"
        yield "data.window", f"{found}, the longest"
    if recipe.data.packing == "best_fit" and any(span.recipe.data.window != window for span in spans):
        yield "data.packing", "found 'best_fit', which packs for one window, with stages of several; expected concat"
    yield from in_stages(recipe, lambda one: (*one.data.problems(), *_layout(one)))


def in_stages(recipe: Recipe, problems: Callable[[Recipe], Iterable[Problem]]) -> Iterator[Problem]:
    """Yield the problems of each stage once, by the keys that it was given; of the recipe where there are no stages."""
    found: dict[Problem, None] = {}
    everywhere = set(problems(recipe))
    for span in recipe.spans():
        for key, text in problems(span.recipe):
            key, text = recipe.told(span.number, key), recipe.told(span.number, text)
            if "stages[" not in key + text and (key, text) not in everywhere:
                text = f"{text} (stages[{span.number}])"
            found[key, text] = None
    yield from found


def _layout(recipe: Recipe) -> Iterator[Problem]:
    yield from _window(recipe)
    yield from _batch(recipe)


def _schedule(recipe: Recipe) -> Iterator[Problem]:
    steps, optim = recipe.train.steps, recipe.optim
    if optim.warmup >= steps:
        yield "optim.warmup", f"{optim.warmup} of train.steps = {steps} steps; expected at most {steps - 1}"
    elif optim.decay is not None and optim.warmup + optim.decay > steps:
        found = f"{optim.decay} steps after optim.warmup = {optim.warmup} exceed train.steps = {steps}"
        yield "optim.decay", f"{found}; expected at most {steps - optim.warmup}"
