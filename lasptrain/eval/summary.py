"""Summary of a finished run: losses against the corpus, a text continued by the model, commands to type next."""

from __future__ import annotations

import math
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
from lasptrain.training.validation import Validation

PROMPT = 48  # tokens of held-out text that the sample continues


def summarize(
    model: LanguageModel, recipe: Recipe, dataset: TokenDataset, run: Path, validation: Validation | None, is_main: bool
) -> None:
    """Print the summary on the main rank. Collective over all ranks, because the weights are gathered."""
    whole = gather(model, is_main)
    if whole is None:
        return
    if validation is not None:
        show(_losses(validation, dataset, recipe))
    if recipe.eval.sample:
        tokenizer = load_tokenizer(recipe.data.tokenizer)
        prompt = dataset.split("train" if validation is None else "validation").read(0, PROMPT).tolist()
        Console(soft_wrap=True, highlight=False).print(_sample(whole, tokenizer, prompt, recipe.eval.sample))
    data = "".join(f"data       {line}\n" for line in epochs(recipe, dataset))
    again = f"lasptrain pretrain {run / RECIPE} --run {run} --set train.steps={2 * recipe.train.steps}"
    show(
        f"{data}"
        f"curves     tensorboard --logdir {run}\n"
        "           from another machine also: ssh -L 6006:localhost:6006 THIS-MACHINE\n"
        f"continue   {again}{_caution(recipe.optim)}"
    )


def epochs(recipe: Recipe, dataset: TokenDataset) -> list[str]:
    """Lines that say how often all steps read each source."""
    tokens = [part.whole("train").tokens for part in dataset.members]
    return prepared.epochs(recipe.data, tokens, recipe.train.steps * recipe.train.batch)


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


def _losses(validation: Validation, dataset: TokenDataset, recipe: Recipe) -> Table:
    table = Table(title=f"{recipe.name}: {validation.tokens:,} held-out tokens")
    table.add_column("")
    table.add_column("nats per token", justify="right")
    table.add_column("", justify="left")
    table.add_row("uniform over the vocabulary", f"{math.log(dataset.vocab_size):.3f}", "knows nothing")
    unigram = f"{dataset.unigram_entropy:.3f}"
    table.add_row("unigram entropy of the corpus", unigram, "knows how often each token occurs")
    table.add_row("this model", f"{validation.loss:.3f}", f"{validation.bits_per_byte:.3f} bits per byte")
    for start, loss in validation.by_position.items():
        if start >= 64 and start.bit_length() % 2:  # powers of four
            table.add_row(f"  from position {start}", f"{loss:.3f}", "")
    return table


def _sample(model: LanguageModel, tokenizer: Tokenizer, prompt: list[int], count: int) -> str:
    continued = generate(model, prompt, count)
    before, after = (escape(printable(tokenizer.decode(tokens), "\n\t")) for tokens in (prompt, continued))
    return f"[dim]{before}[/dim][bold]{after}[/bold]\n"
