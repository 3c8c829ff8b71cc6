"""What `bench kernels` makes of its measurements."""

from __future__ import annotations

import pytest
from rich.console import Console

from lasptrain.bench.kernels import Row, floors, report
from lasptrain.plan import Rates

RATES = Rates(products=792e12, copies=4.305e12, memory=0)


def test_the_floors_are_those_of_the_counted_bytes_and_products() -> None:
    memory, product = floors(131_072, 16, 128, "bf16", RATES)
    found = [memory.forward, memory.both, product.forward, product.both]
    assert found == pytest.approx([0.499, 1.372, 0.260, 0.911], abs=1e-3)


def test_the_report_compares_with_the_fastest_and_says_what_failed() -> None:
    rows = [
        Row("lasptrain", 4096, 1.0, 2.0, 0.5, 1.0),
        Row("other", 4096, 3.0, 9.0, 1.5, 3.5),
        Row("another", 4096, 3.0, 5.0, 1.5, 4.0),
        Row("broken", 4096, 4.0, None, None, failure="will not run"),
    ]
    console = Console(width=150, record=True)
    console.print(report(rows, RATES, 16, 128, "bf16", "head"))
    text = console.export_text()
    ours, *_, broken = (line for line in text.splitlines() if "lasptrain" in line or "broken" in line)
    assert "2.50" in ours and "3.50" in ours and "4.000" in broken and "will not run" in text
