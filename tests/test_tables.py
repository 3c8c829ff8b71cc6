"""What is printed is what was said, whatever it looks like."""

from __future__ import annotations

import pytest
from rich.table import Table

from lasptrain.tables import show


def test_brackets_and_colons_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(title="losses in [/tmp/x] and a title that is wider than its table", caption="[rank0]: out of memory")
    table.add_column("a")
    table.add_row("[b]")
    show(table, "/tmp/[x]/report.html :warning:")
    first, *middle, last = capsys.readouterr().out.splitlines()
    assert first == "losses in [/tmp/x] and a title that is wider than its table"
    assert "[b]" in middle[3] and middle[-1] == "[rank0]: out of memory"
    assert last == "/tmp/[x]/report.html :warning:"
