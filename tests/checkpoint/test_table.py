"""A checkpoint that is not what a save writes is refused in a line, soon, in little memory; an older one is taken."""

from __future__ import annotations

import json
import logging
import os
import pickle  # noqa: TID251  to write what must be refused
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, ChunkStorageMetadata, Metadata, MetadataIndex
from typer.testing import CliRunner

from lasptrain.checkpoint import steps, tensors
from lasptrain.checkpoint.load import load
from lasptrain.checkpoint.saver import save
from lasptrain.checkpoint.single import CheckpointReader
from lasptrain.checkpoint.table import read_table
from lasptrain.cli import main
from lasptrain.errors import CheckpointError
from lasptrain.files import sha256

NAME = "model.weight"


def model(seed: int) -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    net = nn.Linear(4, 6)
    return net, torch.optim.AdamW(net.parameters())


@pytest.fixture
def run(group: None, tmp_path: Path) -> Path:
    """A run with steps 1 and 2; of step 2 the weights are all 2."""
    net, optimizer = model(0)
    for step in (1, 2):
        nn.init.constant_(net.weight, step)
        save(tmp_path, step, tensors.present(tensors.tensors_of(net, optimizer)), {}, keep=9)
    return tmp_path


def loaded(run: Path) -> tuple[int, float]:
    """The step that is taken, and the one value of its weights."""
    net, optimizer = model(1)
    found = load(run, net, optimizer)
    assert found is not None and len(net.weight.unique()) == 1
    return found.step, float(net.weight.detach()[0, 0])


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
    """Make a manifest agree with the files and with itself, as an attacker would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    for name, entry in manifest["files"].items():
        entry |= {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    change(manifest)
    manifest["sha256"] = steps._digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def table_of(folder: Path) -> Any:
    return pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301


def write(folder: Path, table: object) -> None:
    (folder / ".metadata").write_bytes(table if isinstance(table, bytes) else pickle.dumps(table))
    rewrite(folder)


def place(table: Metadata, name: str = NAME) -> _StorageInfo:
    assert isinstance(table.storage_data, dict)
    found: _StorageInfo = next(value for key, value in table.storage_data.items() if key.fqn == name)
    return found


def test_an_honest_table_is_read_as_torch_reads_it(run: Path) -> None:
    folder = run / "checkpoints" / "step-2"
    manifest, _ = steps.read_manifest(folder, 2)
    ours, theirs = read_table(folder, manifest["files"]), table_of(folder)
    assert ours.state_dict_metadata == theirs.state_dict_metadata and ours.storage_data == theirs.storage_data
    assert loaded(run) == (2, 2.0)


def test_a_table_of_python_3_11_2_is_read_too(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run / "checkpoints" / "step-2"
    table = table_of(folder)
    with monkeypatch.context() as older:  # enumerations are pickled so by Python before 3.11.4
        older.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", lambda self, protocol: (getattr, (type(self), self.name)))
        write(folder, table)
    assert b"getattr" in (folder / ".metadata").read_bytes()
    rewrite(folder)
    manifest, _ = steps.read_manifest(folder, 2)
    assert read_table(folder, manifest["files"]).state_dict_metadata == table.state_dict_metadata
    assert loaded(run) == (2, 2.0)


@pytest.mark.parametrize("name", ["__class__", "mro", "TORCH_NOTHING"])
def test_no_other_attribute_is_read(run: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder = run / "checkpoints" / "step-2"
    table = table_of(folder)
    with monkeypatch.context() as older:
        older.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", lambda self, protocol: (getattr, (type(self), name)))
        write(folder, table)
    rewrite(folder)
    manifest, _ = steps.read_manifest(folder, 2)
    with pytest.raises(CheckpointError, match="refused"):
        read_table(folder, manifest["files"])


def chunks(table: Any) -> Any:
    return table.state_dict_metadata[NAME].chunks


def empty(table: Any) -> None:
    chunks(table).clear()


def half(table: Any) -> None:
    chunks(table)[0].sizes = torch.Size([3, 4])


def twice(table: Any) -> None:
    half(table)
    chunks(table).append(chunks(table)[0])


def outside(table: Any) -> None:
    chunks(table)[0].offsets = torch.Size([1, 0])


def crossing(table: Any) -> None:
    """As many elements as the tensor has, some of them twice."""
    pieces = [((0, 0), (6, 2)), ((0, 2), (3, 2)), ((2, 2), (3, 2))]
    chunks(table)[:] = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in pieces]
    for number, (offsets, _) in enumerate(pieces):
        where = _StorageInfo("__0_0.distcp", number, 1)
        table.storage_data[MetadataIndex(NAME, offsets)] = where
    del table.storage_data[MetadataIndex("model.bias", (0,))]


def homeless(table: Any) -> None:
    table.storage_data = {key: value for key, value in table.storage_data.items() if key.fqn != NAME}


def beyond(table: Any) -> None:
    place(table).length += 1 << 40


def shared(table: Any) -> None:
    place(table).offset, place(table).length = place(table, "model.bias").offset, place(table, "model.bias").length


def unlisted(table: Any) -> None:
    place(table).relative_path = "../step-1/__0_0.distcp"


def no_text(table: Any) -> None:
    place(table).relative_path = _StorageInfo("__0_0.distcp", 0, 0)  # type: ignore[assignment]


def huge(table: Any) -> None:
    table.state_dict_metadata[NAME].size = torch.Size([2**62, 2**62])


def negative(table: Any) -> None:
    place(table).offset = -1


@pytest.mark.fault("a hostile checkpoint")
@pytest.mark.parametrize(
    "change",
    [empty, half, twice, outside, crossing, homeless, beyond, shared, unlisted, no_text, huge, negative],
)
def test_a_table_that_does_not_cover_its_tensors_is_not_loaded(
    run: Path, change: Callable[[Any], None], caplog: pytest.LogCaptureFixture
) -> None:
    folder = run / "checkpoints" / "step-2"
    table = table_of(folder)
    change(table)
    write(folder, table)
    assert loaded(run) == (1, 1.0)
    assert any("is damaged and not used: table of tensors: rank 0: .metadata" in line for line in caplog.messages)
    assert [step.step for step in steps.inspect(run, thorough=True) if step.problems] == [2]
    with pytest.raises(CheckpointError, match=r"step-2: damaged, \.metadata"):
        CheckpointReader(run)


def building(module: str, name: str, state: dict[str, object]) -> bytes:
    """A pickle that sets attributes of a class, and is one of its objects."""
    cls = f"c{module}\n{name}\n".encode()
    inner = pickle.dumps(state, protocol=2)[2:-1]
    return b"\x80\x02" + cls + b"N" + inner + b"\x86b" + b")\x81."


BOMBS = {
    "memo": b"\x80\x04Nr\xff\xff\xff\x1f.",
    "bytes": b"\x80\x05\x96" + struct.pack("<Q", 1 << 33) + b".",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b".",
    "string": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 33) + b".",
    "marks": b"\x80\x04" + b"(" * 500_000 + b".",
    "dicts": b"\x80\x04" + b"}" * 500_000 + b".",
    "tuples": b"\x80\x04})" + b"\x85" * 900_000 + b"Ns.",
    "number": b"\x80\x04\x8b" + struct.pack("<i", 1 << 30) + b".",
    "nothing": b"",
    "end": b"\x80\x04",
    "list": b"\x80\x04].",
    "text": b"lots of text",
    "shadow": building("torch.distributed.checkpoint.filesystem", "_StorageInfo", {"__eq__": 1}),
    "metadata": building("torch.distributed.checkpoint.metadata", "Metadata", {"state_dict_metadata": {}}),
}


@pytest.mark.fault("a hostile checkpoint")
@pytest.mark.parametrize("name", BOMBS)
def test_a_crafted_table_runs_nothing_and_takes_little(run: Path, name: str) -> None:
    folder = run / "checkpoints" / "step-2"
    write(folder, BOMBS[name])
    manifest, _ = steps.read_manifest(folder, 2)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            read_table(folder, manifest["files"])
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert loaded(run) == (1, 1.0)


ODD: dict[str, Callable[[dict[str, Any]], object]] = {
    "format": lambda m: m.update(format="3"),
    "no format": lambda m: m.pop("format"),
    "true": lambda m: m.update(format=True),
    "step": lambda m: m.update(step=[2]),
    "negative": lambda m: m.update(step=-2),
    "meta": lambda m: m.update(meta=[]),
    "files": lambda m: m.update(files=["manifest.json"]),
    "entry": lambda m: m["files"].update({".metadata": 7}),
    "size": lambda m: m["files"][".metadata"].update(size="7"),
    "digest": lambda m: m["files"][".metadata"].update(sha256=None),
    "names": lambda m: m["files"].update({"..": {"size": 0, "sha256": "0" * 64}}),
    "zero": lambda m: m["files"].update({"a\0": {"size": 0, "sha256": "0" * 64}}),
    "no files": lambda m: m.update(files={}),
    "no table": lambda m: m["files"].pop(".metadata"),
    "guard": lambda m: m.update(meta={"guard": {"norms": "abc"}}),
    "recipe": lambda m: m.update(meta={"recipe": 3}),
    "order": lambda m: m.update(meta={"order": {"window": -1}}),
}


@pytest.mark.fault("a hostile checkpoint", times=len(ODD) + 3)
def test_odd_types_in_a_manifest_are_told_and_the_older_step_taken(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = run / "checkpoints" / "step-2"
    original = (folder / "manifest.json").read_text()
    for name, change in ODD.items():
        caplog.clear()
        (folder / "manifest.json").write_text(original)
        rewrite(folder, change)
        assert loaded(run) == (1, 1.0), name
        (told,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
        assert "\n" not in told and len(told) < 500, name
    for text in ("[]", "[" * 100_000, '{"sha256": 1, "format": NaN'):
        (folder / "manifest.json").write_text(text)
        assert loaded(run) == (1, 1.0)


def test_files_that_are_links_or_fifos_or_cannot_be_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each lets the older step be taken, at once."""
    folder = run / "checkpoints" / "step-2"
    for name in ("manifest.json", ".metadata", "__0_0.distcp"):
        kept = run / name
        (folder / name).rename(kept)
        (folder / name).symlink_to(kept)
        assert loaded(run) == (1, 1.0)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert loaded(run) == (1, 1.0)
        (folder / name).unlink()
        kept.rename(folder / name)
    assert loaded(run) == (2, 2.0)

    def unreadable(path: Path) -> str:
        if path.parent == folder:
            raise OSError(5, "Input/output error", str(path))
        return sha256(path)

    monkeypatch.setattr(steps, "sha256", unreadable)
    assert loaded(run) == (1, 1.0)


def test_what_is_not_loaded_is_no_number(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "load_state", lambda *_, **__: None)
    net, optimizer = model(1)
    assert load(run, net, optimizer) is not None
    assert bool(net.weight.isnan().all()) and bool(optimizer.state[net.weight]["exp_avg"].isnan().all())


@pytest.mark.fault("a damaged file of a checkpoint")
def test_of_steps_put_aside_two_stay_and_are_counted(run: Path) -> None:
    net, optimizer = model(0)
    for _ in range(4):
        save(run, 1, tensors.present(tensors.tensors_of(net, optimizer)), {}, keep=9)
    assert len(steps.put_aside(run)) == steps.ASIDE and steps.committed(run) == [1]
    assert "put aside as damaged, 2: step-1.bad-" in CliRunner().invoke(main.app, ["ckpt", "list", str(run)]).output
