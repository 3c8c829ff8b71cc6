"""Runs of earlier formats are read: `tests/formats/N` is a run of two steps as format N left it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lasptrain.convert.restore import open_weights
from lasptrain.errors import ConvertError, RecipeError
from lasptrain.recipe.formats import FORMAT, RENAMED
from lasptrain.recipe.loading import load
from tests.recipe.test_recipe import RECIPES
from tests.support.records import Program, text

FORMATS = Path(__file__).parents[1] / "formats"
MODELS = {
    1: "{arch: ssd, dim: 8, layers: 2, heads: 2, mlp: 8, softmax: [1], kv_heads: 1, sliding_window: 24}",
    2: "{arch: tnl, dim: 8, layers: 2, heads: 2, mlp: 8}",
}
GOES_ON = {  # losses of the version that wrote it
    1: [5.778830210367839, 5.6756792068481445, 5.546225865681966, 5.397972424825032],
    2: [5.779520034790039, 5.684258460998535, 5.567334493001302, 5.421561241149902],
}


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """The command line in a folder with the text that the runs were trained on, and a copy of the first format's."""
    text(tmp_path / "text")
    shutil.copytree(FORMATS / "1", tmp_path / "run")
    return Program(tmp_path)


@pytest.mark.parametrize("number", MODELS)
def test_a_run_of_an_earlier_format_goes_on(program: Program, number: int) -> None:
    shutil.rmtree(program.folder / "run")
    shutil.copytree(FORMATS / str(number), program.folder / "run")
    recipe = {
        "model": MODELS[number],
        "data": "{source: text, tokenizer: bytes, window: 96, validation: 150000, cache: cache}",
        "optim": "{lr: 1e-2, schedule: constant}",
        "train": "{steps: 4, batch: 2, precision: fp32}",
        "checkpoint": "{every: 2, keep_every: 2, max_failures: 1}" if number == 1 else "{every: 2}",
        "eval": "{windows: 2, every: 0}",
    }
    (program.folder / "old.yaml").write_text("".join(f"{key}: {value}\n" for key, value in recipe.items()))
    program("pretrain", "old.yaml", "--run", "run", "--nproc", "1")
    rows = [json.loads(line) for line in (program.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "event" not in row]
    assert losses == pytest.approx(GOES_ON[number], rel=1e-6)
    assert (program.folder / "run" / "recipe.yaml").read_text().startswith(f"format: {FORMAT}\n")


def test_a_run_of_the_first_format_is_read_by_every_command(program: Program) -> None:
    program("generate", "run", "--prompt", "the of", "--tokens", "4")
    program("eval", "run", "--tasks", "pairs", "--lengths", "512", "--n", "1")
    program("ckpt", "verify", "run")
    program("data", "inspect", "run", "--step", "1")
    program("convert", "run", "--to", "safetensors", "--out", "export", "--no-verify")
    record = program.folder / "export" / "lasptrain_export.json"
    written = json.loads(record.read_text())
    assert written["meta"]["model"]["sliding_window"] == 24
    old = written | {"format": 1, "recipe": (FORMATS / "1" / "recipe.yaml").read_text()}
    old["meta"]["model"]["sliding"] = old["meta"]["model"].pop("sliding_window")
    record.write_text(json.dumps(old))
    assert open_weights(program.folder / "export").origin.model.sliding_window == 24
    for number, problem in [(FORMAT + 1, "of a newer lasptrain"), (True, "format True; expected 1 to"), ("1", "'1'")]:
        record.write_text(json.dumps(written | {"format": number}))
        with pytest.raises(ConvertError, match=problem):
            open_weights(program.folder / "export")


def test_a_run_of_a_later_format_is_refused(program: Program) -> None:
    file = program.folder / "run" / "recipe.yaml"
    file.write_text(f"format: {FORMAT + 1}\n{file.read_text()}")
    code, _, said = program.end("generate", "run", "--prompt", "a")
    assert code == 2 and f"of a newer lasptrain; expected at most {FORMAT}" in said


@pytest.mark.parametrize("key", RENAMED)
def test_old_names_of_keys_are_refused_with_the_new_one(key: str) -> None:
    with pytest.raises(Exception, match=f"{key}: no such key; it is called {RENAMED[key]} now"):
        load(RECIPES / "quickstart.yaml", [f"{key}=3"])


@pytest.mark.parametrize("number", ["true", "0", "-1", "null", "'1'"])
def test_what_is_no_format_is_refused(number: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"format: {number}\n{(RECIPES / 'quickstart.yaml').read_text()}")
    with pytest.raises(RecipeError, match=f"recipe.yaml:1: format: found {number}; expected 1 to {FORMAT}$"):
        load(file)


def test_a_key_under_its_old_and_its_new_name_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    recipe = (RECIPES / "quickstart.yaml").read_text()
    file.write_text("format: 1\n" + recipe.replace("checkpoint:", "checkpoint:\n  patience: 2\n  max_failures: 3"))
    with pytest.raises(RecipeError, match="patience: no such key; it is called max_failures now"):
        load(file)
