"""Ranks of one machine for a measurement: a process each, one per GPU through NCCL, or on the CPU through gloo."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException, start_processes

from lasptrain.errors import LaspError, SetupError
from lasptrain.parallel import mesh


def on_ranks(ranks: int, measure: Callable[..., Any], *args: Any) -> Any:
    """What rank 0 gets from `measure(*args)`, which every rank calls inside a process group; plain JSON.

    Raises SetupError where there are GPUs, but fewer than ranks, or with what a rank has to say against its setup.
    """
    gpus = torch.cuda.device_count()
    if 0 < gpus < ranks:
        raise SetupError(f"--nproc {ranks}: found {gpus} GPUs; expected at most as many ranks")
    with tempfile.TemporaryDirectory(prefix="lasptrain-") as folder:
        try:
            # A process that was forked cannot use a GPU that its parent has touched; on the CPU forks import nothing.
            start = "spawn" if gpus else "forkserver"
            start_processes(_rank, (ranks, Path(folder), measure, args), nprocs=ranks, start_method=start)
        except ProcessException:
            refusals = sorted(Path(folder).glob("*.refusal"))
            if not refusals:
                raise
            raise SetupError(refusals[0].read_text()) from None
        return json.loads((Path(folder) / "result.json").read_text())


def device_name() -> str:
    """What this rank computes on."""
    device = mesh.device()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _rank(rank: int, ranks: int, folder: Path, measure: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    device = mesh.device()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        device_id=device if cuda else None,
    )
    try:
        result = measure(*args)
    except LaspError as refusal:
        (folder / f"{rank}.refusal").write_text(str(refusal))
        sys.exit(refusal.code)
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
