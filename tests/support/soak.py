"""Kill a run over and over, compare it with one that was left alone: python -m tests.support.soak [CYCLES] [KEY=VALUE]…

Every cycle starts the quickstart (made small by default), kills it with SIGKILL at a random time after its first new
step, or asks it to stop by SIGTERM, and checks that what was committed loads and is not older than what was said to be.
At the end the losses must be those of the undisturbed run, bit for bit.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from lasptrain import train
from lasptrain.checkpoint import steps as checkpoint
from lasptrain.errors import Stopped
from lasptrain.process import signals
from lasptrain.recipe.loading import load
from lasptrain.recipe.schema import Recipe
from lasptrain.run.metrics import read_metrics

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
SMALL = ("model.dim=32", "model.layers=2", "model.mlp=48", "data.window=256", "eval.every=0", "eval.windows=1")


def soak(folder: Path, cycles: int, overrides: tuple[str, ...] = SMALL, seed: int = 0) -> Counter[str]:
    """Run the cycles in `folder`; how often each thing happened. AssertionError where a step was lost or differs."""
    torch.set_num_threads(1)
    importlib.import_module("torch._dynamo")  # once, not in every fork
    steps = 3 * cycles
    common = ("eval.sample=0", f"train.steps={steps}", "checkpoint.every=2", "checkpoint.keep=2", "model.vocab=4096")
    recipe = load(QUICKSTART, [*overrides, *common])
    chance, counts = random.Random(seed), Counter[str]()
    for name in ("undisturbed", "disturbed"):
        (folder / name).mkdir()
    assert wait(fork(lambda: trained(recipe, folder / "undisturbed", folder / "store"))) == 0
    run, cycle = folder / "disturbed", 0
    while True:
        before = acknowledged(run)
        pid = fork(lambda: trained(recipe, run, folder / f"store-{cycle}"))  # noqa: B023  it is forked at once
        if cycle < cycles:
            counts[disturb(pid, run, before, chance)] += 1
        code = wait(pid)
        steps_there = checkpoint.committed(run)
        assert acknowledged(run) <= max(steps_there, default=0), "a step that was acknowledged is lost"
        assert code in (0, 75, -signal.SIGKILL), f"cycle {cycle} ended with {code}"
        cycle += 1
        if code == 0:
            break
    undisturbed, disturbed = ([record["loss"] for record in read_metrics(folder / n)] for n in ("undisturbed", run))
    assert len(undisturbed) == steps and undisturbed == disturbed, "the losses differ"
    counts["resumed"] = sum('"resumed"' in line for line in (run / "metrics.jsonl").read_text().splitlines())
    return counts


def trained(recipe: Recipe, run: Path, store: Path) -> int:
    """Train in this process as rank 0 of 1, quietly; its exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signals.listen()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    try:
        train.train(recipe, run)
    except Stopped as end:
        return end.code
    return 0


def disturb(pid: int, run: Path, before: int, chance: random.Random) -> str:
    """Wait for a new committed step, then a moment, and send a signal; which one."""
    while acknowledged(run) <= before and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.05))
    number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
    os.kill(pid, number)
    return number.name


def acknowledged(run: Path) -> int:
    """The step that the run says it has committed, 0 if none."""
    try:
        return int(json.loads((run / "status.json").read_text())["committed"] or 0)
    except (OSError, ValueError, KeyError):
        return 0


def fork(function: Callable[[], int]) -> int:
    """Run the function in a copy of this process; the copy's id."""
    gc.collect()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            code = function()
        finally:
            os._exit(code)
    return pid


def wait(pid: int) -> int:
    """How a copy ended: its exit code, or the negative number of the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        began = time.monotonic()
        found = soak(Path(name), count, (*SMALL, *sys.argv[2:]))
        print(f"{dict(found)}; losses as undisturbed to the bit; {time.monotonic() - began:.0f} s")
