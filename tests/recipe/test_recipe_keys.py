"""The table of keys says all that a recipe may, and the page shows it."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from lasptrain.cli.main import app
from lasptrain.recipe import keys
from lasptrain.recipe.schema import SECTIONS
from lasptrain.recipe.sections import Stage

PAGE = Path(__file__).parents[2] / "recipes" / "README.md"


def printed(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["recipe", "keys", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_page_has_the_table_of_the_command() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines(keepends=True)
    first = lines.index("| key | fits | default | meaning |\n")
    table = "".join(line for line in lines[first:] if line.startswith("|"))
    assert table == printed("--format", "markdown")


def test_every_key_is_there_with_a_meaning() -> None:
    found = keys.rows()
    names = {key.name for key in found}
    assert names >= {f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields}
    assert names >= {f"stages[].{key}" for key in Stage.model_fields} | {"name", "stages", "model.lrpe"}
    assert [key.name for key in found if not key.meaning or key.meaning.endswith(": ")] == []


@pytest.mark.parametrize(
    ("name", "fits", "default"),
    [
        ("data.window", "integer ≥ 1", "required"),
        ("data.validation", "integer ≥ 0 and < 1,000,000", "20000"),
        ("optim.betas", "[number ≥ 0 and < 1, number ≥ 0 and < 1]", "[0.9, 0.95]"),
        ("optim.kind", "adamw, muon", "adamw"),
        ("mesh.sp", "integer ≥ 1 or auto", "auto"),
        ("train.compile", "true or false", "false"),
        ("track.trackers", "list of tensorboard, wandb", '["tensorboard"]'),
    ],
)
def test_words_of_values(name: str, fits: str, default: str) -> None:
    assert next((key.fits, key.default) for key in keys.rows() if key.name == name) == (fits, default)


def test_keys_of_some_architectures_name_them() -> None:
    found = [(key.default, key.meaning.partition(":")[0]) for key in keys.rows() if key.name == "model.conv"]
    assert found == [("0", "ssd"), ("0", "gla"), ("4", "gdn, kda")]


def test_one_section_and_one_that_is_none() -> None:
    shown = printed("optim")
    assert "optim.lr" in shown and "train.steps" not in shown
    done = CliRunner().invoke(app, ["recipe", "keys", "optimizer"])
    assert done.exit_code != 0 and "optim," in str(done.exception)
