"""Recipes: what is read, what is refused, and that a refusal says where, what was found and what fits."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lasptrain.architectures.base import Architecture
from lasptrain.architectures.section import Section
from lasptrain.architectures.tnl import Tnl
from lasptrain.cost import plan
from lasptrain.errors import RecipeError, SetupError
from lasptrain.files import at_home
from lasptrain.recipe import synonyms
from lasptrain.recipe.loading import load
from lasptrain.recipe.resolve import resolve_mesh, resolve_vocabulary
from lasptrain.recipe.schema import SECTIONS, Recipe
from lasptrain.recipe.yaml12 import dump

RECIPES = Path(__file__).parents[2] / "recipes"
GOOD = """\
model:
  arch: tnl
  dim: 256
  layers: 4
  heads: 4
  mlp: 704
data:
  source: python:source
  window: 4096
optim:
  lr: 1e-4
train:
  steps: 40
  batch: 4
"""


Write = Callable[..., Path]
Refused = Callable[..., list[str]]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str | bytes, name: str = "r.yaml") -> Path:
        file = tmp_path / name
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    return write


@pytest.fixture
def refused(write: Write) -> Refused:
    """The lines of the error that a recipe or its overrides lead to, without the folder."""

    def refused(text: str | bytes, *overrides: str) -> list[str]:
        file = write(text)
        with pytest.raises(RecipeError) as caught:
            load(file, list(overrides))
        return str(caught.value).replace(f"{file.parent}/", "").splitlines()

    return refused


def edit(line: str, by: str) -> str:
    """GOOD with one line replaced."""
    assert GOOD.count(f"{line}\n") == 1
    return GOOD.replace(f"{line}\n", f"{by}\n")


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_recipes_load_and_carry_their_name(file: Path) -> None:
    recipe = load(file)
    assert recipe.name == file.stem
    for world in (1, 2, 4, 8):
        dp, sp = resolve_mesh(recipe, world)
        assert dp * sp == world


def test_defaults_are_the_documented_ones(write: Write) -> None:
    recipe = load(write(GOOD))
    assert isinstance(recipe.model, Tnl) and recipe.model.lrpe == (0,)
    assert recipe.model.tie and recipe.model.vocab == "auto"
    assert (recipe.model.K, recipe.model.V) == (64, 64)
    assert recipe.optim.betas == (0.9, 0.95) and recipe.optim.lr == 1e-4
    assert recipe.mesh.dp == recipe.mesh.sp == "auto"


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-4", 1e-4), ("3E-2", 0.03), ("1.0e0", 1.0), ("5.e-1", 0.5), (".5", 0.5), ("1", 1.0), ("+1.0", 1.0)],
)
def test_numbers_follow_yaml_1_2(write: Write, written: str, value: object) -> None:
    assert load(write(edit("  lr: 1e-4", f"  lr: {written}"))).optim.lr == value


@pytest.mark.parametrize(("written", "value"), [("012", 12), ("0o14", 12), ("0xC", 12), ("+12", 12)])
def test_integers_follow_yaml_1_2(write: Write, written: str, value: object) -> None:
    assert load(write(edit("  layers: 4", f"  layers: {written}"))).model.layers == value


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "1:30", "2024-01-01", "1_000", '"695e0514"', "~x"])
def test_what_yaml_1_1_would_convert_stays_text(write: Write, word: str) -> None:
    assert load(write(edit("  source: python:source", f"  source: {word}"))).data.source == word.strip('"')


@pytest.mark.parametrize(
    ("line", "by", "message"),
    [
        ("  dim: 256", "  dmi: 256", "r.yaml:3: model.dmi: no such key; did you mean dim?"),
        ("  dim: 256", "  dim: true", "r.yaml:3: model.dim: found true; expected an integer"),
        ("  dim: 256", "  dim: 256.0", "r.yaml:3: model.dim: found 256.0; expected an integer, write 256"),
        ("  dim: 256", '  dim: "256"', "r.yaml:3: model.dim: found '256'; expected an integer"),
        ("  dim: 256", "  dim: 0", "r.yaml:3: model.dim: found 0; expected at least 1"),
        ("  dim: 256", "  dim: [256]", "r.yaml:3: model.dim: found [256]; expected an integer"),
        ("  dim: 256", "  dim:", "r.yaml:3: model.dim: found nothing; expected an integer"),
        ("  dim: 256", "  dim: 1_000", "r.yaml:3: model.dim: found '1_000'; expected an integer"),
        (
            "  arch: tnl",
            "  arch: tln",
            "r.yaml:2: model.arch: found 'tln'; did you mean tnl?",
        ),
        ("  lr: 1e-4", "  lr: fast", "r.yaml:11: optim.lr: found 'fast'; expected a number"),
        ("  lr: 1e-4", "  lr: .nan", "r.yaml:11: optim.lr: found .nan; expected a finite number"),
        ("  lr: 1e-4", "  lr: -.inf", "r.yaml:11: optim.lr: found -.inf; expected a finite number"),
        ("  lr: 1e-4", "  lr: 1e999", "r.yaml:11: optim.lr: found 1e999; expected a finite number"),
        ("  lr: 1e-4", "  lr: -1e-4", "r.yaml:11: optim.lr: found -1e-4; expected more than 0"),
        ("  lr: 1e-4", "  steps: 3", "r.yaml:11: optim.steps: no such key; did you mean train.steps?"),
        ("optim:", "optimm:", "r.yaml:10: optimm: no such section; did you mean optim?"),
        (
            "  source: python:source",
            "  source: 695e0514",
            'r.yaml:8: data.source: found 695e0514; expected text, quote it: "695e0514"',
        ),
        ("  source: python:source", '  source: "a\\0b"', "found 'a\\x00b'; expected 1 to 4096 printable characters"),
        ("  batch: 4", "  segment: all", "r.yaml:14: train.segment: found 'all'; expected an integer or auto"),
        ("  mlp: 704", "  mlp: 704\n  lrpe: 0", "r.yaml:7: model.lrpe: found 0; expected a list such as [0]"),
        (
            "  batch: 4",
            "  batch: 4\neval: {lengths: 3}",
            "r.yaml:15: eval.lengths: found 3; expected a list such as [3]",
        ),
        ("  batch: 4", f"  batch: {1 << 60}", "expected at most 281474976710656"),
        ("  batch: 4", "  batch:", "r.yaml:14: train.batch: found nothing; expected an integer"),
        (
            "model:",
            "name: 2024\nmodel:",
            'name: found 2024; expected 1 to 100 letters, digits, dots, dashes or underscores, quote it: "2024"',
        ),
        ("  mlp: 704", "  mlp: 704\n  lrpe: [0, x]", "r.yaml:7: model.lrpe.1: found 'x'; expected an integer"),
        ("  lr: 1e-4", "  lr: 1e-4\n  betas: [0.9]", "optim.betas.1: "),
        ("  lr: 1e-4", "  lr: 1e-4\n  betas: [0.9, 1.0]", "optim.betas.1: found 1.0; expected less than 1"),
    ],
)
def test_one_wrong_value(refused: Refused, line: str, by: str, message: str) -> None:
    assert any(message in found for found in refused(edit(line, by)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.window=4097", "mesh.sp=3"], "data.window: 4097 tokens do not split into mesh.sp = 3 equal slices; "
         "nearest: 4095, 4098"),
        (["train.steps="], "--set train.steps=: train.steps: found nothing; expected an integer"),
        (["train.segment=1000"], "train.segment: 1000 tokens do not divide data.window = 4096; nearest: 512, 1024"),
        (["train.segment=1024", "mesh.sp=3"], "train.segment: 1024 tokens do not split into mesh.sp = 3"),
        (["train.segment=32", "data.window=96", "mesh.sp=3"], "nearest that divide data.window: 24, 48"),
        (["train.segment=1024", "mesh.sp=3"], "nor does data.window = 4096; nearest windows: 4095, 4098"),
        (["eval.window=100", "mesh.sp=8"], "eval.window: 100 tokens do not split into mesh.sp = 8 equal slices; "
         "nearest: 96, 104"),
        (["parallel.data_parallel=zero1", "parallel.reduce=segment"], "parallel.reduce: found 'segment' with "
         "data_parallel: zero1; it saves memory with zero2, zero3 and hsdp"),
        (["optim.momentum=0.9"], "optim.momentum: found 0.9; only kind: muon has one, AdamW has optim.betas"),
        (["model.heads=5"], "model.heads: 5 heads do not divide model.dim = 256; nearest: 4, 8"),
        (["model.lrpe=[0, 4]"], "model.lrpe: there is no layer 4; the 4 layers are 0 to 3"),
        (["model.lrpe=[1, 0, 1]"], "model.lrpe: found [1, 0, 1]; write [0, 1]"),
        (["model.normalizer=true"], "model.normalizer: no such key of this arch, only of linear_transformer"),
        (["model.arch=linear_transformer", "model.decay=tnl"], "model.decay: found 'tnl'; expected none"),
        (["model.arch=linear_transformer", "model.decay=none", "model.lrpe=[0]"],
         "model.lrpe: no such key of this arch, only of tnl"),
        (["train.batch=6", "mesh.dp=4"], "train.batch: 6 windows do not split into mesh.dp = 4 × micro_batch = 1; "
         "nearest: 4, 8"),
        (["train.micro_batch=3"], "train.batch: 4 windows do not split into micro-batches of 3; nearest: 3, 6"),
        (["optim.warmup=40"], "optim.warmup: 40 of train.steps = 40 steps; expected at most 39"),
        (["optim.decay=3"], "optim.decay: found 3; only schedule: wsd has a final decay"),
        (["optim.schedule=wsd", "optim.warmup=10", "optim.decay=31"], "optim.decay: 31 steps after optim.warmup = 10 "
         "exceed train.steps = 40; expected at most 30"),
        (["train.kernel=triton", "train.precision=fp64"], "train.kernel: found 'triton' with train.precision = fp64"),
        (["data.window=1"], "data.window: 1 token has no next one to learn"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_each_other(refused: Refused, overrides: list[str], message: str) -> None:
    lines = refused(GOOD, *overrides)
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hidden_size=256", "model.hidden_size: no such key; did you mean dim?"),
        ("model.num-hidden-layers=4", "model.num-hidden-layers: no such key; did you mean layers?"),
        ("data.seq_len=4096", "data.seq_len: no such key; did you mean window?"),
        ("train.seq_len=4096", "train.seq_len: no such key; did you mean data.window?"),
        ("optim.learning_rate=1", "optim.learning_rate: no such key; did you mean lr?"),
        ("train.learning_rate=1", "train.learning_rate: no such key; did you mean optim.lr?"),
        ("train.lr=1", "train.lr: no such key; did you mean optim.lr?"),
        ("train.global_batch_size=4", "train.global_batch_size: no such key; did you mean batch?"),
        ("model.window_size=4", "model.window_size: no such key; did you mean sliding_window?"),
        ("mesh.context_parallel_size=4", "mesh.context_parallel_size: no such key; did you mean sp?"),
        ("hidden_size=256", "hidden_size: no such section; did you mean model.dim?"),
        ("lr=1", "lr: no such section; did you mean optim.lr?"),
        ("training.steps=1", "training: no such section; did you mean train?"),
        ("optimizer.lr=1", "optimizer: no such section; did you mean optim?"),
        ("max_steps=1", "max_steps: no such section; did you mean train.steps?"),
        ("train.stps=1", "train.stps: no such key; did you mean steps?"),
    ],
)
def test_names_that_others_have_are_known(refused: Refused, override: str, message: str) -> None:
    assert refused(GOOD, override) == [f"--set {override}: {message}"]


def test_synonyms_lead_to_keys_and_are_none() -> None:
    """Of ours, whose own meaning would be lost; and none is there twice."""
    kinds: dict[str, type[Section]] = {**SECTIONS, "model": Architecture}
    keys = {f"{section}.{key}" for section, kind in kinds.items() for key in kind.model_fields}
    assert set(synonyms.OURS.values()) <= keys | {*SECTIONS, "name", "model.conv"}
    assert not set(synonyms.OURS) & ({key.partition(".")[2] for key in keys} | {*SECTIONS})
    assert len(synonyms.OURS) == sum(len(names.split()) for names in synonyms._NAMES.values())


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(refused: Refused) -> None:
    text = edit("  dim: 256", "  dim: x").replace("  lr: 1e-4", "  lr: y").replace("  steps: 40", "  stps: 40")
    assert refused(text, "model.heads=z") == [
        "r.yaml:3: model.dim: found 'x'; expected an integer",
        "r.yaml:11: optim.lr: found 'y'; expected a number",
        "r.yaml:12: train.steps: missing; expected the number of optimizer steps, such as 1000",
        "r.yaml:13: train.stps: no such key; did you mean steps?",
        "--set model.heads=z: model.heads: found 'z'; expected an integer",
    ]


def test_sections_that_are_missing_say_what_belongs_there(refused: Refused) -> None:
    assert any("r.yaml:1: model.arch: missing; expected " in line for line in refused("model: {}\n"))
    lines = refused("model: {arch: tnl}\n")
    assert "r.yaml:1: model.dim: missing; expected the width of the model, such as 256" in lines
    assert "r.yaml: data.window: missing; expected tokens of a training sequence, such as 8192" in [
        line.replace("r.yaml:1:", "r.yaml:") for line in lines
    ]


def test_duplicate_keys_name_both_lines(refused: Refused) -> None:
    assert refused(edit("  layers: 4", "  layers: 4\n  dim: 128")) == [
        "r.yaml:5: model.dim: given twice, on line 3 and on line 5; keep one"
    ]
    assert "given twice, on line 1 and on line 15" in refused(GOOD + "model: {}\n")[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (edit("  dim: 256", "  dim: !!python/object/apply:os.system [echo]"), "r.yaml:3: model.dim: found the tag"),
        (edit("  dim: 256", "  dim: !env WIDTH"), "r.yaml:3: model.dim: found the tag !env"),
        (edit("  dim: 256", "  dim: !!int 256"), "r.yaml:3: model.dim: found the tag"),
        (edit("  dim: 256", "  dim: &d 256"), "r.yaml:3: model.dim: found the anchor &d"),
        (edit("  mlp: 704", "  mlp: *d"), "r.yaml:6: model.mlp: found the alias *d; write the value out"),
        (edit("  mlp: 704", "  mlp: 704\n  <<: {dim: 3}"), "r.yaml:7: model: found the merge key <<"),
        (edit("  mlp: 704", "  mlp: 704\n  3: 4"), "r.yaml:7: model: found 3 as a key; expected a word"),
        (edit("  mlp: 704", "  mlp: 704\n  ? [1]\n  : 4"), "r.yaml:7: model: found [1] as a key; expected a word"),
        (GOOD + "---\na: 1\n", "found a second document; expected one"),
        ("", "r.yaml:1: found nothing; expected sections such as model:"),
        ("# only this\n", "r.yaml:1: found nothing"),
        ("- a\n- b\n", "r.yaml:1: found a list; expected sections"),
        ("model\n", "r.yaml:1: found a single value; expected sections"),
        ("model: [\n", "r.yaml:2: not YAML: "),
        ("model:\n\tdim: 1\n", "that cannot start any token; indent with spaces, not tabs"),
        ("model: 3\n", "r.yaml:1: model: found 3; expected keys and values"),
        (GOOD.encode("utf-16"), "r.yaml: byte 0 is not UTF-8"),
        (GOOD.encode() + b"# \xff", f"r.yaml: byte {len(GOOD) + 2} is not UTF-8"),
        ("# é\nmodel: \0\n", "r.yaml:2: byte 12: found the character U+0000"),
        ("a: " + "[" * 500 + "]" * 500, "r.yaml:1: found more than 32 levels"),
        ("a: [" + "1, " * 400_000 + "]", "larger than 1 MiB"),
        ("a: [" + "1, " * 300_000 + "]", "found more than 10000 values"),
        (edit("  dim: 256", "  dim: " + "9" * 5000), "found a number of 5000 characters"),
        ("a: &a [x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n", "found the alias *b"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "bytes",
)  # fmt: skip
@pytest.mark.fault("a hostile or broken recipe")
def test_hostile_files(refused: Refused, text: str | bytes, message: str) -> None:
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        lines = refused(text)
    finally:
        sys.setprofile(None)
    assert calls < 10_000_000  # three for ten thousand values; a megabyte holds thirty times as many
    assert any(message in line for line in lines), lines


def test_a_byte_order_mark_is_no_mistake(write: Write) -> None:
    assert load(write(GOOD.encode("utf-8-sig"))) == load(write(GOOD))


@pytest.mark.fault("a hostile or broken recipe")
def test_files_that_are_no_recipes(tmp_path: Path, write: Write) -> None:
    write(GOOD, "quickstart.yaml")
    with pytest.raises(RecipeError, match=r"quikstart.yaml: no such file; did you mean .*/quickstart.yaml\?"):
        load(tmp_path / "quikstart.yaml")
    with pytest.raises(RecipeError, match="Is a directory; expected a recipe"):
        load(tmp_path)
    with pytest.raises(RecipeError):
        load(tmp_path / ("x" * 300))
    with pytest.raises(RecipeError):
        load("a\0b")


def test_overrides_follow_the_same_rules(write: Write, refused: Refused) -> None:
    recipe = load(write(GOOD), ["optim.lr=3E-4", "model.lrpe=[0, 1]", "eval.every=0", "data.cache=", "mesh.scan=ring"])
    assert recipe.optim.lr == 3e-4
    assert isinstance(recipe.model, Tnl) and recipe.model.lrpe == (0, 1)
    assert recipe.eval.every == 0
    assert recipe.data.cache is None
    assert recipe.mesh.scan == "ring"
    assert refused(GOOD, "lr") == ["--set lr: expected section.key=value"]
    assert refused(GOOD, "a.b.c=1") == ["--set a.b.c=1: expected section.key=value"]
    assert refused(GOOD, "model.dmi=1") == ["--set model.dmi=1: model.dmi: no such key; did you mean dim?"]
    assert "not YAML" in refused(GOOD, "model.dim=[")[0]
    assert "found the tag" in refused(GOOD, "model.dim=!x 32")[0]
    assert refused(GOOD, "modle.dim=3") == ["--set modle.dim=3: modle: no such section; did you mean model?"]


def test_an_override_mends_what_the_file_has_wrong(write: Write) -> None:
    assert load(write(edit("  dim: 256", "  dim: x")), ["model.dim=128"]).model.dim == 128


def test_mesh_auto_is_both_axes(write: Write) -> None:
    assert load(write(GOOD + "mesh: auto\n")) == load(write(GOOD))
    assert load(write(GOOD + "mesh: auto\n"), ["mesh.sp=2"]).mesh.sp == 2
    assert load(write(GOOD), ["mesh=auto"]) == load(write(GOOD))


@pytest.mark.fault("a hostile or broken recipe")
@pytest.mark.parametrize("name", ["../../x", "a/b", ".hidden", "a\x00b", "x" * 300, "", "-x", "a b", "é"])
def test_names_that_cannot_name_a_run(refused: Refused, name: str) -> None:
    assert any(": name: found" in line for line in refused(f"name: {json.dumps(name)}\n" + GOOD))


@cache
def quickstart() -> dict[str, Any]:
    return load(RECIPES / "quickstart.yaml").model_dump()


@given(st.text(max_size=120))
def test_a_name_stays_inside_its_folder(name: str) -> None:
    fields = quickstart() | {"name": name}
    try:
        assert Recipe.model_validate(fields).name == name
    except ValidationError:
        return
    assert (Path("runs") / name).parent == Path("runs")
    assert Path(name).name == name


@given(
    st.floats(min_value=1e-300, max_value=10),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=40).map(at_home),
    st.lists(st.integers(0, 23), unique=True).map(sorted),
)
def test_dump_is_read_back_as_the_same_recipe(
    tmp_path_factory: pytest.TempPathFactory, lr: float, source: str, lrpe: list[int]
) -> None:
    recipe = load(RECIPES / "tnl_0.4b_16k.yaml")
    recipe = recipe.model_copy(
        update={
            "optim": recipe.optim.model_copy(update={"lr": lr}),
            "data": recipe.data.model_copy(update={"source": source}),
            "model": recipe.model.model_copy(update={"lrpe": tuple(lrpe)}),
        }
    )
    file = tmp_path_factory.mktemp("dump") / "recipe.yaml"
    file.write_text(dump(recipe), encoding="utf-8")
    assert load(file) == recipe


@pytest.mark.parametrize("source", ["1e5", "0x1F", "yes", "null", "~", "1:30", ".nan", "012", "true", " a", "- x", "#"])
def test_dump_quotes_text_that_looks_like_something_else(tmp_path: Path, source: str) -> None:
    recipe = load(RECIPES / "quickstart.yaml", [f"data.source={source!r}"])
    (tmp_path / "r.yaml").write_text(dump(recipe), encoding="utf-8")
    assert load(tmp_path / "r.yaml").data.source == at_home(source)


def test_recipes_are_frozen_and_strict() -> None:
    recipe = load(RECIPES / "quickstart.yaml")
    with pytest.raises(ValidationError):
        recipe.train.steps = 3
    with pytest.raises(ValidationError):
        Recipe.model_validate(recipe.model_dump() | {"extra": 1})
    with pytest.raises(ValidationError, match=r"mesh\.sp = 3"):
        Recipe.model_validate(recipe.model_dump() | {"mesh": {"sp": 3}})
    assert Recipe.model_validate(recipe.model_dump()) == recipe
    assert set(SECTIONS) == {
        "model",
        "data",
        "mesh",
        "parallel",
        "optim",
        "train",
        "checkpoint",
        "guard",
        "eval",
        "track",
        "launch",
    }


@pytest.mark.parametrize(
    ("dp", "sp", "batch", "world", "mesh"),
    [
        ("auto", "auto", 4, 1, (1, 1)),
        ("auto", "auto", 4, 4, (4, 1)),
        ("auto", "auto", 4, 8, (4, 2)),
        ("auto", "auto", 2, 8, (2, 4)),
        ("auto", "auto", 1, 8, (1, 8)),
        ("auto", "auto", 6, 8, (2, 4)),
        ("auto", 2, 4, 8, (4, 2)),
        (2, "auto", 4, 8, (2, 4)),
        (2, 2, 4, 4, (2, 2)),
    ],
)
def test_resolve_mesh(
    write: Write, dp: int | str, sp: int | str, batch: int, world: int, mesh: tuple[int, int]
) -> None:
    recipe = load(write(GOOD), [f"mesh.dp={dp}", f"mesh.sp={sp}", f"train.batch={batch}"])
    assert resolve_mesh(recipe, world) == mesh


@pytest.mark.parametrize(
    ("dp", "sp", "world", "nearest"),
    [(2, 2, 3, "--nproc 4"), (2, 2, 1, "--nproc 4"), ("auto", 2, 5, "--nproc 4 or 8"), (4, "auto", 6, "4 or 8")],
)
def test_a_mesh_for_another_number_of_processes_names_the_nearest(
    write: Write, dp: int | str, sp: int | str, world: int, nearest: str
) -> None:
    recipe = load(write(GOOD), [f"mesh.dp={dp}", f"mesh.sp={sp}"])
    with pytest.raises(SetupError, match=f"mesh: {world} process.*nearest: .*{nearest}"):
        resolve_mesh(recipe, world)


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        ([], 3, "data.window: 4096 tokens do not split into mesh.sp = 3 equal slices; nearest: 4095, 4098; "
         "or --nproc 2 or 4"),
        (["mesh.dp=2"], 6, "data.window: 4096 tokens do not split into mesh.sp = 3 equal slices; nearest: 4095, 4098; "
         "or --nproc 4 or 8"),
        (["mesh.dp=1", "data.window=96", "train.segment=32"], 3, "train.segment: 32 tokens do not split into "
         "mesh.sp = 3 equal slices; nearest that divide data.window: 24, 48; or --nproc 2 or 4"),
        (["mesh.dp=1", "train.segment=32"], 3, "train.segment: 32 tokens do not split into mesh.sp = 3 equal slices, "
         "nor does data.window = 4096; nearest windows: 4095, 4098; or --nproc 2 or 4"),
        (["mesh.dp=1", "eval.window=100"], 8, "eval.window: 100 tokens do not split into mesh.sp = 8 equal slices; "
         "nearest: 96, 104; or --nproc 4"),
        (["mesh.dp=1", "data.window=2"], 3, "data.window: 2 tokens do not split into mesh.sp = 3 equal slices; "
         "nearest: 3; or --nproc 2"),
    ],
)  # fmt: skip
def test_a_window_that_is_ragged_on_the_ranks_found_at_launch(
    write: Write, overrides: list[str], world: int, message: str
) -> None:
    with pytest.raises(RecipeError, match=f"^{re.escape(message)}$"):
        resolve_mesh(load(write(GOOD), overrides), world)


def test_resolve_vocabulary() -> None:
    model = Tnl(dim=8, layers=1, heads=1, mlp=8)
    assert resolve_vocabulary(model, 4096) == 4096
    assert resolve_vocabulary(model, 257) == 320
    assert resolve_vocabulary(model.model_copy(update={"vocab": 300}), 257) == 300
    with pytest.raises(RecipeError, match=r"model.vocab: 256 rows for a tokenizer of 257 pieces"):
        resolve_vocabulary(model.model_copy(update={"vocab": 256}), 257)


@pytest.mark.parametrize(
    ("name", "millions"), [("tnl_0.4b_16k", 398.984), ("1b_4096k", 1020.266), ("lintrans_0.4b_16k", 373.871)]
)
def test_parameters_of_the_published_sizes(name: str, millions: float) -> None:
    # The tables of TransNormerLLM's released sizes with a vocabulary of 64,000 and a tied head.
    model = load(RECIPES / f"{name}.yaml").model
    assert sum(plan.parameters(model, 64_000).values()) / 1e6 == pytest.approx(millions, abs=1e-3)


def test_flops_count_the_head_and_not_the_embedding() -> None:
    model = Tnl(dim=8, layers=2, heads=2, key_dim=3, value_dim=5, mlp=16, lrpe=(), tie=False)
    matrices = 2 * (2 * 6 * 8 + 3 * 10 * 8 + 3 * 8 * 16) + 100 * 8
    assert plan.flops_per_token(model, 100, 64) == 6 * matrices + 3 * 2 * 4 * 3 * 5 * 2
    tied = model.model_copy(update={"tie": True})
    assert plan.flops_per_token(tied, 100, 64) == plan.flops_per_token(model, 100, 64)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"softmax": [4]}, "model.softmax: there is no layer 4; the 4 layers are 0 to 3"),
        ({"softmax": [2, 1]}, "model.softmax: found [2, 1]; write [1, 2]"),
        ({"sliding_window": 8},
         "model.sliding_window: found 8 without model.softmax; name its layers, or leave it out"),
        ({"qk_norm": "head"}, "model.qk_norm: found head without model.softmax; name its layers, or leave it out"),
        ({"softmax_gate": "true"},
         "model.softmax_gate: found true without model.softmax; name its layers, or leave it out"),
        ({"rotary_fraction": 0.5},
         "model.rotary_fraction: found 0.5 without model.softmax; name its layers, or leave it out"),
        ({"softmax": "every third"}, "model.softmax: found 'every third'; expected a list such as [0], or every 4th"),
        ({"softmax": [1], "rotary_fraction": 0.001},
         "model.rotary_fraction: found 0.001 of 64 channels, which are none; expected at least 0.03125"),
        ({"heads": 4000}, "model.heads: 4000 heads do not divide model.dim = 256; nearest: 256 (or give "
         "model.key_dim and model.value_dim)"),
        ({"layers": 10**9}, "model.layers: found 1000000000; expected at most 4096"),
        ({"arch": "retnet", "key_dim": 1}, "model.key_dim: 1 channels do not make pairs to rotate; nearest: 2"),
        ({"softmax": [1], "kv_heads": 3}, "model.kv_heads: 3 do not divide model.heads = 4; nearest: 2, 4"),
        ({"softmax": [1], "heads": 3, "key_dim": 8, "value_dim": 8},
         "model.heads: 3 softmax heads do not divide model.dim = 256; nearest: 2, 4"),
        ({"softmax": [1], "heads": 256},
         "model.rotary: 1 channels of a head do not make pairs to rotate; expected null, or another model.heads"),
        ({"alpha": 2.0}, "model.alpha: no such key of this arch, only of minimax; leave it out"),
    ],
)  # fmt: skip
def test_softmax_layers_that_do_not_fit(refused: Refused, keys: dict[str, object], message: str) -> None:
    written = [f"{key if '.' in key else f'model.{key}'}={value}" for key, value in keys.items()]
    (found,) = refused(edit("  arch: tnl", "  arch: ssd"), *written)
    assert found.partition(": ")[2].endswith(message) or found.endswith(message)


def test_layout(write: Write) -> None:
    recipe = load(write(GOOD), ["data.window=4194304", "train.batch=8", "train.micro_batch=2"])
    layout = plan.layout(recipe, dp=2, sp=2)
    assert (layout.segments, layout.segment, layout.slice) == (64, 65536, 32768)
    assert (layout.micro_batches, layout.tokens_per_step) == (2, 8 * 4194304)
    assert plan.layout(load(write(GOOD), ["data.window=40009"]), 1, 1).segments == 1


def test_a_recipe_is_read_without_torch() -> None:
    program = (
        "import sys; from lasptrain.recipe.loading import load; import lasptrain.cost.plan, lasptrain.cli.main; "
        + ("load(sys.argv[1]); sys.exit('torch' in sys.modules)")
    )
    subprocess.run([sys.executable, "-c", program, str(RECIPES / "quickstart.yaml")], check=True)
