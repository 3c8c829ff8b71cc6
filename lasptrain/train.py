"""The training loop. Every rank runs `train` inside an initialised process group."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lasptrain import checkpoint, links, ops, plan, stream
from lasptrain import recipe as recipes
from lasptrain.data.dataset import TokenDataset
from lasptrain.data.loader import MicroBatch, SliceLoader
from lasptrain.data.source import open_dataset
from lasptrain.errors import NumericalError
from lasptrain.eval.main import while_training
from lasptrain.eval.validation import Validation, validate
from lasptrain.loss import IGNORED
from lasptrain.metrics import Metrics, mfu, peak_rate
from lasptrain.models.language_model import LanguageModel, initial_values
from lasptrain.optim import build_optimizer, clip_gradients, learning_rate, set_learning_rate
from lasptrain.parallel import mesh as meshes
from lasptrain.parallel.attention import Attention
from lasptrain.parallel.mesh import Mesh, sum_over_ranks
from lasptrain.parallel.scan import SCANS
from lasptrain.parallel.shard import parallelize, reshard, set_gradient_sync, shard_optimizer
from lasptrain.profile import profiled
from lasptrain.recipe import Recipe
from lasptrain.summary import gather, summarize

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Job:
    """What a run is made of, on this rank."""

    recipe: Recipe  # its vocabulary is a number
    device: torch.device
    mesh: Mesh
    dataset: TokenDataset
    model: LanguageModel
    called: nn.Module  # the model as it is spread over the mesh
    optimizer: Optimizer
    loader: SliceLoader
    flops_per_token: int
    peak: float | None  # FLOP/s of this device in bf16, where it is known


def train(recipe: Recipe, run: Path) -> None:
    """Train `recipe` in the folder `run`, from its newest checkpoint on, to the last step.

    Collective over all ranks. Raises the errors of `lasptrain.errors`; the newest checkpoint then stays as it was.
    """
    job = build(recipe)
    recipe = job.recipe
    meta = identity(job)
    speaks = job.mesh.flat.get_rank() == 0
    if speaks:
        checkpoint.sweep(run)
    loaded = checkpoint.load(run, job.model, job.optimizer, meta)
    start, steps = (0 if loaded is None else loaded.step), recipe.train.steps
    validation = None
    with Metrics(run, steps=steps, start=start, speaks=speaks) as metrics:
        for step in range(start, steps):
            chosen = speaks and step + 1 in recipe.train.profile
            with profiled(run / "profile", step + 1, job.device) if chosen else nullcontext():
                values = one_step(job, step)
            metrics.log(step + 1, **values)
            if _due(recipe.eval.every, step + 1, steps):
                validation = evaluate(job)
                metrics.log_eval(step + 1, **validation.scalars(), **ask(job))
            if _due(recipe.checkpoint.every, step + 1, steps):
                checkpoint.save(run, step + 1, job.model, job.optimizer, meta, recipe.checkpoint.keep)
                metrics.committed(step + 1)
    job.loader.close()
    summarize(job.model, recipe, job.dataset, run, validation or evaluate(job), speaks)


def _due(every: int, step: int, steps: int) -> bool:
    return step == steps or (every > 0 and step % every == 0)


def build(recipe: Recipe, attention: Callable[[str, Mesh], Attention] | None = None) -> Job:
    """Mesh, data, model and optimizer of this rank; the model has its initial weights.

    `attention` makes what takes the place of the recipe's scan, from the name of a kernel, for comparisons.
    """
    device = meshes.device()
    dp, sp = recipes.resolve_mesh(recipe, meshes.world_size())
    mesh = meshes.build(dp, sp)
    dataset = open_dataset(recipe.data)
    recipe = recipes.with_vocabulary(recipe, dataset.vocab_size)
    vocab = recipes.resolve_vocabulary(recipe.model, dataset.vocab_size)
    available = meshes.smallest(meshes.free_memory(device)) if device.type == "cuda" else None
    recipe = plan.with_reduction(recipe, vocab, dp, sp, available)
    segment = plan.choose_segment(recipe, vocab, dp, sp, available)
    recipe = links.with_scan(recipe, sp, segment)
    kernel = ops.select(recipe.train.kernel, device)
    scanning = attention or (lambda kernel, mesh: Attention(kernel, SCANS[recipe.mesh.scan](mesh.sp_group, device)))
    with torch.device("meta"):
        model = language_model(recipe, scanning(kernel, mesh))
    called = parallelize(
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
        called,
        shard_optimizer(build_optimizer(model, recipe.optim), mesh, recipe.parallel.data_parallel),
        loader,
        plan.flops_per_token(recipe.model, vocab),
        peak_rate(torch.cuda.get_device_name(device)) if device.type == "cuda" else None,
    )


def open_loader(
    recipe: Recipe, dataset: TokenDataset, mesh: Mesh, split: str, window: int, batch: int, segment: int
) -> SliceLoader:
    """This rank's slices of a split, `batch` windows of `window` tokens at a time; only training is read ahead."""
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
    )


def language_model(recipe: Recipe, attention: Attention) -> LanguageModel:
    """The recipe's model, its parameters in at least fp32."""
    dtype = DTYPES[recipe.train.precision]
    model = LanguageModel(recipe.model, recipe.data.window, attention, dtype=dtype, loss_chunk=recipe.train.loss_chunk)
    return model.to(torch.promote_types(dtype, torch.float32))


def identity(job: Job) -> dict[str, Any]:
    """What a checkpoint must agree with to be continued: the data and its order, the model and its decays."""
    recipe = job.recipe
    return {
        "model": recipe.model.model_dump(mode="json"),
        "decays": job.model.decays().tolist(),
        "dataset": job.dataset.fingerprint,
        "order": {
            "seed": recipe.data.seed,
            "window": recipe.data.window,
            "batch": recipe.train.batch,
            "reset_at_documents": recipe.data.reset_at_documents,
        },
    }


def one_step(job: Job, step: int) -> dict[str, float | int | None]:
    """Update number `step` (0 is the first) and its metrics. Raises NumericalError before anything has changed."""
    recipe, began = job.recipe, time.perf_counter()
    micro_batches = [tuple(piece.to(job.device, non_blocking=True) for piece in m) for m in job.loader.step(step)]
    data_wait = time.perf_counter() - began
    loss, norm = accumulate(job, micro_batches)
    lr = learning_rate(recipe.optim, recipe.train.steps, step)
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        windows = job.loader.window_starts(step)
        raise NumericalError(
            f"step {step + 1}: loss {float(loss)}, gradient norm {float(norm)}; expected finite numbers, try a lower "
            f"optim.lr. The weights are those of step {step}; the windows of step {step + 1} start at tokens {windows}"
        )
    set_learning_rate(job.optimizer, lr)
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    tokens = recipe.train.batch * recipe.data.window
    seconds = time.perf_counter() - began
    return {
        "loss": float(loss),
        "lr": lr,
        "grad_norm": float(norm),
        "tokens": (step + 1) * tokens,
        "tokens_per_s": tokens / seconds,
        "tokens_per_s_per_gpu": tokens / seconds / job.mesh.size,
        "mfu": mfu(tokens / seconds / job.mesh.size, job.flops_per_token, job.peak),
        "memory_peak": meshes.peak_memory(job.device),
        "data_wait": data_wait,
        "step_time": seconds,
    }


def accumulate(job: Job, micro_batches: list[MicroBatch]) -> tuple[Tensor, Tensor]:
    """Gradients of the global batch, clipped. Returns its mean loss and the norm the gradients had, on every rank.

    The loss is the sum over all valid labels of the global batch divided by their number, whatever the layout;
    gradients are averaged over ranks, so each rank scales its part by their number.
    """
    valid = sum(
        ((piece.labels != IGNORED).sum() for m in micro_batches for piece in m), torch.zeros((), device=job.device)
    )
    total = sum_over_ranks(valid)
    loss = torch.zeros((), dtype=torch.float64, device=job.device)
    parallel = job.recipe.parallel
    always, gathered = parallel.reduce == "segment", parallel.data_parallel == "zero2"
    synchronise = partial(set_gradient_sync, job.called, always=always, gathered=gathered)
    for number, micro_batch in enumerate(micro_batches):
        synchronise(False)
        last = number == len(micro_batches) - 1
        loss += stream.backward(
            job.called,
            job.recipe.model.layers,
            micro_batch,
            job.mesh.size / total,
            (lambda: synchronise(True)) if last else (lambda: None),
        )
    norm = clip_gradients(job.model, job.recipe.optim.clip)
    return sum_over_ranks(loss) / total, norm


def ask(job: Job) -> dict[str, float]:
    """How the model does at `eval.tasks`; every rank gathers the weights, those of an sp group read together."""
    whole = gather(job.model, True) if job.recipe.eval.tasks else None
    return {} if whole is None else while_training(whole, job.recipe, job.mesh)


def evaluate(job: Job) -> Validation:
    """Loss on the held-out windows of `eval.windows`."""
    recipe = job.recipe
    window = recipe.eval.window or recipe.data.window
    segment = window if window % job.loader.segment else job.loader.segment
    batch = job.mesh.length("dp") * recipe.train.micro_batch
    held_out = open_loader(recipe, job.dataset, job.mesh, "validation", window, batch, segment)
    rounds = held_out.validation_rounds(recipe.eval.windows)
    slices = (held_out.validation_slices(i, recipe.eval.windows) for i in range(rounds))
    found = validate(
        job.called,
        (tuple(piece.to(job.device) for piece in segments) for segments in slices),
        job.mesh,
        window,
        job.dataset.token_bytes.to(job.device),
    )
    reshard(job.model)
    return found
