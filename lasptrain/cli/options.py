"""Arguments and options that commands share."""

from pathlib import Path
from typing import Annotated

import typer

from lasptrain.errors import RecipeError

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, such as recipes/quickstart.yaml.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Overrides section.key.")]


def in_a_folder(file: Path | None) -> Path | None:
    """Check a file that is written at the end: RecipeError now, not then, if its folder does not exist."""
    if file is not None and not file.parent.is_dir():
        raise RecipeError(f"{file}: found no folder {file.parent}; expected one to write into")
    return file


Numbers = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers there too.", callback=in_a_folder)
]


def to_bytes(text: str) -> int:
    """Parse 80GiB, 40GB or 512MiB into bytes; RecipeError for anything else."""
    units = {"GiB": 2**30, "GB": 10**9, "MiB": 2**20}
    number, unit = text.rstrip("GiMB"), text[len(text.rstrip("GiMB")) :]
    try:
        return int(float(number) * units[unit])
    except (KeyError, ValueError):
        raise RecipeError(f"--memory: found {text!r}; expected a size such as 80GiB") from None
