"""`lasptrain convert`: export and import of models."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from lasptrain.errors import RecipeError


def convert(
    source: Annotated[Path, typer.Argument(metavar="RUN|DIR", help="A run; with --from an exported folder.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The new folder; with --from the new run.")],
    to: Annotated[
        str | None,
        typer.Option(metavar="TARGET", help="hf, safetensors, or a target by name; `lasptrain check` lists them."),
    ] = None,
    origin: Annotated[Literal["hf"] | None, typer.Option("--from", help="Make a run of an exported folder.")] = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --from: what the weights are trained on from here.")
    ] = None,
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of the tensors that need not be fp32.")] = "fp32",
    force: Annotated[bool, typer.Option("--force", help="Replace an export; with --from a run.")] = False,
    verify: Annotated[bool, typer.Option(help="Compare logits in the target's library, if installed.")] = True,
) -> None:
    """Export a run's newest checkpoint for other libraries, or make a run of an export."""
    if (to is None) == (origin is None):
        raise RecipeError("convert: expected either --to TARGET or --from hf")
    if origin is not None:
        from lasptrain.convert.restore import restore

        run = restore(source, out, recipe, force=force, tell=typer.echo)
        typer.echo(f"{run}: continue with lasptrain pretrain {run / 'recipe.yaml'} --run {run}")
        return
    from lasptrain.convert.export import export

    assert to is not None
    for line in export(source, out, to, dtype, force=force, check=verify).lines():
        typer.echo(line)
