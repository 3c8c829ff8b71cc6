"""The table of tensors of a step, `.metadata`: DCP's pickle, read as plain data.

Nothing in it is executed: a class is a name here, an object of it that name with its arguments and its state, and what
is handed to DCP is built anew from numbers and strings that have been checked. The table must cover every element of
every tensor exactly once, from files with digests, and takes no more memory than a file of its size can honestly need.
"""

from __future__ import annotations

import io
import math
import pickle  # noqa: TID251  only to restrict it
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from lasptrain import files
from lasptrain.errors import CheckpointError

METADATA = ".metadata"
LARGEST = 1 << 28  # bytes; of 128 ranks with 3,000 tensors each it has some 70 million
DIMENSIONS = 8  # of a tensor, at most
BYTES = 8  # of a table per object in it, at least
SPARE = 64  # objects more, for a small one

MEMBER = ("builtins", "getattr")  # of an enumeration; here a name, like all that a pickle refers to
ENCODINGS = {
    (metadata._MEM_FORMAT_ENCODING.__name__, member.name): member.value for member in metadata._MEM_FORMAT_ENCODING
}

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes of a chunk
Json = dict[str, Any]


def read_table(folder: Path, listed: Json) -> Metadata:
    """Read the table in a step's folder, whose files are those `listed`, with their sizes, by its manifest.

    Raises CheckpointError for everything that no save writes, OSError where it cannot be read.
    """
    if METADATA not in listed:
        raise CheckpointError(f"{METADATA} is not in the manifest")
    data = files.read(folder / METADATA, LARGEST, own=True)
    try:
        return _Table(_Unpickler(data), listed).checked(len(data))
    except CheckpointError:
        raise
    except Exception as error:  # whatever a crafted pickle makes of its reader
        raise CheckpointError(f"{METADATA} is no table of tensors ({type(error).__name__})") from None


class _Record:
    """An object in a pickle: the name of its class, its arguments, its state."""

    __slots__ = ("arguments", "kind", "state")

    def __init__(self, kind: str, arguments: tuple[object, ...]) -> None:
        self.kind, self.arguments = kind, arguments
        self.state: object = None


class _Class:
    """A class in a pickle: its name."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


def _member(arguments: tuple[object, ...]) -> _Record:
    """Return the member of the one enumeration that a table has, named as Python before 3.11.4 does, as if by value."""
    match arguments:
        case (_Class(name=enumeration), str(name)) if (enumeration, name) in ENCODINGS:
            return _Record(enumeration, (ENCODINGS[enumeration, name],))
    raise CheckpointError(f"{METADATA} refers to an attribute, which no checkpoint needs; refused")


class _Unpickler(pickle._Unpickler):  # the one in C cannot be kept from allocating
    """Unpickler of numbers, strings, containers and records of the classes that a table consists of."""

    CLASSES: tuple[type, ...] = (
        Metadata,
        MetadataIndex,
        TensorStorageMetadata,
        TensorProperties,
        ChunkStorageMetadata,
        BytesStorageMetadata,
        StorageMeta,
        metadata._MEM_FORMAT_ENCODING,
        _StorageInfo,
        torch.Size,
    )
    KNOWN = {(cls.__module__, cls.__qualname__) for cls in CLASSES} | {
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
    }

    stack: list[Any]  # of theirs, as is
    append: Callable[[object], None]

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._left = len(data) // BYTES + SPARE

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in self.KNOWN or (module, name) == MEMBER:
            return _Class(name)
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        raise CheckpointError(f"{METADATA} refers to {module!s:.99}.{name!s:.99}, which no checkpoint needs; refused")

    def count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise CheckpointError(f"{METADATA} makes more objects than a table of its size; refused")

    def make(self) -> None:
        """NEWOBJ and REDUCE."""
        arguments, cls = self.stack.pop(), self.stack.pop()
        if type(cls) is not _Class or type(arguments) is not tuple:
            raise CheckpointError(f"{METADATA} calls what is no class; refused")
        self.append(_member(arguments) if cls.name == MEMBER[1] else _Record(cls.name, arguments))

    def give_state(self) -> None:
        """BUILD."""
        state, record = self.stack.pop(), self.stack[-1]
        if type(record) is not _Record or record.state is not None:
            raise CheckpointError(f"{METADATA} changes what is no object; refused")
        record.state = state

    def shallow(self) -> None:
        """Refuse tuples in tuples in tuples, which Python compares and deletes by recursion."""
        made = self.stack[-1]
        if any(type(inner) is tuple and any(type(other) is tuple for other in inner) for inner in made):
            raise CheckpointError(f"{METADATA} nests tuples; refused")


class _Dispatch(dict[int, Callable[[Any], None]]):
    """The operations of a pickle that a table needs; those that make an object are counted."""

    PLAIN = (
        "PROTO FRAME STOP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINUNICODE SHORT_BINUNICODE GLOBAL "
        "STACK_GLOBAL EMPTY_TUPLE APPEND APPENDS SETITEM SETITEMS BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET"
    )
    MAKING = "MARK EMPTY_LIST EMPTY_DICT TUPLE TUPLE1 TUPLE2 TUPLE3"

    def __init__(self) -> None:
        theirs = pickle._Unpickler.dispatch
        super().__init__({_code(name): theirs[_code(name)] for name in self.PLAIN.split()})
        for name in self.MAKING.split():
            self[_code(name)] = _counted(theirs[_code(name)], tuples=name.startswith("TUPLE"))
        self[_code("NEWOBJ")] = self[_code("REDUCE")] = _counted(_Unpickler.make)
        self[_code("BUILD")] = _Unpickler.give_state

    def __missing__(self, code: int) -> NoReturn:
        raise CheckpointError(f"{METADATA} has the operation {code:#x}, which no checkpoint needs; refused")


def _code(name: str) -> int:
    return int(getattr(pickle, name)[0])


def _counted(act: Callable[[Any], None], *, tuples: bool = False) -> Callable[[Any], None]:
    def counting(unpickler: _Unpickler) -> None:
        unpickler.count()
        act(unpickler)
        if tuples:
            unpickler.shallow()

    return counting


_Unpickler.dispatch = _Dispatch()


class _Table:
    """A table, as read, that is checked and built anew."""

    def __init__(self, unpickler: _Unpickler, listed: Json) -> None:
        self._unpickler, self._listed = unpickler, listed

    def checked(self, size: int) -> Metadata:
        """Return DCP's object. Raises CheckpointError for a table, of `size` bytes, that does not cover its tensors."""
        found = self._unpickler.load()
        if type(found) is not _Record or found.kind != Metadata.__name__:
            raise CheckpointError(f"{METADATA} holds no table of tensors")
        fields = _state(found, Metadata)
        self._chunks = size // BYTES + SPARE  # an honest one has bytes of its own for each
        tensors = {_text(name): self._entry(name, entry) for name, entry in _dict(fields["state_dict_metadata"])}
        places = self._places(fields["storage_data"])
        for name, tensor in tensors.items():
            if isinstance(tensor, TensorStorageMetadata):
                _covers(name, tensor, places)
        return Metadata(tensors, None, places, StorageMeta())

    def _entry(self, name: str, entry: object) -> TensorStorageMetadata | BytesStorageMetadata:
        if type(entry) is _Record and entry.kind == BytesStorageMetadata.__name__:
            return BytesStorageMetadata()
        fields = _state(entry, TensorStorageMetadata)
        dtype = _tuple(_state(fields["properties"], TensorProperties))[0]
        if type(dtype) is not torch.dtype or type(fields["chunks"]) is not list:
            raise _odd(f"the entry of {name!r:.99}")
        self._chunks -= len(fields["chunks"])
        if self._chunks < 0:
            raise CheckpointError(f"{METADATA} lists more chunks than a table of its size; refused")
        chunks = [_state(chunk, ChunkStorageMetadata) for chunk in fields["chunks"]]
        built = [ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])) for chunk in chunks]
        return TensorStorageMetadata(TensorProperties(dtype=dtype), _size(fields["size"]), built)

    def _places(self, given: object) -> dict[MetadataIndex, _StorageInfo]:
        """Return where each chunk lies: inside a listed file, and no two in the same bytes."""
        places: dict[MetadataIndex, _StorageInfo] = {}
        for key, place in _dict(given):
            index, fields = _state(key, MetadataIndex), _state(place, _StorageInfo)
            name = _text(fields["relative_path"])
            if name not in self._listed or name == METADATA:
                raise CheckpointError(f"{METADATA} points at {name!r:.99}, which is not in the manifest")
            begin, length = _number(fields["offset"]), _number(fields["length"])
            if begin + length > self._listed[name]["size"] or fields.get("transform_descriptors"):
                raise CheckpointError(f"{METADATA} points beyond the end of {name!r:.99}")
            offset = None if index.get("offset") is None else _size(index["offset"])
            at = MetadataIndex(_text(index["fqn"]), offset)
            if at in places:
                raise CheckpointError(f"{METADATA} has two places for {at.fqn!r:.99}")
            places[at] = _StorageInfo(name, begin, length)
        spans = sorted((place.relative_path, place.offset, place.length) for place in places.values())
        if any(
            name == other and begin + length > later for (name, begin, length), (other, later, _) in pairwise(spans)
        ):
            raise CheckpointError(f"{METADATA} uses the same bytes for two tensors")
        return places


def _covers(name: str, tensor: TensorStorageMetadata, places: dict[MetadataIndex, _StorageInfo]) -> None:
    """Raise CheckpointError unless chunks that lie somewhere hold every element of a tensor exactly once."""
    whole = tuple(tensor.size)
    boxes: list[Box] = []
    for chunk in tensor.chunks:
        offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
        inside = len(offsets) == len(sizes) == len(whole)
        if not inside or any(o + n > all_ for o, n, all_ in zip(offsets, sizes, whole, strict=True)):
            raise CheckpointError(f"{METADATA} has a chunk outside of {name!r:.99}")
        if math.prod(sizes):
            boxes.append((offsets, sizes))
            if MetadataIndex(name, chunk.offsets) not in places:
                raise CheckpointError(f"{METADATA} has no place for a chunk of {name!r:.99}")
    if sum(math.prod(sizes) for _, sizes in boxes) != math.prod(whole) or any(_overlaps(boxes)):
        raise CheckpointError(f"{METADATA}: chunks of {name!r:.99} do not hold each of its elements exactly once")


def _overlaps(boxes: list[Box]) -> Iterator[bool]:
    """Yield True for boxes that share elements; along the dimension with most cuts only neighbours are compared."""
    dimensions = range(len(boxes[0][0]) if boxes else 0)
    if not dimensions:
        yield len(boxes) > 1
        return
    along = max(dimensions, key=lambda d: len({offsets[d] for offsets, _ in boxes}))
    reached: list[Box] = []
    for box in sorted(boxes, key=lambda box: box[0][along]):
        offsets, sizes = box
        reached = [other for other in reached if other[0][along] + other[1][along] > offsets[along]]
        for before, extent in reached:
            yield all(before[d] < offsets[d] + sizes[d] and offsets[d] < before[d] + extent[d] for d in dimensions)
        reached.append(box)


def _odd(what: str) -> CheckpointError:
    return CheckpointError(f"{METADATA}: {what} is not what a save writes")


def _state(record: object, cls: type) -> Any:
    """Return the state of an object of that class."""
    if type(record) is not _Record or record.kind != cls.__name__:
        raise _odd(f"what should be a {cls.__name__}")
    if type(record.state) is not (tuple if cls is TensorProperties else dict):
        raise _odd(f"the state of a {cls.__name__}")
    return record.state


def _dict(value: object) -> Any:
    if type(value) is not dict:
        raise _odd("what should be a dict")
    return value.items()


def _tuple(value: object) -> tuple[object, ...]:
    if type(value) is not tuple or not value:
        raise _odd("what should be a tuple")
    return value


def _text(value: object) -> str:
    if type(value) is not str:
        raise _odd("what should be a name")
    return value


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise _odd("what should be a number of bytes or elements")
    return value


def _size(record: object) -> torch.Size:
    if type(record) is not _Record or record.kind != torch.Size.__qualname__ or len(record.arguments) != 1:
        raise _odd("what should be a size")
    numbers = record.arguments[0]
    if type(numbers) is not tuple or len(numbers) > DIMENSIONS:
        raise _odd("a size")
    return torch.Size([_number(number) for number in numbers])
