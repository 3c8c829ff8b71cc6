"""Report of results: cells of task × length with their intervals, as a table, JSON, a page of HTML, and pictures."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from lasptrain.console.figures import figure_class
from lasptrain.console.stdio import printable
from lasptrain.console.words import times
from lasptrain.eval.runner import PERPLEXITY, Record
from lasptrain.eval.score import bootstrap, interval

RESULTS, PAGE, TABLE = "results.json", "report.html", "table.md"
MEASURES = ("score", "exact", "accuracy")  # fractions in [0, 1]


def cells(records: Iterable[Record]) -> list[Record]:
    """Return one object for each task and length: n, and each measure with its 95 % interval, over all and by depth.

    The interval of nats is None of one sample, which tells no spread.
    A file's object has its number of rows, `rows`, and, where rows differ in length, `by_length`.
    """
    groups: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        groups.setdefault((record["task"], record["length"]), []).append(record)
    return [
        {"task": task, "length": length, "n": len(group)} | (_curve(group) if task in PERPLEXITY else _cell(group))
        for (task, length), group in groups.items()
    ]


def _cell(group: list[Record]) -> Record:
    cell: Record = {"metric": group[0].get("metric")}
    for measure in (*MEASURES, "answer_nll", "control_nll"):
        if values := [record[measure] for record in group if measure in record]:
            bounds = interval if measure in MEASURES else bootstrap
            cell[measure], cell[f"{measure}_ci95"] = fmean(values), bounds(values)
    if "rows" in group[0]:
        cell["file"], cell["rows"] = group[0]["file"], group[0]["rows"]
    sizes = sorted({record["up_to"] for record in group if "up_to" in record})
    if len(sizes) > 1:
        parts = [(size, [record for record in group if record["up_to"] == size]) for size in sizes]
        cell["by_length"] = [{"length": size, "n": len(part)} | _means(part) for size, part in parts]
    depths = sorted({record["depth"] for record in group if record["depth"] is not None})
    if len(depths) > 1:
        cell["by_depth"] = [_at(depth, [r for r in group if r["depth"] == depth]) for depth in depths]
    cell["true_tokens"] = [min(r["tokens"] for r in group), max(r["tokens"] for r in group)]
    cell["prefill_tokens_per_s"] = sum(r["tokens"] for r in group) / max(sum(r["seconds"] for r in group), 1e-9)
    return cell


def _at(depth: float, group: list[Record]) -> Record:
    distance = round(fmean(record["distance"] for record in group))
    return {"depth": depth, "n": len(group), "distance": distance, **_means(group)}


def _means(group: list[Record]) -> dict[str, float]:
    return {measure: fmean(r[measure] for r in group) for measure in MEASURES if measure in group[0]}


def _curve(group: list[Record]) -> Record:
    points = []
    for x in group[0]["nats"]:
        values = [record["nats"][x] for record in group]
        points.append({"x": int(x), "nats": fmean(values), "ci95": bootstrap(values)})
    return {"curve": points}


def table(found: list[Record], title: str) -> Table:
    """Table with tasks down, lengths across: percent ± half of the interval, accuracy where there is no score."""
    return _table(title, *_grid(found))


def _table(title: str, head: list[str], *rows: list[str], left: int = 1) -> Table:
    """Table whose first `left` columns are words, the others numbers."""
    result = Table(title=title)
    for index, text in enumerate(head):
        result.add_column(text, justify="left" if index < left else "right")
    for row in rows:
        result.add_row(*row)
    return result


def rows(found: list[Record]) -> list[dict[str, str]]:
    """The same table as rows of texts by column."""
    head, *others = _grid(found)
    return [dict(zip(head, row, strict=True)) for row in others]


def by_length(found: list[Record]) -> list[Table]:
    """A table of the part that is right by length, for each file whose rows differ in length."""
    title = "% right in rows (their number) of up to so many tokens"
    return [_table(f"{cell['task']}: {title}", *_lengths(cell), left=0) for cell in found if "by_length" in cell]


def _lengths(cell: Record) -> tuple[list[str], list[str]]:
    parts = cell["by_length"]
    return [short(part["length"]) for part in parts], [f"{100 * part['score']:.0f} ({part['n']})" for part in parts]


def curves(found: list[Record]) -> list[Table]:
    """A table of nats per token for each perplexity task."""
    heads = {
        "ppl_by_position": "nats per token, positions up to",
        "ppl_vs_context": "nats per token, after a context of",
    }
    result = []
    for cell in found:
        if cell["task"] in heads:
            points = cell["curve"]
            head = [heads[cell["task"]], *(f"{point['x']:,}" for point in points)]
            nats = ["", *(f"{point['nats']:.3f}" for point in points)]
            range_ = ["95 %", *("{:.2f} to {:.2f}".format(*at["ci95"]) if at["ci95"] else "-" for at in points)]
            title = f"{cell['task']}: {times(cell['n'], 'document')} of {cell['length']:,} tokens"
            result.append(_table(title, head, nats, range_))
    return result


def _text(cell: Record) -> str:
    measure = "score" if "score" in cell else "accuracy"
    low, high = cell[f"{measure}_ci95"]
    return f"{100 * cell[measure]:.0f} ±{50 * (high - low):.0f}, nll {cell['answer_nll']:.2f} ({_count(cell)})"


def _count(cell: Record) -> str:
    """Number of samples, out of a file's rows if it has more."""
    return f"{cell['n']} of {cell['rows']}" if cell.get("rows", 0) > cell["n"] else f"{cell['n']}"


def short(tokens: int) -> str:
    """Format a number of tokens: 4096 as 4K."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return f"{tokens:,}"


def scalars(found: list[Record]) -> dict[str, float]:
    """Results by name, for logs."""
    result = {}
    for cell in found:
        name = f"{cell['task']}@{short(cell['length'])}"
        for measure in (*MEASURES, "answer_nll"):
            if measure in cell:
                result[f"{name}/{measure}"] = float(cell[measure])
        for point in cell.get("curve", ()):
            result[f"{name}/nats_at_{point['x']}"] = float(point["nats"])
    return result


def write(folder: Path, found: list[Record], header: Record, records: Iterable[Record] = ()) -> None:
    """Write results.json, table.md and report.html, which shows the first `records` of each cell, into the folder."""
    (folder / RESULTS).write_text(json.dumps({**header, "cells": found}, indent=1) + "\n", encoding="utf-8")
    (folder / TABLE).write_text(_markdown(found), encoding="utf-8")
    (folder / PAGE).write_text(_page(found, header, list(records)), encoding="utf-8")


def _grid(found: list[Record]) -> list[list[str]]:
    lengths = sorted({cell["length"] for cell in found if cell["task"] not in PERPLEXITY})
    tasks = dict.fromkeys(cell["task"] for cell in found if cell["task"] not in PERPLEXITY)
    place = {(cell["task"], cell["length"]): cell for cell in found}
    rows = [["task", *map(short, lengths)]]
    for task in tasks:
        texts = (_text(place[task, length]) if (task, length) in place else "" for length in lengths)
        rows.append([task, *texts])
    return rows


def _markdown(found: list[Record]) -> str:
    head, *rows = _grid(found)
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |\n" for line in lines)


STYLE = (
    "body{font:15px system-ui;margin:2em auto;max-width:70em;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.3em .7em;border:1px solid #ccc;text-align:right}"
    "td:first-child,th:first-child{text-align:left}figure{display:inline-block;margin:1em 2em 1em 0}"
    "pre,dd{white-space:pre-wrap}dt{font-weight:600;float:left;clear:left;width:9em}dd{margin-left:9em}"
    "details{margin:.5em 0}"
)

SHOWN = 5  # samples of each task and length
LEGEND = {
    "97 ±3": "percent right by the task's own score, and half of its 95 % interval; where there is no score, percent "
    "of the answer's tokens that are the likeliest",
    "nll 0.12": "loss on the right answer, in nats per token: 0 if the model was certain of it, and lower is better",
    "(20)": "samples, of a file also its rows",
}
MAP = "Each number is the part that is right, 0 to 1, at a depth of the text and a length; grey was not asked."


def _page(found: list[Record], header: Record, records: list[Record]) -> str:
    """A self-contained HTML page: the table, a map of depth × length for each task, the curves, some samples."""
    title = _escaped(f"{header.get('name')} after {header.get('step')} steps")
    parts = [f"<h1>{title}</h1>", _html(*_grid(found)), _listed(LEGEND)]
    for cell in found:
        if "by_length" in cell:
            parts += [f"<p>{_escaped(cell['task'])}, by length of the rows</p>", _html(*_lengths(cell))]
    maps = dict.fromkeys(cell["task"] for cell in found if "by_depth" in cell)
    parts += [*(_map(task, found) for task in maps), *([f"<p>{MAP}</p>"] if maps else [])]
    parts += [_svg(cell) for cell in found if "curve" in cell]
    parts += [_samples(cell, records) for cell in found if "curve" not in cell]
    parts.append(f"<h2>How</h2><pre>{_escaped(json.dumps(header, indent=1))}</pre>")
    page = f'<!doctype html><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return page + "\n".join(parts) + "\n"


def _escaped(text: str) -> str:
    """Escape a text for HTML, and spell out characters that do not print: they may be a model's."""
    return html.escape(printable(text, "\n\t"))


def _listed(terms: Mapping[str, str]) -> str:
    """A list of terms, each with what it means or is."""
    return f"<dl>{''.join(f'<dt>{_escaped(term)}</dt><dd>{_escaped(text)}</dd>' for term, text in terms.items())}</dl>"


def _samples(cell: Record, records: list[Record]) -> str:
    """First samples of a cell: the end of each prompt, the right answer, and the model's."""
    of_cell = [r for r in records if (r["task"], r["length"]) == (cell["task"], cell["length"])]
    first = sorted(of_cell, key=lambda record: int(record["index"]))[:SHOWN]
    if not first:
        return ""
    title = f"{cell['task']} at {short(cell['length'])}: {len(first)} of {len(of_cell)} samples"
    return f"<details><summary>{_escaped(title)}</summary>{''.join(map(_sample, first))}</details>"


def _sample(record: Record) -> str:
    said = {"prompt ends": f"…{record.get('prompt_end', '')}"}
    if "prediction" in record:
        said |= {"right answer": ", ".join(record["references"]), "model's answer": record["prediction"]}
    found = [f"{100 * record[measure]:.0f} % by {measure}" for measure in MEASURES if measure in record]
    said["result"] = ", ".join([*found, f"nll {record['answer_nll']:.2f}"])
    return _listed(said)


def _html(head: list[str], *rows: list[str]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_escaped(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def depth_map(task: str, found: list[Record]) -> tuple[list[float], list[int], dict[tuple[float, int], float]]:
    """Depths, lengths, and the score at each pair that was sampled, accuracy by token where there is no score."""
    values: dict[tuple[float, int], float] = {}
    for cell in found:
        if cell["task"] == task:
            for at in cell.get("by_depth", ()):
                values[at["depth"], cell["length"]] = at.get("score", at["accuracy"])
    return sorted({depth for depth, _ in values}), sorted({length for _, length in values}), values


def _map(task: str, found: list[Record]) -> str:
    depths, lengths, values = depth_map(task, found)
    rows = []
    for depth in depths:
        colours = "".join(_coloured(values.get((depth, n))) for n in lengths)
        rows.append(f"<tr><td>{depth:.0%}</td>{colours}</tr>")
    head = "".join(f"<th>{short(n)}</th>" for n in lengths)
    caption = f"<figcaption>{_escaped(task)}: depth × length</figcaption>"
    return f"<figure>{caption}<table><tr><th></th>{head}</tr>{''.join(rows)}</table></figure>"


def _coloured(value: float | None) -> str:
    if value is None:
        return '<td style="background:#ddd"></td>'
    return f'<td style="background:hsl({120 * value:.0f} 60% 75%)">{value:.2f}</td>'


def _svg(cell: Record) -> str:
    points = cell["curve"]
    values = [point["nats"] for point in points]
    low, high = min(values), max(max(values), min(values) + 1e-9)
    width = 480 / max(len(points) - 1, 1)
    places = [(40 + i * width, 30 + 140 * (high - value) / (high - low)) for i, value in enumerate(values)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    labels = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/><text x="{x:.1f}" y="{y - 8:.1f}">{value:.3f}</text>'
        f'<text x="{x:.1f}" y="195">{short(point["x"])}</text>'
        for (x, y), value, point in zip(places, values, points, strict=True)
    )
    caption = f"<figcaption>{cell['task']}: nats per token, {times(cell['n'], 'document')}</figcaption>"
    style = 'font-size="11" text-anchor="middle"'
    path = f'<polyline points="{line}" fill="none" stroke="#369"/>'
    return f'<figure>{caption}<svg width="560" height="205" {style}>{path}{labels}</svg></figure>'


def plot(folder: Path, found: list[Record]) -> list[Path]:
    """Draw heatmap.png and curves.png, where there is data for them. Raises SetupError without matplotlib."""
    Figure = figure_class()
    tasks = dict.fromkeys(cell["task"] for cell in found if "by_depth" in cell)
    pictures = {
        "heatmap.png": (4.5, [partial(_draw_map, task=task, found=found) for task in tasks]),
        "curves.png": (5, [partial(_draw_curve, cell=cell) for cell in found if "curve" in cell]),
    }
    files = [folder / name for name, (_, parts) in pictures.items() if parts]
    for file in files:
        width, parts = pictures[file.name]
        figure = Figure(figsize=(width * len(parts), 4), layout="constrained")
        for axes, draw in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
            draw(axes)
        figure.savefig(file, dpi=120)
    return files


def _draw_curve(axes: Any, cell: Record) -> None:
    points = cell["curve"]
    axes.plot([short(p["x"]) for p in points], [p["nats"] for p in points], marker="o")
    axes.set(title=cell["task"], ylabel="nats per token")


def _draw_map(axes: Any, task: str, found: list[Record]) -> None:
    depths, lengths, values = depth_map(task, found)
    grid = [[values.get((depth, length), float("nan")) for length in lengths] for depth in depths]
    axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set(title=task, xlabel="length", ylabel="depth")
    axes.set_xticks(range(len(lengths)), [short(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
