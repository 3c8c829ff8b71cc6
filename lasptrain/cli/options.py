"""Arguments and options that commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

from lasptrain.errors import RecipeError
from lasptrain.files import at_home

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, such as recipes/quickstart.yaml.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Overrides section.key.")]


F = TypeVar("F", bound=Callable[..., Any])


class _Command(TyperCommand):
    """A command whose paths may begin with `~`: no shell expands it in `--out=~/run`."""

    def invoke(self, ctx: Any) -> Any:
        ctx.params = {name: _expanded(value) for name, value in ctx.params.items()}
        return super().invoke(ctx)


def _expanded(value: Any) -> Any:
    if isinstance(value, list):
        return [_expanded(one) for one in value]
    return Path(at_home(str(value))) if isinstance(value, Path) else value


class App(typer.Typer):
    """A group of commands: `-h` is `--help`, no arguments ask for it too, and paths may begin with `~`."""

    def __init__(self, help: str, *, add_completion: bool = False) -> None:
        super().__init__(
            help=help,
            rich_markup_mode=None,
            add_completion=add_completion,
            pretty_exceptions_enable=False,
            no_args_is_help=True,
            context_settings={"help_option_names": ["-h", "--help"]},
        )

    def command(self, name: str | None = None, **options: Any) -> Callable[[F], F]:
        return super().command(name, cls=_Command, **options)


def spec(given: str | list[str] | None) -> str | list[str] | None:
    """Expand `~` in names that may be paths: of sources, or of a tokenizer."""
    return [at_home(one) for one in given] if isinstance(given, list) else given and at_home(given)


def in_a_folder(file: Path | None) -> Path | None:
    """Check a file that is written at the end: RecipeError now, not then, if its folder does not exist."""
    file = _expanded(file)
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
