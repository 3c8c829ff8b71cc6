"""On a GPU: exports compute the same in flash-linear-attention, and weights as released train on long windows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lasptrain.convert import verify
from lasptrain.convert.export import export
from tests.convert.test_convert import MODELS, loaded, make_run
from tests.convert.test_convert_delta import CLASSES, written
from tests.support import program

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # of another library
]


@pytest.mark.skipif(not verify.installed("fla"), reason="needs flash-linear-attention")
@pytest.mark.parametrize("name", ["linear_transformer", "linear_transformer-sum", "retnet"])
def test_flash_linear_attention_computes_the_same(tmp_path: Path, name: str) -> None:
    target, model = MODELS[name]
    run = make_run(tmp_path, model)
    exported = export(run, tmp_path / "out", target)
    print(exported.parity)
    assert isinstance(exported.parity, verify.Parity) and exported.parity.scale > 1
    import fla.models  # noqa: F401  makes its classes known to transformers

    theirs, ours = loaded(tmp_path / "out").cuda(), verify.reference(run)
    tokens = torch.randint(4096, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, got = ours(tokens), theirs(tokens.cuda()).logits.cpu().double()
    error = float((got - want).abs().max())
    print(f"chunk kernels: {error:.1e} of {float(want.abs().max()):.1f}")
    assert error < 5e-3 * float(want.abs().max())  # TF32


QWEN = {  # Qwen3.5-0.8B
    "vocab_size": 248_320,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 24,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}


def lasp(folder: Path, *arguments: str) -> None:
    """The command, which must end well."""
    environment = os.environ | {"PYTHONPATH": str(program.ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "lasptrain", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def steps(folder: Path, run: str, window: int, count: int, *more: str) -> list[dict[str, Any]]:
    """What so many steps on windows of a length tell, in a run that begins with the weights of `run`."""
    given = f"data.window={window}", f"train.steps={count}", "train.batch=1", "optim.warmup=0", "optim.lr=1e-3"
    keys = [part for key in (*given, "eval.windows=0", "eval.sample=0", *more) for part in ("--set", key)]
    lasp(folder, "pretrain", "run/recipe.yaml", "--from", "run", "--run", run, "--nproc", "1", *keys)
    told = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in told if "event" not in line]


def journey(folder: Path, sizes: dict[str, Any], long: int, short: int, count: int, *more: str) -> None:
    """Weights as transformers writes them become a run, take a step on a long window, learn on shorter ones, leave."""
    written("qwen", folder / "weights", **sizes)
    lasp(folder, "convert", "weights", "--from", "hf", "--out", "run")
    (step,) = steps(folder, "long", long, 1, *more)
    print(f"a step of {long:,} tokens: {step['step_time']:.1f} s, {step['memory_peak'] / 2**30:.1f} GiB")
    losses = [step["loss"] for step in steps(folder, "short", short, count, *more)]
    print(f"losses on windows of {short:,} tokens: {losses[0]:.3f} … {losses[-1]:.3f}")
    assert sum(losses[-5:]) < sum(losses[:5])
    lasp(folder, "convert", "short", "--to", "hf", "--out", "out")  # verified


def test_weights_as_released_train_on_a_million_tokens_and_leave(tmp_path: Path) -> None:
    journey(tmp_path, CLASSES["qwen"][1] | QWEN, 1 << 20, 65_536, 20, "train.compile=true")
