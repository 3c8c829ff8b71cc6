"""The training loop. Every rank runs `train` inside an initialised process group."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from data_tools.prepared import check_held_out, sources
from data_tools.remembered import other_tokenizer
from lasptrain.checkpoint import order
from lasptrain.checkpoint.load import load, load_origin
from lasptrain.checkpoint.saver import Saver
from lasptrain.checkpoint.steps import remove_partial
from lasptrain.console.tables import show
from lasptrain.console.words import times
from lasptrain.cost import plan
from lasptrain.data.loader import MicroBatch
from lasptrain.errors import NumericalError, ReplicasError, ResourceError, Stopped
from lasptrain.eval import report
from lasptrain.eval.during_training import evaluate_in_training
from lasptrain.eval.runner import Record
from lasptrain.eval.summary import epochs, gather, summarize
from lasptrain.ops.cross_entropy import IGNORED
from lasptrain.parallel import mesh as meshes
from lasptrain.parallel import replicas
from lasptrain.parallel.collectives import all_reduce_max, all_reduce_sum
from lasptrain.parallel.mesh import Mesh
from lasptrain.parallel.shard import reshard, set_gradient_sync
from lasptrain.parallel.signals import Signals
from lasptrain.process import signals, watchdog
from lasptrain.recipe.schema import Recipe
from lasptrain.recipe.sections import Parallel
from lasptrain.run import auto
from lasptrain.run.folder import changes
from lasptrain.run.metrics import Metrics, Value, mfu
from lasptrain.run.trackers import tracking
from lasptrain.training import segments
from lasptrain.training.health import due
from lasptrain.training.job import Job, build, checkpoint_meta, fingerprint_of, validation_loader
from lasptrain.training.optimizer import clip_gradients, jump, learning_rate, set_learning_rate
from lasptrain.training.profiler import profiled
from lasptrain.training.stragglers import StragglerDetector
from lasptrain.training.validation import Validation, validate


def train(recipe: Recipe, run: Path) -> None:
    """Train `recipe` in the folder `run`, from its newest checkpoint on, to the last step.

    Collective over all ranks. Raises the errors of `lasptrain.errors`; what was committed stays. Where Stopped or
    NumericalError ends the training, the newest step has been saved.
    """
    ranks = dict.fromkeys(f"{span.recipe.mesh.dp} × {span.recipe.mesh.sp}" for span in recipe.spans())
    place = f"{', '.join(ranks)} × {meshes.device_name()}"
    given = recipe
    job = replace(build(auto.load(recipe, run, place), run=run), given=given)
    is_main = job.mesh.flat.get_rank() == 0
    if is_main:
        parallel = job.recipe.parallel
        choices = {key: getattr(parallel, key) for key in ("reduce", "prefix", "outputs")}
        segments = [stage.loader.segment for stage in job.stages]
        choices |= {"segment": segments if recipe.stages else segments[0], "scan": job.recipe.mesh.scan}
        auto.store(recipe, run, place, choices)
    recipe = job.recipe
    # Held-out text that does not fit is refused now, not after the last step.
    check_held_out(recipe, [part.manifest for part in job.parts])
    if recipe.eval.windows:
        for stage in job.stages:
            validation_loader(replace(job, stage=stage))
    if is_main:
        remove_partial(run)
    loaded = load(run, job.model, job.optimizer, partial(fingerprint_of, job))
    start, there, changed, origin = 0, recipe.train.steps, {}, None
    if loaded is None:
        if (begun := load_origin(run, job.model, job.optimizer, fingerprint_of(job, 0))) is not None:
            origin, tokens = begun
            job = replace(job, before=tokens)
    else:
        start = loaded.step
        there = known if isinstance(known := loaded.meta.get("steps"), int) else there
        changed = changes(loaded.meta.get("recipe", {}), given)
        job.guard.restore(loaded.meta.get("guard", {}))
        job = replace(job, before=order.before(run, loaded.meta))
    saver = Saver(run, job.model, job.optimizer, recipe.checkpoint, start if loaded else None)
    steps = recipe.train.steps
    if is_main:
        if origin is not None:
            show(f"begins with {origin.what}")
            show(*other_tokenizer(origin.run, recipe.data, job.dataset.tokenizer_sha256))
        show(*(f"{key}: {old} up to step {start}, {new} from there" for key, (old, new) in changed.items()))
        show(*beginning(job, start, there))
        if start >= steps:
            show(f"nothing to train: step {start} is the newest of {run}, train.steps is {steps}")
    with tracking(recipe, run, start, is_main) as trackers:
        reports = Metrics(run, steps=steps, start=start, is_main=is_main, trackers=trackers)
        with signals.deferred(), reports as metrics:
            if origin is not None:
                metrics.begun(start, "origin", run=origin.run.name, from_step=origin.step, optimizer=origin.optimizer)
            if changed:
                metrics.begun(start, "changed", keys=changed)
            validation = run_steps(
                replace(job, on_segment=partial(on_segment, watchdog.STARTUP_GRACE)), run, start, saver, metrics
            )
        watchdog.heartbeat(watchdog.STARTUP_GRACE)
        job.close()
        held_out = validation or evaluate(job)
        told = summarize(job.model, recipe, job.parts, job.dataset, run, held_out, is_main, max(start, steps))
        for name, rows in told.items():
            trackers.table(steps, name, rows)


def beginning(job: Job, start: int, there: int) -> Iterator[str]:
    """Yield lines about a run that continues from step `start`, where `there` was `train.steps` until now."""
    recipe = job.recipe
    yield from (f"training reads {line}" for line in epochs(recipe, job.parts))
    optim = job.at(start).stage.span.recipe.optim
    if start < recipe.train.steps and (message := jump(optim, there, recipe.train.steps, start)):
        yield message
    if job.device.type == "cuda":
        promised = "unknown, so there is none" if job.peak is None else f"{job.peak / 1e12:,g} TFLOP/s"
        yield f"MFU is of the data sheet's dense bf16 rate of {meshes.device_name()}: {promised}"


def out_of_memory(job: Job, error: torch.OutOfMemoryError) -> ResourceError:
    """Return what is raised for a GPU's out-of-memory error: it names what takes memory and what would need less."""
    vocab, (dp, sp) = job.dataset.vocab_size, (job.mesh.length("dp"), job.mesh.length("sp"))
    advice = plan.oom_advice(job.stage.span.recipe, vocab, dp, sp, job.loader.segment)
    first = str(error).splitlines()[0]
    peak = meshes.peak_memory(job.device) / 2**30
    return ResourceError(f"out of memory after {peak:.1f} GiB: {first} {advice}")


def run_steps(job: Job, run: Path, start: int, saver: Saver, metrics: Metrics) -> Validation | None:
    """Run every step from `start` on; return the last validation, if any. Ends with the newest step saved."""
    recipe, done, validation = job.recipe, start, None
    steps = recipe.train.steps
    is_main = job.mesh.flat.get_rank() == 0
    stragglers = StragglerDetector(job.device)
    try:
        for step in range(start, steps):
            job = enter_stage(job, step, metrics)
            if is_main:
                begun, read = job.loader.epochs_begun(step), sources(job.stage.span.recipe.data)
                metrics.epochs(step + 1, {read[number][0]: epoch for number, epoch in begun.items()})
            job = replace(job, health=due(recipe, step + 1))
            chosen = is_main and step + 1 in recipe.train.profile
            with profiled(run / "profile", step + 1, job.device) if chosen else nullcontext():
                values = train_step(job, step) | {"checkpoint_stall": saver.stall()}
            done = step + 1
            job = replace(job, on_segment=partial(on_segment, recipe.launch.hang))
            slowest = stragglers.observe(float(values["data_wait"] or 0), float(values["step_time"] or 0))
            if slowest is not None:
                values |= {"slowest_rank": slowest.rank, "slowest_ratio": slowest.ratio}
                metrics.straggler(done, stragglers.straggler(slowest))
            metrics.log(done, **values)
            if job.health is not None:
                metrics.log_health(done, **job.health.read())
            if job.guard.verdict != "accept":
                handle_bad_step(job, run, done, values, saver, metrics)
            if _due(recipe.eval.every, done, steps) and (recipe.eval.windows or recipe.eval.tasks):
                validation = evaluate(job)
                watchdog.heartbeat(watchdog.STARTUP_GRACE)
                found = ask(job)
                metrics.log_eval(done, **(validation.scalars() if validation else {}), **report.scalars(found))
                metrics.table(done, "eval/tasks", report.rows(found))
            if _due(recipe.checkpoint.every, done, steps):
                save(job, saver, done)
            saver.poll()
            metrics.committed(saver.newest)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(job, error) from error
    except ReplicasError:
        finish(saver, metrics)
        raise
    except (Stopped, NumericalError):
        watchdog.heartbeat(watchdog.STARTUP_GRACE)
        reshard(job.model)
        saver.wait()
        if saver.newest != done:
            save(job, saver, done)
        finish(saver, metrics)
        raise
    finish(saver, metrics)
    if number := all_reduce_max(signals.pending()):
        raise signals.interruption(number, signals.ALL_SAVED)
    return validation


def enter_stage(job: Job, step: int, metrics: Metrics) -> Job:
    """Return the job of the stage that update `step` is in, whose first update may take as long as the very first."""
    there = job.at(step)
    span = there.stage.span
    if job.recipe.stages and step == span.first:
        recipe = span.recipe
        what = f"{times(recipe.train.batch, 'window')} of {recipe.data.window:,} tokens a step"
        metrics.stage(step + 1, span.number, f"{what}, learning rate {recipe.optim.lr:g} by its schedule")
    if there is job:
        return job
    job.model.attention.share_as(there.stage.recurrence)
    return replace(there, on_segment=partial(on_segment, watchdog.STARTUP_GRACE))


def save(job: Job, saver: Saver, step: int) -> None:
    """Begin to save the state after `step` updates. Raises ReplicasError where ranks do not agree on it."""
    replicas.compare(job.model, job.mesh, job.recipe.parallel.data_parallel, step)
    saver.save(step, checkpoint_meta(job, step))


def finish(saver: Saver, metrics: Metrics) -> None:
    """Let the last save end."""
    watchdog.heartbeat(watchdog.STARTUP_GRACE)
    saver.wait(last=True)
    saver.close()
    metrics.committed(saver.newest)


def on_segment(silence: float) -> None:
    """Send a heartbeat; raise Stopped on all ranks if any was asked to stop. Called at every segment."""
    watchdog.heartbeat(silence)
    number = all_reduce_max(signals.pending())
    if number:
        raise signals.interruption(number, "the newest step is saved, the same command continues")


def handle_bad_step(job: Job, run: Path, step: int, values: dict[str, Value], saver: Saver, metrics: Metrics) -> None:
    """Record the guard's verdict on a step, and go back to older weights if it is `rollback`."""
    guard = job.guard
    numbers = {key: values[key] for key in ("loss", "grad_norm")}
    metrics.log_bad_step(step, guard.verdict, guard.reason, job.loader.window_starts(step - 1), **numbers)
    if guard.verdict == "rollback":
        saver.wait()
        until = step - job.recipe.guard.back
        if load(run, job.model, job.optimizer, partial(fingerprint_of, job), until=until) is None:
            raise NumericalError(
                f"step {step}: {guard.reason}; guard.nonfinite or guard.spike: rollback found no checkpoint of step "
                f"{until} or before; expected one, raise checkpoint.keep or lower guard.back"
            )
        save(job, saver, step)  # else the next start would take the abandoned weights


def _due(every: int, step: int, steps: int) -> bool:
    return step == steps or (every > 0 and step % every == 0)


def train_step(job: Job, step: int) -> dict[str, Value]:
    """Run update `step` (0 is the first), applied if the guard lets it pass, and return its metrics.

    Raises NumericalError or, from `job.on_segment`, Stopped before anything has changed.
    """
    span, began = job.stage.span, time.perf_counter()
    recipe = span.recipe
    micro_batches = [tuple(piece.to(job.device, non_blocking=True) for piece in m) for m in job.loader.step(step)]
    data_wait = time.perf_counter() - began
    losses, norm = accumulate(job, micro_batches)
    loss, z_loss = losses.tolist()
    found = {"loss": loss, "grad_norm": float(norm)}
    lr = learning_rate(recipe.optim, recipe.train.steps, step)
    verdict = job.guard.judge(found["loss"], found["grad_norm"])
    if verdict == "stop":
        lower = f"a lower optim.lr, such as --set optim.lr={recipe.optim.lr / 2:.2g}"
        if recipe.optim.lr != job.recipe.optim.lr:
            lower = f"a lower stages[{span.number}].lr, such as {recipe.optim.lr / 2:.2g}"
        raise NumericalError(
            f"step {step + 1}: {job.guard.reason}; go on with --set {job.guard.advice} or {lower}. "
            f"The weights are those of step {step}; the windows of step {step + 1} start at tokens "
            f"{job.loader.window_starts(step)}"
        )
    if verdict in ("accept", "warn"):
        set_learning_rate(job.optimizer, lr)
        job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    tokens = recipe.train.batch * recipe.data.window
    before = sum(stage.span.tokens for stage in job.stages[: span.number])
    seconds = time.perf_counter() - began
    return {
        **found,
        **({"stage": span.number} if job.recipe.stages else {}),
        **({"z_loss": z_loss} if recipe.train.z_loss else {}),
        "lr": lr,
        "tokens": before + (step + 1 - span.first) * tokens,
        "tokens_per_s": tokens / seconds,
        "tokens_per_s_per_gpu": tokens / seconds / job.mesh.size,
        "mfu": mfu(tokens / seconds / job.mesh.size, job.stage.flops_per_token, job.peak),
        "memory_peak": meshes.peak_memory(job.device),
        "data_wait": data_wait,
        "step_time": seconds,
    }


def accumulate(job: Job, micro_batches: list[MicroBatch]) -> tuple[Tensor, Tensor]:
    """Compute clipped gradients of the global batch; return mean losses and norm before clipping, on every rank."""
    recipe, health = job.recipe, job.health
    layers, parallel = recipe.model.layers, recipe.parallel
    signals = None if health is None else health.signals
    losses = gradients(job.wrapped, layers, job.mesh, parallel, micro_batches, job.on_segment, signals)
    if health is not None:
        health.gradients(job.model)
    return losses, clip_gradients(job.model, recipe.optim.clip)


def gradients(
    wrapped: nn.Module,
    layers: int,
    mesh: Mesh,
    parallel: Parallel,
    micro_batches: list[MicroBatch],
    on_segment: Callable[[], None] = lambda: None,
    signals: Sequence[Signals] | None = None,
) -> Tensor:
    """Add the gradients of the global batch's mean loss to the parameters of `wrapped`.

    Returns its two parts, [cross-entropy, z-loss] fp64.
    The loss is the sum over all valid labels of the global batch divided by their number, whatever the layout;
    gradients are averaged over ranks, so each rank scales its part by their number. Collective over all ranks.
    `signals`, of each layer and of the head, are reported to.
    """
    device = micro_batches[0][0].labels.device
    valid = torch.zeros((), dtype=torch.int64, device=device)
    for piece in (piece for micro_batch in micro_batches for piece in micro_batch):
        valid += (piece.labels != IGNORED).sum()
    total = all_reduce_sum(valid).double()  # an integer divided by an integer would be fp32
    losses = torch.zeros(2, dtype=torch.float64, device=device)
    always, gathered = parallel.reduce == "segment", parallel.data_parallel == "zero2"
    synchronise = partial(set_gradient_sync, wrapped, always=always, gathered=gathered)
    for number, micro_batch in enumerate(micro_batches):
        synchronise(False)
        last = number == len(micro_batches) - 1
        before_last = (lambda: synchronise(True)) if last else (lambda: None)
        losses += segments.backward(wrapped, layers, micro_batch, mesh.size / total, before_last, on_segment, signals)
    return all_reduce_sum(losses) / total


def ask(job: Job) -> list[Record]:
    """Return the results of `eval.tasks`; every rank gathers the weights, those of an sp group read together."""
    whole = gather(job.model, True) if job.recipe.eval.tasks else None
    return [] if whole is None else evaluate_in_training(whole, job.recipe, job.mesh)


def evaluate(job: Job) -> Validation | None:
    """Return the loss on `eval.windows` held-out windows; None if there are to be none."""
    if not job.recipe.eval.windows:
        return None
    loader, windows = validation_loader(job), job.recipe.eval.windows
    rounds = loader.validation_rounds(windows)

    def slices() -> Iterator[MicroBatch]:
        for index in range(rounds):
            job.on_segment()
            yield tuple(piece.to(job.device) for piece in loader.validation_slices(index, windows))

    found = validate(job.wrapped, slices(), job.mesh, loader.window, job.dataset.token_bytes.to(job.device))
    reshard(job.model)
    return found
