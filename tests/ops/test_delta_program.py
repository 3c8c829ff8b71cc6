"""Models with gates of the data through the command line: trained, stopped, continued, read and exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from lasptrain.convert.restore import open_weights
from tests.support.records import Program, text

MODELS = {
    "gdn": "{arch: gdn, dim: 16, layers: 4, heads: 2, mlp: 16, softmax: every 2nd, sliding_window: 20, qk_norm: head}",
    "kda": "{arch: kda, dim: 16, layers: 2, heads: 2, mlp: 16, conv: 3}",
    "gla": "{arch: gla, dim: 16, layers: 2, heads: 2, mlp: 16}",
}
RECIPE = """\
model: MODEL
data: {source: text, tokenizer: bytes, window: 96, validation: 150000, cache: cache}
optim: {lr: 1e-2, schedule: constant}
train: {steps: 4, batch: 2, precision: fp32, segment: 48}
checkpoint: {every: 1, keep: 4}
eval: {windows: 2, every: 2, tasks: [pairs], lengths: [400], samples: 1}
"""


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "event" not in row]


@pytest.mark.parametrize("arch", MODELS)
def test_a_run_stops_goes_on_anywhere_is_read_and_leaves(arch: str, tmp_path: Path) -> None:
    program = Program(tmp_path)
    text(tmp_path / "text")
    (tmp_path / "r.yaml").write_text(RECIPE.replace("MODEL", MODELS[arch]))
    program("pretrain", "r.yaml", "--run", "whole", "--nproc", "1")
    whole = losses(tmp_path / "whole")
    assert len(whole) == 4 and whole[3] < whole[0]
    for nproc, tolerance in [("1", 0.0), ("2", 1e-5)] if arch == "gdn" else [("2", 1e-5)]:
        run = tmp_path / f"again-{nproc}"
        shutil.copytree(tmp_path / "whole", run)
        for step in (3, 4):
            shutil.rmtree(run / f"checkpoints/step-{step}")
        (run / "metrics.jsonl").unlink()
        keys = ("--set", f"mesh.sp={nproc}", "--set", "mesh.dp=1")
        program("pretrain", "r.yaml", "--run", run.name, "--nproc", nproc, *keys)
        assert losses(run) == pytest.approx(whole[2:], rel=tolerance, abs=0.0)
    program("generate", "whole", "--prompt", "the of", "--tokens", "4")
    if arch == "gdn":
        program("eval", "whole", "--tasks", "pairs", "--lengths", "400", "--n", "1")
    program("convert", "whole", "--to", "safetensors", "--out", "export")
    weights = open_weights(tmp_path / "export")
    assert weights.origin.model.arch == arch and weights.origin.model.softmax == ((1, 3) if arch == "gdn" else ())
    assert all(torch.isfinite(weights.read(name)).all() for name in weights.empty.state_dict())


def test_a_kernel_that_an_architecture_does_not_have_is_refused(tmp_path: Path) -> None:
    program = Program(tmp_path)
    text(tmp_path / "text")
    (tmp_path / "r.yaml").write_text(RECIPE.replace("MODEL", MODELS["kda"]))
    code, _, said = program.end("check", "r.yaml", "--set", "train.kernel=triton")
    assert code == 2
    assert "train.kernel: found 'triton', which arch kda does not have; expected auto, chunked or reference" in said
    code, shown, _ = program.end("plan", "r.yaml", "--gpu", "h200")
    assert code == 0 and "with a Triton kernel, which kda does not have yet: slower without, in more memory" in shown
    assert "at the start of training: data decide later" in shown
    (tmp_path / "r.yaml").write_text(RECIPE.replace("MODEL", MODELS["gdn"]))
    for command in (("check", "r.yaml"), ("plan", "r.yaml", "--gpu", "h200")):
        code, shown, _ = program.end(*command)
        assert code == 0 and "Triton" not in shown
