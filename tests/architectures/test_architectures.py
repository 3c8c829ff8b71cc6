"""Architectures are found by name, ours and those of installed packages, and own what is said of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

from lasptrain import architectures
from lasptrain.architectures import GROUP, OURS
from lasptrain.architectures.base import Architecture
from lasptrain.cost import links, plan
from lasptrain.errors import RecipeError
from lasptrain.models.language_model import on_meta
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.recipe.loading import load
from tests.recipe.test_recipe import RECIPES

SOURCE = Path(architectures.__file__).parents[1]
KNOWN = f"{', '.join(sorted(OURS))} or one that an installed package offers"
SIZES: dict[str, Any] = {"dim": 32, "layers": 3, "heads": 4, "mlp": 48, "vocab": 64}


@pytest.mark.parametrize("softmax", [[], [1]], ids=["pure", "hybrid"])
@pytest.mark.parametrize("arch", OURS)
def test_numbers_are_those_of_the_layers(arch: str, softmax: list[int]) -> None:
    model = architectures.model({"arch": arch, **SIZES, "softmax": softmax})
    assert (model.arch, architectures.named(arch)) == (arch, type(model))
    made = on_meta(model, 128, ShardedRecurrence("chunked"))
    assert sum(plan.parameters(model, 64).values()) == sum(p.numel() for p in made.parameters())
    assert [len(slopes) for slopes in model.decays(128)] == [4] * 3
    assert {block.mixer_name for block in made.blocks} == {"mixer", *(["attn"] if softmax else [])}


@pytest.mark.parametrize("arch", OURS)
def test_every_architecture_has_a_plan(arch: str) -> None:
    recipe = load(RECIPES / "quickstart.yaml")
    recipe = recipe.model_copy(update={"model": architectures.model({"arch": arch, **SIZES, "softmax": [1]})})
    layout = plan.layout(recipe, 1, 2, 4096, 1 << 34)
    assert links.with_scan(recipe, 2, layout.segment).mesh.scan in ("ring", "all_gather", "all_scan")
    assert sum(plan.memory(recipe, 4096, 1, 2, layout.segment).values()) > 0
    assert len(plan.memory_horizon(recipe.model, recipe.data.window)) == recipe.model.layers


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("sdd", "model.arch: found 'sdd'; did you mean ssd?"),
        ("transformer", "model.arch: found 'transformer'; did you mean linear_transformer?"),
        (None, f"model.arch: missing; expected {KNOWN}"),
        (7, f"model.arch: found 7; expected {KNOWN}"),
    ],
)
def test_an_unknown_architecture_is_one_line(arch: object, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        architectures.model({"arch": arch, **SIZES})
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_keys_that_came_later_have_their_defaults_in_what_was_written_before() -> None:
    model = architectures.model({"arch": "tnl", **SIZES})
    written = model.model_dump(mode="json")
    assert architectures.completed({k: v for k, v in written.items() if k not in ("softmax", "rotary")}) == written
    assert architectures.completed({"arch": "of another package", "dim": 3}) == {"arch": "of another package", "dim": 3}


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere.at_all:Model", "which does not load: ModuleNotFoundError: No module named 'nowhere'"),
        ("json:Model", "which does not load: AttributeError: module 'json' has no attribute 'Model'"),
        ("unparsable:Model", r"which does not load: SyntaxError: .*\(unparsable.py, line 1\)$"),
        ("failing:Model", "which does not load: KeyError: 'SETTING'$"),
        ("lasptrain.architectures.decay:Decaying", "expected its implementation, the module of its layers$"),
        ("json:JSONDecoder", r"expected a subclass of lasptrain\.architectures\.base\.Architecture"),
    ],
)
def test_a_package_that_offers_something_else_is_refused(
    place: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(tmp_path, {"broken": place})
    (tmp_path / "unparsable.py").write_text("def (")
    (tmp_path / "failing.py").write_text("{}['SETTING']")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RecipeError, match=f"model.arch: broken is {place}.*{message}"):
        architectures.model({"arch": "broken", **SIZES})


@pytest.mark.parametrize("arch", ["tnl", "twofold"])
def test_a_name_that_several_packages_offer_is_refused(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(tmp_path, {arch: "one:Model"})
    monkeypatch.syspath_prepend(tmp_path)
    first = "lasptrain.architectures.tnl:Tnl of lasptrain and one:Model of offers"
    if arch not in OURS:
        installed(tmp_path, {arch: "two:Model"}, "another")
        first = "one:Model of offers|two:Model of another"
    with pytest.raises(RecipeError, match=f"^model.arch: {arch} is ({first}).*; expected a name of its own for each$"):
        architectures.model({"arch": arch, **SIZES})


@pytest.mark.parametrize("place", ["nowhere.at_all", "json"])
def test_layers_that_are_not_where_a_package_says_are_one_line(place: str) -> None:
    class Astray(Architecture):
        implementation: ClassVar[str] = place

    with pytest.raises(RecipeError, match=f"^model.arch: astray has its layers in {place}, which does not load: .*"):
        on_meta(Astray(arch="astray", **SIZES), 128, ShardedRecurrence("chunked"))


def installed(folder: Path, offered: dict[str, str], package: str = "offers") -> None:
    """Write what pip writes for a package that offers architectures."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {place}\n" for name, place in offered.items()]
    (info / "entry_points.txt").write_text("".join([f"[{GROUP}]\n", *lines]))


def test_only_the_named_architecture_is_imported_and_no_torch() -> None:
    code = (
        "import sys; from lasptrain.recipe.loading import load; from lasptrain.cost import plan;"
        "recipe = load('recipes/quickstart.yaml'); plan.memory(recipe, 4096, 1, 1, recipe.data.window);"
        "print(*sorted(m for m in sys.modules if m.startswith('lasptrain.architectures.') or m == 'torch'))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=RECIPES.parent)
    names = {name.rpartition(".")[2] for name in found.stdout.split()}
    assert names & {*OURS, "torch"} == {load(RECIPES / "quickstart.yaml").model.arch}


def test_an_architecture_is_named_in_its_two_files_and_hardly_anywhere_else() -> None:
    words = re.compile(rf"\b({'|'.join(OURS)})\b")
    own = {f"{folder}/{arch}.py" for arch in OURS for folder in ("architectures", "models")}
    naming = set()
    for file in SOURCE.rglob("*.py"):
        path = file.relative_to(SOURCE).as_posix()
        if path not in own and not path.startswith("convert/targets/") and words.search(file.read_text()):
            naming.add(path)
    operators = {"bench/kernels.py", "cli/bench.py"}  # of that name, which are timed without a model
    assert naming - operators <= {"architectures/__init__.py", "architectures/decay.py", "bench/rivals/megatron.py"}
