"""What the pages say holds: their links lead somewhere, the front page's examples run, commands can be given."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

from lasptrain.cli.main import app
from lasptrain.recipe.loading import load
from tests.program import ROOT

FOLDERS = ("", "lasptrain", "data_tools", "recipes", "tests", "tokenizers")
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for folder in FOLDERS
    for page in (ROOT / folder).glob("**/*.md" if folder else "*.md")
)
FRONT = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    """The front page's only block of a language."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", FRONT, re.DOTALL)
    return str(found)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    lost = [
        link
        for link in links
        if "://" not in link and not (ROOT / page).parent.joinpath(link.partition("#")[0]).exists()
    ]
    assert not lost


def test_the_front_page_is_short() -> None:
    assert len(FRONT.splitlines()) <= 170


def test_the_example_in_python_runs() -> None:
    names: dict[str, object] = {}
    exec(block("python"), names)  # noqa: S102  of our own page
    more = names["more"]
    assert isinstance(more, torch.Tensor) and more.shape == (1, 256, 8, 64)


def test_the_example_of_a_recipe_is_one(tmp_path: Path) -> None:
    file = tmp_path / "my_recipe.yaml"
    file.write_text(block("yaml"), encoding="utf-8")
    assert load(file).model.unbounded == (3, 7, 11)


def test_commands_of_the_page_of_measurements_can_be_given() -> None:
    """Of each the options are read, and the recipe with what it overrides."""
    text = " ".join((ROOT / "lasptrain/bench/README.md").read_text(encoding="utf-8").split())
    commands = re.findall(r"`lasptrain (\w[^`]*)`", text)
    for words in map(str.split, commands):
        command: Any = get_command(app)
        while words and words[0] in getattr(command, "commands", ()):
            command, words = command.commands[words[0]], words[1:]
        if words and words != ["--help"]:
            assert not hasattr(command, "commands"), words
            words = ["recipes/quickstart.yaml" if word == "RECIPE" else word for word in words]
            given = command.make_context("lasptrain", words).params
            if "recipe" in given:
                load(given["recipe"], given["overrides"])
    assert len(commands) > 20
