"""`lasptrain data`: text, tokenizers and token shards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lasptrain.cli.options import App, Overrides, RecipeFile, spec
from lasptrain.console.stdio import argument, printable
from lasptrain.errors import DataError, RecipeError
from lasptrain.recipe.loading import load
from lasptrain.run.folder import RECIPE

if TYPE_CHECKING:
    from data_tools.packing import BestFit
    from data_tools.prepare import Preparation

app = App("Text, tokenizers and token shards.")
tokenizer_app = App("Train a tokenizer, or look at one.")
app.add_typer(tokenizer_app, name="tokenizer")

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE…",
        callback=spec,
        help="python:source, repositories:FOLDER for code, hf:NAME[:CONFIG][@SPLIT] for datasets, or files and folders "
        "of text, JSON lines, .csv, .parquet and .arrow.",
    ),
]
TOKENIZER = "A tokenizer.json, a folder that holds one, a sentencepiece .model, or bytes."
Tokenizer = Annotated[str, typer.Argument(metavar="FILE", callback=spec, help=TOKENIZER)]
Field = Annotated[str, typer.Option(help="The key of rows that holds the text, or a path of keys such as doc.text.")]
Errors = Annotated[Literal["fail", "replace", "skip"], typer.Option(help="What to do with text that is not Unicode.")]
MaxBad = Annotated[int, typer.Option(min=0, help="Bad lines of JSON or CSV that are tolerated.")]
Dataset = Annotated[Path, typer.Argument(metavar="DIR", help="A prepared dataset.")]
Seed = Annotated[int, typer.Option(min=0, max=(1 << 63) - 1, help="Of the shuffle of documents.")]
HeldOut = Annotated[int, typer.Option(min=0, max=999_999, help="Documents held out, per million.")]
Shortest = Annotated[int, typer.Option(min=0, help="Leave out shorter documents.")]
Longest = Annotated[int | None, typer.Option(min=1, help="Leave out longer documents.")]
Packing = Annotated[
    Literal["concat", "best_fit"], typer.Option(help="One after another, or windows of whole documents.")
]
Window = Annotated[int | None, typer.Option(min=2, help="Tokens of a window, for best_fit.")]
LongDocuments = Annotated[Literal["continue", "cut"], typer.Option(help="What best_fit does with more than a window.")]

PartOf = Annotated[
    str | None, typer.Option("--part", metavar="I/N", help="One of N shares of the files; data merge joins all.")
]


def _say(result: object) -> None:
    """Print a result, in which names of files and of sources may hold any character."""
    typer.echo(printable(str(result), "\n"))


@app.command()
def prepare(
    sources: Sources,
    tokenizer: Annotated[str, typer.Option(metavar="FILE", callback=spec, help=TOKENIZER)],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The new dataset.")],
    seed: Seed = 0,
    validation: HeldOut = 20_000,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one per core if not given.")] = None,
    errors: Errors = "fail",
    field: Field = "text",
    max_bad: MaxBad = 0,
    min_tokens: Shortest = 0,
    max_tokens: Longest = None,
    packing: Packing = "concat",
    window: Window = None,
    long_documents: LongDocuments = "continue",
    part: PartOf = None,
) -> None:
    """Turn text into token shards."""
    from data_tools.prepare import Preparation
    from data_tools.sources import Reading

    given = Preparation(sources, tokenizer, reading=Reading(errors, field, max_bad), workers=workers)
    _prepare(given, out, seed, validation, min_tokens, max_tokens, packing, window, long_documents, part)


@app.command("import")
def import_ids(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE…",
            callback=spec,
            help="Files and folders: .parquet, .arrow, save_to_disk, Megatron-LM's .bin with .idx, bare .bin, .npy.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The new dataset.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="FILE", callback=spec, help="The one that made the ids, if it is not beside them."),
    ] = None,
    bos: Annotated[int | None, typer.Option(min=0, metavar="ID", help="Of a tokenizer that names no BOS.")] = None,
    column: Annotated[str, typer.Option(help="Of tables: lists of ids.")] = "input_ids",
    document_mark: Annotated[
        int | None, typer.Option(min=0, metavar="ID", help="The id that ends or begins documents, over rows of tables.")
    ] = None,
    dtype: Annotated[Literal["uint16", "uint32"] | None, typer.Option(help="Type of the ids in a bare .bin.")] = None,
    seed: Seed = 0,
    validation: HeldOut = 20_000,
    min_tokens: Shortest = 0,
    max_tokens: Longest = None,
    packing: Packing = "concat",
    window: Window = None,
    long_documents: LongDocuments = "continue",
    part: PartOf = None,
) -> None:
    """Turn ids that another program has made of text into token shards."""
    from data_tools.ids import TokenReading, find_tokenizer
    from data_tools.prepare import Preparation

    reading = TokenReading(column, document_mark, dtype, bos)
    given = Preparation(sources, tokenizer or find_tokenizer(sources), tokens=reading)
    _prepare(given, out, seed, validation, min_tokens, max_tokens, packing, window, long_documents, part)


@app.command()
def merge(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR…", help="Datasets: all parts of one, or old and new.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The new dataset.")],
    packing: Packing = "concat",
    window: Window = None,
    long_documents: LongDocuments = "continue",
) -> None:
    """Join datasets to one: what one prepare of all their sources would have made."""
    import time

    from data_tools import commands
    from lasptrain.console.progress import preparing

    began = time.monotonic()
    with preparing() as progress:
        merged = commands.merge(folders, out, _best_fit(packing, window, long_documents), progress)
    _say(merged)
    typer.echo(f"  {merged.rate(time.monotonic() - began)}")


def _best_fit(
    packing: Literal["concat", "best_fit"], window: int | None, long_documents: Literal["continue", "cut"]
) -> BestFit | None:
    """Return the packing that options ask for. Raises RecipeError for options that do not fit each other."""
    from data_tools.packing import BestFit

    if (packing == "best_fit") != (window is not None):
        found = "without --window" if window is None else f"with --window {window}"
        raise RecipeError(f"--packing: found {packing} {found}; best_fit needs a window, concat has none")
    if packing == "concat" and long_documents == "cut":
        raise RecipeError("--long-documents: found cut with --packing concat; only best_fit cuts documents")
    return None if window is None else BestFit(window, long_documents)


def _prepare(
    given: Preparation,
    out: Path,
    seed: int,
    validation: int,
    min_tokens: int,
    max_tokens: int | None,
    packing: Literal["concat", "best_fit"],
    window: int | None,
    long_documents: Literal["continue", "cut"],
    part: str | None,
) -> None:
    """Prepare a dataset with the options of `prepare` and `import`, and say what is in it.

    Raises RecipeError for a part with packing, which is done when parts are joined.
    """
    import time

    from data_tools import commands
    from data_tools.parts import Part
    from data_tools.prepare import ANY_LENGTH
    from lasptrain.console.progress import preparing

    fit = _best_fit(packing, window, long_documents)
    if part is not None and fit is not None:
        raise RecipeError(f"--part: found {part} with --packing {packing}; expected --packing of lasptrain data merge")
    lengths = min_tokens, max_tokens or ANY_LENGTH[1]
    share = None if part is None else Part.parse(part)
    asked = replace(given, validation_ppm=validation, seed=seed, lengths=lengths, packing=fit, part=share)
    began = time.monotonic()
    with preparing() as progress:
        prepared = commands.prepare(replace(asked, progress=progress), out)
    _say(prepared)
    typer.echo(f"  {prepared.rate(time.monotonic() - began)}")


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A prepared dataset, or a run.")],
    window: Annotated[int | None, typer.Option(min=2, help="Tokens; shows how many windows fit.")] = None,
    sample: Annotated[int | None, typer.Option(min=0, help="With --window: the text that this sample reads.")] = None,
    at: Annotated[int | None, typer.Option(min=0, help="With --window: the text from this token on.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="FILE", callback=spec, help="To show text: the one it was made with.")
    ] = None,
    seed: Annotated[int, typer.Option(help="data.seed of the recipe that reads it.")] = 0,
    split: Annotated[Literal["train", "validation"], typer.Option()] = "train",
    step: Annotated[int | None, typer.Option(min=1, help="Of a run: the text that this step reads.")] = None,
) -> None:
    """Show what a dataset holds, or the text of windows with their documents' boundaries.

    For a run folder only --step, or --at a place that metrics.jsonl names, is needed; its recipe says the rest. Where
    it has stages, --at needs the --step that the place is of.
    """
    from data_tools import commands

    if (folder / RECIPE).is_file():
        if step is None and at is None:
            raise RecipeError("--step: expected it for a run, or else --at a place that its metrics.jsonl names")
        from data_tools import windows

        for text in windows.show_windows(folder, step, at):
            _say(text)
        return
    if step is not None:
        raise RecipeError(f"--step: {folder} holds no {RECIPE}; expected a run")
    if sample is None and at is None:
        _say(commands.inspect(folder, window))
        return
    if window is None or tokenizer is None:
        raise RecipeError(f"--{'at' if sample is None else 'sample'}: needs --window and --tokenizer too")
    from data_tools import windows

    _say(windows.show_window(folder, tokenizer, window, sample or 0, seed, split, at))


@app.command()
def synth(
    out: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="The new file.")],
    kind: Annotated[
        Literal["passkey", "recall", "tracking", "pairs"],
        typer.Option(help="What is hidden and asked; pairs stand alone, without sources."),
    ] = "recall",
    sources: Annotated[list[str] | None, typer.Argument(callback=spec, help="Text to hide facts in.")] = None,
    errors: Errors = "fail",
    field: Field = "text",
    max_bad: MaxBad = 0,
    characters: Annotated[int, typer.Option(min=1, help="Of each document, about.")] = 200_000,
    shortest: Annotated[
        int | None, typer.Option(min=1, help="Lengths from this to --characters, as much text in every octave.")
    ] = None,
    documents: Annotated[int, typer.Option(min=1)] = 1000,
    prompts: Annotated[bool, typer.Option("--prompts", help="Questions for lasptrain eval --file.")] = False,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Hide facts in real text and ask for them at its end, or repeat pairs: documents that need a long memory."""
    from data_tools import commands
    from data_tools.sources import Reading

    if out.suffix != ".jsonl":  # by which `data prepare` tells JSON lines from other files
        raise RecipeError(f"--out: found {out}; expected a name that ends in .jsonl")
    lengths = (min(shortest or characters, characters), characters)
    if (kind == "pairs") != (not sources):
        raise RecipeError(f"--kind {kind}: found sources {sources or 'none'}; expected some, but none with pairs")
    reading = Reading(errors, field, max_bad, "synth")
    _say(commands.synthesize(kind, sources or [], lengths, documents, seed, prompts, out, reading))


@app.command()
def mix(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Show in which shares a recipe reads its sources, and how often."""
    from data_tools import windows

    _say(windows.preview(load(recipe, overrides)))


@app.command("bench")
def bench_reading(
    folder: Dataset,
    tokens: Annotated[int, typer.Option(min=1, help="Of a slice, which may go round the dataset.")] = 524_288,
    rate: Annotated[float | None, typer.Option(min=1, help="Tokens/s that training uses; how long it waits.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="With --rate, as many slices.")] = 5,
) -> None:
    """Time how a rank reads its slice, and with --rate how long training waits for slices that are read ahead."""
    from data_tools import windows

    typer.echo(str(windows.time_reading(folder, tokens)))
    if rate is not None:
        typer.echo(str(windows.time_waiting(folder, tokens, rate, steps)))


@app.command()
def verify(folder: Dataset) -> None:
    """Read every byte of a dataset and check it."""
    from data_tools import commands

    verified = commands.verify(folder)
    _say(verified)
    if verified.failures:
        raise typer.Exit(DataError.code)


@tokenizer_app.command("train")
def train_tokenizer(
    sources: Sources,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The new model.")],
    vocab: Annotated[int, typer.Option(min=300, max=1 << 20, help="Pieces.")] = 16384,
    errors: Errors = "fail",
    field: Field = "text",
    max_bad: MaxBad = 0,
) -> None:
    """Train a sentencepiece tokenizer on text."""
    from data_tools import commands
    from data_tools.sources import Reading

    _say(commands.train_tokenizer(sources, vocab, out, Reading(errors, field, max_bad, "tokenizer train")))


@tokenizer_app.command("check")
def check_tokenizer(
    file: Tokenizer,
    sources: Sources,
    other: Annotated[
        str | None, typer.Option("--against", metavar="FILE", callback=spec, help="Another one: same ids?")
    ] = None,
    errors: Errors = "fail",
    field: Field = "text",
    max_bad: MaxBad = 0,
) -> None:
    """Encode text and decode it again: what is lost, unknown, or encoded otherwise by another tokenizer."""
    from collections import Counter

    from data_tools.commands import told_left_out
    from data_tools.sources import Reading, left_out, open_source
    from data_tools.tokenizer import check, load_tokenizer

    dropped: Counter[str] = Counter()
    reading = Reading(errors, field, max_bad, "tokenizer check")
    documents = (d for source in sources for d in open_source(source).documents(reading, dropped))
    texts = ((document.place, document.text) for document in documents)
    found = check(load_tokenizer(file), texts, load_tokenizer(other) if other else None)
    for line in found.changed[:20]:
        _say(line)
    rate = found.bytes / max(1, found.tokens)
    rates = f"{found.texts:,} texts, {found.tokens:,} tokens, {rate:.3f} bytes per token"
    typer.echo(rates + told_left_out(left_out(sources), dropped))
    typer.echo(f"{len(found.changed):,} do not come back, {found.unknown:,} tokens are unknown")
    typer.echo(f"long texts {'may be cut: no id changes' if found.cuts else 'are encoded whole: a cut changes ids'}")
    if found.differing is not None:
        typer.echo(f"{found.differing:,} texts have other ids than {other} gives them")
    if not found.good:
        raise typer.Exit(DataError.code)


@tokenizer_app.command("inspect")
def inspect_tokenizer(
    file: Tokenizer, text: Annotated[str | None, typer.Option(help="Text to cut into pieces.")] = None
) -> None:
    """Show a tokenizer, and how it cuts a text."""
    from data_tools.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(file)
    typer.echo(f"{tokenizer.name}: {tokenizer.vocab_size} pieces, BOS {tokenizer.bos}, SHA-256 {tokenizer.sha256}")
    if text is not None:
        ids = tokenizer.encode(argument("--text", text))
        typer.echo(" ".join(repr(tokenizer.decode([i])) for i in ids))
        typer.echo(f"{len(ids)} tokens")
