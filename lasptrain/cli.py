"""The command line: parse, call, print. Every error is one line on stderr and an exit code; torch is imported late."""

import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from lasptrain import __version__, cli_checkpoint, links, plan, rates, streams
from lasptrain.convert import targets
from lasptrain.convert.commands import convert
from lasptrain.errors import INTERNAL, INTERRUPTED, STOPPED, DataError, LaspError, RecipeError, SetupError
from lasptrain.eval import commands as eval_commands
from lasptrain.links import ASSUMED, Links
from lasptrain.recipe import Model, Recipe, load, resolve_mesh, resolve_vocabulary
from lasptrain.run import RECIPE

app = typer.Typer(
    help="Pretrain linear-attention language models on sequences of millions of tokens.",
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
data_app = typer.Typer(help="Text, tokenizers and token shards.", rich_markup_mode=None, no_args_is_help=True)
tokenizer_app = typer.Typer(help="Train a tokenizer, or look at one.", rich_markup_mode=None, no_args_is_help=True)
bench_app = typer.Typer(help="Measure on this machine.", rich_markup_mode=None, no_args_is_help=True)
app.add_typer(data_app, name="data")
eval_commands.register(app)
app.add_typer(bench_app, name="bench")
bench_app.command("saving")(cli_checkpoint.bench_saving)
app.add_typer(cli_checkpoint.app, name="ckpt")
app.command()(convert)
data_app.add_typer(tokenizer_app, name="tokenizer")

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, such as recipes/quickstart.yaml.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Overrides section.key.")]
Sources = Annotated[
    list[str], typer.Argument(metavar="SOURCE…", help="python:source, or files and folders of text, JSONL, code.")
]
Dataset = Annotated[Path, typer.Argument(metavar="DIR", help="A prepared dataset.")]


def main() -> NoReturn:
    """Runs the command line and ends the process with its exit code."""
    streams.forgive()
    try:
        app()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except LaspError as error:
        for line in str(error).splitlines() if error.code != INTERRUPTED else ():
            typer.echo(line if error.code == STOPPED else f"error: {line}", err=True)
        code = error.code
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception:
        traceback.print_exc()
        code = INTERNAL
    sys.exit(code)


def _show(*tables: Table) -> None:
    """Tables, as wide as the terminal; where there is none, as wide as they need."""
    console = Console()
    for table in tables:
        (console if console.is_terminal else Console(width=200)).print(table)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"lasptrain {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """What stands before a command."""


@app.command()
def pretrain(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Processes here; one per GPU, or 1 without any.")] = None,
    run: Annotated[Path | None, typer.Option(metavar="DIR", help="The run folder; runs/NAME if not given.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over in a new run folder.")] = False,
    nnodes: Annotated[int, typer.Option(min=1, help="Machines; start this command on each of them.")] = 1,
    node_rank: Annotated[int, typer.Option(min=0, help="The number of this machine, from 0.")] = 0,
    rdzv: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="A free port on machine 0.")] = None,
    max_restarts: Annotated[int, typer.Option(min=0, help="Go on that often after losing a rank.")] = 0,
) -> None:
    """Train a recipe, or go on with its newest run."""
    loaded = load(recipe, overrides)
    _check_nodes(nnodes, node_rank, rdzv)
    if max_restarts and nnodes > 1:
        raise RecipeError("--max-restarts: found with --nnodes; expected it on one machine only")
    from lasptrain.launch import Nodes, Place, launch

    nodes = Nodes(nnodes, node_rank, rdzv) if rdzv else None
    raise typer.Exit(launch(loaded, Place(run, fresh), nproc, nodes, max_restarts=max_restarts))


def _check_nodes(nnodes: int, node_rank: int, rdzv: str | None) -> None:
    if nnodes > 1 and rdzv is None:
        raise RecipeError(f"--rdzv: missing with --nnodes {nnodes}; expected HOST:PORT, a free port on machine 0")
    if node_rank >= nnodes:
        raise RecipeError(f"--node-rank: found {node_rank} of --nnodes {nnodes}; expected 0 to {nnodes - 1}")
    if rdzv is not None:
        host, _, port = rdzv.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise RecipeError(f"--rdzv: found {rdzv!r}; expected HOST:PORT such as 10.0.0.1:29400")


@app.command()
def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Processes to lay the recipe out for.")] = None,
) -> None:
    """Show what a recipe means: parameters, tokens, layout. Needs no GPU and no data."""
    loaded = load(recipe, overrides)
    given = [axis for axis in (loaded.mesh.dp, loaded.mesh.sp) if axis != "auto"]
    world = nproc or (given[0] * given[-1] if len(given) == 2 else sum(given) or 1)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    for name, value in _meaning(loaded, world):
        table.add_row(name, value)
    Console().print(table)


def _meaning(recipe: Recipe, world: int) -> list[tuple[str, str]]:
    from data_tools.tokenizer import load_tokenizer

    model, train = recipe.model, recipe.train
    dp, sp = resolve_mesh(recipe, world)
    vocab = resolve_vocabulary(model, load_tokenizer(recipe.data.tokenizer).vocab_size)
    layout = plan.layout(recipe, dp, sp)
    scan = links.with_scan(recipe, sp, layout.segment).mesh.scan
    parts = plan.parameters(model, vocab)
    total = sum(parts.values())
    return [
        ("recipe", f"{recipe.name}: {model.arch}, {model.layers} layers of {model.dim}, {model.heads} heads"),
        ("parameters", f"{total:,}: " + ", ".join(f"{name} {count:,}" for name, count in parts.items())),
        ("vocabulary", f"{vocab:,} rows, {'tied' if model.tie else 'untied'} head"),
        ("heads", f"key dim {model.K}, value dim {model.V}, decay {model.decay}"),
        *([("softmax", _softmax(model))] if model.softmax else []),
        ("mesh", f"dp {dp} × sp {sp}, {world} processes, {recipe.parallel.data_parallel}, scan {scan}"),
        ("window", f"{recipe.data.window:,} tokens: {_times(layout.segments, 'segment')} of {layout.segment:,}"),
        ("slice", f"{layout.slice:,} tokens per rank and segment"),
        (
            "step",
            f"{layout.tokens_per_step:,} tokens: {_times(train.batch, 'window')}, "
            f"{_times(layout.micro_batches, 'micro-batch', 'es')} per rank, {train.precision}",
        ),
        ("training", f"{train.steps:,} steps, {train.steps * layout.tokens_per_step:,} tokens"),
        ("work", f"{plan.flops_per_token(model, vocab, recipe.data.window) / 1e9:.3g} GFLOP per token"),
        ("state", f"{plan.state_bytes(model) / 2**20:.3g} MiB per window over all layers"),
        ("checkpoint", f"{12 * total / 1e9:.3g} GB"),
        *(("convert --to", line) for line in targets.lines(model)),
    ]


def _times(count: int, word: str, plural: str = "s") -> str:
    return f"{count:,} {word}{plural if count != 1 else ''}"


@app.command("plan")
def plan_command(
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs.")] = 1,
    gpu: Annotated[Literal["h200", "h100", "a100"], typer.Option(help="Which: rates and memory.")] = "h100",
    memory: Annotated[str | None, typer.Option(metavar="80GiB", help="Of each GPU, if it differs.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="This machine's GPUs and links instead.")] = False,
    nproc: Annotated[int | None, typer.Option(min=1, help="Ranks that measure; one per GPU.")] = None,
    file: Annotated[
        Path | None, typer.Option("--rates", metavar="FILE", help="Read what was measured; with --measure, write it.")
    ] = None,
) -> None:
    """Predict what a recipe costs on GPUs: memory by part, time, communication; and how far its model remembers."""
    loaded = load(recipe, overrides)
    measured = _measured(measure, nproc, file)
    known = Known(measured.device, measured.rates, measured.links) if measured else Known(gpu, plan.GPUS[gpu])
    if measured or gpus > 1:
        _show(_rates(known, measured))
    _show(*_plan(loaded, gpus, known, memory))


class Known(NamedTuple):
    """What a plan predicts from."""

    name: str
    rates: plan.Rates
    links: Links = ASSUMED


def _measured(measure: bool, nproc: int | None, file: Path | None) -> rates.Measured | None:
    """What this machine does, or what a file says that one did."""
    if not measure:
        return None if file is None else rates.read(file)
    import torch

    from lasptrain.bench import rates as measuring

    if nproc is None and not torch.cuda.is_available():
        raise SetupError("--measure: found no CUDA device; expected one, or --nproc for a dry run on the CPU")
    found = measuring.measure(nproc or torch.cuda.device_count())
    if file is not None:
        rates.write(file, found)
    return found


def _rates(known: Known, measured: rates.Measured | None) -> Table:
    table = Table(title="predicted from", title_justify="left", show_header=False)
    for row in rates.told(known.rates, known.links, measured):
        table.add_row(*row)
    return table


def _plan(recipe: Recipe, gpus: int, known: Known, given: str | None) -> Iterator[Table]:
    from data_tools.tokenizer import load_tokenizer

    available = known.rates.memory if given is None else _bytes(given)
    dp, sp = resolve_mesh(recipe, gpus)
    vocab = resolve_vocabulary(recipe.model, load_tokenizer(recipe.data.tokenizer).vocab_size)
    recipe = plan.with_reduction(recipe, vocab, dp, sp, available)
    cut = plan.layout(recipe, dp, sp, vocab, available)
    scan = links.with_scan(recipe, sp, cut.segment, known.links).mesh.scan
    parts = plan.memory(recipe, vocab, dp, sp, cut.segment)
    seconds = plan.seconds_per_token(recipe, vocab, cut.segments, known.rates)
    tokens = cut.tokens_per_step
    step = seconds * tokens / gpus
    sent = plan.state_bytes(recipe.model) * recipe.train.batch // dp * cut.segments * 2 * (sp > 1)
    table = Table(title=f"{recipe.name}: predicted for {gpus} × {known.name}", title_justify="left", show_header=False)
    for name, size in parts.items():
        table.add_row(name, f"{size / 2**30:.2f} GiB")
    table.add_section()
    table.add_row("peak memory", f"{sum(parts.values()) / 2**30:.1f} of {available / 2**30:.1f} GiB on each")
    host = plan.host_memory(recipe, vocab, dp, sp, cut.segment)
    held = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in host.items() if size)
    table.add_row("host memory", f"{sum(host.values()) / 2**30:.1f} GiB per rank, page-locked: {held}")
    table.add_row("gradients", f"summed over ranks once per {recipe.parallel.reduce}")
    table.add_row("segments", f"{cut.segments:,} of {cut.segment:,} tokens, slices of {cut.slice:,}")
    table.add_row("speed", f"{1e-3 / seconds:.1f}k tokens/s per GPU, {step:.1f} s per step of {tokens:,} tokens")
    table.add_row("states sent", f"{sent / 2**20:,.0f} MiB per rank and step, by {scan}")
    table.add_row("training", f"{tokens * recipe.train.steps:,} tokens, {step * recipe.train.steps / 86400:.2f} days")
    yield table
    if gpus > 1:
        yield _sharing(recipe, vocab, cut.slice, gpus, known)
    yield _memory_horizon(recipe)


def _softmax(model: Model) -> str:
    layers = ", ".join(map(str, model.softmax))
    reach = "all tokens before" if model.sliding is None else f"the last {model.sliding:,} tokens"
    turned = "no positions" if model.rotary is None else f"rotary positions of base {model.rotary:g}"
    return f"layers {layers}: {model.kv_heads or model.heads} key heads, over {reach}, {turned}"


def _sharing(recipe: Recipe, vocab: int, tokens: int, gpus: int, known: Known) -> Table:
    """What sharing windows costs by method, on ever more GPUs."""
    counts = sorted({1 << n for n in range(1, gpus.bit_length())} | {gpus})
    found = {n: links.step_seconds(recipe, vocab, n, tokens, known.rates, known.links) for n in counts}
    table = Table(
        title=f"k tokens/s per GPU, predicted, when n GPUs share a window of n × {tokens:,} tokens",
        title_justify="left",
    )
    for column in ("GPUs", *found[gpus]):
        table.add_column(column, justify="right")
    for n, methods in found.items():
        table.add_row(str(n), *("" if s is None else f"{1e-3 * tokens / s:.1f}" for s in methods.values()))
    return table


def _memory_horizon(recipe: Recipe) -> Table:
    heads = plan.horizon(recipe.model, recipe.data.window)
    far, window = plan.sees(recipe.model, recipe.data.window), recipe.data.window
    warning = (
        f"WARNING: windows of {window:,} tokens, but a quarter of the layers sees no further than {far:,.0f}"
        if window > 4 * far
        else None
    )
    table = Table(title="heads to which a token still matters", title_justify="left", caption=warning)
    table.add_column("layer")
    for distance in plan.DISTANCES:
        table.add_column(f"after {distance:,}", justify="right")
    for layer, counts in enumerate(heads):
        table.add_row(str(layer), *(str(count) for count in counts))
    return table


def _bytes(text: str) -> int:
    units = {"GiB": 2**30, "GB": 10**9, "MiB": 2**20}
    number, unit = text.rstrip("GiMB"), text[len(text.rstrip("GiMB")) :]
    try:
        return int(float(number) * units[unit])
    except (KeyError, ValueError):
        raise RecipeError(f"--memory: found {text!r}; expected a size such as 80GiB") from None


@bench_app.callback()
def bench() -> None:
    """Measure on this machine."""


@bench_app.command("kernels")
def bench_kernels(
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Lengths; 8K, 32K, 128K, 512K if not given.")] = None,
    heads: Annotated[int, typer.Option(min=1)] = 16,
    dim: Annotated[int, typer.Option(min=1, max=256, help="K and V of a head.")] = 128,
    dtype: Annotated[Literal["bf16", "fp16", "fp32"], typer.Option()] = "bf16",
    decay: Annotated[Literal["none", "head", "token"], typer.Option(help="None, constant, or per token.")] = "head",
    documents: Annotated[int, typer.Option(min=0, help="Document boundaries in the window.")] = 0,
    file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers there too.")] = None,
) -> None:
    """Time the attention kernels beside flash-linear-attention (extra `bench`) and the floors."""
    from lasptrain.bench import kernels

    rows, found = kernels.measure(tokens or [1 << n for n in (13, 15, 17, 19)], heads, dim, dtype, decay, documents)
    _show(kernels.report(rows, found, heads, dim, dtype, decay))
    if all(row.name == "lasptrain" for row in rows):
        typer.echo("flash-linear-attention is not installed: pip install 'lasptrain[bench]' to compare")
    if file is not None:
        kernels.write(file, rows, found)


@bench_app.command("sp")
def bench_sp(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Ranks; one per GPU, or 2 without any.")] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            help="none (a window per rank), a scan, a rival; all if not given. A wrong one lists them.",
        ),
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Per rank, of one attention layer.")] = None,
    steps: Annotated[list[int] | None, typer.Option(min=1, help="Per rank, of whole steps of the model.")] = None,
    file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers there too.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw whole steps as PNG.")] = None,
    measured: Annotated[
        Path | None, typer.Option("--rates", metavar="FILE", help="Of plan --measure, to predict steps from.")
    ] = None,
    limit: Annotated[float, typer.Option(min=1, help="Seconds for one method's steps of one length.")] = 240,
) -> None:
    """Time windows shared between ranks beside windows that are not, with as many tokens per rank."""
    import torch

    from lasptrain.bench import plot as drawing
    from lasptrain.bench import sp

    ranks = nproc or torch.cuda.device_count() or 2
    names = methods or sp.METHODS
    known = None if measured is None else rates.read(measured)
    for found in sp.measure(load(recipe, overrides), ranks, names, tokens or [], steps or [], known, limit):
        if file is not None:  # as it comes: the last of it may take long
            sp.write(file, found)
    _show(*sp.report(found))
    if plot is not None:
        drawing.draw(found, plot)


@bench_app.command("prefill")
def bench_prefill(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Ranks; one per GPU, or 1 without any.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Of a text; 128K, 1M and 4M if not given.")] = None,
    segment: Annotated[int, typer.Option(min=1, help="Tokens that each rank has in work at a time.")] = 32_768,
    file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers there too.")] = None,
) -> None:
    """Time how `lasptrain eval` reads long texts, beside the forward of training, and take its memory."""
    import torch

    from lasptrain.bench import prefill

    ranks = nproc or torch.cuda.device_count() or 1
    lengths = tokens or [1 << n for n in (17, 20, 22)]
    found = prefill.measure(load(recipe, overrides), ranks, lengths, segment)
    _show(prefill.report(found))
    if file is not None:
        prefill.write(file, found)


@bench_app.command("parity")
def bench_parity(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Ranks; one per GPU, or 2 without any.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Updates on each layout.")] = 100,
    kinds: Annotated[
        list[str] | None, typer.Option("--kind", help="Of data parallelism; all five if not given.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all losses there.")] = None,
) -> None:
    """Train a recipe on every kind of data parallelism, with and without sequence parallelism; compare the losses."""
    import torch

    from lasptrain.bench import parity

    ranks = nproc or torch.cuda.device_count() or 2
    for found in parity.measure(load(recipe, overrides), ranks, steps, kinds or parity.KINDS):
        if file is not None:
            parity.write(file, found)
    _show(parity.report(found))


@bench_app.command("ablation")
def bench_ablation(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Ranks; one per GPU, or 2 without any.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Per rank.")] = 32_768,
    file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers there too.")] = None,
) -> None:
    """Time whole steps with and without fused kernels, with and without keeping states for the backward."""
    import torch

    from lasptrain.bench import ablation

    ranks = nproc or torch.cuda.device_count() or 2
    device, rows = ablation.measure(load(recipe, overrides), ranks, tokens)
    _show(ablation.report(device, ranks, tokens, rows))
    if file is not None:
        ablation.write(file, device, ranks, tokens, rows)


@bench_app.command("scale")
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
    file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers there too.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw them as PNG.")] = None,
) -> None:
    """Time one recipe on ever more GPUs of this machine: weak and strong scaling, long windows, beside `plan`."""
    import torch

    from lasptrain.bench import scale

    most = torch.cuda.device_count() or 2
    counts = sorted(gpus) if gpus else [1 << n for n in range(most.bit_length())]
    one, windows = load(recipe, overrides), long or [4_194_304]
    models = [one, *([load(large)] if large else [])]
    listed = scale.cases(
        one, counts, weak or [32_768, 131_072], strong or [262_144], [(m, n) for m in models for n in windows]
    )
    for found in scale.measure(listed, 60 * minutes):
        if file is not None:
            scale.write(file, found)
    _show(*scale.report(found))
    if plot is not None:
        scale.plot(found, plot)


@bench_app.command("longest")
def bench_longest(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Ranks; one per GPU, or 2 without any.")] = None,
    kinds: Annotated[list[str] | None, typer.Option("--kind", help="Of data parallelism; ddp and zero3.")] = None,
    most: Annotated[int, typer.Option(min=1024, help="Tokens of the longest window that is streamed.")] = 1 << 22,
    memory: Annotated[str | None, typer.Option(metavar="40GiB", help="Of each rank, if it is to be less.")] = None,
    minutes: Annotated[float, typer.Option(min=0, help="After which nothing more is tried.")] = 30,
    file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers there too.")] = None,
) -> None:
    """Find the longest window that trains: ddp or zero3, without and with recomputation, unshared, shared, streamed."""
    import torch

    from lasptrain.bench import longest

    ranks = nproc or torch.cuda.device_count() or 2
    capacity = None if memory is None else _bytes(memory)
    chosen = [form for form in longest.forms() if form.kind in (kinds or longest.KINDS)]
    if not chosen:
        raise RecipeError(f"--kind: found {', '.join(kinds or ())}; expected one of {', '.join(longest.KINDS)}")
    for found in longest.measure(load(recipe, overrides), ranks, most, capacity, 60 * minutes, chosen):
        if file is not None:
            longest.write(file, found)
    _show(longest.report(found))


@bench_app.command("mqar")
def bench_mqar(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=1, help="Ranks that share every sequence.")] = 1,
    tokens: Annotated[int, typer.Option(min=4, help="Of a sequence.")] = 64,
    pairs: Annotated[int, typer.Option(min=1, help="To recall.")] = 4,
    vocab: Annotated[int, typer.Option(min=16, help="Different tokens.")] = 8192,
    file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers there too.")] = None,
) -> None:
    """Train a recipe's model to recall pairs of tokens (MQAR) and test it on unseen ones."""
    from lasptrain.bench import mqar

    found = mqar.measure(load(recipe, overrides), nproc, tokens, pairs, vocab)
    _show(mqar.report(found))
    if file is not None:
        mqar.write(file, found)


@data_app.command()
def prepare(
    sources: Sources,
    tokenizer: Annotated[str, typer.Option(metavar="FILE", help="A sentencepiece model, or bytes.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The new dataset.")],
    seed: Annotated[int, typer.Option(help="Of the shuffle of documents.")] = 0,
    validation: Annotated[int, typer.Option(min=0, max=999_999, help="Documents held out, per million.")] = 20_000,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one per core if not given.")] = None,
    errors: Annotated[
        Literal["fail", "replace", "skip"], typer.Option(help="What to do with text that is not Unicode.")
    ] = "fail",
    field: Annotated[str, typer.Option(help="The key of JSON lines that holds the text.")] = "text",
    max_bad: Annotated[int, typer.Option(min=0, help="Bad JSON lines that are tolerated.")] = 0,
    min_tokens: Annotated[int, typer.Option(min=0, help="Leave out shorter documents.")] = 0,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Leave out longer documents.")] = None,
    packing: Annotated[
        Literal["concat", "best_fit"], typer.Option(help="One after another, or windows of whole documents.")
    ] = "concat",
    window: Annotated[int | None, typer.Option(min=2, help="Tokens of a window, for best_fit.")] = None,
    long_documents: Annotated[
        Literal["continue", "cut"], typer.Option(help="What best_fit does with more than a window.")
    ] = "continue",
) -> None:
    """Turn text into token shards."""
    import time

    from data_tools import commands
    from data_tools.packing import BestFit
    from data_tools.sources import Reading
    from lasptrain.progress import preparing

    if (packing == "best_fit") != (window is not None):
        raise RecipeError(
            f"--packing: found {packing} with --window {window}; best_fit needs a window, concat has none"
        )
    if packing == "concat" and long_documents == "cut":
        raise RecipeError("--long-documents: found cut with --packing concat; only best_fit cuts documents")
    best_fit = None if window is None else BestFit(window, long_documents)
    reading = Reading(errors, field, max_bad)
    lengths = (min_tokens, max_tokens or 1 << 62)
    began = time.monotonic()
    with preparing() as progress:
        prepared = commands.prepare(
            sources, tokenizer, out, reading, validation, seed, workers, progress, lengths, best_fit
        )
    typer.echo(str(prepared))
    typer.echo(f"  {prepared.rate(time.monotonic() - began)}")


@data_app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A prepared dataset, or a run.")],
    window: Annotated[int | None, typer.Option(min=2, help="Tokens; shows how many windows fit.")] = None,
    sample: Annotated[int | None, typer.Option(min=0, help="With --window: the text that this sample reads.")] = None,
    at: Annotated[int | None, typer.Option(min=0, help="With --window: the text from this token on.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="FILE", help="To show text: the one it was made with.")
    ] = None,
    seed: Annotated[int, typer.Option(help="data.seed of the recipe that reads it.")] = 0,
    split: Annotated[Literal["train", "validation"], typer.Option()] = "train",
    step: Annotated[int | None, typer.Option(min=1, help="Of a run: the text that this step reads.")] = None,
) -> None:
    """Show what a dataset holds, or the text of windows with their documents' boundaries.

    For a run folder only --step, or --at a place that metrics.jsonl names, is needed; its recipe says the rest.
    """
    from data_tools import commands

    if (folder / RECIPE).is_file():
        if (step is None) == (at is None):
            raise RecipeError("--step: expected it for a run, or else --at a place that its metrics.jsonl names")
        from data_tools import windows

        typer.echo("\n".join(str(text) for text in windows.show_windows(folder, step, at)))
        return
    if sample is None and at is None:
        typer.echo(str(commands.inspect(folder, window)))
        return
    if window is None or tokenizer is None:
        raise RecipeError(f"--{'at' if sample is None else 'sample'}: needs --window and --tokenizer too")
    from data_tools import windows

    typer.echo(str(windows.show_window(folder, tokenizer, window, sample or 0, seed, split, at)))


@data_app.command()
def synth(
    out: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="The new file.")],
    kind: Annotated[
        Literal["passkey", "recall", "tracking", "pairs"],
        typer.Option(help="What is hidden and asked; pairs stand alone, without sources."),
    ] = "recall",
    sources: Annotated[list[str] | None, typer.Argument(help="Text to hide facts in.")] = None,
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

    lengths = (min(shortest or characters, characters), characters)
    if (kind == "pairs") != (not sources):
        raise RecipeError(f"--kind {kind}: found sources {sources or 'none'}; expected some, but none with pairs")
    typer.echo(commands.synthesize(kind, sources or [], lengths, documents, seed, prompts, out))


@data_app.command()
def mix(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Show in which shares a recipe reads its sources, and how often."""
    from data_tools import windows

    typer.echo(str(windows.preview(load(recipe, overrides))))


@data_app.command("bench")
def bench_reading(
    folder: Dataset,
    tokens: Annotated[int, typer.Option(min=1, help="Of a slice, which may go round the dataset.")] = 524_288,
    rate: Annotated[float | None, typer.Option(min=1, help="Tokens/s that training uses; how long it waits.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="With --rate, as many slices.")] = 5,
) -> None:
    """Time what a rank does to read its slice, and with --rate what training waits for slices that are read ahead."""
    from data_tools import windows

    typer.echo(str(windows.time_reading(folder, tokens)))
    if rate is not None:
        typer.echo(str(windows.time_waiting(folder, tokens, rate, steps)))


@data_app.command()
def verify(folder: Dataset) -> None:
    """Read every byte of a dataset and check it."""
    from data_tools import commands

    verified = commands.verify(folder)
    typer.echo(str(verified))
    if verified.failures:
        raise typer.Exit(DataError.code)


@tokenizer_app.command("train")
def train_tokenizer(
    sources: Sources,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The new model.")],
    vocab: Annotated[int, typer.Option(min=300, max=1 << 20, help="Pieces.")] = 16384,
) -> None:
    """Train a sentencepiece tokenizer on text."""
    from data_tools import commands

    typer.echo(str(commands.train_tokenizer(sources, vocab, out)))


@tokenizer_app.command("check")
def check_tokenizer(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A sentencepiece model, or bytes.")],
    sources: Sources,
    other: Annotated[str | None, typer.Option("--against", metavar="FILE", help="Another one: same ids?")] = None,
) -> None:
    """Encode text and decode it again: what is lost, unknown, or encoded otherwise by another tokenizer."""
    from collections import Counter

    from data_tools.sources import Reading, open_source
    from data_tools.tokenizer import check, load_tokenizer

    dropped: Counter[str] = Counter()
    documents = (d for source in sources for d in open_source(source).documents(Reading(), dropped))
    texts = ((document.place, document.text) for document in documents)
    found = check(load_tokenizer(file), texts, load_tokenizer(other) if other else None)
    for line in found.changed[:20]:
        typer.echo(line)
    rate = found.bytes / max(1, found.tokens)
    typer.echo(f"{found.texts:,} texts, {found.tokens:,} tokens, {rate:.3f} bytes per token")
    typer.echo(f"{len(found.changed):,} do not come back, {found.unknown:,} tokens are unknown")
    typer.echo(f"long texts {'may be cut: no id changes' if found.cuts else 'are encoded whole: a cut changes ids'}")
    if found.differing is not None:
        typer.echo(f"{found.differing:,} texts have other ids than {other} gives them")
    if not found.good:
        raise typer.Exit(DataError.code)


@tokenizer_app.command("inspect")
def inspect_tokenizer(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A sentencepiece model, or bytes.")],
    text: Annotated[str | None, typer.Option(help="Text to cut into pieces.")] = None,
) -> None:
    """Show a tokenizer, and how it cuts a text."""
    from data_tools.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(file)
    typer.echo(f"{tokenizer.name}: {tokenizer.vocab_size} pieces, BOS {tokenizer.bos}, SHA-256 {tokenizer.sha256}")
    if text is not None:
        ids = tokenizer.encode(text)
        typer.echo(" ".join(repr(tokenizer.decode([i])) for i in ids))
        typer.echo(f"{len(ids)} tokens")
