"""Windows as training reads them: their text, the time to read them, and the shares of several sources."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

from data_tools.dataset import left_out, open_stages
from data_tools.prepared import every_source
from data_tools.tokenizer import load_tokenizer
from lasptrain.console.words import times
from lasptrain.data.dataset import TokenDataset
from lasptrain.data.loader import SliceLoader
from lasptrain.data.mixture import SPAN, MixedDataset
from lasptrain.data.order import epochs, permute
from lasptrain.errors import DataError, RecipeError
from lasptrain.recipe.schema import Recipe, Span
from lasptrain.run.folder import RECIPE, recipe_of


@dataclass(frozen=True)
class WindowText:
    """Text of a window: documents as (first token, end, text). Prints the beginning and the end of each."""

    folder: Path
    place: int
    documents: tuple[tuple[int, int, str], ...]

    def __str__(self) -> str:
        lines = [f"window at token {self.place:,} of {self.folder}: {times(len(self.documents), 'document')}"]
        for first, end, text in self.documents:
            lines.append(f"  {first:>10,} to {end:,}  {_ends(text)}")
        return "\n".join(lines)


def _ends(text: str, most: int = 60) -> str:
    return repr(text) if len(text) <= 2 * most else f"{text[:most]!r} … {text[-most:]!r}"


@dataclass(frozen=True)
class Mixing:
    """Shares and epochs of several sources: a line for each."""

    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.lines)


def show_window(
    folder: Path, tokenizer_path: str, window: int, sample: int, seed: int, split: str, at: int | None = None
) -> WindowText:
    """Decode the window that a sample reads, or that starts `at` a token; documents that began before it stand first,
    without a BOS.

    Raises DataError for another tokenizer than the dataset's, or a split without such a window.
    """
    dataset = TokenDataset.open(folder)
    found = dataset.whole(split)
    if found.tokens < window:
        raise DataError(f"{folder}: split {split} has {found.tokens:,} tokens, no window of {window:,}")
    place = found.window_start(window, seed, sample) if at is None else at
    return _text(dataset, split, tokenizer_path, window, place)


def show_windows(run: Path, step: int | None = None, at: int | None = None) -> tuple[WindowText, ...]:
    """Decode the windows that a run reads in a step, 1 is the first, or the one `at` a place that the run has recorded;
    of a run with stages at that step.

    Raises RecipeError for a step beyond the recipe's last, DataError for a place that is in no source.
    """
    recipe = recipe_of(run)
    if step is not None and step > recipe.train.steps:
        raise RecipeError(f"--step: found {step}; {run / RECIPE} has train.steps = {recipe.train.steps}")
    if step is None and recipe.stages:
        raise RecipeError(f"--at: found with {run}, which has stages; expected --step too, which tells the stage")
    span = next(span for span in recipe.spans() if (step or 1) <= span.end)
    data, batch = span.recipe.data, span.recipe.train.batch
    dataset = open_stages(recipe, run=run).stages[span.number]
    parts = dataset.members
    if at is not None or step is None:
        places = [at or 0]
    else:
        order, first = dataset.split("train"), (step - 1 - span.first) * batch
        places = [order.window_start(data.window, data.seed, first + i) for i in range(batch)]
    texts = []
    for place in places:
        number, token = divmod(place, SPAN)
        if number >= len(parts):
            raise DataError(f"--at: found {place}, of source {number}; {run / RECIPE} has {len(parts)} sources")
        texts.append(_text(parts[number], "train", data.tokenizer, data.window, token))
    return tuple(texts)


def _text(dataset: TokenDataset, split: str, tokenizer_path: str, window: int, place: int) -> WindowText:
    tokenizer, found = load_tokenizer(tokenizer_path), dataset.whole(split)
    if tokenizer.sha256 != dataset.tokenizer_sha256:
        made = dataset.manifest.tokenizer.name
        raise DataError(f"--tokenizer: found {tokenizer.name}; {dataset.folder} was made with another, {made}")
    if place >= found.tokens:
        raise DataError(
            f"--at: found {place}, split {split} of {dataset.folder} has {found.tokens:,} tokens; where a recipe mixes "
            "sources, name the run folder instead"
        )
    tokens = found.read(place, window)
    starts = (tokens == dataset.bos).nonzero().flatten().tolist()
    spans = pairwise(sorted({0, *starts, window}))
    texts = tuple((a, b, tokenizer.decode(tokens[a:b].tolist())) for a, b in spans)
    return WindowText(dataset.folder, place, texts)


@dataclass(frozen=True)
class Timing:
    """Seconds to read a slice of `tokens`, checksums and ids verified, into int64: the best and the mean of many."""

    tokens: int
    best: float
    mean: float

    def __str__(self) -> str:
        return (
            f"slices of {self.tokens:,} tokens, read, checked and widened: best {1000 * self.best:.3f} ms, "
            f"mean {1000 * self.mean:.3f} ms, {self.tokens / self.mean / 1e6:,.0f} million tokens/s"
        )


def time_reading(folder: Path, tokens: int, reads: int = 100) -> Timing:
    """Time one thread reading slices of the training split, where samples would read them."""
    split = TokenDataset.open(folder).whole("train")
    starts = [permute(split.tokens, i, seed=0) for i in range(min(reads, split.tokens))]
    seconds = []
    for start in starts:
        began = time.perf_counter()
        split.read(start, tokens)
        seconds.append(time.perf_counter() - began)
    return Timing(tokens, min(seconds), sum(seconds) / len(seconds))


@dataclass(frozen=True)
class Waiting:
    """Time that training waits for data while the next window is read beside it: mean seconds, share of a step."""

    window: int
    rate: float  # tokens/s
    steps: int
    mean: float
    share: float

    def __str__(self) -> str:
        return (
            f"windows of {self.window:,} tokens, read ahead while {self.rate:,.0f} tokens/s are used: "
            f"{self.steps} steps wait {1000 * self.mean:.3f} ms each, {100 * self.share:.4f} % of a step"
        )


def time_waiting(folder: Path, window: int, rate: float, steps: int) -> Waiting:
    """Time a rank that uses `rate` tokens/s of the training split waiting for its windows, but for the first."""
    dataset = TokenDataset.open(folder)
    loader = SliceLoader(
        dataset.whole("train"),
        window=window,
        batch=1,
        micro_batch=1,
        dp=1,
        dp_rank=0,
        sp=1,
        sp_rank=0,
        segment=window,
        seed=0,
        bos=dataset.bos,
        reset=True,
        repeat=True,
    )
    waits = []
    for step in range(steps + 1):
        began = time.perf_counter()
        loader.step(step)
        waits.append(time.perf_counter() - began)
        time.sleep(window / rate)
    loader.close()
    mean = sum(waits[1:]) / steps
    return Waiting(window, rate, steps, mean, mean / (mean + window / rate))


def preview(recipe: Recipe) -> Mixing:
    """Preview the share and the epochs of each source that a recipe reads; prepares those that never were."""
    opened = open_stages(recipe)
    lines = list[str]()
    for span, dataset in zip(recipe.spans(), opened.stages, strict=True):
        lines += _stage_preview(span, dataset, f"stages[{span.number}]: " if recipe.stages else "")
    return Mixing((*lines, *left_out(every_source(recipe), opened.parts)))


def _stage_preview(span: Span, dataset: TokenDataset, name: str) -> Iterator[str]:
    data, total = span.recipe.data, span.samples
    counts = dataset.counts if isinstance(dataset, MixedDataset) else (data.mix_block,)
    yield f"{name}{total:,} windows of {data.window:,} tokens in {span.steps:,} steps, mixed {sum(counts):,} at a time"
    for part, count in zip(dataset.members, counts, strict=True):
        tokens = part.whole("train").tokens
        read = float(epochs(tokens, data.window, Fraction(total * count, sum(counts))))
        yield (
            f"{part.folder}: {count:,} of {sum(counts):,} windows ({100 * count / sum(counts):.2f} %), "
            f"{tokens:,} tokens, {read:.2f} epochs" + ("; each more than 4 times" if read > 4 else "")
        )
