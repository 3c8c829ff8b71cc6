"""`lasptrain runs`: where the runs of a folder stand."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from lasptrain import files
from lasptrain.cli.options import Numbers
from lasptrain.console.stdio import printable
from lasptrain.console.tables import number, show
from lasptrain.errors import RecipeError
from lasptrain.run.listing import Listed, listing

COLUMNS = ("step", "loss", "tokens/s", "checkpoint")


def runs(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="A folder of runs, or one run.")] = Path("runs"),
    file: Numbers = None,
) -> None:
    """List runs: state, step, last loss, rate, newest checkpoint. Reads only; needs no GPU."""
    try:
        found, others = listing(folder)
    except OSError as error:
        raise RecipeError(f"{folder}: {error.strerror}; expected a folder of runs, such as runs") from None
    if file is not None:
        content = {"runs": [run._asdict() for run in found], "no_runs": others}
        files.replace(file, json.dumps(content, indent=1) + "\n")
    if found:
        show(_table(found), *(f"{printable(run.name)}: {printable(run.remark)}" for run in found if run.remark))
    else:
        show(f"{folder}: holds no run")
    if others:
        some = ", ".join(printable(name) for name in others[:5])
        show(f"no runs, {len(others)}: {some}{' …' if len(others) > 5 else ''}")


def _table(found: list[Listed]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    table.add_column("state")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for run in found:
        step = "" if run.steps is None else f"{number(run.step, ',') or '-'}/{run.steps:,}"
        numbers = number(run.loss, ".4f"), number(run.tokens_per_s, ",.0f"), number(run.checkpoint, ",")
        table.add_row(printable(run.name), run.state, step, *numbers)
    return table
