"""Steps read and written by one process without a process group."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state
from torch.optim import Optimizer

from lasptrain.checkpoint.steps import begin, commit, committed, folder_of, problems_of, read_manifest
from lasptrain.checkpoint.table import Json
from lasptrain.checkpoint.tensors import Planner, Reader, TensorSpec, Writer, poison, tensors_of
from lasptrain.checkpoint.votes import reason_of
from lasptrain.errors import CheckpointError
from lasptrain.files import sha256
from lasptrain.run.folder import CHECKPOINTS


class CheckpointReader:
    """The newest step of a run, read by one process tensor by tensor. Raises CheckpointError if it is not intact."""

    def __init__(self, run: Path) -> None:
        if not (steps := committed(run)):
            found = f"{run / CHECKPOINTS}: holds no checkpoint"
            raise CheckpointError(f"{found}; expected the folder of a run that has saved")
        self.step, self.folder = steps[0], folder_of(run, steps[0])
        manifest, problem = read_manifest(self.folder, self.step)
        files: Json = manifest.get("files", {})
        problems = [problem] if problem else []
        problems += [p for name, entry in files.items() for p in problems_of(self.folder / name, entry)]
        if problems:
            raise CheckpointError(f"{self.folder}: damaged, {'; '.join(problems)}")
        self.meta: Json = manifest["meta"]
        try:
            self._reader = Reader(self.folder, files)
        except (CheckpointError, OSError) as error:
            raise CheckpointError(f"{self.folder}: damaged, {reason_of(error)}") from None
        table = self._reader.table.state_dict_metadata
        ours = {key.removeprefix("model."): entry for key, entry in table.items() if key.startswith("model.")}
        self._specs = {name: TensorSpec.of(entry) for name, entry in ours.items()}
        chunks = {name: getattr(entry, "chunks", ()) for name, entry in ours.items()}
        self._whole = {name for name, pieces in chunks.items() if len(pieces) == 1}
        self.shapes = {name: spec.shape for name, spec in self._specs.items()}

    def read(self, name: str) -> Tensor:
        """Return a tensor of the model by its name there."""
        spec = self._specs[name]
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        planner = WholePlanner() if name in self._whole else Planner()
        if name not in self._whole:
            poison([tensor])
        with without_process_group():
            load_state({f"model.{name}": tensor}, storage_reader=self._reader, planner=planner, no_dist=True)
        return planner.found.to(spec.dtype) if isinstance(planner, WholePlanner) else tensor


class WholePlanner(Planner):
    """DCP's planner for one tensor that is stored as one: it is kept as it was read, not copied into a second one.

    What DCP takes for that second one is this object itself. `found`: the tensor.
    """

    found: Tensor
    shape: torch.Size

    def resolve_tensor(self, read_item: Any) -> Any:
        self.shape = super().resolve_tensor(read_item).shape
        return self

    def detach(self) -> WholePlanner:
        """Return itself."""
        return self

    def size(self) -> torch.Size:
        """Return the tensor's size."""
        return self.shape

    def copy_(self, tensor: Tensor) -> None:
        """Keep a tensor that was read."""
        self.found = tensor


@contextlib.contextmanager
def without_process_group() -> Iterator[None]:
    """Silence DCP's warning that there is no process group; unwrap its CheckpointException, which is no Exception."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            raise error.failures[0][0] from None


def write(
    run: Path, step: int, model: nn.Module, optimizer: Optimizer, read: Callable[[str], Tensor], meta: Json
) -> None:
    """Commit a step from one process: fp32 tensors of `model`, which is on meta, as `read` returns them, and the
    optimizer's state before its first step.

    Tensors are read one at a time; DCP holds a file's contents until it is whole, so each has a file of its own.
    """
    tensors = tensors_of(model, optimizer)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    zeros = lru_cache(1)(torch.zeros)  # both moments of a parameter are one tensor: DCP holds the last one and the next

    def value(name: str) -> Tensor:
        if name.startswith("model."):
            return read(name.removeprefix("model.")).to(tensors[name].dtype)
        return zeros(tensors[name].shape, dtype=tensors[name].dtype)

    folder = run / CHECKPOINTS / begin(run, step, size)
    try:
        with without_process_group():
            writer = Writer(folder, single_file_per_rank=False, thread_count=1, sync_files=True)
            save_state(tensors, storage_writer=writer, planner=LazyPlanner(value), no_dist=True)
        files = {p.name: {"size": p.stat().st_size, "sha256": sha256(p)} for p in folder.iterdir()}
        commit(folder, step, meta, files, 1)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


class LazyPlanner(DefaultSavePlanner):
    """DCP's planner, except that it makes each tensor when it is to be written."""

    def __init__(self, value: Callable[[str], Tensor]) -> None:
        super().__init__()
        self.value = value

    def lookup_object(self, index: metadata.MetadataIndex) -> Tensor:
        return self.value(index.fqn)
