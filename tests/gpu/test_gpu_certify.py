"""`lasptrain certify` on GPUs: recipes hold, by Triton and NCCL, in fp32 to 1e-4 and in their own precision."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lasptrain.certify.proof import NAMES
from tests.support import program

GPUS = torch.cuda.device_count()
LIMIT = 600.0  # seconds of any of these
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="needs a CUDA device")]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, in a folder of its own."""
    environment = os.environ | {"PYTHONPATH": str(program.ROOT), "TMPDIR": str(folder)}
    command = [sys.executable, "-m", "lasptrain", "certify", *arguments, "--json", str(folder / "certificate.json")]
    return subprocess.run(
        command, cwd=program.ROOT, env=environment, text=True, capture_output=True, timeout=LIMIT, check=False
    )


def certified(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """The checks of a recipe that holds."""
    done = run(folder, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((folder / "certificate.json").read_text())
    assert written["verdict"] == "holds" and written["memory"]["peak"] <= written["memory"]["planned"], done.stdout
    assert list(folder.glob("lasptrain-*")) == []
    checks: list[dict[str, Any]] = written["checks"]
    assert {one["check"] for one in checks if one["verdict"] == "holds"} == set(NAMES), done.stdout
    return checks


def compared(checks: list[dict[str, Any]], start: str) -> dict[str, Any]:
    """The comparison whose name begins so."""
    (found,) = (one for one in checks if one["compared"].startswith(start))
    return found


def test_the_quickstart_holds_on_one_gpu(tmp_path: Path) -> None:
    checks = certified(tmp_path, "recipes/quickstart_gdn.yaml", "--nproc", "1", "--set", "train.segment=2048")
    assert compared(checks, "gradient of every parameter, fp32")["tolerance"] == 1e-4
    assert compared(checks, "outputs and gradients of triton, fp32")["verdict"] == "holds"


def test_a_large_model_holds_on_one_gpu(tmp_path: Path) -> None:
    checks = certified(tmp_path, "recipes/gdn_1b_4096k.yaml", "--nproc", "1", "--layers", "2", "--tokens", "4096")
    for start in ("gradient of every parameter, fp32", "gradient of every parameter, bf16", "outputs and gradients of"):
        assert any(one["compared"].startswith(start) and one["verdict"] == "holds" for one in checks)


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_a_large_recipe_holds_on_two_gpus_within_three_minutes(tmp_path: Path) -> None:
    began = time.monotonic()
    certified(tmp_path, "recipes/gdn_1b_4096k.yaml", "--nproc", "2")
    assert time.monotonic() - began < 180


def test_more_processes_than_gpus_are_refused_in_one_line(tmp_path: Path) -> None:
    done = run(tmp_path, "recipes/quickstart_gdn.yaml", "--nproc", str(GPUS + 1))
    assert done.returncode == 5 and "Traceback" not in done.stderr
    assert done.stderr.strip() == (f"error: --nproc {GPUS + 1}: found {GPUS} GPUs; expected at most as many ranks")
