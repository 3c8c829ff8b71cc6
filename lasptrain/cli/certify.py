"""`lasptrain certify`: proof that a recipe computes on this machine what it means."""

from pathlib import Path
from typing import Annotated

import typer

from lasptrain.cli.options import Overrides, RecipeFile, in_a_folder
from lasptrain.console.tables import show
from lasptrain.errors import NumericalError, RecipeError
from lasptrain.recipe.loading import load


def certify(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Processes; one per GPU, or 1 without any.")] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="Of a window, in place of as many as fit.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="In place of as many as fit.")] = None,
    stage: Annotated[int | None, typer.Option(min=0, help="Of a recipe with stages; the longest if not given.")] = None,
    checks: Annotated[list[str] | None, typer.Option("--check", help="Only that one; may be repeated.")] = None,
    file: Annotated[Path, typer.Option("--json", metavar="FILE", help="The certificate.", callback=in_a_folder)] = Path(
        "certificate.json"
    ),
) -> None:
    """Prove a recipe: layout, documents, kernel, update, resume and export against one process and the definition."""
    loaded = load(recipe, overrides)
    spans = loaded.spans()
    if stage is not None and (not loaded.stages or stage >= len(spans)):
        expected = f"0 to {len(spans) - 1}" if loaded.stages else "a recipe with stages, or to leave it out"
        raise RecipeError(f"--stage: found {stage}; expected {expected}")
    span = loaded.longest if stage is None else spans[stage]
    import torch

    from lasptrain.certify.proof import prove

    certificate = prove(span.recipe, nproc or torch.cuda.device_count() or 1, tokens, layers, checks or ())
    certificate.write(file)
    of = [f"of stages[{span.number}], windows of {span.recipe.data.window:,} tokens"] if loaded.stages else []
    show(certificate.table(), *certificate.lines(), *of, f"written to {file}")
    if not certificate.holds:
        raise typer.Exit(NumericalError.code)
