"""What the pages say holds: their links lead somewhere, the front page's examples run, commands can be given."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

from lasptrain.cli.main import app
from lasptrain.recipe.loading import load
from tests.support.program import ROOT

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


def give(words: list[str]) -> None:
    """Read a command's options, and the recipe that it names with what it overrides."""
    command: Any = get_command(app)
    while words and words[0] in getattr(command, "commands", ()):
        command, words = command.commands[words[0]], words[1:]
    if words and words != ["--help"]:
        assert not hasattr(command, "commands"), words
        given = command.make_context("lasptrain", words).params
        if "overrides" in given:
            load(given["recipe"], given["overrides"])


def test_commands_of_the_page_of_measurements_can_be_given() -> None:
    text = " ".join((ROOT / "lasptrain/bench/README.md").read_text(encoding="utf-8").split())
    commands = re.findall(r"`lasptrain (\w[^`]*)`", text)
    for words in map(str.split, commands):
        give(["recipes/quickstart.yaml" if word == "RECIPE" else word for word in words])
    assert len(commands) > 20


def test_commands_from_a_corpus_to_a_server_can_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "recipes/README.md").read_text(encoding="utf-8")
    text = re.split(r"\n## (?=From your corpus)", page)[1].partition("\n## ")[0]
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for file in ("my_recipe.yaml", "runs/theirs/recipe.yaml"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(recipe, encoding="utf-8")
    commands = re.findall(r"^    \$ lasptrain (.*)", text.replace("\\\n", ""), re.MULTILINE)
    for command in commands:
        give(shlex.split(command, comments=True))
    assert len(commands) > 15
    assert not [line for line in text.splitlines() if len(line) > 120]
