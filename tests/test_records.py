"""Names and places in the source may change; what the program computes and writes does not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.support.records import LAYOUTS, MODELS, RECORD, Program

RECORDS = json.loads((Path(__file__).parent / "records.json").read_text())
EXACT = 1e-9  # relative, of fp64 on another processor
# Since then exports of minimax hold the decays that its class keeps beside its weights, and their index names them.
ADDED = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
INDEX = "model.safetensors.index.json"


@pytest.fixture
def program(tmp_path: Path) -> Program:
    made = Program(tmp_path)
    assert made.prepare() == RECORDS["shards"]
    return made


@pytest.mark.parametrize("number", range(len(MODELS)))
def test_runs_are_those_on_record(program: Program, number: int) -> None:
    """Every architecture on one of the layouts, so that each layout is drawn."""
    arch = list(MODELS)[number]
    ranks, segments = LAYOUTS[number % len(LAYOUTS)]
    near(program.train(arch, ranks, segments), RECORDS["runs"][f"{arch}, {ranks} ranks, {segments} segments"])


@pytest.mark.parametrize("arch", ["tnl", "minimax"])
def test_exports_and_codes_are_those_on_record(program: Program, arch: str) -> None:
    near(program.train(arch, 1, 1), RECORDS["runs"][f"{arch}, 1 ranks, 1 segments"])
    found, want = program.export(arch), RECORDS["exports"][arch]
    if arch == "minimax":
        assert len(found["weights"]) == len(want["weights"]) + 2 * len(ADDED) and INDEX in found["files"]
        found["weights"] = {name: w for name, w in found["weights"].items() if not name.endswith(ADDED)}
    unknown = (RECORD, INDEX) if arch == "minimax" else (RECORD,)
    files, recorded = ({n: d for n, d in made["files"].items() if n not in unknown} for made in (found, want))
    near(found | {"files": files}, want | {"files": recorded})
    if arch == "tnl":
        assert program.codes() == RECORDS["codes"]


def near(found: Any, want: Any) -> None:
    """Equal, but for the last digits of numbers and for digests of the bits behind them."""
    match want:
        case dict():
            assert list(found) == list(want)
            for key in want:
                near(found[key], want[key])
        case [list() as shape, str() as dtype, float() as total, float() as norm, str()]:
            assert found[:2] == [shape, dtype]
            assert math.isclose(found[3], norm, rel_tol=EXACT), (found, want)
            assert math.isclose(found[2], total, rel_tol=EXACT, abs_tol=EXACT * norm), (found, want)
        case list():
            assert len(found) == len(want)
            for one, other in zip(found, want, strict=True):
                near(one, other)
        case float():
            assert math.isclose(found, want, rel_tol=EXACT), (found, want)
        case _:
            assert found == want
