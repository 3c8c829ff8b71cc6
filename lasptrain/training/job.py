"""A run on this rank: mesh, data, model, optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from data_tools.dataset import open_stages
from lasptrain import ops
from lasptrain.cost import gpus, links, plan
from lasptrain.data.dataset import TokenDataset
from lasptrain.data.loader import SliceLoader
from lasptrain.models.language_model import LanguageModel, initial_values, on_meta
from lasptrain.ops.precision import DTYPES
from lasptrain.parallel import mesh as meshes
from lasptrain.parallel.autotune import fastest_scan
from lasptrain.parallel.collectives import all_reduce_min
from lasptrain.parallel.mesh import Mesh
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.parallel.scan import SCANS
from lasptrain.parallel.shard import parallelize, shard_optimizer
from lasptrain.recipe.resolve import resolve_meshes, resolve_vocabulary, with_vocabulary
from lasptrain.recipe.schema import Recipe, Span
from lasptrain.training.guard import Guard
from lasptrain.training.health import Health
from lasptrain.training.optimizer import build_optimizer


class JobStage(NamedTuple):
    """A stage of a run on this rank, or all of its steps."""

    span: Span
    dataset: TokenDataset
    mesh: Mesh
    recurrence: ShardedRecurrence  # on this mesh
    loader: SliceLoader
    flops_per_token: int


@dataclass(frozen=True)
class Job:
    """The parts of a run on this rank."""

    recipe: Recipe  # of the run; its vocabulary is a number
    device: torch.device
    dataset: TokenDataset  # that text is held out of
    parts: tuple[TokenDataset, ...]  # that are read, in the order of `every_source`
    model: LanguageModel
    wrapped: nn.Module  # the model as spread over the mesh
    optimizer: Optimizer
    stage: JobStage  # that it is in
    stages: tuple[JobStage, ...]  # all of them; one where the recipe has none
    peak: float | None  # FLOP/s of this device in bf16 by its data sheet, where it is known
    guard: Guard
    health: Health | None = None  # to take signals in a step, where they are due
    before: int | None = 0  # tokens that the runs it began with have read; None: not known
    given: Recipe | None = None  # the recipe before `auto` was decided, where it was another
    on_segment: Callable[[], None] = lambda: None  # called at every segment, by all ranks equally often; may raise

    def at(self, step: int) -> Job:
        """Return the job of the stage that update `step` (0 is the first) is in; behind the last, of that one."""
        stage = next((stage for stage in self.stages if step < stage.span.end), self.stages[-1])
        return self if stage is self.stage else replace(self, stage=stage)

    @property
    def mesh(self) -> Mesh:
        """The mesh of the stage that the job is in."""
        return self.stage.mesh

    @property
    def loader(self) -> SliceLoader:
        """The reader of the stage that the job is in."""
        return self.stage.loader

    def close(self) -> None:
        """End the threads that read data."""
        for stage in self.stages:
            stage.loader.close()


def build(
    recipe: Recipe, attention: Callable[[str, Mesh], ShardedRecurrence] | None = None, run: Path | None = None
) -> Job:
    """Build mesh, data, model and optimizer of this rank; the model has its initial weights.

    With `run`, the data are those it was trained on.
    `attention` makes another recurrence than the recipe's, from a kernel's name and the mesh, for comparisons.
    """
    device = meshes.device()
    pairs = resolve_meshes(recipe, meshes.world_size())
    dp, sp = pairs[plan.widest(recipe).number]
    built = _meshes(pairs)
    opened = open_stages(recipe, run=run)
    dataset = opened.dataset
    recipe = with_vocabulary(recipe, dataset.vocab_size)
    vocab = resolve_vocabulary(recipe.model, dataset.vocab_size)
    available, host = _free_memory(device)
    recipe = plan.with_reduction(recipe, vocab, dp, sp, available)
    recipe = plan.with_prefix(recipe, vocab, dp, sp, available, host)
    segments = [
        plan.choose_segment(span.recipe, vocab, *pair, available)
        for span, pair in zip(recipe.spans(), pairs, strict=True)
    ]
    widest = plan.widest(recipe)
    chosen = with_scan(widest.recipe, built[dp, sp], segments[widest.number], device)
    recipe = recipe.replace(mesh={"scan": chosen.mesh.scan})
    kernel = ops.select(recipe.train.kernel, device, recipe.model.kernels)
    scanning = attention or (
        lambda kernel, mesh: ShardedRecurrence(
            kernel,
            SCANS[recipe.mesh.scan](mesh.sp_group, device),
            recipe.parallel.prefix,
            recipe.parallel.outputs == "host",
        )
    )
    recurrences = {pair: scanning(kernel, mesh) for pair, mesh in built.items()}
    mesh = built[pairs[0]]
    model = language_model(recipe, copy.copy(recurrences[pairs[0]]))
    wrapped = parallelize(
        model,
        model.blocks,
        mesh,
        device,
        kind=recipe.parallel.data_parallel,
        mode=recipe.parallel.recompute,
        dtype=model.dtype,
        fuse=recipe.train.compile,
        values=initial_values(model, recipe.train.seed, device),
    )
    stages = tuple(
        JobStage(
            span,
            own,
            built[pair],
            recurrences[pair],
            _training_loader(span, own, built[pair], segment),
            plan.flops_per_token(recipe.model, vocab, span.recipe.data.window),
        )
        for span, own, pair, segment in zip(recipe.spans(), opened.stages, pairs, segments, strict=True)
    )
    return Job(
        recipe,
        device,
        dataset,
        opened.parts,
        model,
        wrapped,
        shard_optimizer(build_optimizer(model, recipe.optim, model.dtype), mesh, recipe.parallel.data_parallel),
        stages[0],
        stages,
        gpus.of(meshes.device_name()).peak,
        Guard(recipe.guard),
    )


def _free_memory(device: torch.device) -> tuple[int | None, int | None]:
    """Return the bytes free on every rank's GPU, and of its machine's memory; None where there is no GPU."""
    if device.type != "cuda":
        return None, None
    host, ranks = meshes.host_memory(), min(meshes.world_size(), torch.cuda.device_count())  # of one machine
    least = all_reduce_min(-1 if host is None else host // ranks)
    return all_reduce_min(meshes.free_memory(device)), None if least < 0 else least


def with_scan(recipe: Recipe, mesh: Mesh, segment: int, device: torch.device) -> Recipe:
    """Return the recipe with `mesh.scan: auto` decided: measured where GPUs share windows, else by rule."""
    if recipe.mesh.scan != "auto" or mesh.length("sp") == 1 or device.type != "cuda":
        return links.with_scan(recipe, mesh.length("sp"), segment)
    model = recipe.model
    shape = (recipe.train.micro_batch, model.heads, model.K, model.V)
    numbers = max(model.layer_state(layer).transition for layer in range(model.layers)) // model.heads
    linear = (*shape[:2], *{model.K: (model.K,), model.K**2: (model.K, model.K)}.get(numbers, ()))
    scan = fastest_scan(mesh.sp_group, device, shape, segment < recipe.data.window, linear=linear)
    return recipe.replace(mesh={"scan": scan})


def _training_loader(span: Span, dataset: TokenDataset, mesh: Mesh, segment: int) -> SliceLoader:
    window, batch = span.recipe.data.window, span.recipe.train.batch
    return open_loader(span.recipe, dataset, mesh, "train", window, batch, segment, span.first, span.end)


def _meshes(pairs: Iterable[tuple[int, int]]) -> dict[tuple[int, int], Mesh]:
    """Build each mesh once; parameters are spread over the same row of ranks in all of them."""
    built = {pair: meshes.build(*pair) for pair in dict.fromkeys(pairs)}
    flat = next(iter(built.values())).flat
    return {pair: mesh._replace(flat=flat) for pair, mesh in built.items()}


def open_loader(
    recipe: Recipe,
    dataset: TokenDataset,
    mesh: Mesh,
    split: str,
    window: int,
    batch: int,
    segment: int,
    first: int = 0,
    end: int | None = None,
) -> SliceLoader:
    """Open this rank's slices of a split, `batch` windows of `window` tokens at a time; only training prefetches."""
    return SliceLoader(
        dataset.split(split),
        window=window,
        batch=batch,
        micro_batch=recipe.train.micro_batch,
        dp=mesh.length("dp"),
        dp_rank=mesh.rank("dp"),
        sp=mesh.length("sp"),
        sp_rank=mesh.rank("sp"),
        segment=segment,
        seed=recipe.data.seed,
        bos=dataset.bos,
        reset=recipe.data.reset_at_documents,
        repeat=recipe.data.repeat and split == "train",
        first=first,
        end=end,
        prefetch=split == "train",
        pin=split == "train" and meshes.device().type == "cuda",
    )


def language_model(recipe: Recipe, attention: ShardedRecurrence) -> LanguageModel:
    """Return the recipe's model, its parameters in at least fp32."""
    train = recipe.train
    return on_meta(
        recipe.model,
        recipe.data.window,
        attention,
        dtype=DTYPES[train.precision],
        loss_chunk=train.loss_chunk,
        z_loss=train.z_loss,
    )


def checkpoint_meta(job: Job, step: int) -> dict[str, Any]:
    """Return JSON saved beside tensors: fingerprint, guard state, tokens before, and the recipe of the step."""
    recipe = (job.given or job.recipe).model_dump(mode="json")
    state = {"guard": job.guard.state(), "before": job.before, "steps": job.recipe.train.steps, "recipe": recipe}
    return fingerprint_of(job, step) | state


def fingerprint_of(job: Job, step: int) -> dict[str, Any]:
    """Return what a checkpoint of `step` updates must agree with to be continued: the data and its order, the model and
    its decays; of stages those that have begun.
    """
    recipe = job.recipe
    read: dict[str, Any] = {"window": recipe.data.window, "batch": recipe.train.batch}
    read |= job.dataset.mixed if step else {}
    if recipe.stages:
        read = {"stages": {str(s.span.number): _read(s) for s in job.stages if s.span.first < step}}
    return {
        "model": recipe.model.model_dump(mode="json"),
        "decays": job.model.decays().tolist(),
        "dataset": job.dataset.fingerprint,
        "content": job.dataset.content,
        "order": {
            "seed": recipe.data.seed,
            **read,
            "reset_at_documents": recipe.data.reset_at_documents,
        },
    }


def _read(stage: JobStage) -> dict[str, Any]:
    """Return what a stage reads."""
    recipe = stage.span.recipe
    numbers = {"steps": stage.span.steps, "window": recipe.data.window, "batch": recipe.train.batch}
    return numbers | {"content": stage.dataset.content} | stage.dataset.mixed


def validation_loader(job: Job) -> SliceLoader:
    """Open this rank's slices of held-out text, the same in all stages, read as the longest one reads its windows."""
    longest = job.stages[job.recipe.longest.number]
    recipe, segment = longest.span.recipe, longest.loader.segment
    window = recipe.eval.window or recipe.data.window
    segment = window if window % segment or segment % job.mesh.length("sp") else segment
    batch = job.mesh.length("dp") * recipe.train.micro_batch
    return open_loader(recipe, job.dataset, job.mesh, "validation", window, batch, segment)
