"""`lasptrain ckpt`: the checkpoints of a run, listed, verified, pruned, by one process."""

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from lasptrain.cli.options import App
from lasptrain.console.words import times
from lasptrain.errors import CheckpointError
from lasptrain.run import folder as runs

app = App("Checkpoints of a run.")

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, such as runs/quickstart.")]


@app.command("list")
def list_steps(run: Run) -> None:
    """Show the steps with their sizes, and problems that show without reading every byte."""
    _show(run, thorough=False)


@app.command()
def verify(run: Run) -> None:
    """Read every byte of every step and compare digests; exit code 4 if one does not fit."""
    if not _show(run, thorough=True):
        raise typer.Exit(CheckpointError.code)


@app.command()
def prune(
    run: Run,
    keep: Annotated[int, typer.Option(min=1, help="The newest steps that stay.")] = 2,
    keep_every: Annotated[int, typer.Option(min=0, help="Multiples of this stay too; 0: none do.")] = 0,
    really: Annotated[bool, typer.Option("--really", help="Delete; without it only say what.")] = False,
) -> None:
    """Delete steps, all but the newest and multiples of --keep-every. The newest step that is whole always stays."""
    from lasptrain.checkpoint import steps as checkpoint

    with runs.lock(_existing(run)):
        steps = checkpoint.expired(run, keep, keep_every)
        whole = next((step.step for step in checkpoint.inspect(run, thorough=True) if not step.problems), None)
        doomed = [step for step in steps if step != whole]
        if really:
            checkpoint.remove_partial(run)
            checkpoint.delete(run, doomed)
    verb = "deleted" if really else "would delete"
    typer.echo(f"{verb} {', '.join(f'step-{step}' for step in doomed) or 'nothing'}")


def _existing(run: Path) -> Path:
    if not (run / runs.CHECKPOINTS).is_dir():
        raise CheckpointError(f"{run}: holds no {runs.CHECKPOINTS}; expected a run folder, such as runs/quickstart")
    return run


def _show(run: Path, *, thorough: bool) -> bool:
    """Print the steps; return true if all are whole."""
    from lasptrain.checkpoint import steps as checkpoint

    good = True
    for step in checkpoint.inspect(_existing(run), thorough=thorough):
        good = good and not step.problems
        verdict = "; ".join(step.problems) or ("intact" if thorough else "complete")
        ranks = times(step.world, "rank") if step.world else "? ranks"
        when = datetime.fromtimestamp(step.time).isoformat(" ", "seconds")
        typer.echo(f"step-{step.step}  {step.size:,} bytes  {ranks}  {when}  {verdict}")
    if aside := checkpoint.put_aside(run):
        typer.echo(f"put aside as damaged, {len(aside)}: {', '.join(path.name for path in aside)}")
    return good
