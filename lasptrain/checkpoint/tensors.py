"""Tensors of a step: torch's distributed checkpoint (DCP), which reads and writes them."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lasptrain.checkpoint.table import METADATA, Json, read_table
from lasptrain.checkpoint.votes import Group, vote
from lasptrain.errors import CheckpointError
from lasptrain.files import regular, sha256
from lasptrain.training.optimizer import initial_state, initialise_state


def tensors_of(model: nn.Module, optimizer: Optimizer | None) -> dict[str, Tensor]:
    """Return every tensor of the state by its name in a checkpoint, sharing memory with the live state; tied ones once.

    Tensors that only another rank has are on the meta device: a name, a shape and a dtype.
    """
    module = model.module if isinstance(model, DistributedDataParallel) else model
    states = {} if optimizer is None else _states(optimizer)
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in module.state_dict(keep_vars=True).items():
        name = key.replace("_orig_mod.", "")  # put there by torch.compile
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        tensors[f"model.{name}"] = tensor.detach()
        tensors |= {f"optimizer.{name}.{part}": value for part, value in states.get(tensor, {}).items()}
    return tensors


def _states(optimizer: Optimizer) -> dict[Tensor, dict[str, Tensor]]:
    """Return the state by parameter; with ZeRO-1 that of most parameters is on other ranks, and here on meta."""
    own = getattr(optimizer, "optim", optimizer)  # a ZeroRedundancyOptimizer's, of the parameters that it updates here
    initialise_state(own)
    return {
        parameter: own.state[parameter]
        if parameter in own.state
        else initial_state(torch.empty_like(parameter, device="meta"), group)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def present(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return those that this rank has. Every other one is present on some rank, and is saved and loaded there."""
    return {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}


def write_files(folder: Path, tensors: dict[str, Tensor], rank: int, group: Group) -> Json:
    """Write this rank's files, synced, and return their sizes and digests by name."""
    save_state(tensors, storage_writer=Writer(folder, thread_count=1, sync_files=True), process_group=group)
    own = list(folder.glob(f"__{rank}_*")) + ([folder / METADATA] if rank == 0 else [])
    return {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in own}


class Writer(FileSystemWriter):
    """DCP's writer, except that it raises the disk's error, which DCP's serialiser hides behind its own.

    For use with one thread: errors of further ones would be lost.
    """

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise (cause or error) from None

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # the folder's name would be the temporary one


def restore(
    reader: Reader, model: nn.Module, optimizer: Optimizer | None, group: Group, *, buffers: bool = True
) -> None:
    """Compare the stored tensors with the live ones, then overwrite these; without `buffers` parameters only."""
    tensors = tensors_of(model, optimizer)
    left_out = set[str]() if buffers else _buffers(model)
    what = f"{reader.path} not loaded"
    own = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    vote(what, lambda: _compare_tensors(reader.table, own, left_out, partial=optimizer is None), group)
    own = present(own)
    poison(own.values())
    vote(what, lambda: load_state(own, storage_reader=reader, planner=Planner(), process_group=group), group)


def _buffers(model: nn.Module) -> set[str]:
    """Names in a checkpoint of what is no parameter."""
    module = model.module if isinstance(model, DistributedDataParallel) else model
    return {f"model.{name.replace('_orig_mod.', '')}" for name, _ in module.named_buffers()}


def _compare_tensors(table: Metadata, tensors: dict[str, Tensor], left_out: set[str], partial: bool) -> None:
    """Raise CheckpointError listing all names, shapes and dtypes that differ; `partial` leaves the optimizer out."""
    live = {key: TensorSpec(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    prefix = ("optimizer.",) if partial else ()
    entries = {key: entry for key, entry in table.state_dict_metadata.items() if key not in left_out}
    stored = {key: TensorSpec.of(entry) for key, entry in entries.items() if not key.startswith(prefix)}
    differing = sorted(key for key in stored.keys() | live.keys() if stored.get(key) != live.get(key))
    lines = [f"{key}: checkpoint {stored.get(key, 'has none')}, model {live.get(key, 'has none')}" for key in differing]
    if lines:
        raise CheckpointError("\n  ".join([f"{len(lines)} tensors differ:", *lines]))


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor; () and None for what is no tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None

    @classmethod
    def of(cls, entry: object) -> TensorSpec:
        if isinstance(entry, TensorStorageMetadata):
            return cls(tuple(entry.size), entry.properties.dtype)
        return cls((), None)

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


class Reader(FileSystemReader):
    """DCP's reader, except that it executes nothing in the table of tensors and opens the `listed` files only.

    Raises CheckpointError or OSError where the table cannot be used.
    """

    def __init__(self, folder: Path, listed: Json) -> None:
        super().__init__(folder)
        self.table = read_table(folder, listed)
        self.fs = _Files(folder, listed)

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self.table


class _Files(filesystem.FileSystem):
    """The files of a step, as its manifest lists them."""

    def __init__(self, folder: Path, listed: Json) -> None:
        self.allowed = {folder / name for name in listed}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        if mode != "rb" or Path(path) not in self.allowed:
            raise CheckpointError(f"{path} is not in the manifest; refused")
        with regular(Path(path), own=True) as stream:
            yield cast("io.IOBase", stream)


class Planner(DefaultLoadPlanner):
    """DCP's planner, except that it never unpickles objects: we store tensors only."""

    def load_bytes(self, read_item: Any, value: object) -> NoReturn:
        raise CheckpointError(f"{read_item.dest_index.fqn} is no tensor")


def poison(tensors: Iterable[Tensor]) -> None:
    """Fill tensors that are to be loaded, so that what is not loaded cannot be taken for weights."""
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.fill_(math.nan)
