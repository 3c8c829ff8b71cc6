"""`lasptrain recipe`: the keys of recipes."""

from typing import Annotated, Literal

import typer
from rich.table import Column, Table

from lasptrain.cli.options import App
from lasptrain.console.tables import show
from lasptrain.errors import RecipeError
from lasptrain.recipe import keys

app = App("Recipes.")


@app.callback()
def recipe() -> None:
    """Show what a recipe may say."""


@app.command("keys")
def keys_command(
    section: Annotated[str | None, typer.Argument(metavar="[SECTION]", help="One section, such as optim.")] = None,
    form: Annotated[
        Literal["table", "markdown"], typer.Option("--format", help="For a terminal, or a page.")
    ] = "table",
) -> None:
    """List every key of a recipe: what fits, its default, its meaning. `--set KEY=VALUE` overrides one."""
    found = keys.rows()
    names = dict.fromkeys(key.section for key in found)
    if section is not None and section not in names:
        raise RecipeError(f"SECTION: found {section!r}; expected {', '.join(names)}")
    found = [key for key in found if section in (None, key.section)]
    if form == "markdown":
        typer.echo(keys.markdown(found))
        return
    name, *others = keys.COLUMNS
    table = Table(Column(name, no_wrap=True), *(Column(other, overflow="fold") for other in others))
    for key, after in zip(found, [*found[1:], None], strict=True):
        table.add_row(*key, end_section=after is not None and after.section != key.section)
    show(table)
