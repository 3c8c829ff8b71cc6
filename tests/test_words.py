"""Docstrings begin with a noun or a verb: they say, and do not ask."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHIPPED = "modeling_transnormer.py"  # a copy is in every export: its bytes stay
FILES = sorted(
    file for top in ("lasptrain", "data_tools") for file in (ROOT / top).rglob("*.py") if file.name != SHIPPED
)
QUESTIONS = {"What", "How", "Whether", "Where", "Who", "Which", "Those", "Why", "When"}
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_docstrings_begin_with_a_noun_or_a_verb(file: Path) -> None:
    nodes = (node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, DOCUMENTED))
    documented = [(getattr(node, "lineno", 1), text) for node in nodes if (text := ast.get_docstring(node))]
    assert not [(line, text) for line, text in documented if text.split()[0].strip(",.:;?") in QUESTIONS]
