"""Tensors by name that are never in memory all at once: in a folder, or spread over ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from lasptrain.parallel.shard import full_tensor

SUFFIX = ".safetensors"


class Kept(Mapping[str, Tensor]):
    """Tensors in a folder, a file each, read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors one after another, on the CPU, in the folder, which is made."""
        self.folder.mkdir(exist_ok=True)
        for name, x in tensors.items():
            save_file({name: x.cpu().contiguous()}, self.folder / f"{name}{SUFFIX}")

    def __getitem__(self, name: str) -> Tensor:
        file = self.folder / f"{name}{SUFFIX}"
        if not file.is_file():
            raise KeyError(name)
        return load_file(file)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(file.name.removesuffix(SUFFIX) for file in self.folder.iterdir()))

    def __len__(self) -> int:
        return len(list(self.folder.iterdir()))

    def __contains__(self, name: object) -> bool:
        return (self.folder / f"{name}{SUFFIX}").is_file()


class Whole(Mapping[str, Tensor]):
    """Tensors of which ranks hold shards, gathered when they are asked for, by all ranks in the same order."""

    def __init__(self, shared: Mapping[str, Tensor]) -> None:
        self.shared = shared

    def __getitem__(self, name: str) -> Tensor:
        return full_tensor(self.shared[name]).detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self.shared)

    def __len__(self) -> int:
        return len(self.shared)

    def __contains__(self, name: object) -> bool:
        return name in self.shared
