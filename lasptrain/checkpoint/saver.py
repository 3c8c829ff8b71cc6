"""Saving, at once or beside training."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.optim import Optimizer

from lasptrain.checkpoint.steps import begin, commit, delete, expired, log
from lasptrain.checkpoint.table import Json
from lasptrain.checkpoint.tensors import present, tensors_of, write_files
from lasptrain.checkpoint.votes import Group, reason_of, vote, vote_of_first
from lasptrain.errors import CheckpointError, ResourceError
from lasptrain.recipe.sections import Checkpoint
from lasptrain.run.folder import CHECKPOINTS

TIMEOUT = timedelta(minutes=30)  # of a rank that writes, when it waits for another


def save(
    run: Path, step: int, tensors: dict[str, Tensor], meta: Json, keep: int, keep_every: int = 0, group: Group = None
) -> None:
    """Commit the state after `step` updates as RUN/checkpoints/step-N, then delete all but the newest `keep` steps.

    Multiples of `keep_every` stay too. Collective over `group` (default: all ranks); returns once it is committed.
    `tensors` are those `present` of `tensors_of` model and optimizer, `meta` is any JSON object. Raises the same
    CheckpointError on every rank if any failed; then nothing has changed on disk.
    """
    rank = dist.get_rank(group)
    what = f"{run}: step {step} not saved"
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    folder = run / CHECKPOINTS / vote_of_first(what, lambda: begin(run, step, size), group)
    try:
        tables = vote(what, lambda: write_files(folder, tensors, rank, group), group)
        files = {name: entry for table in tables for name, entry in table.items()}
        vote_of_first(what, lambda: commit(folder, step, meta, files, len(tables)), group)
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if rank == 0:
        try:
            delete(run, expired(run, keep, keep_every, step))
        except OSError as error:  # they are looked for again after the next save
            log.warning("%s: cannot look for steps to delete: %s", run, reason_of(error))


class Saver:
    """Saves a run while it trains on: `save` copies the state to host memory, a thread writes and commits the copy.

    The thread has a group of its own to talk over. One save at a time: the next one, and `wait`, first let it end.
    Collective over all ranks; `max_failures` saves in a row may fail.
    """

    def __init__(
        self, run: Path, model: nn.Module, optimizer: Optimizer, checkpoint: Checkpoint, newest: int | None
    ) -> None:
        self.newest = newest  # the step that was committed last
        self._run, self._model, self._optimizer, self._cfg = run, model, optimizer, checkpoint
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[None]] | None = None
        self._stage = StateDictStager(pin_memory=torch.cuda.is_available(), share_memory=False)
        self._failed = 0
        self._stall = 0.0

    def save(self, step: int, meta: Json) -> None:
        """Begin to save `step` and return once its state may change. Raises ResourceError as `wait` does."""
        began = time.perf_counter()
        self.wait()
        tensors = self._stage.stage(present(tensors_of(self._model, self._optimizer)))
        cfg = self._cfg
        meta = json.loads(json.dumps(meta))  # may change too
        future = self._thread.submit(save, self._run, step, tensors, meta, cfg.keep, cfg.keep_every, self._group)
        self._pending = step, future
        self._stall += time.perf_counter() - began

    def stall(self) -> float:
        """Return the seconds for which `save` has held up training since the last call."""
        stall, self._stall = self._stall, 0.0
        return stall

    def wait(self, *, last: bool = False) -> None:
        """Wait for the save under way. Raises ResourceError where too many failed, or the `last` one did."""
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        try:
            future.result()
        except CheckpointError as error:
            self._failed += 1
            if last or self._failed > self._cfg.max_failures:
                times = f"{self._failed} saves in a row failed" if self._failed > 1 else "a save failed"
                raise ResourceError(f"{times}: {error}") from None
            if dist.get_rank() == 0:
                log.warning("%s; training goes on", error)
        else:
            self._failed, self.newest = 0, step

    def poll(self) -> None:
        """Set `newest` if a save has succeeded. Local, so a failure is left to the next collective call."""
        if self._pending is not None and self._pending[1].done() and self._pending[1].exception() is None:
            self.newest = self._pending[0]

    def close(self) -> None:
        """End the thread; a save must not be under way."""
        self._thread.shutdown()
