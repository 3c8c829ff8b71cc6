"""`lasptrain certify`: holds for the program as it is, and for one that is broken in one place fails there.

Each of MUTANTS breaks the program on the ranks; what it is compared with was computed by the program as it is.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from lasptrain import train
from lasptrain.certify import documents, export, kernel, layout, resume, smallest, update
from lasptrain.certify.certificate import Certificate
from lasptrain.certify.check import Check, not_run, of_parameters, ratio
from lasptrain.certify.proof import NAMES, prove, reduced
from lasptrain.certify.trial import WEIGHTS, WORK, Limits, Trial, fit
from lasptrain.checkpoint import tensors
from lasptrain.console.tables import show
from lasptrain.convert import files, tables, targets
from lasptrain.convert.rules import Rule
from lasptrain.data.loader import Slice, SliceLoader
from lasptrain.errors import RecipeError, ResourceError
from lasptrain.models import linear
from lasptrain.models.convolution import ConvWeights
from lasptrain.ops import chunked, cross_entropy, decay_rule, delta_rule
from lasptrain.ops.softmax import Documents
from lasptrain.parallel import block, collectives, halo, shard, turns
from lasptrain.parallel.mesh import Mesh
from lasptrain.parallel.scan import AllGather, Exchange, Ring, Scanned
from lasptrain.parallel.transition import FORGET, Transition
from lasptrain.recipe.loading import load
from lasptrain.recipe.schema import Recipe
from lasptrain.training import optimizer, segments
from tests.support import program
from tests.support.gloo import PATIENCE, spawn

Patch = pytest.MonkeyPatch
SIZES = "dim: 16, layers: 2, heads: 2, mlp: 24"
MODELS = {
    "tnl": f"{{arch: tnl, {SIZES}}}",
    "gdn": f"{{arch: gdn, {SIZES}, conv: 4}}",
    "ssd": f"{{arch: ssd, {SIZES}, data_dependent: true, decay: learned, conv: 15}}",
    "hybrid": f"{{arch: ssd, {SIZES}, conv: 0, softmax: [1]}}",
}
RECIPE = """
model: MODEL
data: {source: SOURCE, tokenizer: bytes, window: WINDOW, cache: CACHE, validation: 300000}
mesh: {MESH}
parallel: {data_parallel: KIND}
optim: {lr: 1e-2, schedule: constant, clip: 1.0}
train: {steps: 6, batch: BATCH, precision: PRECISION, segment: SEGMENT}
"""


class Case(NamedTuple):
    """A recipe of the table below; slices of two ranks have 16 tokens, of four 8."""

    model: str
    dp: int
    sp: int
    scan: str
    kind: str
    window: int = 64
    segment: int = 32
    precision: str = "fp32"
    more: tuple[str, ...] = ()  # other keys


CASES = {
    "ring": Case("gdn", 1, 2, "ring", "ddp"),
    "half": Case("gdn", 1, 2, "ring", "zero3", precision="bf16"),
    "decays": Case("tnl", 1, 2, "all_gather", "ddp"),
    "prefix": Case("hybrid", 1, 2, "all_gather", "ddp"),
    "rows": Case("ssd", 2, 2, "all_gather", "zero3", 32, 16),
    "zero2": Case("tnl", 2, 2, "all_scan", "zero2", 32, 16),
    "copies": Case("gdn", 2, 2, "ring", "ddp", 32, 16),
    "muon": Case("tnl", 1, 2, "ring", "zero3", more=("optim.kind=muon", "train.z_loss=0.01")),
}


class Mutant(NamedTuple):
    """A program that is broken by `apply(patch, rank)`, and what is found.

    Args:
        case: the recipe.
        check: the part of `certify` that is run.
        fails: beginnings of comparisons that fail; every other one whose beginning is in `holds` does not.
        rank: of the largest error.
        where: a part of the failure's place or note.
        least: the smallest layout that is named, where it is looked for.
        part: of the check, in place of the one that most are looked for in.
    """

    apply: Callable[[Patch, int], None]
    case: str
    check: str
    fails: tuple[str, ...]
    holds: tuple[str, ...] = ()
    rank: int | None = None
    where: str = ""
    least: str = ""
    part: str = ""


MUTANTS: dict[str, Mutant] = {}


def mutant(name: str, case: str, check: str, *fails: str, **more: Any) -> Callable[[Any], Any]:
    def keep(apply: Callable[[Patch, int], None]) -> Callable[[Patch, int], None]:
        assert name not in MUTANTS
        MUTANTS[name] = Mutant(apply, case, check, fails, **more)
        return apply

    return keep


LOSSES, GRADIENTS = ("loss of every token",), ("gradient at every token", "gradient of every parameter")


def scanned(patch: Patch, change: Callable[[Tensor], Tensor], *, reverse: bool, here: bool) -> None:
    """Change what enters this rank's slice, or its gradient, where it is `here`."""
    for scan in (Ring, AllGather):
        original = scan.start

        def start(self: Any, *args: Any, original: Any = original, **given: Any) -> Any:
            exchange = original(self, *args, **given)
            if not here or given.get("reverse", False) != reverse:
                return exchange

            def changed() -> Scanned:
                entering, leaving = exchange.wait()
                return Scanned(None if entering is None else change(entering), leaving)

            return Exchange(changed, None, ())

        patch.setattr(scan, "start", start)


@mutant(
    "exchange skipped",
    "ring",
    "layout",
    *LOSSES,
    *GRADIENTS,
    rank=1,
    where="from window 0 token 16 (rank 1)",
    least="mesh.sp = 2",
)
def _(patch: Patch, rank: int) -> None:
    scanned(patch, torch.zeros_like, reverse=False, here=rank == 1)


@mutant("state gradient dropped", "ring", "layout", *GRADIENTS, holds=("mean loss", *LOSSES), where="token 47 (rank 0)")
def _(patch: Patch, rank: int) -> None:
    scanned(patch, torch.zeros_like, reverse=True, here=rank == 0)


@mutant("M not transposed", "ring", "layout", *GRADIENTS, holds=("mean loss", *LOSSES), where="window")
def _(patch: Patch, rank: int) -> None:
    patch.setattr(Transition, "transpose", lambda self: self._replace(rows=-self.rows))


@mutant(
    "M left out on a rank", "ring", "layout", "mean loss", *LOSSES, *GRADIENTS, where="from window 0 token 32 (rank 0)"
)
def _(patch: Patch, rank: int) -> None:
    original = delta_rule.summarize

    def summarize(*args: Any) -> Any:
        state, linear, blocks = original(*args)
        return state, torch.eye(linear.shape[-1], dtype=linear.dtype).expand_as(linear), blocks

    if rank == 1:
        patch.setattr(delta_rule, "summarize", summarize)


@mutant("state rounded to bf16", "ring", "layout", *LOSSES, *GRADIENTS)
def _(patch: Patch, rank: int) -> None:
    original = Transition.apply
    patch.setattr(Transition, "apply", lambda self, *args: original(self, *args).bfloat16().to(args[1].dtype))


def of_weight(patch: Patch, change: Callable[[Tensor], Tensor]) -> None:
    """Change the gradient of the second product of every MLP."""
    original = linear.weight_gradient

    def weight_gradient(*args: Any) -> Tensor:
        found = original(*args)
        return change(found) if found.shape == (16, 24) else found

    patch.setattr(linear, "weight_gradient", weight_gradient)


OWN = {"part": "own", "holds": tuple(f"{start}, fp64" for start in (*LOSSES, *GRADIENTS))}


@mutant("state rounded to bf16 in fp32", "ring", "layout", "loss of every token, fp32", "gradient", **OWN)
def _(patch: Patch, rank: int) -> None:
    original = Transition.apply

    def apply(self: Transition, *args: Any) -> Tensor:
        state = original(self, *args)
        return state.bfloat16().float() if state.dtype == torch.float32 else state

    patch.setattr(Transition, "apply", apply)


def lost_unless_exact(state: Tensor) -> Tensor:
    return state if state.dtype == torch.float64 else torch.zeros_like(state)


@mutant("exchange skipped in bf16", "half", "layout", "gradient at every token, bf16", **OWN)
def _(patch: Patch, rank: int) -> None:
    scanned(patch, lost_unless_exact, reverse=False, here=rank == 1)


@mutant("state gradient dropped in bf16", "half", "layout", "gradient at every token, bf16", **OWN)
def _(patch: Patch, rank: int) -> None:
    scanned(patch, lost_unless_exact, reverse=True, here=rank == 0)


@mutant("one gradient off by 1e-5 in fp32", "ring", "layout", "gradient of every parameter, fp32", where="down", **OWN)
def _(patch: Patch, rank: int) -> None:
    of_weight(patch, lambda x: x * (1 + 1e-5) if x.dtype == torch.float32 else x)


@mutant("initial state of the second segment dropped", "ring", "layout", *GRADIENTS, holds=LOSSES)
def _(patch: Patch, rank: int) -> None:
    original = segments.keep_states

    def keep_states(*args: Any) -> Any:
        kept, carry = original(*args)
        return kept, None if carry is None else [tuple(None if x is None else x * 0 for x in s) for s in carry]

    patch.setattr(segments, "keep_states", keep_states)


@mutant(
    "gradient between segments dropped",
    "ring",
    "layout",
    *GRADIENTS,
    holds=("mean loss", *LOSSES),
    where="token 31 (rank 1)",
    least="mesh.dp = 2, 2 segments",
)
def _(patch: Patch, rank: int) -> None:
    patch.setattr(segments, "_pairs", lambda *_: [])


@mutant("gradient of the convolution's rows lost", "ring", "layout", *GRADIENTS, holds=("mean loss", *LOSSES))
def _(patch: Patch, rank: int) -> None:
    original = halo._Halo.backward

    def backward(ctx: Any, *grads: Any) -> Any:
        drows, *rest = original(ctx, *grads)
        return None if drows is None else torch.zeros_like(drows), *rest

    patch.setattr(halo._Halo, "backward", staticmethod(backward))


@mutant("rows of another window", "ring", "layout", *LOSSES, where="from window 0 token 16 (rank 1)")
def _(patch: Patch, rank: int) -> None:
    original, kept = halo.halo, list[Tensor]()

    def stale(*args: Any) -> Any:
        rows, final = original(*args)
        kept.append(rows.detach())
        return rows + kept[0] - rows.detach(), final

    if rank == 1:
        patch.setattr("lasptrain.models.delta_rule.halo", stale)


def sliced(patch: Patch, change: Callable[[Slice], Slice]) -> None:
    """Change every slice that is read."""
    original = SliceLoader._slice
    patch.setattr(SliceLoader, "_slice", lambda self, starts: change(original(self, starts)))


@mutant(
    "label shifted at a slice's edge", "ring", "layout", "mean loss", *LOSSES, where="from window 0 token 15 (rank 0)"
)
def _(patch: Patch, rank: int) -> None:
    def change(piece: Slice) -> Slice:
        labels = piece.labels.clone()
        labels[:, -1] = labels[:, 0]
        return piece._replace(labels=labels)

    sliced(patch, change)


@mutant("loss scaled by local labels", "ring", "layout", "mean loss", "gradient of every parameter", holds=LOSSES)
def _(patch: Patch, rank: int) -> None:
    original = collectives.all_reduce_sum
    patch.setattr(
        train, "all_reduce_sum", lambda x: original(x) if x.is_floating_point() else x * dist.get_world_size()
    )


@mutant("wrong rank order", "ring", "layout", *LOSSES, *GRADIENTS, where="on every rank")
def _(patch: Patch, rank: int) -> None:
    original = SliceLoader.__init__

    def reversed_(self: Any, *args: Any, sp: int, sp_rank: int, **given: Any) -> None:
        original(self, *args, sp=sp, sp_rank=sp - 1 - sp_rank, **given)

    patch.setattr(SliceLoader, "__init__", reversed_)


@mutant(
    "one micro-batch dropped",
    "ring",
    "layout",
    "mean loss",
    *GRADIENTS,
    holds=LOSSES,
    where="from window 1 token 0 (rank 0)",
)
def _(patch: Patch, rank: int) -> None:
    original, calls = segments.backward, [0]

    def backward(model: Any, layers: int, pieces: Any, scale: Any, *rest: Any) -> Any:
        calls[0] += 1
        return original(model, layers, pieces, scale * (calls[0] % 2), *rest) * (calls[0] % 2)

    patch.setattr(segments, "backward", backward)


@mutant("order of data differs per rank", "ring", "layout", *LOSSES, rank=1, where="from window 0 token 16 (rank 1)")
def _(patch: Patch, rank: int) -> None:
    original = SliceLoader.window_starts
    if rank == 1:
        patch.setattr(SliceLoader, "window_starts", lambda self, step: original(self, step)[::-1])


@mutant(
    "slice's decay off by a token", "decays", "layout", *LOSSES, *GRADIENTS, where="from window 0 token 32 (rank 0)"
)
def _(patch: Patch, rank: int) -> None:
    original = decay_rule.summarize

    def summarize(name: str, inputs: Any, doc_ids: Any, wanted: int) -> Any:
        state, decay, blocks = original(name, inputs, doc_ids, wanted)
        return state, decay * inputs[2].exp(), blocks

    patch.setattr(decay_rule, "summarize", summarize)


@mutant(
    "decay inside a chunk off by a token",
    "decays",
    "kernel",
    "outputs and gradients of chunked, fp32",
    "outputs and gradients of chunked, fp64",
    where="layer",
)
def _(patch: Patch, rank: int) -> None:
    def to_right(self: chunked.Chunks) -> Tensor:
        same = self.doc_ids == self.doc_ids[..., -1:]
        return torch.where(same, self.each.flip(-1).cumsum(-1).flip(-1).exp(), 0.0)

    patch.setattr(chunked.Chunks, "to_right", to_right)


@mutant(
    "kernel's state in bf16",
    "decays",
    "kernel",
    "outputs and gradients of chunked, fp32",
    "outputs and gradients of chunked, fp64",
    where="layer",
)
def _(patch: Patch, rank: int) -> None:
    original = chunked._scan
    patch.setattr(chunked, "_scan", lambda *args: tuple(x.bfloat16().to(x.dtype) for x in original(*args)))


@mutant(
    "gradient of the decay lost",
    "rows",
    "kernel",
    "outputs and gradients of chunked, fp32",
    "outputs and gradients of chunked, fp64",
    where="log_decay",
)
def _(patch: Patch, rank: int) -> None:
    original = chunked.grad_inputs

    def grad_inputs(*args: Any) -> Any:
        dk, dv, dlog = original(*args)
        return dk, dv, None if dlog is None else dlog * 0

    patch.setattr(chunked, "grad_inputs", grad_inputs)


def renumbered(patch: Patch, change: Callable[[Tensor], Tensor]) -> None:
    """Change the numbers of documents in every slice."""

    def changed(piece: Slice) -> Slice:
        return piece if piece.doc_ids is None else piece._replace(doc_ids=change(piece.doc_ids))

    sliced(patch, changed)


SEEN = ("losses of documents beside", "gradients of documents beside")


@mutant("documents leak inside a slice", "ring", "documents", *SEEN, where="seen over: inside a slice")
def _(patch: Patch, rank: int) -> None:
    renumbered(patch, lambda numbers: numbers[:, :1].expand_as(numbers).contiguous())


@mutant(
    "documents leak over a slice's edge",
    "ring",
    "documents",
    *SEEN,
    where="seen over: slice edge",
    least="mesh.sp = 2, documents kept apart",
)
def _(patch: Patch, rank: int) -> None:
    if rank == 1:
        renumbered(patch, lambda numbers: numbers - numbers[:, :1])


@mutant("documents that begin inside a chunk leak", "ring", "documents", *SEEN, where="seen over: inside a slice")
def _(patch: Patch, rank: int) -> None:
    renumbered(patch, lambda numbers: numbers[:, torch.arange(numbers.shape[1]) // 8 * 8])


@mutant(
    "documents that begin with a slice's last token leak",
    "ring",
    "documents",
    *SEEN,
    where="seen over: last token of a slice",
)
def _(patch: Patch, rank: int) -> None:
    if rank == 0:
        renumbered(patch, lambda numbers: torch.cat([numbers[:, :-1], numbers[:, -2:-1]], dim=1))


@mutant("documents leak after one that spans slices", "ring", "documents", *SEEN, where="seen over: spanning slices")
def _(patch: Patch, rank: int) -> None:
    if rank == 1:
        renumbered(patch, lambda numbers: numbers[:, :1].expand_as(numbers).contiguous())


@mutant("documents leak past a slice in which two begin", "decays", "documents", *SEEN, where="seen over: twice")
def _(patch: Patch, rank: int) -> None:
    original = decay_rule.summarize

    def summarize(name: str, inputs: Any, doc_ids: Any, wanted: int) -> Any:
        state, decay, blocks = original(name, inputs, doc_ids, wanted)
        if doc_ids is not None:
            _, through, _ = original(name, inputs, None, wanted)
            begun = doc_ids[:, -1].view(-1, *[1] * (decay.dim() - 1))
            decay = torch.where((begun > 0) & (begun % 2 == 0), through.expand_as(decay), decay)
        return state, decay, blocks

    patch.setattr(decay_rule, "summarize", summarize)


@mutant("documents leak over a segment's edge", "ring", "documents", *SEEN, where="seen over: segment edge")
def _(patch: Patch, rank: int) -> None:
    if rank == 0:
        renumbered(patch, lambda numbers: numbers - numbers[:, :1])


@mutant("documents leak through the convolution", "ring", "documents", *SEEN)
def _(patch: Patch, rank: int) -> None:
    original = ConvWeights.__call__
    patch.setattr(ConvWeights, "__call__", lambda self, x, before, doc_ids: original(self, x, before, None))


@mutant("documents leak through the rows before a slice", "ring", "documents", *SEEN, where="edge")
def _(patch: Patch, rank: int) -> None:
    original = ConvWeights.__call__

    def called(self: Any, x: Tensor, before: Tensor, doc_ids: Tensor | None) -> Tensor:
        return original(self, x, before, None if doc_ids is None else doc_ids - doc_ids[:, :1])

    patch.setattr(ConvWeights, "__call__", called)


@mutant("documents leak through softmax", "prefix", "documents", *SEEN)
def _(patch: Patch, rank: int) -> None:
    patch.setattr(Documents, "of", classmethod(lambda cls, *_: cls()))


@mutant("prefix gradient of softmax lost", "prefix", "layout", *GRADIENTS, holds=("mean loss", *LOSSES), where="rank 0")
def _(patch: Patch, rank: int) -> None:
    def own(out: Tensor, parts: Tensor, group: Any) -> None:
        out.copy_(parts.view(dist.get_world_size(group), -1)[dist.get_rank(group)])

    patch.setattr(block, "reduce_scatter", own)


@mutant("prefix gradient of later segments lost", "prefix", "layout", *GRADIENTS, holds=("mean loss", *LOSSES))
def _(patch: Patch, rank: int) -> None:
    patch.setattr(block.Block, "add", lambda *_: Exchange(lambda: None, None, ()))


@mutant("optimizer's state not restored", "ring", "resume", "updates 3", where="weights on rank 0, 1")
def _(patch: Patch, rank: int) -> None:
    original = tensors.restore

    def restore(reader: Any, model: Any, adam: Any, group: Any) -> None:
        original(reader, model, adam, group)
        for state in adam.state.values():
            state["exp_avg"].zero_()

    patch.setattr("lasptrain.checkpoint.load.restore", restore)


@mutant("weights not restored", "ring", "resume", "updates 3", where="weights on rank 0, 1")
def _(patch: Patch, rank: int) -> None:
    patch.setattr("lasptrain.checkpoint.load.restore", lambda *_: None)


@mutant("rows of a short slice lost", "rows", "layout", *LOSSES, *GRADIENTS, where="from window 0 token 16 (rank 0)")
def _(patch: Patch, rank: int) -> None:
    patch.setattr(halo, "_transition", lambda *_: FORGET)


@mutant(
    "wrong scale with dp > 1",
    "rows",
    "layout",
    "gradient of every parameter",
    holds=("mean loss", *LOSSES),
    least="mesh.dp = 4",
)
def _(patch: Patch, rank: int) -> None:
    patch.setattr(Mesh, "size", property(lambda self: self.length("sp")))


def drifting(patch: Patch, here: bool) -> None:
    """Give the optimizer another learning rate, where it is `here`."""
    original = optimizer.set_learning_rate
    if here:
        patch.setattr(train, "set_learning_rate", lambda adam, lr: original(adam, lr * 1.01))


@mutant("a replica drifts", "copies", "update", "weights of replicas", where="parameters of rank 3 differ")
def _(patch: Patch, rank: int) -> None:
    drifting(patch, rank == 3)


@mutant("a shard drifts", "rows", "update", "moves of weights", where="model.")
def _(patch: Patch, rank: int) -> None:
    drifting(patch, rank == 3)


@mutant("weights left out of the optimizer", "rows", "update", "weights and moments", where="norm1.weight.exp_avg")
def _(patch: Patch, rank: int) -> None:
    original = optimizer.build_optimizer

    def build(model: nn.Module, *args: Any) -> Any:
        adam = original(model, *args)
        del adam.param_groups[1]
        return adam

    patch.setattr("lasptrain.training.job.build_optimizer", build)


@mutant("clipping by the local norm", "rows", "update", "gradient norm", "moments", where="on")
def _(patch: Patch, rank: int) -> None:
    def clip(model: nn.Module, most: float) -> Tensor:
        local = [p.grad.to_local() for p in model.parameters() if p.grad is not None]  # type: ignore[attr-defined]
        norm: Tensor = torch.stack([x.norm() for x in local]).norm()
        for x in local:
            x.mul_((most / norm).clamp(max=1.0))
        return norm

    patch.setattr(train, "clip_gradients", clip)


def gathered_stale(patch: Patch) -> None:
    """Gather the weights of the first time again and again."""
    original = vars(FSDPParam)["all_gather_inputs"].fget
    kept: dict[FSDPParam, list[Tensor]] = {}

    def inputs(self: FSDPParam) -> list[Tensor]:
        if self not in kept:
            kept[self] = [x.clone() for x in original(self)]
        return kept[self]

    patch.setattr(FSDPParam, "all_gather_inputs", property(inputs))


@mutant(
    "stale weights after a gather (zero2)",
    "zero2",
    "update",
    "losses",
    "moves of weights",
)
def _(patch: Patch, rank: int) -> None:
    gathered_stale(patch)


@mutant(
    "stale weights after a gather (zero3)",
    "rows",
    "update",
    "losses",
    "moves of weights",
    least="mesh.dp = 4, parallel.data_parallel = zero3, documents kept apart",
)
def _(patch: Patch, rank: int) -> None:
    gathered_stale(patch)


@mutant("gradients not summed over dp", "copies", "layout", "gradient of every parameter", holds=LOSSES)
def _(patch: Patch, rank: int) -> None:
    original = shard._replicate
    patch.setattr(shard, "_replicate", lambda model, mesh, device: original(model, groups["sp"], device))
    build = Mesh.__new__
    groups: dict[str, Any] = {}

    def made(cls: Any, grid: Any, flat: Any) -> Mesh:
        groups["sp"] = grid["sp"]
        found: Mesh = build(cls, grid, flat)
        return found

    patch.setattr(Mesh, "__new__", made)


@mutant(
    "gradient of a weight lost on every layout", "ring", "update", "gradient along a random direction", part="slope"
)
def _(patch: Patch, rank: int) -> None:
    of_weight(patch, torch.zeros_like)


@mutant("a rank orthogonalises its rows only", "muon", "update", "moves of weights", where="weight")
def _(patch: Patch, rank: int) -> None:
    patch.setattr(turns._Rows, "of", lambda like: None)


@mutant("gradient of the z-loss lost", "muon", "update", "gradient along a random direction", part="slope")
def _(patch: Patch, rank: int) -> None:
    original = cross_entropy._losses_and_gradient

    def lossy(z_loss: float, *args: Any) -> Any:
        losses, z_losses, _ = original(z_loss, *args)
        return losses, z_losses, original(0.0, *args)[2]

    patch.setattr(cross_entropy, "_losses_and_gradient", lossy)


LOADED = "weights and moments that are loaded on another mesh"
ELSEWHERE = {"part": "elsewhere"}


def restored(patch: Patch, change: Callable[[nn.Module, Any], object]) -> None:
    """Change what has been loaded."""
    original = tensors.restore

    def restore(reader: Any, model: nn.Module, adam: Any, group: Any) -> None:
        original(reader, model, adam, group)
        with torch.no_grad():
            change(model, adam)

    patch.setattr("lasptrain.checkpoint.load.restore", restore)


@mutant("moments not restored on another mesh", "ring", "resume", LOADED, where="exp_avg", **ELSEWHERE)
def _(patch: Patch, rank: int) -> None:
    restored(patch, lambda _, adam: [state["exp_avg"].zero_() for state in adam.state.values()])


@mutant("a rank's rows not restored on another mesh", "ring", "resume", LOADED, where="embed.weight", **ELSEWHERE)
def _(patch: Patch, rank: int) -> None:
    restored(patch, lambda model, _: model.get_parameter("embed.weight")[-128:].zero_())


@mutant("other batches on another mesh", "ring", "resume", "updates 3", holds=(LOADED,), **ELSEWHERE)
def _(patch: Patch, rank: int) -> None:
    original = SliceLoader.window_starts
    patch.setattr(SliceLoader, "window_starts", lambda self, step: original(self, step + 1))


def exported(patch: Patch, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Change the tensors of an export."""
    original = tables.export
    patch.setattr(tables, "export", lambda *args: iter(change(dict(original(*args))).items()))


BACK, Q, K = "weights that come back", "layers.0.mixer.q.weight", "layers.0.mixer.k.weight"


@mutant("a wrong value in an export", "ring", "export", BACK, where=Q)
def _(patch: Patch, rank: int) -> None:
    exported(patch, lambda found: found | {Q: found[Q] + torch.eye(*found[Q].shape) * 1e-6})


@mutant("two names swapped in an export", "ring", "export", BACK, where=Q)
def _(patch: Patch, rank: int) -> None:
    exported(patch, lambda found: found | {Q: found[K], K: found[Q]})


@mutant("two names swapped in an export and an import", "ring", "export", BACK, where=Q)
def _(patch: Patch, rank: int) -> None:
    ours = targets.TARGETS["safetensors"]

    def rules(model: Any, names: Any) -> list[Rule]:
        return [replace(rule, targets=({Q: K, K: Q}.get(*rule.targets * 2),)) for rule in ours.rules(model, names)]

    patch.setitem(targets.TARGETS, "safetensors", replace(ours, rules=rules))


@mutant("a tensor dropped from an export", "ring", "export", "logits", where=f"has no {Q}")
def _(patch: Patch, rank: int) -> None:
    original = files.write

    def write(folder: Any, forms: Any, tensors: Any) -> None:
        kept = {name: form for name, form in forms.items() if name != Q}
        original(folder, kept, ((name, x) for name, x in tensors if name != Q))

    patch.setattr(files, "write", write)


class Ended(Exception):
    """The end of a run, in place of a kill, which these ranks would not outlive."""


def resumed(trial: Trial) -> list[Check]:
    """The resume check in one process group."""

    def end() -> None:
        raise Ended

    if not (trial.folder / resume.RECORD).exists():
        resume.undisturbed(trial)
        with pytest.raises(Ended):
            resume.killed(trial, end)
    return resume.continued(trial)


CHECKS: dict[tuple[str, str], Callable[[Trial], list[Check]]] = {
    ("layout", ""): layout.exact,
    ("layout", "own"): layout.check,
    ("documents", ""): documents.check,
    ("kernel", ""): kernel.check,
    ("update", ""): update.check,
    ("update", "slope"): update.slope,
    ("resume", ""): resumed,
    ("resume", "elsewhere"): resume.elsewhere,
    ("export", ""): export.check,
}
AFTER = {("update", "slope"), ("resume", "elsewhere"), ("export", "")}  # on one process, after the ranks


def wanted(world: int, after: bool) -> dict[str, Mutant]:
    """The mutants of a number of ranks."""
    ours = {name: one for name, one in MUTANTS.items() if CASES[one.case].dp * CASES[one.case].sp == world}
    return {name: one for name, one in ours.items() if ((one.check, one.part) in AFTER) is after}


def named(trial: Trial, check: str) -> str:
    """The smallest layout that is named."""
    return smallest.told(Recipe.model_validate(reduced(trial, check)))


Found = dict[str, list[Check]]


def hunt(rank: int, _: int, trials: dict[str, Trial], mutants: list[str]) -> tuple[Found, dict[str, str]]:
    """What the checks find of the program as it is, by case, and of every mutant; and the smallest layouts."""
    found: Found = {}
    least: dict[str, str] = {}
    some = {name: MUTANTS[name] for name in mutants}
    for case, *check in dict.fromkeys((one.case, one.check, one.part) for one in some.values()):
        found[case] = found.get(case, []) + CHECKS[check[0], check[1]](trials[case])
    for name, one in some.items():
        with Patch.context() as patch:
            one.apply(patch, rank)
            found[name] = CHECKS[one.check, one.part](trials[one.case])
            least[name] = named(trials[one.case], one.check) if one.least else ""
    return found, least


def prepare(rank: int, world: int, trials: dict[str, Trial]) -> None:
    """Leave what one process computes."""
    for name, trial in trials.items():
        mine = [one for one in MUTANTS.values() if one.case == name]
        if any(one.part == "own" for one in mine):
            layout.reference(trial)
        else:
            layout.leave(trial, layout.EXACT)
        if any(one.check == "update" for one in mine):
            update.reference(trial)
        if any(one.least for one in mine):
            layout.leave(trial, layout.TOGETHER)


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trial]:
    """The recipes, with what one process computes of them."""
    folder = tmp_path_factory.mktemp("certify")
    (folder / "text").mkdir()
    for i in range(40):
        (folder / "text" / f"{i}.txt").write_text(f"Document {i} counts: " + " ".join(str(i * j) for j in range(i * 5)))
    made = {}
    for name, case in CASES.items():
        (folder / name).mkdir()
        values = {
            "MODEL": MODELS[case.model],
            "SOURCE": str(folder / "text"),
            "CACHE": str(folder / "cache"),
            "MESH": f"dp: {case.dp}, sp: {case.sp}, scan: {case.scan}",
            "KIND": case.kind,
            "BATCH": str(2 * case.dp),
            "WINDOW": str(case.window),
            "SEGMENT": str(case.segment),
            "PRECISION": case.precision,
        }
        text = RECIPE
        for key, value in values.items():
            text = text.replace(key, value)
        file = folder / f"{name}.yaml"
        file.write_text(text)
        made[name], _ = fit(load(file, list(case.more)), case.dp * case.sp, folder / name)
        assert made[name].recipe.data.window == case.window and made[name].recipe.model.layers == 2
    spawn(1, prepare, made)
    return made


def told(found: list[Check]) -> Iterator[str]:
    yield from (
        f"{one.verdict}: {one.compared}, {one.reference}: {one.error} {one.where()}; {one.note}" for one in found
    )


@pytest.mark.parametrize("world", [2, 4])
def test_every_mutant_is_caught_where_it_is(trials: dict[str, Trial], world: int) -> None:
    mine = {name: trial for name, trial in trials.items() if CASES[name].dp * CASES[name].sp == world}
    for after in (False, True):
        mutants = wanted(world, after)
        all_found, least = spawn(1 if after else world, hunt, mine, list(mutants))[0] if mutants else ({}, {})
        for name in all_found.keys() & mine.keys():
            verdicts = {one.verdict for one in all_found[name]}
            assert "holds" in verdicts and "fails" not in verdicts, "\n".join([name, *told(all_found[name])])
        wrong = [text for name, one in mutants.items() if (text := missed(name, one, all_found[name], least[name]))]
        assert not wrong, "\n".join(wrong)


def missed(name: str, one: Mutant, found: list[Check], least: str) -> str:
    """What is not found of a mutant as it should be, and all that is; nothing if all is."""
    failing = [check for check in found if check.verdict == "fails"]
    held = [check for check in found if check.verdict == "holds"]
    caught = all(any(check.compared.startswith(start) for check in failing) for start in one.fails)
    kept = all(any(check.compared.startswith(start) for check in held) for start in one.holds)
    located = any(one.where in f"{check.where()}; {check.note}" for check in failing)
    ranked = one.rank is None or any(check.rank == one.rank for check in failing)
    if caught and kept and located and ranked and least == one.least:
        return ""
    return "\n  ".join([f"{name}: {caught=} {kept=} {located=} {ranked=} {least}", *told(found)])


def test_the_page_lists_the_mutants() -> None:
    page = (program.ROOT / "lasptrain" / "certify" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| ([^|]+) \| (\w+) \|$", page, re.MULTILINE) == [(k, v.check) for k, v in MUTANTS.items()]
    assert f"{len(MUTANTS)} broken programs" in page


def test_there_are_many_mutants_of_every_check() -> None:
    assert len(MUTANTS) >= 40 and {(one.check, one.part) for one in MUTANTS.values()} == set(CHECKS)


def certify(folder: Path, *arguments: str, temporary: Path | None = None) -> subprocess.Popen[str]:
    """The command on a recipe in `folder`, whose temporary files go there or to another."""
    environment = os.environ | {"PYTHONPATH": str(program.ROOT), "OMP_NUM_THREADS": "1"}
    environment["TMPDIR"] = str(temporary or folder)
    # A shell ignores Ctrl-C in what it starts in the background, such as these tests; a user's terminal does not.
    heard = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    module = "runpy.run_module('lasptrain', run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-c", heard + module, "certify", "ring.yaml", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, stdout=pipe, stderr=pipe)


def left_behind(folder: Path) -> list[str]:
    """Temporary files of ours."""
    return [path.name for path in folder.glob("lasptrain-*")]


@pytest.mark.slow
def test_the_command_writes_a_certificate(trials: dict[str, Trial]) -> None:
    folder = trials["ring"].folder.parent
    run = certify(folder, "--nproc", "2", "--json", "ring.json")
    printed, said = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, printed + said
    written = json.loads((folder / "ring.json").read_text())
    assert written["verdict"] == "holds" and "CERTIFIED" in printed and len(written["code_sha256"]) == 64
    verdicts = {name: {one["verdict"] for one in written["checks"] if one["check"] == name} for name in NAMES}
    assert verdicts == {name: {"holds"} for name in NAMES} | {"export": {"holds", "not run"}}
    assert left_behind(folder) == []


@pytest.mark.slow
def test_one_rank_and_one_segment_have_no_layout_to_compare(trials: dict[str, Trial]) -> None:
    folder = trials["ring"].folder.parent
    one = ("--set", "mesh.sp=1", "--set", "train.segment=64", "--check", "layout", "--json", "one.json")
    run = certify(folder, *one)
    printed, said = run.communicate(timeout=PATIENCE)
    assert run.returncode == 6, printed + said
    (found,) = json.loads((folder / "one.json").read_text())["checks"]
    assert found["verdict"] == "not run" and "--nproc 2" in found["note"]
    alone = load(folder / "ring.yaml").replace(
        mesh={"sp": 1, "dp": 1}, train={"segment": 64}, parallel={"reduce": "step"}
    )
    assert layout.same(alone) and not layout.same(alone.replace(parallel={"recompute": "full"}))


def processes(folder: Path) -> list[str]:
    """Processes whose temporary files go to `folder`, by their commands."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"TMPDIR={folder}".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_an_interrupted_proof_leaves_nothing(
    trials: dict[str, Trial], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    run = certify(trials["ring"].folder.parent, "--nproc", "2", "--json", "none.json", temporary=tmp_path)
    deadline = time.monotonic() + PATIENCE
    while not left_behind(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(2)
    run.send_signal(number)
    _, said = run.communicate(timeout=PATIENCE)
    assert run.returncode == code and "Traceback" not in said, said
    assert f"stopped by {number.name}" in said
    assert left_behind(tmp_path) == [] and not (trials["ring"].folder.parent / "none.json").exists()
    while found := processes(tmp_path):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def test_what_does_not_fit_is_refused(trials: dict[str, Trial]) -> None:
    recipe = trials["ring"].recipe.replace(train={"segment": 32})
    for given, text in (
        ({"tokens": 50}, "--tokens: 50 do not split into 4 equal slices of 2 or more"),
        ({"layers": 3}, "--layers: found 3; expected 1 to 2"),
        ({"only": ["speed"]}, "--check: found 'speed'; expected layout, documents, kernel, update, resume, export"),
    ):
        with pytest.raises(RecipeError, match=re.escape(text)):
            prove(recipe, 2, **given)


def test_memory_decides_how_large_a_trial_is(trials: dict[str, Trial], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load(program.ROOT / "recipes" / "gdn_1b_4096k.yaml")

    def fitted(memory: float) -> tuple[int, int, int]:
        within = Limits(WORK["cpu"], WEIGHTS["cpu"], int(memory * 2**30), True, 1 << 50)
        monkeypatch.setattr("lasptrain.certify.trial.limits", lambda device: within)
        found, _ = fit(recipe, 2, Path())
        return found.recipe.model.layers, found.recipe.data.window, found.planned

    (few, narrow, small), (more, _, _) = fitted(20), fitted(64)
    assert few == 1 < more and narrow < recipe.data.window and small < 20 * 2**30
    with pytest.raises(ResourceError, match=r"1 layers, a vocabulary of 64,000 .* GiB of memory, found 4.0 GiB free"):
        fitted(4)


@pytest.mark.usefixtures("group")
def test_what_is_no_number_never_holds() -> None:
    good, bad, worse = torch.ones(2, 3), torch.full((2, 3), math.nan), torch.full((2, 3), math.inf)
    here = torch.ones(2, 3, dtype=torch.bool)
    for x in (bad, worse):
        assert of_parameters({"x": x}, {"x": good}).size == math.inf
        assert of_parameters({"x": good}, {"x": x}).size == math.inf
        assert of_parameters({}, {"x": good}).size == math.inf
        assert ratio(float(x[0, 0]), 1.0) == ratio(1.0, float(x[0, 0])) == math.inf
        lost = layout.Deviation(math.nan, x, x, {"x": math.nan})
        unit = layout.Rounding.of([lost, lost], "bf16")
        found = lost.in_units(unit)
        checks = layout.judged(found, here, layout.SPREAD, "bf16", "itself")
        assert {one.verdict for one in checks} == {"fails"}
        zero = layout.Deviation(1.0, good, good, {"x": 1.0}).in_units(unit)
        assert {one.verdict for one in layout.judged(zero, here, layout.SPREAD, "bf16", "itself")} == {"fails"}


def test_a_failure_is_no_certificate(trials: dict[str, Trial], tmp_path: Path) -> None:
    holds = Check("layout", "one", "other", "holds", 0.0, 0.0)
    fails = Check(
        "layout", "one", "other", "fails", math.inf, 1e-9, rank=1, parameter="k", note="from window 0 token 3"
    )
    trial = trials["ring"]
    for checks, good in (
        ([holds], True),
        ([holds, fails], False),
        ([not_run("layout", "one", "other", "because")], False),
    ):
        made = Certificate(trial.recipe, trial, 2, [], checks, {"layout": "mesh.sp = 2"}, 1.0, 1 << 30)
        made.write(tmp_path / "c.json")
        written = json.loads((tmp_path / "c.json").read_text())
        assert made.holds is good and written["verdict"] == ("holds" if good else "fails")
        assert made.lines()[0].startswith("CERTIFIED" if good else "NOT CERTIFIED")
        assert made.table().row_count == 1 + len(checks)


def test_a_table_has_120_columns_and_all_of_every_name(
    trials: dict[str, Trial], capsys: pytest.CaptureFixture[str]
) -> None:
    """Also of a failure on every rank, where there is no terminal."""
    name = f"optimizer.layers.1.mixer.{'decay.' * 12}log_slope.exp_avg_sq"
    unit, note = "one process, one segment, fp64; in roundings of one process", "from window 0 token 3 to token 4093"
    fails = Check("layout", "gradient of every parameter, fp32", unit, "fails", 7.0, 4.0, 3, name, 0, 3, note)
    checks = [fails._replace(verdict="holds", note=""), fails, not_run("export", "logits", "ours", "nothing [there]")]
    show(Certificate(trials["ring"].recipe, trials["ring"], 2, [], checks, {}, 1.0, 1 << 30).table())
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) == 120
    cells = [line.strip("│").split("│")[0].strip() for line in lines if line.startswith("│")]
    assert cells[0] == f"layout, with: {unit}" and "export, with: ours logits; nothing [there]" in " ".join(cells)
    assert "".join(cells).count(name) == 2 and note in " ".join(cells)
