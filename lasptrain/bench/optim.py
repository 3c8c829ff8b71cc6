"""`lasptrain bench optim`: the time of an update by AdamW and by Muon, spread over ranks as a recipe says."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from data_tools.tokenizer import load_tokenizer
from lasptrain.bench.result import Column, Result, table
from lasptrain.bench.steps import median_seconds, model_of, reset
from lasptrain.cost import gpus, links, plan
from lasptrain.ops.orthogonal import STEPS
from lasptrain.parallel import mesh as meshes
from lasptrain.parallel.collectives import all_reduce_max
from lasptrain.parallel.mesh import device_name
from lasptrain.parallel.shard import local, shard_optimizer
from lasptrain.process.local_ranks import on_ranks
from lasptrain.recipe.resolve import resolve_mesh, resolve_vocabulary, with_vocabulary
from lasptrain.recipe.schema import Recipe
from lasptrain.training.muon import matrices
from lasptrain.training.optimizer import build_optimizer

KINDS = ("adamw", "muon")
WARM, EACH = 2, 3  # updates before, and in a row in a turn
GRADIENT = 1e-3  # standard deviation


class Update(NamedTuple):
    """An update by one kind of optimizer."""

    kind: str
    seconds: float
    state: int  # bytes, of the rank that keeps most
    flops: int  # of orthogonalisation, over all ranks


def measure(recipe: Recipe, ranks: int) -> Result[Update]:
    """Time updates of the recipe's model along random gradients, on one process per rank on this machine."""
    facts, rows = on_ranks(ranks, _rank, recipe)
    return result(facts, [Update(*row) for row in rows])


def _rank(recipe: Recipe) -> tuple[dict[str, Any], list[Update]]:
    recipe = with_vocabulary(recipe, load_tokenizer(recipe.data.tokenizer).vocab_size)
    vocab, tokens = resolve_vocabulary(recipe.model, 0), recipe.train.batch * recipe.data.window
    facts = {"device": device_name(), "ranks": meshes.world_size(), "kind": recipe.parallel.data_parallel}
    facts |= {"parameters": sum(plan.parameters(recipe.model, vocab).values()), "tokens": tokens}
    facts["step"] = _predicted(recipe, vocab, meshes.world_size())
    return facts, [_timed(recipe.replace(optim={"kind": kind})) for kind in KINDS]


def _predicted(recipe: Recipe, vocab: int, ranks: int) -> float | None:
    """Seconds of a step by `plan`; None for an unknown GPU."""
    rates = gpus.of(device_name()).sustained
    if rates is None:
        return None
    dp, sp = resolve_mesh(recipe, ranks)
    recipe = plan.with_prefix(recipe, vocab, dp, sp, rates.memory)
    laid = plan.layout(recipe, dp, sp, vocab, rates.memory)
    scan = links.with_scan(recipe, sp, laid.segment).mesh.scan if sp > 1 else "none"
    tokens = laid.tokens_per_step // ranks
    return links.step_seconds(recipe, vocab, ranks, tokens, rates, segments=laid.segments)[scan]


def _timed(recipe: Recipe) -> Update:
    reset(meshes.device())
    mesh = meshes.build(*resolve_mesh(recipe, meshes.world_size()))
    kind = recipe.parallel.data_parallel
    model = model_of(recipe, mesh, kind)
    optimizer = shard_optimizer(build_optimizer(model, recipe.optim, model.dtype), mesh, kind)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        local(parameter.grad).normal_(0.0, GRADIENT)
    for _ in range(WARM):
        optimizer.step()
    seconds = median_seconds(optimizer.step, EACH)
    kept = [x for state in getattr(optimizer, "optim", optimizer).state.values() for x in state.values()]
    state = all_reduce_max(sum(local(x).numel() * x.element_size() for x in kept))
    work = [(min(x.shape), max(x.shape)) for x in matrices(model)] if recipe.optim.kind == "muon" else []
    return Update(recipe.optim.kind, seconds, state, sum(STEPS * (4 * m * m * n + 2 * m**3) for m, n in work))


def result(facts: dict[str, Any], updates: list[Update]) -> Result[Update]:
    """Return a result whose table has each kind, with its share of a step as `plan` predicts it, if it knows the GPU.

    Facts are the device, its number of ranks, the `kind` of data parallelism, the parameters, and the tokens and
    predicted seconds of a step.
    """
    step, ranks = facts["step"], facts["ranks"]
    title = f"an update of {facts['parameters']:,} parameters, {facts['kind']} on {ranks} × {facts['device']}"
    columns: list[Column[Update]] = [
        ("optimizer", lambda row: row.kind, "<"),
        ("ms", lambda row: 1e3 * row.seconds, ",.1f"),
        ("÷ a step", lambda row: step and row.seconds / step, ".2%"),
        ("state GiB", lambda row: row.state / 2**30, ".2f"),
        ("TFLOP/s", lambda row: row.flops / row.seconds / ranks / 1e12 if row.flops else None, ",.1f"),
    ]
    caption = step and f"a step of {facts['tokens']:,} tokens takes {step:.2f} s, as predicted"
    return Result(updates, [table(title, updates, columns, caption or "")], facts, "updates")
