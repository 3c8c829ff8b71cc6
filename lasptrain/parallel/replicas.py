"""Comparison of ranks that should hold the same parameters: a flipped bit on one of them would spread unseen."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lasptrain.errors import ReplicasError
from lasptrain.parallel import mesh
from lasptrain.parallel.collectives import all_gather_object
from lasptrain.parallel.mesh import Mesh


def compare(model: nn.Module, layout: Mesh, kind: str, step: int) -> None:
    """Raise ReplicasError on every rank, naming those whose parameters differ from their replicas' if there are any.

    Collective over all ranks. `kind` is the recipe's `parallel.data_parallel`, which says which ranks hold the same.
    """
    match kind:
        case "ddp" | "zero1":
            same = 0
        case "hsdp":
            same = layout.rank("sp")
        case _:
            return
    if layout.size > 1 and (odd := outvoted(all_gather_object((same, checksum(model))))):
        ranks = ", ".join(map(str, odd))
        raise ReplicasError(
            f"step {step}: the parameters of rank {ranks} differ from their replicas; expected the same bits: memory "
            "or network is broken there. Not saved; the same command goes on from the newest checkpoint"
        )


def checksum(model: nn.Module) -> int:
    """Return the sum of this rank's parameters, their bits read as 32-bit integers: any single flip changes it."""
    total = torch.zeros((), dtype=torch.int64, device=mesh.device())
    for parameter in model.parameters():
        local = parameter.detach()
        if isinstance(local, DTensor):
            local = local.to_local()
        total += local.reshape(-1).view(torch.int32).sum(dtype=torch.int64)
    return int(total)


def outvoted(checksums: list[tuple[int, int]]) -> list[int]:
    """Return the ranks whose checksum is not the most common one of those that should agree; all where none is."""
    odd = []
    for group in {same for same, _ in checksums}:
        ranks = [rank for rank, (same, _) in enumerate(checksums) if same == group]
        counts = Counter(checksums[rank][1] for rank in ranks).most_common()
        tied = len(counts) > 1 and counts[0][1] == counts[1][1]
        odd += [rank for rank in ranks if len(counts) > 1 and (tied or checksums[rank][1] != counts[0][0])]
    return sorted(odd)
