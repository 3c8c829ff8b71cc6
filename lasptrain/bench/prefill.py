"""`lasptrain bench prefill`: speed and memory of reading a text before generation.

On GPUs through NCCL, elsewhere a dry run through gloo. The model has its initial weights. Texts are read as by `eval`,
beside the forward of training: the same tokens in the same segments, without gradients, as in the first pass over a
window.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from data_tools.tokenizer import load_tokenizer
from lasptrain.bench.result import Column, Result, table
from lasptrain.bench.steps import elapsed, median_seconds, model_of
from lasptrain.eval.inference import Reader
from lasptrain.parallel import mesh as meshes
from lasptrain.parallel.collectives import all_reduce_max
from lasptrain.parallel.mesh import Mesh, device_name
from lasptrain.process.local_ranks import on_ranks
from lasptrain.recipe.resolve import with_vocabulary
from lasptrain.recipe.schema import Recipe

SCAN = "all_gather"
TURNS = 3
SEGMENTS = 4  # segments of the window on which the forward of training is timed


class Read(NamedTuple):
    """The reading of one text."""

    tokens: int
    tokens_per_s: float
    memory: int  # peak of a rank, bytes


def measure(recipe: Recipe, ranks: int, tokens: Sequence[int], segment: int) -> Result[Read]:
    """Read a text of each of `tokens` on one process per rank on this machine, `segment` tokens per rank at a time."""
    facts, reads = on_ranks(ranks, _rank, recipe, tokens, segment)
    return result(facts, [Read(*row) for row in reads])


def _rank(recipe: Recipe, tokens: Sequence[int], segment: int) -> tuple[dict[str, Any], list[Read]]:
    recipe = with_vocabulary(recipe, load_tokenizer(recipe.data.tokenizer).vocab_size)
    mesh = meshes.build(1, meshes.world_size())
    fused = recipe.train.compile and meshes.device().type == "cuda"
    facts = {"device": device_name(), "ranks": meshes.world_size(), "segment": segment, "fused": fused}
    facts["training"] = _training(recipe, mesh, segment, fused)
    model = model_of(recipe, mesh, "ddp").requires_grad_(False)
    reader = Reader(model, mesh, segment, SCAN, fused)
    facts["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    return facts, [_read(reader, count) for count in tokens]


@torch.no_grad()
def _training(recipe: Recipe, mesh: Mesh, segment: int, fused: bool) -> float:
    """Tokens/s, over all ranks, of the training forward over a window of SEGMENTS segments."""
    model = model_of(recipe, mesh, "ddp", scan=SCAN, fused=fused).requires_grad_(False)
    piece = torch.randint(64, (1, segment), device=meshes.device())

    def forward() -> None:
        carry = None
        for _ in range(SEGMENTS):
            carry = model(piece, carry=carry, output_final_state=True).final_state

    for _ in range(2):  # compiles, allocates and tunes
        forward()
    return SEGMENTS * segment * meshes.world_size() / median_seconds(forward, turns=TURNS)


def _read(reader: Reader, tokens: int) -> Read:
    """Read a random text."""
    text = torch.randint(64, (1, tokens), generator=torch.Generator().manual_seed(0))
    reader.read(text[:, : reader.segment + 2])
    gc.collect()
    if reader.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(reader.device)
    seconds, _ = elapsed(lambda: reader.read(text))
    return Read(tokens, tokens / seconds, int(all_reduce_max(meshes.peak_memory(reader.device))))


def result(facts: dict[str, Any], reads: list[Read]) -> Result[Read]:
    """Return a result whose table has every text beside the forward of training."""
    title = (
        f"{facts['parameters']:,} parameters on {facts['ranks']} × {facts['device']}, "
        f"segments of {facts['segment']:,} tokens per rank, {'compiled' if facts['fused'] else 'not compiled'}; "
        f"forward of training: {facts['training']:,.0f} tokens/s"
    )
    columns: list[Column[Read]] = [
        ("tokens", lambda row: row.tokens, ","),
        ("seconds", lambda row: row.tokens / row.tokens_per_s, ".1f"),
        ("tokens/s", lambda row: row.tokens_per_s, ",.0f"),
        ("× training", lambda row: row.tokens_per_s / facts["training"], ".2f"),
        ("peak GiB", lambda row: row.memory / 2**30, ".2f"),
    ]
    return Result(reads, [table(title, reads, columns)], facts, "reads")
