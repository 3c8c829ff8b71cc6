"""What is printed is what was said, whatever it looks like."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.table import Table

from data_tools import commands
from data_tools.prepare import Preparation, prepare
from lasptrain.console.tables import figures, show


def test_brackets_and_colons_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(title="losses in [/tmp/x] and a title that is wider than its table", caption="[rank0]: out of memory")
    table.add_column("a")
    table.add_row("[b]")
    show(table, "/tmp/[x]/report.html :warning:")
    first, *middle, last = capsys.readouterr().out.splitlines()
    assert first == "losses in [/tmp/x] and a title that is wider than its table"
    assert "[b]" in middle[3] and middle[-1] == "[rank0]: out of memory"
    assert last == "/tmp/[x]/report.html :warning:"


@pytest.mark.parametrize(
    ("value", "count", "text"),
    [(100, 2, "100"), (99.6, 2, "100"), (0.034567, 2, "0.035"), (2250, 3, "2,250"), (1e-5, 3, "0.00001"), (0, 3, "0")],
)
def test_figures_are_written_out(value: float, count: int, text: str) -> None:
    assert figures(value, count) == text


def test_documents_that_all_are_cut_are_100_percent(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("word " * 20_000)
    found = prepare(Preparation([str(tmp_path / "long.txt")], "bytes", validation_ppm=0, workers=1), tmp_path / "set")
    assert "documents cut: 100 % at 2K, " in str(commands.inspect(found))


def test_cells_without_a_frame_have_no_blanks_behind_them_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_row("key", "a value")
    table.add_row("another", "b")
    show(table)
    assert capsys.readouterr().out == "key      a value\nanother  b\n"
