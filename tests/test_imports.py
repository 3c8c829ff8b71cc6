"""Imports only go down, never in a circle, and outside packages are imported where they belong."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(file for top in ("lasptrain", "data_tools") for file in (ROOT / top).rglob("*.py"))

# Lowest first. What stands in lasptrain/ may import its own layer and those below.
LAYERS = (
    {"__init__", "errors", "progress", "stop", "streams", "tables", "watch"},
    {"recipe"},
    {"ops", "run"},
    {"models", "data", "data_tools", "guard", "loss", "optim", "pace", "parallel"},
    {"checkpoint", "metrics", "profile", "settled"},
    {"stream", "train", "eval", "convert", "plan", "cards", "links", "rates", "bench", "summary"},
    {"launch", "rank", "cli", "cli_bench", "cli_checkpoint", "cli_data", "cli_options"},
    {"__main__"},
)

# Outside packages that only these may import.
HOMES = {
    "torch.distributed": {"parallel", "checkpoint", "launch", "bench"},
    "triton": {"ops", "bench"},
    "yaml": {"recipe"},
    "typer": {"cli", "cli_bench", "cli_checkpoint", "cli_data", "cli_options", "convert", "eval"},
    "sentencepiece": {"data_tools"},
    "lm_eval": {"eval"},
    "tensorboard": {"metrics"},
    "torch.utils.tensorboard": {"metrics"},
}


def part(module: str) -> str:
    """The file or folder of lasptrain/ that a module is or is in; data_tools as a whole."""
    names = module.split(".")
    if names[0] == "data_tools":
        return "data_tools"
    return names[1] if len(names) > 1 else "__init__"


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(file): ast.parse(file.read_text(encoding="utf-8")) for file in FILES}


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported, the lazy ones included; `from a import b` is a.b where that is a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                outside = node.module.split(".")[0] not in ("lasptrain", "data_tools")
                yield inner if outside or inner in MODULES else node.module


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    own = layer(part(module))
    for imported in imports(MODULES[module]):
        if imported.split(".")[0] in ("lasptrain", "data_tools"):
            assert layer(part(imported)) <= own, f"{module} imports {imported}"


def layer(name: str) -> int:
    found = [number for number, names in enumerate(LAYERS) if name in names]
    assert found, f"lasptrain/{name} has no layer: give it one here"
    return found[0]


@pytest.mark.parametrize("module", MODULES)
def test_outside_packages_stay_at_home(module: str) -> None:
    for imported in imports(MODULES[module]):
        for package, homes in HOMES.items():
            if f"{imported}.".startswith(f"{package}."):
                assert part(module) in homes, f"{module} imports {imported}"


def test_no_module_imports_itself_through_others() -> None:
    graph = {
        module: [name for name in imports(tree) if name in MODULES and name != module]
        for module, tree in MODULES.items()
    }
    list(TopologicalSorter(graph).static_order())


def test_nothing_serves_the_network() -> None:
    """TensorBoard has no password: it is never told to listen on more than this machine."""
    for file in (*ROOT.glob("lasptrain/**/*.py"), *ROOT.glob("data_tools/**/*.py"), ROOT / "README.md"):
        assert not re.search(r"bind_all|--host|0\.0\.0\.0", file.read_text(encoding="utf-8")), file
