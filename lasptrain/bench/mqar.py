"""Multi-query associative recall (arXiv:2312.04927): training a small model of a recipe's kind to recall.

As in the paper's own code, problems of several sizes are learnt together: the small ones help to learn the large.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from lasptrain import ops
from lasptrain.bench.result import Column, Result, table
from lasptrain.data.loader import Slice
from lasptrain.errors import RecipeError
from lasptrain.eval.tasks.recall import associations
from lasptrain.models.language_model import LanguageModel, initial_values, on_meta
from lasptrain.ops.cross_entropy import IGNORED
from lasptrain.parallel import mesh as meshes
from lasptrain.parallel.collectives import all_reduce_sum
from lasptrain.parallel.mesh import Mesh
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.parallel.scan import SCANS
from lasptrain.parallel.shard import parallelize
from lasptrain.process.local_ranks import on_ranks
from lasptrain.recipe.schema import Recipe
from lasptrain.training import segments
from lasptrain.training.optimizer import build_optimizer, clip_gradients, learning_rate, set_learning_rate

TESTED = 1000  # sequences
EVERY = 100  # steps between tests
ENOUGH = 0.99
AT_ONCE = 100  # sequences per forward of a test
SMALLEST = 64  # tokens
HARDER = ((64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))  # the paper's other tests

Size = tuple[int, int]  # tokens of a sequence, pairs in it
Accuracies = tuple[int, list[float]]  # steps, accuracy at each size after them


def sizes(length: int, pairs: int) -> list[Size]:
    """Sizes to train on: tokens and pairs, halved again and again down to 64 tokens; the smallest first."""
    found = [(length, pairs)]
    while found[0][0] >= 2 * SMALLEST and not found[0][0] % 2 and not found[0][1] % 2:
        found.insert(0, (found[0][0] // 2, found[0][1] // 2))
    return found


def _most(vocab: int) -> int:
    """The largest number of pairs whose keys are all different."""
    return vocab // 2 - 1


def measure(recipe: Recipe, ranks: int, length: int, pairs: int, vocab: int) -> Result[Accuracies]:
    """Train the recipe's model for `train.steps` on `train.batch` fresh sequences each, spread over sp = `ranks`.

    Steps take the `sizes` in turn. Ends early at 99 % accuracy on 1,000 sequences of each size that are never trained
    on.
    """
    if 4 * pairs > length:
        raise RecipeError(f"--pairs: found {pairs} for --tokens {length}; expected at most {length // 4}")
    if pairs > _most(vocab):
        raise RecipeError(f"--pairs: found {pairs} for --vocab {vocab}; expected at most {_most(vocab)}")
    smallest, _ = sizes(length, pairs)[0]
    if smallest % ranks:
        raise RecipeError(
            f"--tokens: found {length}, learnt from sequences of {smallest} on, for {ranks} ranks; expected a multiple"
        )
    facts, curve = on_ranks(ranks, _train, recipe, length, pairs, vocab)
    return result(facts, curve)


def _train(recipe: Recipe, length: int, pairs: int, vocab: int) -> tuple[dict[str, Any], list[Accuracies]]:
    """Train, on every rank: all draw the same sequences and take their own slice."""
    device, world = meshes.device(), meshes.world_size()
    mesh = meshes.build(1, world)
    cfg = recipe.model.model_copy(update={"vocab": -(-vocab // 64) * 64})
    kernel = ops.select(recipe.train.kernel, device, recipe.model.kernels)
    attention = ShardedRecurrence(kernel, SCANS["all_gather"](mesh.sp_group, device))
    model = on_meta(cfg, length, attention, z_loss=recipe.train.z_loss)
    values = initial_values(model, recipe.train.seed, device)
    wrapped = parallelize(
        model, model.blocks, mesh, device, kind="ddp", mode="none", dtype=torch.float32, values=values
    )
    optimizer = build_optimizer(model, recipe.optim)
    generator = torch.Generator(device).manual_seed(recipe.train.seed)
    learnt, batch = sizes(length, pairs), recipe.train.batch
    tests = {size: _unseen(recipe, size, vocab, mesh, device) for size in learnt}
    steps, began, curve, losses = recipe.train.steps, time.perf_counter(), [], []
    for step in range(steps):
        size = learnt[step % len(learnt)]
        piece = _slice(associations(batch, *size, vocab, generator), mesh, device)
        loss, _ = segments.backward(wrapped, cfg.layers, (piece,), world / (batch * size[1]))
        losses.append(loss / (batch * size[1]))
        clip_gradients(model, recipe.optim.clip)
        set_learning_rate(optimizer, learning_rate(recipe.optim, steps, step))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            curve.append((step + 1, [accuracy(model, test) for test in tests.values()]))
            if mesh.rank("sp") == 0:
                shown = "  ".join(f"{value:.4f}" for value in curve[-1][1])
                sys.stderr.write(f"step {step + 1}/{steps}  accuracy {shown}\n")
            if min(curve[-1][1]) >= ENOUGH:
                break
    harder = [size for size in HARDER if size not in learnt and size[0] % world == 0 and size[1] <= _most(vocab)]
    facts = {
        "model": f"{cfg.arch}, {cfg.layers} layers of {cfg.dim}, {cfg.heads} heads, state {cfg.K} × {cfg.V}",
        "ranks": world,
        "sizes": learnt,
        "vocab": vocab,
        "accuracy": curve[-1][1],
        "steps": curve[-1][0],
        "seconds": time.perf_counter() - began,
        "losses": all_reduce_sum(torch.stack(losses)).tolist(),
        "harder": [(*size, accuracy(model, _unseen(recipe, size, vocab, mesh, device))) for size in harder],
    }
    return facts, curve


def _unseen(recipe: Recipe, size: Size, vocab: int, mesh: Mesh, device: torch.device) -> Slice:
    """This rank's part of the test sequences."""
    generator = torch.Generator(device).manual_seed(recipe.train.seed + 1)
    return _slice(associations(TESTED, *size, vocab, generator), mesh, device)


def _slice(drawn: tuple[torch.Tensor, torch.Tensor], mesh: Mesh, device: torch.device) -> Slice:
    """This rank's part of tokens and labels [n, T]."""
    tokens, labels = (part.chunk(mesh.length("sp"), 1)[mesh.rank("sp")].contiguous().to(device) for part in drawn)
    return Slice(tokens, labels, None)


@torch.no_grad()
def accuracy(model: LanguageModel, piece: Slice) -> float:
    """Fraction of all labels, over all ranks, that are the likeliest token; AT_ONCE sequences at a time."""
    counts = torch.zeros(2, dtype=torch.int64, device=piece.tokens.device)
    for tokens, labels in zip(piece.tokens.split(AT_ONCE), piece.labels.split(AT_ONCE), strict=True):
        x, _ = model.hidden(tokens)
        asked = labels != IGNORED
        hits = (model.logits(x[asked]).argmax(-1) == labels[asked]).sum()
        counts += torch.stack([hits, asked.sum()])
    right, all_asked = all_reduce_sum(counts).tolist()
    return float(right / all_asked)


def result(facts: dict[str, Any], curve: list[Accuracies]) -> Result[Accuracies]:
    """Return a result with tables of accuracy during training, and at sizes that were not trained on."""
    title = f"{facts['model']}, vocabulary {facts['vocab']}, sp {facts['ranks']}, {facts['seconds']:.0f} s"
    tables = [table(title, curve, [("step", lambda row: row[0], ""), *_columns(facts["sizes"])])]
    if harder := facts["harder"]:
        columns = [("", lambda row: row[0], ""), *_columns([size[:2] for size in harder])]
        tables.append(table("never trained", [("", [accuracy for *_, accuracy in harder])], columns))
    return Result(curve, tables, facts, "curve")


def _columns(sizes: Sequence[Size]) -> list[Column[tuple[Any, list[float]]]]:
    def column(place: int, size: Size) -> Column[tuple[Any, list[float]]]:
        return f"{size[0]} tokens\n{size[1]} pairs", lambda row: row[1][place], ".4f"

    return [column(*one) for one in enumerate(sizes)]
