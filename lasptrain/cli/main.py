"""The command line: parse, call, print. Every error is one line on stderr and an exit code; torch is imported late."""

import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.table import Table

from lasptrain import __version__
from lasptrain.cli import bench, checkpoint, data
from lasptrain.cli import eval as eval_commands
from lasptrain.cli import recipe as recipe_commands
from lasptrain.cli.certify import certify
from lasptrain.cli.convert import convert
from lasptrain.cli.options import App, Overrides, RecipeFile
from lasptrain.cli.plan import plan_command
from lasptrain.cli.runs import runs
from lasptrain.console import stdio
from lasptrain.console.tables import figures, show
from lasptrain.console.words import times
from lasptrain.convert import targets
from lasptrain.cost import links, plan
from lasptrain.errors import INTERNAL, INTERRUPTED, STOPPED, LaspError, RecipeError, ResourceError, SetupError
from lasptrain.files import BROKEN, FULL
from lasptrain.process import signals
from lasptrain.recipe.loading import load
from lasptrain.recipe.resolve import resolve_meshes, resolve_vocabulary, with_meshes
from lasptrain.recipe.schema import Recipe
from lasptrain.run import origin as origins
from lasptrain.run import trackers

POSIX = ("fcntl", "resource")  # modules that Windows lacks, and that `check`, `plan` and `recipe` do without

app = App("Pretrain linear-attention language models on sequences of millions of tokens.", add_completion=True)


def main() -> NoReturn:
    """Run the command line and end the process with its exit code."""
    stdio.replace_unencodable()
    signals.interrupt()
    # Read when torch is loaded, by ranks too. Threads that spin while they wait for one another halve the speed of
    # training on cores that are shared, and cut that of generation to a tenth; results are the same.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except LaspError as error:
        for line in map(stdio.printable, _lines(error)):
            typer.echo(line if error.code in (STOPPED, INTERRUPTED) else f"error: {line}", err=True)
        code = error.code
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        if error.errno in FULL:
            typer.echo(f"error: {_name(error) or 'output'}: no space left; expected some", err=True)
            code = ResourceError.code
        elif error.errno in BROKEN:
            typer.echo(f"error: {_name(error) or 'a file'}: {error.strerror}", err=True)
            code = SetupError.code
        elif error.filename is None:
            traceback.print_exc()
            code = INTERNAL
        else:  # a file that cannot be written or read, where no better message exists
            typer.echo(f"error: {_name(error)}: {error.strerror}", err=True)
            code = SetupError.code
    except ModuleNotFoundError as error:
        if error.name not in POSIX:
            traceback.print_exc()
            code = INTERNAL
        else:
            typer.echo(
                f"error: found {sys.platform}, where this command does not run; expected Linux or macOS", err=True
            )
            code = SetupError.code
    except Exception:
        if (code := signals.heard() or INTERNAL) == INTERNAL:
            traceback.print_exc()
    if code in (STOPPED, INTERRUPTED):
        signals.ignore()
    sys.exit(code)


def _lines(error: LaspError) -> list[str]:
    """Split a message into its lines, of which only that about a recipe may have several."""
    return str(error).split("\n") if isinstance(error, RecipeError) else [str(error)]


def _name(error: OSError) -> str:
    return stdio.printable(str(error.filename or ""))


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"lasptrain {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Options before a command."""


@app.command()
def pretrain(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Processes here; one per GPU, or 1 without any.")] = None,
    run: Annotated[Path | None, typer.Option(metavar="DIR", help="The run folder; runs/NAME if not given.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over in a new run folder.")] = False,
    origin: Annotated[
        str | None, typer.Option("--from", metavar="RUN[@STEP]", help="Begin a new run with the weights of another.")
    ] = None,
    with_optimizer: Annotated[bool, typer.Option("--with-optimizer", help="With --from: its moments too.")] = False,
    nnodes: Annotated[int, typer.Option(min=1, help="Machines; start this command on each of them.")] = 1,
    node_rank: Annotated[int, typer.Option(min=0, help="The number of this machine, from 0.")] = 0,
    rdzv: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="A free port on machine 0.")] = None,
    max_restarts: Annotated[int, typer.Option(min=0, help="Go on that often after losing a rank.")] = 0,
) -> None:
    """Train a recipe, or go on with its newest run."""
    signals.listen()
    loaded = load(recipe, overrides)
    trackers.require(loaded)
    _check_nodes(nnodes, node_rank, rdzv)
    if max_restarts and nnodes > 1:
        raise RecipeError("--max-restarts: found with --nnodes; expected it on one machine only")
    if with_optimizer and origin is None:
        raise RecipeError("--with-optimizer: found without --from; expected both")
    begun = None if origin is None else origins.parse(origin, with_optimizer)
    stdio.ignore_broken_pipe()
    from lasptrain.process.launcher import Nodes, launch
    from lasptrain.process.location import RunLocation

    nodes = Nodes(nnodes, node_rank, rdzv) if rdzv else None
    raise typer.Exit(launch(loaded, RunLocation(run, fresh, begun), nproc, nodes, max_restarts=max_restarts))


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
    """Show what a recipe means: parameters, tokens, layout. Needs no GPU; its text need not be prepared yet."""
    loaded = load(recipe, overrides)
    trackers.require(loaded)
    given = [axis for axis in (loaded.mesh.dp, loaded.mesh.sp) if axis != "auto"]
    world = nproc or (given[0] * given[-1] if len(given) == 2 else sum(given) or 1)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    for name, value in _meaning(loaded, world):
        table.add_row(name, value)
    show(table)


def _meaning(recipe: Recipe, world: int) -> list[tuple[str, str]]:
    from data_tools.tokenizer import load_tokenizer

    model, tokenizer = recipe.model, recipe.data.tokenizer
    pairs = resolve_meshes(recipe, world)
    dp, sp = pairs[plan.widest(recipe).number]
    vocab = resolve_vocabulary(model, load_tokenizer(tokenizer).vocab_size)
    widest = plan.widest(recipe).recipe
    segment = plan.layout(widest, dp, sp).segment
    scan = links.with_scan(widest, sp, segment).mesh.scan
    parts = plan.parameters(model, vocab)
    total = sum(parts.values())
    windows = dict.fromkeys(span.recipe.data.window for span in recipe.spans())
    works = dict.fromkeys(figures(plan.flops_per_token(model, vocab, window) / 1e9) for window in windows)
    return [
        (
            "recipe",
            f"{recipe.name}: {model.arch}, {times(model.layers, 'layer')} of {model.dim}, {times(model.heads, 'head')}",
        ),
        ("parameters", f"{total:,}: " + ", ".join(f"{name} {count:,}" for name, count in parts.items())),
        ("vocabulary", f"{vocab:,} rows, {'tied' if model.tie else 'untied'} head"),
        *model.description(),
        ("mesh", f"dp {dp} × sp {sp}, {times(world, 'process', 'es')}, {recipe.parallel.data_parallel}, scan {scan}"),
        *(_stages(recipe, pairs) if recipe.stages else _steps(recipe, dp, sp)),
        ("training", f"{recipe.train.steps:,} steps, {sum(span.tokens for span in recipe.spans()):,} tokens"),
        *(("data", line) for line in _epochs(with_meshes(recipe, world))),
        ("work", " and ".join(f"{work} GFLOP" for work in works) + " per token"),
        ("state", f"{figures(plan.state_bytes(model) / 2**20)} MiB per window over all layers"),
        *_prefix(widest, sp, segment),
        ("checkpoint", f"{figures(plan.host_memory(widest, vocab, 1, 1, segment)['checkpoint'] / 1e9)} GB"),
        *(("convert --to", line) for line in targets.lines(model)),
        *(("serve in", line) for line in targets.servers(model.model_copy(update={"vocab": vocab}), tokenizer)),
    ]


def _steps(recipe: Recipe, dp: int, sp: int) -> Iterator[tuple[str, str]]:
    """Yield lines on the steps of a run without stages."""
    layout, train = plan.layout(recipe, dp, sp), recipe.train
    yield "window", f"{recipe.data.window:,} tokens: {times(layout.segments, 'segment')} of {layout.segment:,}"
    yield "slice", f"{layout.slice:,} tokens per rank and segment"
    yield (
        "step",
        f"{layout.tokens_per_step:,} tokens: {times(train.batch, 'window')}, "
        f"{times(layout.micro_batches, 'micro-batch', 'es')} per rank, {train.precision}",
    )


def _stages(recipe: Recipe, pairs: Sequence[tuple[int, int]]) -> Iterator[tuple[str, str]]:
    """Yield a line on each stage."""
    spans = recipe.spans()
    total = sum(span.tokens for span in spans)
    for span, (dp, sp) in zip(spans, pairs, strict=True):
        layout, train = plan.layout(span.recipe, dp, sp), span.recipe.train
        windows = f"{times(train.batch, 'window')} of {span.recipe.data.window:,} tokens on dp {dp} × sp {sp}"
        each = f"in {times(layout.micro_batches, 'micro-batch', 'es')} per rank, {times(layout.segments, 'segment')}"
        tokens = f"{span.tokens:,} tokens, {span.tokens / total:.1%}"
        yield (
            f"stages[{span.number}]",
            f"steps {span.first + 1:,} to {span.end:,}: {windows}, {each}, slices of {layout.slice:,}; "
            f"lr {span.recipe.optim.lr:g}; {tokens}",
        )


def _prefix(recipe: Recipe, sp: int, segment: int) -> list[tuple[str, str]]:
    """Return a line on the state of softmax layers that see all, if there are any."""
    if not recipe.model.unbounded:
        return []
    keys, gradients = (f"{figures(size / 2**20)} MiB" for size in plan.prefix_bytes(recipe, sp, segment))
    return [("prefix", f"{keys} of keys and values and {gradients} of gradients per rank, {recipe.parallel.prefix}")]


def _epochs(recipe: Recipe) -> list[str]:
    from data_tools import prepared

    found = prepared.manifests(prepared.every_source(recipe))
    if found is None:
        return ["how many epochs is told once it is prepared, by training or lasptrain data mix"]
    prepared.check_held_out(recipe, found)
    return prepared.epochs(recipe, [manifest.splits["train"].tokens for manifest in found])


app.command("plan")(plan_command)
app.command()(certify)
app.command()(runs)
eval_commands.register(app)
app.command()(convert)
app.add_typer(recipe_commands.app, name="recipe")
app.add_typer(data.app, name="data")
app.add_typer(bench.app, name="bench")
app.add_typer(checkpoint.app, name="ckpt")
