"""`lasptrain plan`: the predicted cost of a recipe."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import typer
from rich.table import Table

from lasptrain.cli.options import Overrides, RecipeFile, to_bytes
from lasptrain.console.tables import figures, show
from lasptrain.console.words import times
from lasptrain.cost import links, plan, rates
from lasptrain.cost.gpus import PLANNED, Rates
from lasptrain.cost.links import ASSUMED, Links
from lasptrain.errors import SetupError
from lasptrain.recipe.loading import load
from lasptrain.recipe.resolve import resolve_meshes, resolve_vocabulary
from lasptrain.recipe.schema import Recipe


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
    hardware = Hardware(measured.device, measured.rates, measured.links) if measured else Hardware(gpu, PLANNED[gpu])
    predicted = list(_plan(loaded, gpus, hardware, memory))
    show(_rates(hardware, measured, links=measured is not None or gpus > 1), *predicted)


def _lasting(seconds: float) -> str:
    """Format seconds in days, hours, minutes or seconds: the largest unit of which there is at least one."""
    for length, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{_seconds(seconds)} seconds"


def _seconds(seconds: float) -> str:
    """Format seconds, fewer than one by their first figures."""
    return f"{seconds:.1f}" if seconds >= 1 else figures(seconds, 2)


def _gib(size: int, digits: int = 1) -> str:
    """Format bytes in GiB; in MiB where so many digits would show nothing of them."""
    found = size / 2**30
    return f"{found:.{digits}f} GiB" if not size or found >= 10**-digits else f"{figures(size / 2**20, 2)} MiB"


class Hardware(NamedTuple):
    """Rates and links that a plan predicts from."""

    name: str
    rates: Rates
    links: Links = ASSUMED


def _measured(measure: bool, nproc: int | None, file: Path | None) -> rates.MeasuredHardware | None:
    """Measure this machine's rates, or read them from a file; None without either."""
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


def _rates(hardware: Hardware, measured: rates.MeasuredHardware | None, *, links: bool) -> Table:
    table = Table(title="predicted from", show_header=False)
    for row in rates.provenance(hardware.rates, hardware.links, measured)[: None if links else len(hardware.rates)]:
        table.add_row(*row)
    return table


def _plan(recipe: Recipe, gpus: int, hardware: Hardware, given: str | None) -> Iterator[Table]:
    from data_tools.tokenizer import load_tokenizer

    available = hardware.rates.memory if given is None else to_bytes(given)
    pairs = resolve_meshes(recipe, gpus, "--gpus")
    dp, sp = pairs[plan.widest(recipe).number]
    vocab = resolve_vocabulary(recipe.model, load_tokenizer(recipe.data.tokenizer).vocab_size)
    recipe = plan.with_reduction(recipe, vocab, dp, sp, available)
    recipe = plan.with_prefix(recipe, vocab, dp, sp, available)
    staged, span = recipe, plan.widest(recipe)
    if staged.stages:
        yield _stages(staged, vocab, pairs, available, hardware.rates)
    recipe = span.recipe
    cut = plan.layout(recipe, dp, sp, vocab, available)
    scan = links.with_scan(recipe, sp, cut.segment, hardware.links).mesh.scan
    parts = plan.memory(recipe, vocab, dp, sp, cut.segment)
    seconds = plan.seconds_per_token(recipe, vocab, cut.segments, hardware.rates, sp)
    tokens = cut.tokens_per_step
    step = seconds * tokens / gpus
    sent = plan.state_bytes(recipe.model) * recipe.train.batch // dp * cut.segments * 2 * (sp > 1)
    name = f"{recipe.name}, stages[{span.number}]" if staged.stages else recipe.name
    table = Table(title=f"{name}: predicted for {gpus} × {hardware.name}", show_header=False)
    for name, size in parts.items():
        table.add_row(name, _gib(size, 2))
    table.add_section()
    table.add_row("peak memory", f"{_gib(sum(parts.values()))} of {_gib(available)} on each")
    host = plan.host_memory(recipe, vocab, dp, sp, cut.segment)
    held = ", ".join(f"{name} {_gib(size)}" for name, size in host.items() if size)
    table.add_row("host memory", f"{_gib(sum(host.values()))} per rank, page-locked: {held}")
    table.add_row("gradients", f"summed over ranks once per {recipe.parallel.reduce}")
    table.add_row("segments", f"{cut.segments:,} of {cut.segment:,} tokens, slices of {cut.slice:,}")
    table.add_row("speed", f"{1e-3 / seconds:.1f}k tokens/s per GPU, {_seconds(step)} s per step of {tokens:,} tokens")
    if unbounded := len(recipe.model.unbounded):
        keys, gradients = (_gib(size, 2) for size in plan.prefix_bytes(recipe, sp, cut.segment))
        table.add_row("prefix", f"{recipe.parallel.prefix}: keys and values {keys}, gradients {gradients}")
        share = plan.softmax_share(recipe, vocab, cut.segments, hardware.rates, sp)
        last = f"; the last of {sp} ranks has {plan.uneven(sp, cut.segments):.2f} times the mean" if sp > 1 else ""
        table.add_row("", f"{share:.0%} of the time goes to {times(unbounded, 'layer')} seeing all of it{last}")
    if "triton" not in recipe.model.kernels:
        table.add_row(
            "",
            f"with a Triton kernel, which {recipe.model.arch} does not have yet: slower without, in more memory",
        )
    table.add_row("states sent", f"{_gib(sent)} per rank and step, by {scan}")
    if keys_sent := plan.prefix_sent(recipe, sp, cut.segments) * recipe.train.batch // dp:
        table.add_row("keys sent", f"{_gib(keys_sent)} per rank and step, with their gradients")
    table.add_row("training", f"{span.tokens:,} tokens, {_lasting(step * span.steps)}")
    yield table
    if gpus > 1:
        yield _sharing(recipe, vocab, cut.slice, gpus, hardware)
    yield _memory_horizon(staged)


def _stages(recipe: Recipe, vocab: int, pairs: Sequence[tuple[int, int]], available: int, rates: Rates) -> Table:
    """Table of memory, time and tokens by stage, and in all."""
    spans = recipe.spans()
    table = Table(title=f"{recipe.name}: predicted by stage", show_footer=True)
    rows, seconds_of, peaks = [], list[float](), list[int]()
    for span, (dp, sp) in zip(spans, pairs, strict=True):
        cut = plan.layout(span.recipe, dp, sp, vocab, available)
        peaks.append(sum(plan.memory(span.recipe, vocab, dp, sp, cut.segment).values()))
        seconds = plan.seconds_per_token(span.recipe, vocab, cut.segments, rates, sp)
        seconds_of.append(seconds * span.tokens / (dp * sp))
        rows.append(
            (
                f"stages[{span.number}]",
                f"{span.steps:,}",
                f"{dp} × {sp}",
                f"{span.recipe.train.batch:,} × {span.recipe.data.window:,}",
                f"{cut.segments:,} × {cut.segment:,}",
                _gib(peaks[-1]),
                f"{1e-3 / seconds:.1f}k",
                f"{_seconds(seconds_of[-1] / span.steps)} s",
                f"{span.tokens:,}",
                _lasting(seconds_of[-1]),
            )
        )
    total = (
        f"{recipe.train.steps:,}",
        "",
        "",
        "",
        _gib(max(peaks)),
        "",
        "",
        f"{sum(s.tokens for s in spans):,}",
    )
    names = ("steps", "dp × sp", "windows a step", "segments", "memory", "tokens/s per GPU", "a step", "tokens", "time")
    table.add_column("stage", "in all")
    for name, footer in zip(names, (*total, _lasting(sum(seconds_of))), strict=True):
        table.add_column(name, footer, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _sharing(recipe: Recipe, vocab: int, tokens: int, gpus: int, hardware: Hardware) -> Table:
    """Table of predicted speed by method and number of GPUs that share a window."""
    counts = sorted({1 << n for n in range(1, gpus.bit_length())} | {gpus})
    shared = {n: recipe.replace(data={"window": n * tokens}) for n in counts}
    found = {n: links.step_seconds(shared[n], vocab, n, tokens, hardware.rates, hardware.links) for n in counts}
    table = Table(title=f"k tokens/s per GPU, predicted, when n GPUs share a window of n × {tokens:,} tokens")
    for column in ("GPUs", *found[gpus]):
        table.add_column(column, justify="right")
    for n, methods in found.items():
        table.add_row(str(n), *("" if s is None else f"{1e-3 * tokens / s:.1f}" for s in methods.values()))
    return table


def _memory_horizon(recipe: Recipe) -> Table:
    window = recipe.data.window
    heads, far = plan.memory_horizon(recipe.model, window), plan.effective_context(recipe.model, window)
    warning = f"WARNING: windows of {window:,} tokens, but a quarter of the layers sees no further than {far:,.0f}"
    first = " at the start of training: data decide later" if recipe.model.decays_by_data else ""
    table = Table(title=f"heads to which a token still matters{first}", caption=warning if window > 4 * far else None)
    table.add_column("layer")
    for distance in plan.DISTANCES:
        table.add_column(f"after {distance:,}", justify="right")
    for layer, counts in enumerate(heads):
        table.add_row(str(layer), *(str(count) for count in counts))
    return table
