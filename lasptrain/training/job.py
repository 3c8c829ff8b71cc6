"""A run on this rank: mesh, data, model, optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from data_tools.dataset import open_dataset
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
from lasptrain.recipe.resolve import resolve_mesh, resolve_vocabulary, with_vocabulary
from lasptrain.recipe.schema import Recipe
from lasptrain.training.guard import Guard
from lasptrain.training.health import Health
from lasptrain.training.optimizer import build_optimizer


@dataclass(frozen=True)
class Job:
    """The parts of a run on this rank."""

    recipe: Recipe  # its vocabulary is a number
    device: torch.device
    mesh: Mesh
    dataset: TokenDataset
    model: LanguageModel
    wrapped: nn.Module  # the model as spread over the mesh
    optimizer: Optimizer
    loader: SliceLoader
    flops_per_token: int
    peak: float | None  # FLOP/s of this device in bf16 by its data sheet, where it is known
    guard: Guard
    health: Health | None = None  # to take signals in a step, where they are due
    given: Recipe | None = None  # the recipe before `auto` was decided, where it was another
    on_segment: Callable[[], None] = lambda: None  # called at every segment, by all ranks equally often; may raise


def build(
    recipe: Recipe, attention: Callable[[str, Mesh], ShardedRecurrence] | None = None, run: Path | None = None
) -> Job:
    """Build mesh, data, model and optimizer of this rank; the model has its initial weights.

    With `run`, the data are those it was trained on.
    `attention` makes another recurrence than the recipe's, from a kernel's name and the mesh, for comparisons.
    """
    device = meshes.device()
    dp, sp = resolve_mesh(recipe, meshes.world_size())
    mesh = meshes.build(dp, sp)
    dataset = open_dataset(recipe.data, run=run)
    recipe = with_vocabulary(recipe, dataset.vocab_size)
    vocab = resolve_vocabulary(recipe.model, dataset.vocab_size)
    available, host = _free_memory(device)
    recipe = plan.with_reduction(recipe, vocab, dp, sp, available)
    recipe = plan.with_prefix(recipe, vocab, dp, sp, available, host)
    segment = plan.choose_segment(recipe, vocab, dp, sp, available)
    recipe = with_scan(recipe, mesh, segment, device)
    kernel = ops.select(recipe.train.kernel, device, recipe.model.kernels)
    scanning = attention or (
        lambda kernel, mesh: ShardedRecurrence(
            kernel,
            SCANS[recipe.mesh.scan](mesh.sp_group, device),
            recipe.parallel.prefix,
            recipe.parallel.outputs == "host",
        )
    )
    model = language_model(recipe, scanning(kernel, mesh))
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
    loader = open_loader(recipe, dataset, mesh, "train", recipe.data.window, recipe.train.batch, segment)
    return Job(
        recipe,
        device,
        mesh,
        dataset,
        model,
        wrapped,
        shard_optimizer(build_optimizer(model, recipe.optim), mesh, recipe.parallel.data_parallel),
        loader,
        plan.flops_per_token(recipe.model, vocab, recipe.data.window),
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


def open_loader(
    recipe: Recipe, dataset: TokenDataset, mesh: Mesh, split: str, window: int, batch: int, segment: int
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
        prefetch=split == "train",
        pin=split == "train" and meshes.device().type == "cuda",
    )


def language_model(recipe: Recipe, attention: ShardedRecurrence) -> LanguageModel:
    """Return the recipe's model, its parameters in at least fp32."""
    train = recipe.train
    return on_meta(
        recipe.model, recipe.data.window, attention, dtype=DTYPES[train.precision], loss_chunk=train.loss_chunk
    )


def checkpoint_meta(job: Job) -> dict[str, Any]:
    """Return JSON saved beside tensors: fingerprint, guard state, and the recipe by which the step was trained."""
    recipe = (job.given or job.recipe).model_dump(mode="json")
    return fingerprint_of(job) | {"guard": job.guard.state(), "steps": job.recipe.train.steps, "recipe": recipe}


def fingerprint_of(job: Job) -> dict[str, Any]:
    """Return what a checkpoint must agree with to be continued: the data and its order, the model and its decays."""
    recipe = job.recipe
    return {
        "model": recipe.model.model_dump(mode="json"),
        "decays": job.model.decays().tolist(),
        "dataset": job.dataset.fingerprint,
        "content": job.dataset.content,
        "order": {
            "seed": recipe.data.seed,
            "window": recipe.data.window,
            "batch": recipe.train.batch,
            "reset_at_documents": recipe.data.reset_at_documents,
        },
    }


def validation_loader(job: Job) -> SliceLoader:
    """Open this rank's slices of held-out text. Raises DataError where it is shorter than a window."""
    recipe = job.recipe
    window = recipe.eval.window or recipe.data.window
    segment = window if window % job.loader.segment else job.loader.segment
    batch = job.mesh.length("dp") * recipe.train.micro_batch
    return open_loader(recipe, job.dataset, job.mesh, "validation", window, batch, segment)
