"""`lasptrain bench`: measurements on this machine."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lasptrain.cli.options import App, Numbers, Overrides, RecipeFile, in_a_folder, to_bytes
from lasptrain.console.figures import figure_class
from lasptrain.cost import rates
from lasptrain.errors import RecipeError
from lasptrain.recipe.loading import load
from lasptrain.recipe.schema import Recipe

if TYPE_CHECKING:
    from lasptrain.bench.result import Result, Row

app = App("Measure on this machine.")

Ranks = Annotated[int | None, typer.Option(min=1, help="Ranks; one per GPU, or 2 without any.")]
RanksOrOne = Annotated[int | None, typer.Option(min=1, help="Ranks; one per GPU, or 1 without any.")]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw whole steps as PNG.", callback=in_a_folder)]


@app.callback()
def bench() -> None:
    """Measure on this machine."""


def _longest(recipe: Path, overrides: list[str] | None = None) -> Recipe:
    """Load a recipe; of one with stages the longest is measured."""
    return load(recipe, overrides).longest.recipe


def _gpus(otherwise: int = 2) -> int:
    """Return the number of GPUs here, or this number without any."""
    import torch

    return torch.cuda.device_count() or otherwise


def _tell(results: "Iterable[Result[Row]]", file: Path | None) -> "Result[Row]":
    """Write each result to the file as it comes, for the last may take long; print the last one and return it."""
    for found in results:
        if file is not None:
            found.write(file)
    found.show()
    return found


@app.command("kernels")
def bench_kernels(
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Lengths; 8K, 32K, 128K, 512K if not given.")] = None,
    heads: Annotated[int, typer.Option(min=1)] = 16,
    dim: Annotated[int, typer.Option(min=1, max=256, help="K and V of a head.")] = 128,
    dtype: Annotated[Literal["bf16", "fp16", "fp32"], typer.Option()] = "bf16",
    decay: Annotated[Literal["none", "head", "token"], typer.Option(help="None, constant, or per token.")] = "head",
    documents: Annotated[int, typer.Option(min=0, help="Document boundaries in the window.")] = 0,
    op: Annotated[Literal["linear", "gdn"], typer.Option(help="Linear attention, or the delta rule.")] = "linear",
    file: Numbers = None,
) -> None:
    """Time the attention kernels beside flash-linear-attention (extra `bench`) and the floors."""
    from lasptrain.bench import kernels

    lengths = tokens or [1 << n for n in (13, 15, 17, 19)]
    found = _tell([kernels.measure(lengths, heads, dim, dtype, decay, documents, op)], file)
    if all(row.name == "lasptrain" for row in found.rows):
        typer.echo("flash-linear-attention is not installed: pip install 'lasptrain[bench]' to compare")


@app.command("softmax")
def bench_softmax(
    tokens: Annotated[int, typer.Option(min=8192, help="Queries of a slice.")] = 32_768,
    heads: Annotated[int, typer.Option(min=1)] = 16,
    kv_heads: Annotated[int, typer.Option(min=1, help="Heads of k and v; they divide --heads.")] = 4,
    dim: Annotated[int, typer.Option(min=16, max=256, help="Of a head.")] = 128,
    dtype: Annotated[Literal["bf16", "fp16"], typer.Option()] = "bf16",
    alone: Annotated[bool, typer.Option("--alone", help="Without the others, which take minutes to compile.")] = False,
    file: Numbers = None,
) -> None:
    """Time softmax attention with documents, a prefix or a sliding window beside FlexAttention and PyTorch's own."""
    from lasptrain.bench import softmax

    if heads % kv_heads:
        raise RecipeError(f"--kv-heads: found {kv_heads}; expected a divisor of --heads {heads}")
    _tell([softmax.measure(tokens, softmax.Sizes(heads, kv_heads, dim), dtype, alone)], file)


@app.command("sp")
def bench_sp(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nproc: Ranks = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method", help="none (a window per rank), a scan, a rival; all if not given. A wrong one lists them."
        ),
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Per rank, of one attention layer.")] = None,
    steps: Annotated[list[int] | None, typer.Option(min=1, help="Per rank, of whole steps of the model.")] = None,
    file: Numbers = None,
    plot: Plot = None,
    measured: Annotated[
        Path | None, typer.Option("--rates", metavar="FILE", help="Of plan --measure, to predict steps from.")
    ] = None,
    limit: Annotated[float, typer.Option(min=1, help="Seconds for one method's steps of one length.")] = 240,
) -> None:
    """Time windows shared between ranks beside windows that are not, with as many tokens per rank."""
    from lasptrain.bench import sp
    from lasptrain.bench.methods import METHODS
    from lasptrain.bench.plot import draw

    if not tokens and not steps:
        raise RecipeError("--tokens, --steps: found neither; expected tokens per rank, such as --steps 32768")
    if plot is not None:
        figure_class()  # a missing matplotlib is told before measuring, not after it
    one, ranks, names = _longest(recipe, overrides), nproc or _gpus(), methods or METHODS
    hardware = None if measured is None else rates.read(measured)
    found = _tell(sp.measure(one, ranks, names, tokens or [], steps or [], hardware, limit), file)
    if plot is not None:
        draw(found, plot)


@app.command("prefill")
def bench_prefill(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nproc: RanksOrOne = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Of a text; 128K, 1M and 4M if not given.")] = None,
    segment: Annotated[int, typer.Option(min=1, help="Tokens that each rank has in work at a time.")] = 32_768,
    file: Numbers = None,
) -> None:
    """Time how `lasptrain eval` reads long texts, beside the forward of training, and take its memory."""
    from lasptrain.bench import prefill

    lengths = tokens or [1 << n for n in (17, 20, 22)]
    _tell([prefill.measure(_longest(recipe, overrides), nproc or _gpus(1), lengths, segment)], file)


@app.command("parity")
def bench_parity(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nproc: Ranks = None,
    steps: Annotated[int, typer.Option(min=1, help="Updates on each layout.")] = 100,
    kinds: Annotated[
        list[str] | None, typer.Option("--kind", help="Of data parallelism; all five if not given.")
    ] = None,
    file: Numbers = None,
) -> None:
    """Train a recipe on every kind of data parallelism, with and without sequence parallelism; compare the losses."""
    from lasptrain.bench import parity

    _tell(parity.measure(_longest(recipe, overrides), nproc or _gpus(), steps, kinds or parity.KINDS), file)


@app.command("ablation")
def bench_ablation(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nproc: Ranks = None,
    tokens: Annotated[int, typer.Option(min=1, help="Per rank.")] = 32_768,
    file: Numbers = None,
) -> None:
    """Time whole steps with and without fused kernels, with and without keeping states for the backward."""
    from lasptrain.bench import ablation

    _tell([ablation.measure(_longest(recipe, overrides), nproc or _gpus(), tokens)], file)


@app.command("optim")
def bench_optim(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nproc: RanksOrOne = None,
    file: Numbers = None,
) -> None:
    """Time an update of a recipe's model by AdamW and by Muon, beside the step that `plan` predicts."""
    from lasptrain.bench import optim

    _tell([optim.measure(_longest(recipe, overrides), nproc or _gpus(1))], file)


@app.command("saving")
def bench_saving(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nproc: RanksOrOne = None,
    saves: Annotated[int, typer.Option(min=1, help="Checkpoints to write.")] = 3,
    folder: Annotated[Path | None, typer.Option(metavar="DIR", help="On the disk to measure; default: here.")] = None,
    file: Numbers = None,
) -> None:
    """Measure how long saving checkpoints stops training, and how much slower it makes steps."""
    from lasptrain.bench import saving

    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder or Path.cwd()) as run:
        found = saving.measure(_longest(recipe, overrides), Path(run), nproc or _gpus(1), saves)
    _tell([found], file)


@app.command("scale")
def bench_scale(
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpus: Annotated[
        list[int] | None, typer.Option(min=1, help="How many; 1, 2, 4 … of those here if not given.")
    ] = None,
    weak: Annotated[list[int] | None, typer.Option(min=1, help="Tokens per GPU; 32K and 128K if not given.")] = None,
    strong: Annotated[list[int] | None, typer.Option(min=1, help="Tokens of a shared window; 256K.")] = None,
    long: Annotated[list[int] | None, typer.Option(min=1, help="Tokens of a window on all GPUs; 4096K.")] = None,
    large: Annotated[Path | None, typer.Option(metavar="RECIPE", help="A larger model for the long windows.")] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="What does not fit into them is left out.")] = 9.0,
    file: Numbers = None,
    plot: Plot = None,
) -> None:
    """Time one recipe on ever more GPUs of this machine: weak and strong scaling, long windows, beside `plan`."""
    from lasptrain.bench import scale
    from lasptrain.bench.plot import draw_scaling

    if plot is not None:
        figure_class()
    counts = sorted(gpus) if gpus else [1 << n for n in range(_gpus().bit_length())]
    one, windows = _longest(recipe, overrides), long or [4_194_304]
    models = [one, *([_longest(large)] if large else [])]
    listed = scale.cases(
        one, counts, weak or [32_768, 131_072], strong or [262_144], [(m, n) for m in models for n in windows]
    )
    found = _tell(scale.measure(listed, 60 * minutes), file)
    if plot is not None:
        draw_scaling(found, plot)


@app.command("longest")
def bench_longest(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nproc: Ranks = None,
    kinds: Annotated[list[str] | None, typer.Option("--kind", help="Of data parallelism; ddp and zero3.")] = None,
    most: Annotated[int, typer.Option(min=1024, help="Tokens of the longest window that is streamed.")] = 1 << 22,
    memory: Annotated[str | None, typer.Option(metavar="40GiB", help="Of each rank, if it is to be less.")] = None,
    minutes: Annotated[float, typer.Option(min=0, help="After which nothing more is tried.")] = 30,
    file: Numbers = None,
) -> None:
    """Find the longest window that trains: ddp or zero3, without and with recomputation, unshared, shared, streamed."""
    from lasptrain.bench import longest

    capacity = None if memory is None else to_bytes(memory)
    chosen = [form for form in longest.forms() if form.kind in (kinds or longest.KINDS)]
    if not chosen:
        raise RecipeError(f"--kind: found {', '.join(kinds or ())}; expected one of {', '.join(longest.KINDS)}")
    one, ranks = _longest(recipe, overrides), nproc or _gpus()
    _tell(longest.measure(one, ranks, most, capacity, 60 * minutes, chosen), file)


@app.command("mqar")
def bench_mqar(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=1, help="Ranks that share every sequence.")] = 1,
    tokens: Annotated[int, typer.Option(min=4, help="Of the longest sequences.")] = 64,
    pairs: Annotated[int, typer.Option(min=1, help="To recall from them.")] = 4,
    vocab: Annotated[int, typer.Option(min=16, help="Different tokens.")] = 8192,
    file: Numbers = None,
) -> None:
    """Train a recipe's model to recall pairs of tokens (MQAR) and test it on unseen ones."""
    from lasptrain.bench import mqar

    _tell([mqar.measure(_longest(recipe, overrides), nproc, tokens, pairs, vocab)], file)
