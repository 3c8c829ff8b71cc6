"""Folders of safetensors shards, written and read one tensor at a time; a folder appears whole or not at all."""

from __future__ import annotations

import json
import pickle  # noqa: TID251  only for the name of its error
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lasptrain.errors import ConvertError
from lasptrain.files import read

SHARD = 4 * 10**9  # bytes of a file, unless one tensor alone is larger
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write(
    folder: Path, forms: Mapping[str, TensorSpec], tensors: Iterable[tuple[str, Tensor]], limit: int = SHARD
) -> None:
    """Write `tensors`, which come in the order of `forms`, into shards of at most `limit` bytes, and their index."""
    shards: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, form in forms.items():
        if shards[-1] and size + form.bytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = form
        size += form.bytes
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = [SINGLE] if len(names) == 1 else names
    stream = iter(tensors)
    for file, shard in zip(names, shards, strict=True):
        with (folder / file).open("xb") as opened:
            _write_shard(opened, shard, stream)
    index = {
        "metadata": {"total_size": sum(form.bytes for form in forms.values())},
        "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _write_shard(file: BinaryIO, shard: Mapping[str, TensorSpec], tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write the safetensors format: the length of a JSON header in 8 bytes, the header, the tensors' bytes in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, form in shard.items():
        end = offset + form.bytes
        header[name] = {"dtype": NAMES[form.dtype], "shape": form.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for expected, form in shard.items():
        name, tensor = next(tensors)
        assert (name, tuple(tensor.shape), tensor.dtype) == (expected, form.shape, form.dtype), (name, expected)
        file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


class Folder:
    """The tensors of a folder of safetensors shards, or of PyTorch's zip files. ConvertError where it is neither."""

    def __init__(self, path: Path):
        self.path = path
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
        if not files:
            raise ConvertError(f"{path}: holds no *.safetensors and no pytorch_model*.bin; expected a model's folder")
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            for name, shape in _shapes(file).items():
                if name in self.files:
                    raise ConvertError(f"{file}: has {name}, as has {self.files[name].name}; expected it once")
                self.files[name], self.shapes[name] = file, shape
        self.stored = {name: name for name in self.files}  # names in the files
        self.left_out: list[str] = []

    def rename(self, canonical: Callable[[str], str | None]) -> None:
        """Give tensors the names that `canonical` returns, and leave out those of None. ConvertError for one twice."""
        found: dict[str, str] = {}
        for name in self.stored:
            new = canonical(name)
            if new is None:
                self.left_out.append(name)
            elif new in found:
                raise ConvertError(f"{self.path}: has {found[new]} and {name}; expected one of them")
            else:
                found[new] = name
        self.files = {new: self.files[name] for new, name in found.items()}
        self.shapes = {new: self.shapes[name] for new, name in found.items()}
        self.stored = found

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read one tensor, into memory of its own, as what it is stored or as `dtype`."""
        file, name = self.files[name], self.stored[name]
        if file.suffix == ".bin":
            return _mapped(file)[name].to(dtype, copy=True)
        with _open(file) as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor.to(dtype, copy=True)

    def json(self, name: str) -> dict[str, Any] | None:
        """Read a JSON object from a file of the folder; None if there is no such file."""
        file = self.path / name
        try:
            found = json.loads(read(file))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConvertError(f"{file}: cannot be read as JSON ({reason})") from None
        if not isinstance(found, dict):
            raise ConvertError(f"{file}: found {type(found).__name__}; expected an object")
        return found


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    if file.suffix == ".bin":
        return {name: tuple(tensor.shape) for name, tensor in _mapped(file).items()}
    with _open(file) as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118  no dict


def _mapped(file: Path) -> dict[str, Tensor]:
    """Map a file of PyTorch into memory; only tensors are taken from its pickle, so no code in it runs."""
    try:
        found: dict[str, Tensor] = torch.load(file, map_location="cpu", mmap=True, weights_only=True)  # noqa: TID251
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ConvertError(f"{file}: no tensors can be read from it ({str(error).splitlines()[0]})") from None
    return found


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ConvertError(f"{file}: no safetensors file can be read from it ({error})") from None
