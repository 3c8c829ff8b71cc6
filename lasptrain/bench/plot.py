"""Plots of whole steps: of `bench sp` by window (the LASP paper's figures 3, 4), of `bench scale` by GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lasptrain.bench.methods import METHODS, NONE
from lasptrain.bench.result import Result
from lasptrain.bench.scale import Row, compared
from lasptrain.bench.sp import Step
from lasptrain.console.figures import figure_class

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = {
    NONE: "no sharing",
    "ring": "LASP ring",
    "all_gather": "all-gather (LASP-2)",
    "all_scan": "all-scan (ZeCO)",
    "ulysses": "Ulysses",
    "ring_attention": "Ring Attention",
    "megatron": "Megatron-SP",
}
RIVAL = ("ulysses", "ring_attention", "megatron")
FORMS = {"": "--", "_left": ":", "_softmax": "-."}  # of rivals
NOTES = {"": "", "_left": ", left product", "_softmax": ", softmax"}
COLOURS = ("#555555", "#d62728", "#ff7f0e", "#b8860b", "#1f77b4", "#2ca02c", "#9467bd")


def draw(found: Result[Step], file: Path) -> None:
    """Draw speed and memory by window, as a PNG 1,050 pixels wide; SetupError without matplotlib."""
    ranks = found.facts["ranks"]
    figure, speed, memory = _two()
    for method in METHODS:
        rows = sorted((row for row in found.rows if row.method == method), key=lambda row: row.tokens)
        if rows:
            whole = [row.tokens_per_s and 1e-3 * ranks * row.tokens_per_s for row in rows]
            _line(speed, method, rows, whole, ranks)
            _line(memory, method, rows, [row.memory and row.memory / 2**30 for row in rows], ranks)
    windows = sorted({row.tokens * ranks for row in found.rows})
    named = dict(zip(windows, map(_length, windows), strict=True))
    for axes, label in ((speed, "thousand tokens/s, all GPUs"), (memory, "peak memory per GPU, GiB")):
        _dress(axes, label, "tokens of the window", named)
    handles, labels = speed.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7.5, frameon=False)
    figure.suptitle(f"Whole training steps on {ranks} × {found.facts['device']}", fontsize=10)
    figure.savefig(file, dpi=150)


def draw_scaling(found: Result[Row], file: Path) -> None:
    """Draw weak scaling as tokens/s per GPU and strong scaling as a multiple, by GPUs, as PNG; SetupError without
    matplotlib.
    """
    figure, weak, strong = _two()
    rows, colours = [row for row in found.rows if row.kind == "weak"], dict(zip(NAMES, COLOURS, strict=True))
    sizes = sorted({row.tokens // row.ranks for row in rows})
    for tokens, method in product(sizes, NAMES):
        done = [row for row in rows if (row.tokens // row.ranks, row.method) == (tokens, method) and row.speed]
        if done:
            label = f"{NAMES[method]}, {_length(tokens)} per GPU"
            values = [1e-3 * (row.speed or 0) / row.ranks for row in done]
            style = ("-", "--", ":", "-.")[sizes.index(tokens) % 4]
            weak.plot([row.ranks for row in done], values, style, marker="o", color=colours[method], label=label)
    rows = [row for row in found.rows if row.kind == "strong"]
    for window in dict.fromkeys(row.window for row in rows):
        done = [row for row in rows if row.window == window and row.speed]
        strong.plot([r.ranks for r in done], [compared(r, rows) or 0 for r in done], marker="o", label=_length(window))
    counts = sorted({row.ranks for row in found.rows})
    strong.plot(counts, [n / counts[0] for n in counts], ":", color="gray", label="in proportion")
    for axes, label in ((weak, "thousand tokens/s per GPU"), (strong, "speed of one window, × that on the fewest")):
        _dress(axes, label, "GPUs", {n: str(n) for n in counts})
        if axes.lines:
            axes.legend(fontsize=7, frameon=False)
    figure.suptitle(found.facts["device"], fontsize=10)
    figure.savefig(file, dpi=150)


def _two() -> tuple[Figure, Axes, Axes]:
    """Make a figure of two plots side by side."""
    figure = figure_class()(figsize=(7, 3.9), layout="constrained")
    return figure, *figure.subplots(1, 2)


def _dress(axes: Axes, title: str, across: str, named: Mapping[int, str]) -> None:
    """Format axes: from zero up, over powers of two with these labels."""
    axes.set_xscale("log", base=2)
    axes.set_xticks([*named], [*named.values()], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel(across, fontsize=9)
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _line(axes: Axes, method: str, rows: Sequence[Step], values: Sequence[float | None], ranks: int) -> None:
    """Draw a method's line, with OOM at its end if it ran out of memory."""
    root = next(name for name in sorted(NAMES, key=len, reverse=True) if method.startswith(name))
    form = method.removeprefix(root)
    style: dict[str, Any] = {"color": COLOURS[[*NAMES].index(root)], "linestyle": FORMS[form] if root in RIVAL else "-"}
    label = NAMES[root] + NOTES[form]
    if root == NONE:  # wide, under the others, which should lie on it
        style |= {"linewidth": 5, "alpha": 0.4}
    points = [(row.tokens * ranks, value) for row, value in zip(rows, values, strict=True) if value is not None]
    axes.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=3, label=label, **style)
    if any(row.oom for row in rows):
        last = points[-1] if points else (rows[0].tokens * ranks, 0.0)
        axes.annotate("OOM", last, (4, -3), textcoords="offset points", fontsize=7, color=style["color"])


def _length(tokens: int) -> str:
    """Format a number of tokens: 64K, 2M, or the number."""
    for size, unit in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)
