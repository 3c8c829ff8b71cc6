"""Files that someone made to harm, or a disk has damaged: each is read, or refused in one line, soon, in little memory.

Every reader is given files that were changed at random; the seeds are fixed, so that what was once found stays found.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import lzma
import os
import random
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from data_tools import commands, windows
from data_tools.prepare import Preparation, prepare
from data_tools.sources import Errors, Reading, open_source
from data_tools.tokenizer import ByteTokenizer, load_tokenizer
from lasptrain.data.dataset import TokenDataset
from lasptrain.data.manifest import FILE, Manifest
from lasptrain.data.shard import FOOTER, MAGIC, PAGE, Shard, ShardHeader, ShardWriter
from lasptrain.errors import DataError, LaspError
from lasptrain.eval.tasks.files import open_files
from tests.support.byte_level import byte_level
from tests.support.gloo import PATIENCE
from tests.support.program import ROOT

MODEL = ROOT / "tokenizers" / "python-4k.model"
ODD: list[Any] = [
    None, True, -1, 0, 1, 3, 1 << 31, 1 << 62, 1 << 64, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "5",
    "\0", "\ud800", "\x1b[2J\n", "u32", "x" * 5000, [], [1], {}, {"a": 1}, [[[]]], {"train": None},
]  # fmt: skip


SEEDS = 25  # of files that are damaged at random, by each reader


def tried(reads: Callable[[], object]) -> str:
    """The message of a file that is refused, in one short line; empty for one that is read. Nothing else may happen."""
    try:
        reads()
    except LaspError as error:
        message = str(error)
        assert error.code in (2, 3) and message.isprintable() and len(message) < 1000, message
        return message
    return ""


# Shards and manifests that were changed and sealed again


def sealed(page: bytes) -> bytes:
    head = MAGIC + struct.pack("<I", len(page)) + page
    return (head + struct.pack("<I", zlib.crc32(head))).ljust(PAGE, b"\0")


def resealed(path: Path, values: Any) -> None:
    content = path.read_bytes()
    path.write_bytes(sealed(json.dumps(values).encode()) + content[PAGE:])


def shard_of(path: Path, documents: int = 3) -> Shard:
    with ShardWriter(path, ShardHeader(300, 1, "0" * 64, "test", "train", "test")) as writer:
        for size in range(documents):
            writer.add(np.array([1, *range(2, 9 + size)]))
    return Shard(path)


def read_shard(path: Path) -> None:
    shard = Shard(path)
    shard.verify()
    shard.check_tokens(0, shard.read(0, shard.header.n_tokens))


@pytest.mark.parametrize("key", [*asdict(ShardHeader(300, 1, "", "", "", "")), "other", None])
def test_a_header_of_a_shard_with_odd_values_is_refused(tmp_path: Path, key: str | None) -> None:
    path = tmp_path / "a.ltok"
    header = asdict(shard_of(path).header)
    for value in ODD:
        resealed(path, value if key is None else header | {key: value})
        message = tried(lambda: read_shard(path))
        assert message.startswith("shard a.ltok: ") or key is not None, value
    resealed(path, {name: value for name, value in header.items() if name != key} if key else "[" * 1000)
    assert tried(lambda: read_shard(path)) or key == "other"


def test_deep_json_in_a_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ltok"
    shard_of(path)
    content = path.read_bytes()
    for page in (b"[" * 4000, b'{"a":' * 700, b"\xff", b"", b"1" * 4000):
        path.write_bytes(sealed(page) + content[PAGE:])
        assert "header" in tried(lambda: read_shard(path))


@pytest.mark.parametrize("seed", range(8))
def test_a_footer_that_points_elsewhere_is_refused(tmp_path: Path, seed: int) -> None:
    """Sealed again, so that only what it says can tell; nothing beyond the file is made room for."""
    path, of = tmp_path / "a.ltok", random.Random(seed)
    shard_of(path)
    content = path.read_bytes()
    *parts, crc, _, _ = FOOTER.unpack(content[-FOOTER.size :])
    for _ in range(30):
        changed = list(parts)
        changed[of.randrange(6)] = of.choice([0, 1, 64, PAGE, 1 << 31, 1 << 40, (1 << 64) - 1, of.randrange(1 << 14)])
        if changed == parts:
            continue
        foot = FOOTER.pack(*changed, crc, 0, MAGIC)[:52]
        path.write_bytes(content[: -FOOTER.size] + FOOTER.pack(*changed, crc, zlib.crc32(foot), MAGIC))
        assert tried(lambda: read_shard(path)).startswith("shard a.ltok: "), changed


def test_a_pipe_is_no_shard(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.ltok")
    assert tried(lambda: Shard(tmp_path / "a.ltok")) == "shard a.ltok: 0 bytes, a shard has at least 4160"


def test_a_file_of_a_repository_that_is_mostly_nothing_is_not_read(tmp_path: Path) -> None:
    """Which takes no place on the disk, and would take a gigabyte of memory."""
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.py").write_text("pass\n")
    with (tmp_path / "one" / "b.py").open("wb") as empty:
        empty.truncate(1 << 30)
    dropped: Counter[str] = Counter()
    tracemalloc.start()
    try:
        (found,) = open_source(f"repositories:{tmp_path}").documents(Reading(), dropped)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.text == "# a.py\npass\n" and dropped == {"not code": 1} and found.done == 5 + (1 << 30)
    assert peak < 8 << 20


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("hostile")
    (base / "a.jsonl").write_text("\n".join(json.dumps({"text": f"line {i} " * 9}) for i in range(40)))
    return prepare(Preparation([str(base / "a.jsonl")], "bytes", validation_ppm=300_000), base / "set")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, of long lists the first few."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, member in inner:
        yield from places(member, (*path, key))


def changed(value: Any, path: tuple[Any, ...], by: Any) -> Any:
    if not path:
        return by
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = changed(value[path[0]], path[1:], by)
    return copied


def use(folder: Path) -> None:
    """All that reads a dataset."""
    found = TokenDataset.open(folder)
    str(commands.inspect(folder, 16)).encode()
    commands.verify(folder)
    found.token_bytes.sum()
    for name in found.splits:
        split = found.whole(name)
        split.read(split.window_start(16, 0, 3), 16)
    str(windows.show_window(folder, "bytes", 16, 0, 0, "train")).encode()


@pytest.mark.parametrize("seed", range(4))
def test_a_manifest_with_odd_values_is_refused_or_as_good(dataset: Path, tmp_path: Path, seed: int) -> None:
    """With the fingerprint of what it says now, where it says anything."""
    values = json.loads((dataset / FILE).read_text())
    for path in dataset.iterdir():
        (tmp_path / path.name).hardlink_to(path)
    (tmp_path / FILE).unlink()
    of = random.Random(seed)
    for place in of.sample(list(places(values)), 40):
        odd = changed(values, place, of.choice(ODD))
        with contextlib.suppress(ValueError, TypeError):
            odd["fingerprint"] = Manifest.model_validate_json(json.dumps(odd)).computed_fingerprint()
        (tmp_path / FILE).write_text(json.dumps(odd))
        tried(lambda: use(tmp_path))


def test_a_manifest_that_lacks_a_key_says_so(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(DataError, match=r"dataset\.json: [a-z_]+: missing$"):
        Manifest.load(tmp_path)


def test_a_manifest_that_never_ends_is_refused(tmp_path: Path) -> None:
    for name, content in {"deep": b"[" * (1 << 20), "long": b" " * ((1 << 23) + 1), "nulls": bytes(99)}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / FILE).write_bytes(content)
        assert tried(lambda name=name: Manifest.load(tmp_path / name))  # type: ignore[misc]
    for name, leads in {"endless": "/dev/zero", "loop": FILE}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / FILE).symlink_to(leads)
        assert tried(lambda name=name: Manifest.load(tmp_path / name))  # type: ignore[misc]
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / FILE)
    assert "it is no regular file" in tried(lambda: Manifest.load(tmp_path / "pipe"))


# Text


def read(path: Path, errors: Errors = "replace") -> None:
    for document in open_source(str(path)).documents(Reading(errors, max_bad=1 << 30), Counter()):
        document.text.encode()


ROWS = b"\n".join(json.dumps({"text": f"row {i} \u00e9" * (i % 5), "n": i}).encode() for i in range(40))
WHOLE: dict[str, bytes] = {
    "a.txt": ROWS,
    "a.jsonl": ROWS,
    "a.json": b"[" + ROWS.replace(b"\n", b",") + b"]",
    "a.jsonl.gz": gzip.compress(ROWS, mtime=0),
    "a.jsonl.bz2": bz2.compress(ROWS),
    "a.jsonl.xz": lzma.compress(ROWS),
    "a.jsonl.zst": pyarrow.compress(ROWS, codec="zstd", asbytes=True),
    "a.py": ROWS,
}


def damaged(content: bytes, of: random.Random) -> bytes:
    """The content with a few bytes flipped, cut out, doubled, or put in."""
    found = bytearray(content)
    for _ in range(of.randrange(1, 5)):
        at = of.randrange(len(found) + 1)
        match of.randrange(4):
            case 0 if at < len(found):
                found[at] ^= 1 << of.randrange(8)
            case 1:
                del found[at : at + of.randrange(1, 40)]
            case 2:
                found[at:at] = found[at : at + of.randrange(1, 40)]
            case _:
                found[at:at] = of.choice([b"\xff\xfe", b"\0" * 9, b"[" * 2000, b'"', b"\\ud800", b"9" * 5000, b"\n"])
    return bytes(found)


@pytest.mark.parametrize("name", WHOLE)
def test_damaged_text_is_read_or_refused(tmp_path: Path, name: str) -> None:
    for seed in range(SEEDS):
        (tmp_path / name).write_bytes(damaged(WHOLE[name], random.Random(seed)))
        for errors in ("fail", "replace", "skip"):
            tried(lambda errors=errors: read(tmp_path / name, errors))  # type: ignore[misc]


@pytest.mark.parametrize("kind", ["string", "binary", "list", "dictionary"])
def test_damaged_tables_are_read_or_refused(tmp_path: Path, kind: str) -> None:
    texts: Any = pyarrow.array([f"row {i} \u00e9" * (i % 5) for i in range(300)])
    column = {
        "string": texts,
        "binary": texts.cast(pyarrow.binary()),
        "list": pyarrow.array([[text.as_py(), None] for text in texts]),
        "dictionary": texts.dictionary_encode(),
    }[kind]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": column}), path, compression="zstd", row_group_size=100)
    whole = path.read_bytes()
    for seed in range(SEEDS):
        path.write_bytes(damaged(whole, random.Random(seed)))
        for errors in ("fail", "replace", "skip"):
            tried(lambda errors=errors: read(path, errors))  # type: ignore[misc]


def test_damaged_tokenizers_are_read_or_refused(tmp_path: Path) -> None:
    whole, path = MODEL.read_bytes(), tmp_path / "a.model"
    for seed in range(SEEDS):
        of = random.Random(seed)
        at = of.randrange(len(whole) - 900)
        path.write_bytes(whole[:at] + damaged(whole[at : at + 900], of) + whole[at + 900 :])

        def reads() -> None:
            tokenizer = load_tokenizer(path)
            tokenizer.decode(tokenizer.encode("def f(x):\n    return ▁\n")).encode()

        tried(reads)


def test_odd_values_in_a_tokenizer_json_are_read_or_refused(tmp_path: Path) -> None:
    path, beside = byte_level(tmp_path), tmp_path / "tokenizer_config.json"
    whole, config = path.read_text(), {"bos_token": {"content": "<s>"}}
    load_tokenizer(path)

    def reads() -> None:
        tokenizer = load_tokenizer(path)
        tokenizer.decode(tokenizer.encode("def f(x):\n    return ▁\n")).encode()

    for seed in range(SEEDS):
        path.write_bytes(damaged(whole.encode(), random.Random(seed)))
        tried(reads)
    of = random.Random(0)
    for place in of.sample(list(places(json.loads(whole))), 60):
        path.write_text(json.dumps(changed(json.loads(whole), place, of.choice(ODD))))
        tried(reads)
    path.write_text(whole)
    for odd in [json.dumps(changed(config, place, odd)) for place in places(config) for odd in ODD] + ["[" * 9999]:
        beside.write_text(odd)
        tried(reads)


QUESTION = {"prompt": "1 + 1 =", "answers": ["2"], "budget": 3, "length": 64, "gap": " ", "metric": "f1"}
SQUAD = {"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": [{"text": "a"}]}]}]}]}


@pytest.mark.parametrize(("name", "value"), [("a.jsonl", QUESTION), ("a.json", SQUAD)])
def test_questions_with_odd_values_are_read_or_refused(tmp_path: Path, name: str, value: Any) -> None:
    path = tmp_path / name
    for place in places(value):
        for odd in ODD:
            path.write_text(json.dumps(changed(value, place, odd)))
            message = tried(lambda: open_files([path], ByteTokenizer()))
            assert not message or message.startswith(f"--file: {path}")
    for seed in range(SEEDS):
        path.write_bytes(damaged(json.dumps(value).encode(), random.Random(seed)))
        tried(lambda: open_files([path], ByteTokenizer()))


# What takes much memory or time


def large(kind: str) -> bytes:
    """A manifest of some MB, of which each of very many parts is wrong."""
    number = 1 << 21
    match kind:
        case "many":
            return b'{"shards": [' + b"1, " * number + b"1]}"
        case "deep":
            return b'{"shards": [[' + b"{}," * (number // 2) + b"1]]}"
        case _:
            return b"{" + b", ".join(b'"%d": 1' % i for i in range(number // 6)) + b"}"


BOMBS = """
import os, sys, time
from pathlib import Path
from data_tools import commands
from data_tools.prepare import Preparation
from lasptrain.data.manifest import Manifest
from lasptrain.data.shard import Shard
from lasptrain.errors import LaspError

for name in sys.argv[1:]:
    if child := os.fork():  # so that each has a memory of its own
        os.waitpid(child, 0)
        continue
    began = time.process_time()
    try:
        if name.endswith(".ltok"):
            Shard(Path(name)).verify()
        elif name.endswith(".set"):
            Manifest.load(Path(name))
        else:
            commands.prepare(Preparation([name], "bytes", workers=1, validation_ppm=0), Path("out"))
        code = 0
    except LaspError as error:
        code = error.code
    peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
    print(name, code, int(peak) >> 10, f"{time.process_time() - began:.2f}", flush=True)
    os._exit(0)
"""


def zeros(path: Path, pack: Any, head: bytes, size: int) -> None:
    """A packed file of `head` and so many MiB of one letter."""
    with pack(path, "wb") as stream:
        stream.write(head)
        for _ in range(size):
            stream.write(b"a" * (1 << 20))


def test_small_files_that_would_take_gigabytes_are_refused(tmp_path: Path) -> None:
    """In a second and 200 MB each."""
    for name, head in {"line.jsonl": b'{"text": "', "list.json": b'[{"text": "', "text.txt": b""}.items():
        zeros(tmp_path / f"{name}.zst", lambda path, _: pyarrow.CompressedOutputStream(str(path), "zstd"), head, 256)
    zeros(tmp_path / "line.jsonl.gz", gzip.open, b'{"text": "', 32)
    for name, size in {"large": 8 << 20, "larger": 40 << 20}.items():
        values = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 256), pyarrow.array(["x" * size]))
        parquet.write_table(pyarrow.table({"text": values}), tmp_path / f"{name}.parquet", compression="zstd")
    values = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 99), pyarrow.array(["x" * (1 << 20)]))
    lists = pyarrow.ListArray.from_arrays([0, 99], values)
    parquet.write_table(pyarrow.table({"text": lists}), tmp_path / "lists.parquet", compression="zstd")
    table = bytes(1 << 17)  # checksums of 2 GiB
    for number, counts in enumerate(({"n_tokens": 1 << 30}, {"n_documents": 1 << 28})):
        page = json.dumps(asdict(ShardHeader(300, 1, "", "", "", "")) | counts).encode()
        sizes = [PAGE, 2 * counts.get("n_tokens", 0), PAGE, 8 * counts.get("n_documents", 0), PAGE, len(table)]
        foot = FOOTER.pack(*sizes, zlib.crc32(table), 0, MAGIC)[:52]
        foot = FOOTER.pack(*sizes, zlib.crc32(table), zlib.crc32(foot), MAGIC)
        (tmp_path / f"{number}.ltok").write_bytes(sealed(page) + table + foot)
    for kind in ("many", "deep", "keys"):
        (tmp_path / f"{kind}.set").mkdir()
        (tmp_path / f"{kind}.set" / FILE).write_bytes(large(kind))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert all((tmp_path / name).stat().st_size < 1 << 18 for name in names)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", BOMBS, *names]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    found = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in found] == names, done.stderr
    assert {code for _, code, *_ in found} == {"3"}, found
    assert all(int(peak) < 200 and float(seconds) < 5 for *_, peak, seconds in found), found


def test_a_packed_text_may_repeat_itself(tmp_path: Path) -> None:
    """Far more than text does, as long as it is small."""
    text = "the grass is green. " * 500_000
    (tmp_path / "a.txt.zst").write_bytes(pyarrow.compress(text.encode(), codec="zstd", asbytes=True))
    (found,) = open_source(str(tmp_path)).documents(Reading(), Counter())
    assert found.text == text and (tmp_path / "a.txt.zst").stat().st_size * 5000 < len(text)
    with pytest.raises(DataError, match="no such source"):
        open_source("")
