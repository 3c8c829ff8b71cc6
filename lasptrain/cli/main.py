"""The command line: parse, call, print. Every error is one line on stderr and an exit code; torch is imported late."""

import errno
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, NoReturn

import typer
from rich.table import Table

from lasptrain import __version__
from lasptrain.cli import bench as cli_bench
from lasptrain.cli import checkpoint as cli_checkpoint
from lasptrain.cli import data as cli_data
from lasptrain.cli import eval as eval_commands
from lasptrain.cli.options import Overrides, RecipeFile, to_bytes
from lasptrain.console import stdio as streams
from lasptrain.console.tables import figures, show
from lasptrain.convert import targets
from lasptrain.convert.commands import convert
from lasptrain.cost import gpus as cards
from lasptrain.cost import links, plan, rates
from lasptrain.cost.links import ASSUMED, Links
from lasptrain.errors import INTERNAL, INTERRUPTED, STOPPED, LaspError, RecipeError, ResourceError, SetupError
from lasptrain.process import signals as stop
from lasptrain.recipe import Model, Recipe, load, resolve_mesh, resolve_vocabulary

app = typer.Typer(
    help="Pretrain linear-attention language models on sequences of millions of tokens.",
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)


def main() -> NoReturn:
    """Runs the command line and ends the process with its exit code."""
    streams.forgive()
    stop.interrupt()
    # Read when torch is loaded, by ranks too. Threads that spin while they wait for one another halve the speed of
    # training on cores that are shared, and cut that of generation to a tenth; results are the same.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except LaspError as error:
        for line in str(error).splitlines():
            typer.echo(line if error.code in (STOPPED, INTERRUPTED) else f"error: {line}", err=True)
        code = error.code
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            typer.echo(f"error: {error.filename or 'output'}: no space left; expected some", err=True)
            code = ResourceError.code
        elif error.filename is None:
            traceback.print_exc()
            code = INTERNAL
        else:  # a file that cannot be written or read where nothing more is known of it
            typer.echo(f"error: {error.filename}: {error.strerror}", err=True)
            code = SetupError.code
    except Exception:
        traceback.print_exc()
        code = INTERNAL
    sys.exit(code)


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
    stop.listen()
    streams.outlive()
    from lasptrain.process.launcher import Nodes, Place, launch

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
    show(table)


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
        ("mesh", f"dp {dp} × sp {sp}, {_times(world, 'process', 'es')}, {recipe.parallel.data_parallel}, scan {scan}"),
        ("window", f"{recipe.data.window:,} tokens: {_times(layout.segments, 'segment')} of {layout.segment:,}"),
        ("slice", f"{layout.slice:,} tokens per rank and segment"),
        (
            "step",
            f"{layout.tokens_per_step:,} tokens: {_times(train.batch, 'window')}, "
            f"{_times(layout.micro_batches, 'micro-batch', 'es')} per rank, {train.precision}",
        ),
        ("training", f"{train.steps:,} steps, {train.steps * layout.tokens_per_step:,} tokens"),
        *(("data", line) for line in _epochs(recipe)),
        ("work", f"{figures(plan.flops_per_token(model, vocab, recipe.data.window) / 1e9)} GFLOP per token"),
        ("state", f"{figures(plan.state_bytes(model) / 2**20)} MiB per window over all layers"),
        ("checkpoint", f"{figures(12 * total / 1e9)} GB"),
        *(("convert --to", line) for line in targets.lines(model)),
    ]


def _epochs(recipe: Recipe) -> list[str]:
    from data_tools import prepared

    tokens = prepared.training_tokens(recipe.data)
    if tokens is None:
        return ["how many epochs is told once it is prepared, by training or lasptrain data mix"]
    return prepared.epochs(recipe.data, tokens, recipe.train.steps * recipe.train.batch)


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
    known = Known(measured.device, measured.rates, measured.links) if measured else Known(gpu, cards.PLANNED[gpu])
    predicted = list(_plan(loaded, gpus, known, memory))
    show(_rates(known, measured, links=measured is not None or gpus > 1), *predicted)


def _lasting(seconds: float) -> str:
    """Days, hours or minutes, whichever is the first that is not less than one."""
    for length, unit in ((86400, "days"), (3600, "hours")):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds / 60:.1f} minutes"


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


def _rates(known: Known, measured: rates.Measured | None, *, links: bool) -> Table:
    table = Table(title="predicted from", show_header=False)
    for row in rates.told(known.rates, known.links, measured)[: None if links else len(known.rates)]:
        table.add_row(*row)
    return table


def _plan(recipe: Recipe, gpus: int, known: Known, given: str | None) -> Iterator[Table]:
    from data_tools.tokenizer import load_tokenizer

    available = known.rates.memory if given is None else to_bytes(given)
    dp, sp = resolve_mesh(recipe, gpus, "--gpus")
    vocab = resolve_vocabulary(recipe.model, load_tokenizer(recipe.data.tokenizer).vocab_size)
    recipe = plan.with_reduction(recipe, vocab, dp, sp, available)
    cut = plan.layout(recipe, dp, sp, vocab, available)
    scan = links.with_scan(recipe, sp, cut.segment, known.links).mesh.scan
    parts = plan.memory(recipe, vocab, dp, sp, cut.segment)
    seconds = plan.seconds_per_token(recipe, vocab, cut.segments, known.rates)
    tokens = cut.tokens_per_step
    step = seconds * tokens / gpus
    sent = plan.state_bytes(recipe.model) * recipe.train.batch // dp * cut.segments * 2 * (sp > 1)
    table = Table(title=f"{recipe.name}: predicted for {gpus} × {known.name}", show_header=False)
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
    table.add_row("training", f"{tokens * recipe.train.steps:,} tokens, {_lasting(step * recipe.train.steps)}")
    yield table
    if gpus > 1:
        yield _sharing(recipe, vocab, cut.slice, gpus, known)
    yield _memory_horizon(recipe)


def _softmax(model: Model) -> str:
    layers = ", ".join(map(str, model.softmax))
    reach = "all tokens before" if model.sliding is None else f"the last {model.sliding:,} tokens"
    turned = "no positions" if model.rotary is None else f"rotary positions of base {figures(model.rotary, 6)}"
    return f"layers {layers}: {model.kv_heads or model.heads} key heads, over {reach}, {turned}"


def _sharing(recipe: Recipe, vocab: int, tokens: int, gpus: int, known: Known) -> Table:
    """What sharing windows costs by method, on ever more GPUs."""
    counts = sorted({1 << n for n in range(1, gpus.bit_length())} | {gpus})
    found = {n: links.step_seconds(recipe, vocab, n, tokens, known.rates, known.links) for n in counts}
    table = Table(title=f"k tokens/s per GPU, predicted, when n GPUs share a window of n × {tokens:,} tokens")
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
    table = Table(title="heads to which a token still matters", caption=warning)
    table.add_column("layer")
    for distance in plan.DISTANCES:
        table.add_column(f"after {distance:,}", justify="right")
    for layer, counts in enumerate(heads):
        table.add_row(str(layer), *(str(count) for count in counts))
    return table


eval_commands.register(app)
app.command()(convert)
app.add_typer(cli_data.app, name="data")
app.add_typer(cli_bench.app, name="bench")
app.add_typer(cli_checkpoint.app, name="ckpt")
