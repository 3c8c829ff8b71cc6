"""Imports only go down, never in a circle, and outside packages are imported where they belong."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(file for top in ("lasptrain", "data_tools") for file in (ROOT / top).rglob("*.py"))

# Lowest first: a module imports its own folder and earlier ones.
ORDER = [
    "__init__", "errors", "files", "console", "architectures", "recipe", "run", "cost", "ops", "parallel", "models",
    "data", "data_tools", "training", "checkpoint", "process", "convert", "eval", "train", "certify", "bench", "cli",
    "__main__",
]  # fmt: skip

# Outside packages that only these may import.
HOMES = {
    "torch.distributed": {"parallel", "checkpoint", "process", "bench"},
    "triton": {"ops", "bench"},
    "yaml": {"recipe"},
    "typer": {"cli"},
    "sentencepiece": {"data_tools"},
    "lm_eval": {"eval"},
    "tensorboard": {"run"},
    "wandb": {"run"},
    "torch.utils.tensorboard": {"run"},
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
    for imported in imports(MODULES[module]):
        if imported.split(".")[0] in ("lasptrain", "data_tools"):
            assert ORDER.index(part(imported)) <= ORDER.index(part(module)), f"{module} imports {imported}"


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
    for file in (*FILES, *ROOT.glob("*.md"), *ROOT.glob("[a-z]*/**/*.md")):
        assert not re.search(r"bind_all|--host|0\.0\.0\.0", file.read_text(encoding="utf-8")), file
