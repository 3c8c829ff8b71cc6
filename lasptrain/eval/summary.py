"""Summary of a finished run: losses against the corpus, a text continued by the model, commands to type next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_tools import prepared
from data_tools.tokenizer import Tokenizer, load_tokenizer
from lasptrain.console.stdio import printable
from lasptrain.console.tables import show
from lasptrain.data.dataset import TokenDataset
from lasptrain.eval.generate import generate
from lasptrain.models.language_model import LanguageModel, on_meta
from lasptrain.ops import select
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.parallel.shard import fill, full_tensor
from lasptrain.recipe.schema import Recipe
from lasptrain.recipe.sections import Optim
from lasptrain.run.folder import RECIPE
from lasptrain.run.tracker import Rows
from lasptrain.training.validation import Validation

PROMPT = 48  # tokens of held-out text that the sample continues


def summarize(
    model: LanguageModel,
    recipe: Recipe,
    parts: Sequence[TokenDataset],
    dataset: TokenDataset,
    run: Path,
    validation: Validation | None,
    is_main: bool,
    done: int,
) -> dict[str, Rows]:
    """Print the summary on the main rank; return its tables by name, `losses` and `sample`, as far as there are any.

    `done` are the steps of the run, more than the recipe's where that names fewer than were trained before.

    Collective over all ranks, because the weights are gathered.
    """
    tables: dict[str, Rows] = {}
    whole = gather(model, is_main)
    if whole is None:
        return tables
    if validation is not None:
        tables["losses"] = _losses(validation, dataset)
        show(_shown(tables["losses"], f"{recipe.name}: {validation.tokens:,} held-out tokens"))
    if recipe.eval.sample:
        tokenizer = load_tokenizer(recipe.data.tokenizer)
        prompt = dataset.split("train" if validation is None else "validation").read(0, PROMPT).tolist()
        sample = _sample(whole, tokenizer, prompt, recipe.eval.sample)
        tables["sample"] = [sample]
        before, after = map(escape, sample.values())
        Console(soft_wrap=True, highlight=False).print(f"[dim]{before}[/dim][bold]{after}[/bold]\n")
    data = "".join(f"data       {line}\n" for line in epochs(recipe, parts))
    again = f"lasptrain pretrain {run / RECIPE} --run {run}"
    if recipe.stages:
        again += ", with another stage in the recipe and its steps added to train.steps"
    else:
        again += f" --set train.steps={2 * done}"
    curves = f"curves     tensorboard --logdir {run}\n"
    curves += "           from another machine also: ssh -L 6006:localhost:6006 THIS-MACHINE\n"
    show(f"{data}{curves if 'tensorboard' in recipe.track.trackers else ''}continue   {again}{_caution(recipe.optim)}")
    return tables


def epochs(recipe: Recipe, parts: Sequence[TokenDataset]) -> list[str]:
    """Lines that say how often all steps read each source; `parts` are those of `every_source`."""
    return prepared.epochs(recipe, [part.whole("train").tokens for part in parts])


def _caution(cfg: Optim) -> str:
    """Warn of the effect that more steps would have on the learning rate at the end of a run."""
    if cfg.schedule == "constant":
        return ""
    before = ", or from a checkpoint before its decay" if cfg.schedule == "wsd" else ""
    return f"; schedule {cfg.schedule} then raises the learning rate again (constant{before} would not)"


def gather(model: LanguageModel, wanted: bool) -> LanguageModel | None:
    """Gather the whole model on this rank if `wanted`, else return None. Collective, one parameter at a time."""
    alone = None
    if wanted:
        attention = ShardedRecurrence(select("auto", model.embed.weight.device, model.cfg.kernels))
        alone = on_meta(model.cfg, model.window, attention, dtype=model.dtype)
        alone.to_empty(device=model.embed.weight.device)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        whole = full_tensor(value)
        if alone is not None:
            fill(alone, [(name, whole)])
    return alone


def _losses(validation: Validation, dataset: TokenDataset) -> list[dict[str, str | float]]:
    rows: list[tuple[str, float, str]] = [
        ("uniform over the vocabulary", math.log(dataset.vocab_size), "knows nothing"),
        ("unigram entropy of the corpus", dataset.unigram_entropy, "knows how often each token occurs"),
        ("this model", validation.loss, f"{validation.bits_per_byte:.3f} bits per byte"),
    ]
    for start, loss in validation.by_position.items():
        if start >= 64 and start.bit_length() % 2:  # powers of four
            rows.append((f"  from position {start}", loss, ""))
    return [{"loss": name, "nats per token": loss, "meaning": remark} for name, loss, remark in rows]


def _shown(rows: Rows, title: str) -> Table:
    table = Table(title=title)
    table.add_column("")
    table.add_column("nats per token", justify="right")
    table.add_column("", justify="left")
    for name, loss, remark in (row.values() for row in rows):
        table.add_row(f"{name}", f"{loss:.3f}", f"{remark}")
    return table


def _sample(model: LanguageModel, tokenizer: Tokenizer, prompt: list[int], count: int) -> dict[str, str]:
    parts = {"prompt": prompt, "continued": generate(model, prompt, count)}
    return {name: printable(tokenizer.decode(tokens), "\n\t") for name, tokens in parts.items()}
