"""Text to dataset: sources, tokenizers, cutting, and the same bytes whoever prepares them."""

import bz2
import codecs
import contextlib
import errno
import gzip
import hashlib
import json
import lzma
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from data_tools import commands, sources, synthetic, windows
from data_tools import encode as worker
from data_tools import prepare as preparing
from data_tools.files import counted
from data_tools.packing import BestFit
from data_tools.prepare import Preparation, ensure_dataset, prepare
from data_tools.sources import Piece, Reading, open_source
from data_tools.spool import Ids, Spool
from data_tools.synthetic import Kind
from data_tools.tokenizer import ByteTokenizer, Tokenizer, check, cut, cuts_safely, load_tokenizer
from lasptrain.cli.main import app
from lasptrain.data.dataset import TokenDataset
from lasptrain.data.manifest import Manifest
from lasptrain.errors import DataError, LaspError, ResourceError, SetupError
from lasptrain.eval.tasks.files import rows
from lasptrain.process.location import resolve
from lasptrain.recipe.loading import load
from tests.support.byte_level import byte_level
from tests.support.gloo import PATIENCE

MODEL = Path(__file__).parents[2] / "tokenizers" / "python-4k.model"
RECIPES = Path(__file__).parents[2] / "recipes"
HARD = [
    "a\r\nb\x00c\td",
    "  two  blanks \n\n\n",
    "é e\u0301 ﬁ \ufeff 😀 \u202e",
    "<s></s><unk>",
    "x" * 500,
    " ",
    "1234567 89",
]


@pytest.fixture(scope="module")
def library() -> list[str]:
    """Part of the standard library, long files included."""
    texts = [document.text for document in open_source("python:source").documents(Reading(), Counter())]
    return texts[::6]


@pytest.fixture(scope="module", params=["bytes", "model"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return load_tokenizer("bytes" if request.param == "bytes" else MODEL)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("first text\n" * 30)
    (folder / "deep" / "b.txt").write_bytes("\ufeffsecond text\r\n".encode() * 20)
    (folder / "c.txt.gz").write_bytes(gzip.compress(b"third text\n" * 50))
    lines = [json.dumps({"text": f"line {i} " * (i % 7 + 1), "other": 1}) for i in range(200)]
    (folder / "d.jsonl").write_text("\n".join([*lines, "", json.dumps({"text": "  "})]))
    (folder / "ignored.bin").write_bytes(b"\xff")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_text_comes_back_and_bytes_are_counted(tokenizer: Tokenizer, library: list[str]) -> None:
    for text in [*HARD, *library]:
        ids = tokenizer.encode(text)
        assert tokenizer.bos not in ids and max(ids) < tokenizer.vocab_size
        assert len(tokenizer.token_bytes) == tokenizer.vocab_size
        if "▁" not in text:  # sentencepiece's own sign for the space
            assert tokenizer.decode(ids) == text
            assert sum(tokenizer.token_bytes[i] for i in ids) == len(text.encode())
    ids = tokenizer.encode("end")
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.vocab_size + 5]) == "end"
    assert tokenizer.token_bytes[tokenizer.bos] == 0


def test_cutting_changes_no_token(tokenizer: Tokenizer, library: list[str]) -> None:
    assert cuts_safely(tokenizer, library)
    for text in library[:40]:
        pieces = list(cut(text, 300))
        assert "".join(pieces) == text
        assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_a_tokenizer_is_checked(library: list[str]) -> None:
    model = load_tokenizer(MODEL)
    named = [(f"text {i}", text) for i, text in enumerate([*HARD, *library[:20]])]
    good = check(model, named, load_tokenizer(MODEL))
    assert good.good and good.cuts and good.differing == 0 and good.texts == len(named)
    assert good.bytes == sum(len(text.encode()) for _, text in named)

    class Lossy(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            return [256 if i == ord("x") else i for i in super().encode(text)]

    bad = check(Lossy(), [("a", "axb"), ("b", "abc")], ByteTokenizer())
    assert not bad.good and bad.unknown == 1 and bad.differing == 1
    assert bad.changed == ["a: character 1: 'xb' comes back as 'b'"]


def test_the_mark_of_a_space_is_kept_or_counted_as_lost(tmp_path: Path) -> None:
    text = "a ▁ mark and another▁ "
    (tmp_path / "a.txt").write_text(text)
    for spec, lost in (("bytes", 0), (byte_level(tmp_path), 0), (MODEL, 2)):
        tokenizer = load_tokenizer(spec)
        found = check(tokenizer, [("a", text)])
        assert found.good and not found.changed
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == (text.replace("▁", " ") if lost else text)
        assert sum(tokenizer.token_bytes[i] for i in ids) == len(text.encode()) - 2 * lost
        out = prepare(
            Preparation([str(tmp_path / "a.txt")], spec, validation_ppm=0), tmp_path / f"{Path(spec).name}.set"
        )
        assert Manifest.load(out).dropped == ({"replaced ▁": lost} if lost else {})


def test_cut_places() -> None:
    assert list(cut("ab\ncd\nefgh", 7)) == ["ab\ncd\n", "efgh"]
    assert list(cut("ab cd  efgh", 8)) == ["ab cd", "  efgh"]
    assert list(cut("abcdefghij k", 4)) == ["abcdefghij", " k"]
    assert [len(piece) for piece in cut("x" * (3 << 19))] == [1 << 20, 1 << 19]


def test_a_tokenizer_that_may_not_be_cut_is_found_out(library: list[str]) -> None:
    class Prefixing(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            return [32, *super().encode(text)]

    assert not cuts_safely(Prefixing(), library[:1])


def texts(spec: Path | str, reading: Reading = Reading()) -> list[tuple[str, str, int]]:  # noqa: B008  (frozen)
    source = open_source(str(spec))
    return [(document.place, document.text, document.done) for document in source.documents(reading, Counter())]


def zstd(content: bytes) -> bytes:
    """A frame."""
    packed: bytes = pyarrow.compress(content, codec="zstd", asbytes=True)
    return packed


def test_compressed_files_and_tables_are_read_as_what_they_hold(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"line {i}\n", "body": f"body {i}"}) for i in range(600)]
    content = "\n".join(lines).encode()
    middle = len(content) // 2
    frames = [zstd(content[:middle]), zstd(b""), zstd(content[middle:])]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    (tmp_path / "b.txt.zst").write_bytes(zstd(b"one text"))
    table = pyarrow.table({"text": [f"row {i}" for i in range(600)] + [None], "other": [*range(600), 1]})
    parquet.write_table(table, tmp_path / "c.parquet")
    found = texts(tmp_path, Reading(max_bad=1))
    assert [text for _, text, _ in found] == [f"line {i}\n" for i in range(600)] + ["one text"] + [
        f"row {i}" for i in range(600)
    ]
    assert found[0][0] == f"{tmp_path / 'a.jsonl.zst'}:1" and found[-1][0] == f"{tmp_path / 'c.parquet'}:600"
    done = [position for *_, position in found]
    assert done == sorted(done) and done[-1] <= open_source(str(tmp_path)).bytes
    with pytest.raises(DataError, match=r"c\.parquet: no column 'body'; it has text, other"):
        texts(tmp_path / "c.parquet", Reading(field="body"))
    for name in ("a.jsonl.zst", "c.parquet"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 3])
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            texts(tmp_path / name)


PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstd,
    ".zstd": zstd,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def test_all_usual_names_are_read_in_any_case(tmp_path: Path) -> None:
    """C4's are .json.gz, Dolma's .json.gz and .jsonl.zst, others write .ndjson; a BOM is none of the text."""
    for packed, pack in PACK.items():
        line = json.dumps({"text": f"line of {packed}"}).encode() + b"\n"
        for ending in (".jsonl", ".ndjson", ".json"):
            (tmp_path / f"a{ending}{packed}").write_bytes(pack(codecs.BOM_UTF8 + line))
            (tmp_path / f"B{ending.upper()}{packed.upper()}").write_bytes(pack(line * 2))
        (tmp_path / f"a.Txt{packed}").write_bytes(pack(b"a text"))
        with pytest.raises(DataError, match=re.escape(f"a.json{packed}:1: no text under 'body'")):
            texts(tmp_path / f"a.json{packed}", Reading(field="body"))
    parquet.write_table(pyarrow.table({"text": ["a row"]}), tmp_path / "a.PARQUET")
    assert Counter(text for _, text, _ in texts(tmp_path)) == {
        "a row": 1,
        "a text": len(PACK),
        **{f"line of {packed}": 3 * 3 for packed in PACK},
    }
    for packed in (".bz2", ".xz", ".zst"):
        path = tmp_path / f"a.json{packed}"
        whole = path.read_bytes()
        for damaged in (whole[:-9], whole + whole[:-1], b"none at all"):
            path.write_bytes(damaged)
            with pytest.raises(DataError, match=rf"a\.json\{packed}: it cannot be read: "):
                texts(path, Reading(max_bad=1))


@pytest.mark.parametrize(("log", "fits"), [(20, True), (27, True), (28, False), (31, False)])
def test_frames_that_look_far_back(tmp_path: Path, log: int, fits: bool) -> None:
    """As `zstd --long=31` makes them: these would take 2 GiB; how to make others of them is said."""
    content = b'{"text": "a"}\n'
    frame = b"\x28\xb5\x2f\xfd\0" + bytes([(log - 10) << 3]) + (len(content) << 3 | 1).to_bytes(3, "little") + content
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(content) + frame)
    if fits:
        assert len(texts(tmp_path)) == 2
        return
    with pytest.raises(DataError, match=r"a\.jsonl\.zst: looks back over more than 128 MiB.*zstd -dc --long=31 OLD"):
        texts(tmp_path)


def named(folder: Path, *names: str) -> Path:
    """The folder, with files of these names that say their name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_what_is_not_read_is_counted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By `prepare`, and where a recipe names the folder, also when it has been prepared before."""
    names = ("a.txt", "b.md", "deep/c.MD", "d.tar.gz", "README", ".hidden", "deep/.txt~", "1.%")
    corpus = named(tmp_path / "corpus", *names)
    said = "2 .md, 2 dot files, 2 other files, 1 .tar.gz, 1 socket"
    with socket.socket(socket.AF_UNIX) as bound, contextlib.chdir(corpus):
        bound.bind("socket.jsonl")
    made = commands.prepare(Preparation([str(corpus)], "bytes", validation_ppm=0), tmp_path / "out")
    assert f"\n  left out     {said}\n" in str(made) and made.manifest.splits["train"].documents == 1
    named(tmp_path, "only.txt")
    whole = commands.prepare(Preparation([str(tmp_path / "only.txt")], "bytes", validation_ppm=0), tmp_path / "whole")
    assert "\n  left out     nothing\n" in str(whole)
    own = [f"data.source={corpus}", f"data.cache={tmp_path}", "data.validation=0", "eval.windows=0"]
    recipe = load(RECIPES / "quickstart.yaml", own)
    for _ in range(2):
        resolve(recipe, 1, tmp_path / "run")
        assert capsys.readouterr().err == f"data.source: {corpus}: left out: {said}\n"
    (corpus / "a.jsonl").write_text('{"text": null}\n')
    resolve(recipe, 1, tmp_path / "run")
    dropped = f"data.source: {corpus}: dropped: 1 empty\n"
    assert capsys.readouterr().err == f"{dropped}data.source: {corpus}: left out: {said}\n"
    (corpus / "a.jsonl").unlink()
    asked = commands.synthesize("recall", [str(corpus)], (900, 900), 3, 0, False, tmp_path / "out.jsonl")
    assert asked.endswith(f"\nleft out: {said}")
    kinds = Counter({f".{i}": 1 for i in range(20)} | {".md": 1000, "dot file": 1})
    assert re.fullmatch(r"1,000 \.md, 1 \.0, 1 \.1, 1 \.10, .*, 10 of other endings", counted(kinds))


PIPES = """
import sys
from data_tools.sources import open_source
from lasptrain.errors import DataError

for name in sys.argv[1:]:
    try:
        open_source(name).sha256
    except DataError as error:
        print(error)
"""


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "folder" / "one").mkdir(parents=True)
    for name in ("pipe.txt", "folder/one/pipe.txt"):
        os.mkfifo(tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", PIPES, "pipe.txt", "folder", "repositories:folder"],
        env=os.environ | {"PYTHONPATH": str(MODEL.parent.parent)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    said = [line.partition("; ") for line in done.stdout.splitlines()]
    assert [line[0] for line in said] == [
        "pipe.txt: 0 files to read",
        "folder: 0 files to read",
        "folder: 0 files in folders",
    ], done.stderr
    assert all(line[2].endswith("left out: 1 FIFO") for line in said)


def test_links_are_followed_and_no_text_is_read_twice(tmp_path: Path) -> None:
    """What stands in the folder keeps its name; of two links to the same the first one counts; none goes in circles."""
    root = named(tmp_path / "root", "z/own.txt", "blobs/0123")
    named(tmp_path / "away", "b.txt", "deep/c.txt", "deep/d.md")
    for name, leads in {
        "a.txt": "z/own.txt",  # is read anyway
        "b.txt": "blobs/0123",  # is not, under its own name
        "c.txt": "blobs/0123",
        "circle": "circles",  # of links
        "circles": "../root",
        "z/up": "..",
        "z/top": "/",
        "link1": "../away/deep",
        "link2": "../away",
        "link3": "link2",
        "link4": "z",
        "one.txt": "../away/b.txt",
        "notes.md": "z/own.txt",
    }.items():
        (root / name).symlink_to(leads)
    (tmp_path / "away" / "deep" / "back").symlink_to(root)
    source = open_source(str(root))
    places = ["b.txt", "link1/c.txt", "link2/b.txt", "z/own.txt"]
    assert [path.relative_to(root).as_posix() for path in source.files] == places
    assert source.left_out == {"repeated link": 9, "upward link": 1, ".md": 2, "other file": 1}
    assert [text for _, text, _ in texts(root)] == ["blobs/0123", "deep/c.txt", "b.txt", "z/own.txt"]
    (tmp_path / "named").symlink_to("root")
    assert len(open_source(str(tmp_path / "named")).files) == 4


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    named(tmp_path, "deep/a.txt")
    for leads, reason in (("gone", "No such file or directory"), ("data", "Too many levels of symbolic links")):
        (tmp_path / "deep" / "data").symlink_to(leads)
        with pytest.raises(DataError, match=rf"deep/data -> {leads}: it cannot be read: {reason}$"):
            open_source(str(tmp_path))
        (tmp_path / "deep" / "data").unlink()


CLOSED = """
import os, pathlib, sys
from data_tools import commands
from data_tools.prepare import Preparation, ensure_dataset
from data_tools.sources import open_source
from lasptrain.errors import LaspError

if os.getuid() == 0:  # who may read everything
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
for name in sys.argv[1:]:
    for reads in (
        lambda: commands.prepare(Preparation([name], "bytes"), pathlib.Path("out")),
        lambda: ensure_dataset(Preparation([name], "bytes", validation_ppm=0), pathlib.Path("cache")),
    ):
        try:
            print(reads())
        except LaspError as error:
            print(error.code, error)
"""


def test_what_may_not_be_read_is_named(tmp_path: Path) -> None:
    """A folder in a folder, a file, what stands in a folder that may only be listed, and a name that leads into one."""
    named(tmp_path, *(f"{name}/1.txt" for name in "abc"), "a/closed/2.txt", "b/closed.txt", "c/listed/2.txt")
    named(tmp_path, "d/one/closed.py")
    closed = {"a/closed": 0, "b/closed.txt": 0, "c/listed": 0o444, "d/one/closed.py": 0}
    tmp_path.chmod(0o777)
    for name, mode in closed.items():
        (tmp_path / name).chmod(mode)
    names = ["a", "b", "c", "repositories:d", "a/closed/2.txt"]
    environment = os.environ | {"PYTHONPATH": str(MODEL.parent.parent)}
    command = [sys.executable, "-c", CLOSED, *names]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    for name in closed:
        (tmp_path / name).chmod(0o700)
    expected = ["a/closed", "b/closed.txt", "c/listed/2.txt", "d/one/closed.py", "a/closed/2.txt"]
    assert re.findall(r"^3 (.*): it cannot be read: (?:P|no p)ermission", done.stdout, re.M) == [
        name for name in expected for _ in range(2)
    ], done.stdout + done.stderr


def test_a_repository_is_one_document(tmp_path: Path) -> None:
    for name, content in {
        "one/b/c.py": b"c = 1\n\n\n",
        "one/a.py": b"a = 1",
        "one/.git/config": b"hidden",
        "one/image.png": b"\x89PNG\0",
        "one/latin.txt": b"\xe9",
        "two/readme": b"text\n",
        "stray.py": b"belongs to none",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    source, dropped = open_source(f"repositories:{tmp_path}"), Counter[str]()
    found = list(source.documents(Reading(), dropped))
    assert [document.text for document in found] == ["# a.py\na = 1\n\n# b/c.py\nc = 1\n", "# readme\ntext\n"]
    assert [document.place for document in found] == [str(tmp_path / "one"), str(tmp_path / "two")]
    assert found[-1].done == source.bytes and dropped == {"not code": 2}
    for wrong in (tmp_path / "missing", tmp_path / "two"):
        with pytest.raises(DataError, match=f"{wrong}: .*repositories:FOLDER takes each folder in it as one document"):
            open_source(f"repositories:{wrong}")


@pytest.mark.parametrize("kind", ["passkey", "recall", "tracking"])
def test_what_is_asked_at_the_end_was_hidden_in_the_text(kind: Kind) -> None:
    filler = [f"line {i} of text that is real enough" for i in range(400)]
    made = list(synthetic.documents(kind, filler, (4000, 4000), 6, seed=1))
    assert made == list(synthetic.documents(kind, filler, (4000, 4000), 9, seed=1))[:6]
    found = [one.row["text"] for one in made]
    assert len(set(found)) == 6
    places, counts = [], set()
    for text in found:
        body, asked = text.rsplit("\n", 1)
        assert 3900 < len(text) < 4200
        if kind == "tracking":
            assigned = dict(re.findall(r"VAR (\w+) = (\w+)\.", body))
            value = re.findall(r"hold (\d+)", asked)[0]
            chain = re.findall(r"[a-z]+\d\d", asked.split(":")[1])
            assert [assigned[name] for name in chain] == [value, *chain[:-1]]
            assert len(assigned) == 8 and sum(name not in chain for name in assigned) == 4
            order = [body.index(f"VAR {name} =") for name in chain]
            assert order == sorted(order)
        else:
            answers = re.findall(r"The (?:value of \w+|pass key) is \d+", asked)
            assert all(answer in body for answer in answers)
            counts.add(len(answers))
            places += [body.index(answer) for answer in answers]
        hidden = [line for line in body.splitlines() if line.startswith(("VAR ", "The "))]
        rest = body.replace("".join(f"{line}\n" for line in hidden), "") if len(hidden) == 1 else body
        assert sum(line in rest for line in filler) > 60
    assert kind == "tracking" or max(places) - min(places) > 1500
    assert {"tracking": counts == set(), "passkey": counts == {1}, "recall": len(counts) > 2}[kind]
    for one in made:
        answer = one.row["text"].removeprefix(one.prompt["prompt"])
        assert answer != one.row["text"] and answer.startswith(f" {', '.join(one.prompt['answers'])}.")


def test_pairs_return_soon_and_late_and_never_change() -> None:
    made = list(synthetic.documents("pairs", [], (6000, 6000), 30, seed=0))
    assert made == list(synthetic.documents("pairs", [], (6000, 6000), 40, seed=0))[:30]
    gaps, counts, parted = [], set(), 0
    for one in made:
        text = one.row["text"]
        assert 5900 < len(text) < 6100
        parted += synthetic.NOISE in text
        text = text.replace(f"{synthetic.NOISE} ", "")
        facts = [re.fullmatch(r"([a-z]{1,2})([A-Z])", fact) for fact in text.split(" ")]
        known: dict[str, str] = {}
        last: dict[str, int] = {}
        for place, fact in enumerate(facts):
            assert fact is not None and known.setdefault(fact[1], fact[2]) == fact[2]
            gaps += [place - last[fact[1]]] if fact[1] in last else []
            last[fact[1]] = place
        counts.add(len(known))
        assert one.row["text"] == one.prompt["prompt"] + one.prompt["answers"][0]
        assert one.prompt["prompt"].rsplit(" ", 1)[1] in {key[0] for key in last} | set(last)
    assert len(counts) > 15 and 17 < parted < 29
    for shortest in (1, 4, 16, 64, 256):
        assert sum(shortest <= gap < 4 * shortest for gap in gaps) > 300


def test_short_documents_of_pairs_are_as_long_as_asked_for() -> None:
    for characters in (32, 150, 500):
        made = synthetic.documents("pairs", [], (characters, characters), 40, seed=0)
        lengths = [len(one.row["text"]) for one in made]
        assert characters - 8 < min(lengths) and max(lengths) < characters + 8


def test_short_synthetic_documents_hold_as_much_text_as_long_ones() -> None:
    made = synthetic.documents("passkey", ["line of text\n" * 9], (500, 32_000), 3000, seed=0)
    lengths = [len(one.row["text"]) for one in made]
    assert min(lengths) < 600 and max(lengths) > 8_000
    assert 0.4 < sum(n for n in lengths if n < 2000) / sum(n for n in lengths if n < 8000) < 0.6


def test_synthetic_documents_go_to_a_new_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n" * 9)
    out = tmp_path / "deep" / "out.jsonl"
    said = commands.synthesize("recall", [str(tmp_path / "a.txt")], (900, 900), 3, 0, False, out)
    assert said == f"{out}: 3 documents of about 900 characters"
    assert len(texts(out)) == 3 and [path.name for path in out.parent.iterdir()] == ["out.jsonl"]
    with pytest.raises(SetupError, match=r"out\.jsonl: it exists"):
        commands.synthesize("recall", [str(tmp_path / "a.txt")], (900, 900), 3, 0, False, out)
    asked = tmp_path / "asked.jsonl"
    commands.synthesize("recall", [str(tmp_path / "a.txt")], (300, 900), 3, 0, True, asked)
    assert [bool(row.references) for row in rows(asked)] == [True] * 3
    commands.synthesize("pairs", [], (300, 900), 3, 0, True, tmp_path / "pairs.jsonl")
    assert [(row.gap, row.budget) for row in rows(tmp_path / "pairs.jsonl")] == [("", 1)] * 3


def test_a_window_is_shown_as_text(corpus: Path, tmp_path: Path) -> None:
    folder = prepare(Preparation([str(corpus)], "bytes", validation_ppm=0, workers=1), tmp_path / "out")
    shown = windows.show_window(folder, "bytes", 512, 2, 0, "train")
    split = TokenDataset.open(folder).whole("train")
    tokens = split.read(split.window_start(512, 0, 2), 512)
    assert "".join(text for *_, text in shown.documents) == ByteTokenizer().decode(tokens.tolist())
    spans = [(first, end) for first, end, _ in shown.documents]
    assert spans[0][0] == 0 and spans[-1][1] == 512 and all(a[1] == b[0] for a, b in pairwise(spans))
    assert [first for first, _ in spans[1:]] == [i for i in (tokens == 256).nonzero().flatten().tolist() if i]
    title = f"window at token {shown.place:,} of {folder}"
    assert len(spans) > 1 and f"{title}: {len(spans):,} documents\n" in str(shown)
    assert f"{title}: 1 document\n" in str(replace(shown, documents=shown.documents[:1]))
    assert windows.show_window(folder, "bytes", 512, 0, 0, "train", at=shown.place) == shown
    with pytest.raises(DataError, match=rf"--at: found {split.tokens}, .* where a recipe mixes sources, name the run"):
        windows.show_window(folder, "bytes", 512, 0, 0, "train", at=split.tokens)
    with pytest.raises(DataError, match=r"--tokenizer: found python-4k\.model; .* was made with another, bytes"):
        windows.show_window(folder, str(MODEL), 512, 2, 0, "train")


def test_reading_is_timed(corpus: Path, tmp_path: Path) -> None:
    folder = prepare(Preparation([str(corpus)], "bytes", validation_ppm=0, workers=1), tmp_path / "out")
    timed = windows.time_reading(folder, 100, reads=5)
    assert 0 < timed.best <= timed.mean and re.match(
        r"slices of 100 tokens, read, checked and widened: best \d+\.\d+ ms, mean \d+\.\d+ ms", str(timed)
    )
    flipped = bytearray((folder / "train-00000.ltok").read_bytes())
    flipped[5000] ^= 1
    (folder / "train-00000.ltok").write_bytes(flipped)
    with pytest.raises(DataError, match="does not match its CRC-32"):
        windows.time_reading(folder, 4000, reads=5)


def test_training_does_not_wait_for_its_data(tmp_path: Path) -> None:
    """A rank at 2 million tokens/s waits less than 1 % of a step at 100,000."""
    (tmp_path / "a.txt").write_text("a line of text\n" * 20_000)
    folder = prepare(Preparation([str(tmp_path / "a.txt")], "bytes", validation_ppm=0, workers=1), tmp_path / "out")
    found = windows.time_waiting(folder, 1 << 18, rate=2e6, steps=4)
    assert 0 < found.mean < 0.01 * (1 << 18) / 100_000
    assert re.match(
        r"windows of 262,144 tokens, read ahead while 2,000,000 tokens/s are used: 4 steps wait \d", str(found)
    )


def test_documents_are_chosen_by_length(corpus: Path, tmp_path: Path) -> None:
    whole, long, short = (
        Manifest.load(
            prepare(Preparation([str(corpus)], "bytes", validation_ppm=0, workers=1, lengths=lengths), tmp_path / name)
        )
        for name, lengths in (("whole", (0, 10**9)), ("long", (100, 10**9)), ("short", (0, 99)))
    )
    assert long.splits["train"].documents == 3 and long.dropped["shorter"] == short.splits["train"].documents
    assert long.splits["train"].tokens + short.splits["train"].tokens == whole.splits["train"].tokens
    assert short.dropped["longer"] == 3


def test_a_packed_dataset(corpus: Path, tmp_path: Path) -> None:
    """Windows of 256: their documents are whole but for the long ones, and the same bytes from two calls."""
    made = {
        name: prepare(
            Preparation([str(corpus)], "bytes", workers=1, validation_ppm=0, packing=packing), tmp_path / name
        )
        for name, packing in {
            "concat": None,
            "one": BestFit(256),
            "two": BestFit(256),
            "cut": BestFit(256, "cut"),
        }.items()
    }
    assert files(made["one"]) == files(made["two"])
    manifests = {name: Manifest.load(folder) for name, folder in made.items()}
    assert len({manifest.fingerprint for manifest in manifests.values()}) == 3
    for name in ("one", "cut"):
        manifest, dataset = manifests[name], TokenDataset.open(made[name])
        assert commands.verify(made[name]).failures == 0
        assert (manifest.order.packing, manifest.order.align) == ("best_fit", 256)
        tokens = dataset.whole("train").read(0, dataset.whole("train").tokens)
        assert len(tokens) == manifest.splits["train"].tokens and len(tokens) % 256 == 0
        heads = (tokens[::256] == dataset.bos).float().mean()
        assert heads > 0.4  # one after another: 0.04
        assert manifest.splits["train"].bytes == int((tokens != dataset.bos).sum())
        assert "best_fit, windows of a multiple of 256" in str(commands.inspect(made[name]))
    assert manifests["cut"].dropped["tokens beyond their window"] == 331 + 318 + 551 - 3 * 256
    cached = [
        ensure_dataset(Preparation([str(corpus)], "bytes", validation_ppm=0, packing=packing), tmp_path / "cache")
        for packing in (None, BestFit(256), BestFit(256, "cut"))
    ]
    assert [files(folder)["train-00000.ltok"] for folder in cached] == [
        files(made[name])["train-00000.ltok"] for name in ("concat", "one", "cut")
    ]
    packed = {name: Preparation([str(made[name])], "bytes", packing=BestFit(256)) for name in made}
    assert ensure_dataset(packed["one"], tmp_path / "cache") == made["one"]
    with pytest.raises(
        DataError, match=r"concat: packed by concat .* the recipe has data\.packing: best_fit with .* 256"
    ):
        ensure_dataset(packed["concat"], tmp_path / "cache")
    with pytest.raises(DataError, match=r"[0-9,]+ tokens to train on, no window of 65,536"):
        prepare(Preparation([str(corpus)], "bytes", workers=1, packing=BestFit(1 << 16)), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_training_a_tokenizer_is_deterministic(corpus: Path, tmp_path: Path) -> None:
    one, two = (commands.train_tokenizer([str(corpus)], 300, tmp_path / f"{i}.model") for i in "ab")
    assert one.sha256 == two.sha256 and one.vocab == 300 and one.sha256 in str(one)
    with pytest.raises(SetupError, match=r"a\.model: it exists"):
        commands.train_tokenizer([str(corpus)], 300, tmp_path / "a.model")
    with pytest.raises(
        DataError, match=r"a tokenizer of 5000 pieces cannot be trained on this text: expected at most \d+$"
    ):
        commands.train_tokenizer([str(corpus)], 5000, tmp_path / "c.model")


def test_a_tokenizer_that_finds_no_room_leaves_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lay there refused the next training."""

    def full(path: Path, content: bytes) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        commands.train_tokenizer([str(corpus)], 300, tmp_path / "new" / "a.model")
    assert not list((tmp_path / "new").iterdir())


def test_the_shipped_tokenizer_is_the_one_its_page_names() -> None:
    assert load_tokenizer(MODEL).sha256 in (MODEL.parent / "README.md").read_text()


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "bad.model").write_text("no model")
    (tmp_path / "odd.model").write_bytes(MODEL.read_bytes().replace("▁def".encode(), b"\xff\x96\x81def"))
    os.mkfifo(tmp_path / "pipe.model")
    for name, reason in {
        "bad.model": "no sentencepiece model",
        "none.model": "it cannot be read: No such file",
        "odd.model": "the model has pieces that are not UTF-8",
        "pipe.model": "it cannot be read: it is no regular file",
        "": "holds no tokenizer.model and no tokenizer.json; a tokenizer.json, a folder that holds one, a",
    }.items():
        with pytest.raises(DataError, match=f"{name}: {reason}"):
            load_tokenizer(tmp_path / name)


def test_a_dataset_holds_the_documents(corpus: Path, tmp_path: Path) -> None:
    dataset = TokenDataset.open(
        prepare(Preparation([str(corpus)], "bytes", validation_ppm=100_000, seed=3), tmp_path / "out")
    )
    tokenizer = load_tokenizer("bytes")
    read = {}
    for name, split in dataset.splits.items():
        text = split.read(0, split.tokens).tolist()
        assert text[0] == dataset.bos
        marks = [i for i, token in enumerate(text) if token == dataset.bos] + [len(text)]
        read[name] = [tokenizer.decode(text[a:b]) for a, b in pairwise(marks)]
        assert dataset.manifest.splits[name].documents == len(read[name])
        assert dataset.manifest.splits[name].bytes == int(dataset.token_bytes[split.read(0, split.tokens)].sum())
    expected = [document.text for document in open_source(str(corpus)).documents(Reading(), Counter())]
    assert sorted(read["train"] + read["validation"]) == sorted(expected) and len(expected) == 203
    assert not set(read["train"]) & set(read["validation"]) and read["validation"]
    assert [text for text in expected if text in set(read["train"])] != read["train"]  # shuffled
    assert dataset.manifest.dropped == {"empty": 1}
    assert "second" in expected[-1] and "\ufeff" not in expected[-1][:1]


def test_unigram_entropy(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("aaab")
    manifest = Manifest.load(
        prepare(Preparation([str(tmp_path / "a.txt")], "bytes", validation_ppm=0), tmp_path / "out")
    )
    assert manifest.unigram_entropy == pytest.approx(0.950271, abs=1e-6)  # shares 3/5, 1/5, 1/5
    assert manifest.lengths.documents == (0, 0, 1) and manifest.lengths.tokens == (0, 0, 5)


def test_the_same_bytes_from_any_number_of_workers(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_tools.prepare.UNIT", 200)
    monkeypatch.setattr("data_tools.shards.SHARD_TOKENS", 2000)
    (corpus / "a.json.bz2").write_bytes(bz2.compress(json.dumps([{"text": f"row {i}"} for i in range(99)]).encode()))
    (corpus / "linked").symlink_to(named(tmp_path / "elsewhere", "b.txt", "c.txt"))
    stages = []
    one = prepare(Preparation([str(corpus)], MODEL, workers=1, validation_ppm=100_000), tmp_path / "1")
    two = prepare(
        Preparation([str(corpus)], MODEL, workers=2, validation_ppm=100_000, progress=lambda *x: stages.append(x)),
        tmp_path / "2",
    )
    three = prepare(Preparation([str(corpus)], MODEL, workers=3, validation_ppm=100_000), tmp_path / "three")
    assert files(one) == files(two) == files(three) and len(files(one)) > 3
    assert {stage for stage, _, _ in stages} == {"encode", "write"}
    assert all(0 < done <= total for _, done, total in stages) and stages[-1][1] == stages[-1][2]
    other = prepare(Preparation([str(corpus)], MODEL, workers=1, validation_ppm=100_000, seed=1), tmp_path / "3")
    assert Manifest.load(other).fingerprint != Manifest.load(one).fingerprint
    assert commands.verify(one).failures == 0
    assert "windows of 512" in str(commands.inspect(one, 512))


def test_many_callers_prepare_once(corpus: Path, tmp_path: Path) -> None:
    found: list[Path] = []

    def ensured(seed: int = 0) -> Path:
        return ensure_dataset(
            Preparation([str(corpus)], "bytes", validation_ppm=100_000, seed=seed), tmp_path / "cache"
        )

    def call() -> None:
        found.append(ensured())

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 4
    times = {path: path.stat().st_mtime_ns for path in found[0].iterdir()}
    again = ensured()
    assert {path: path.stat().st_mtime_ns for path in again.iterdir()} == times
    assert ensured(seed=1) != again
    (corpus / "a.txt").write_text("changed text")
    changed = ensured()
    assert changed != again
    (corpus / "linked").symlink_to(named(tmp_path / "elsewhere", "b.txt"))
    linked = ensured()
    (tmp_path / "elsewhere" / "c.JSON").write_text(json.dumps([{"text": "c"}]))
    assert ensured() not in (again, changed, linked)
    assert linked != changed
    assert ensure_dataset(Preparation([str(again)], "bytes", validation_ppm=1, seed=1), tmp_path / "cache") == again


def test_what_a_killed_prepare_left_is_replaced(corpus: Path, tmp_path: Path) -> None:
    hidden = tmp_path / ".out.partial"
    hidden.mkdir()
    (hidden / "train-00000.ltok").write_text("half")
    out = prepare(Preparation([str(corpus)], "bytes"), tmp_path / "out")
    assert not hidden.exists() and commands.verify(out).failures == 0
    with pytest.raises(SetupError, match="it is not empty"):
        prepare(Preparation([str(corpus)], "bytes"), out)


KILLED = """
import os, pathlib, signal, sys
from data_tools import prepare

if __name__ == "__main__":
    prepare.UNIT = 200
    kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    prepare.prepare(prepare.Preparation([sys.argv[1]], "bytes", workers=2, progress=kill), pathlib.Path(sys.argv[2]))
"""


def test_a_killed_prepare_leaves_nothing_visible_and_no_process(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (corpus / "a.json").write_text(json.dumps([{"text": f"row {i}"} for i in range(99)]))
    (corpus / "linked").symlink_to(named(tmp_path / "elsewhere", "b.txt", "c.txt"))
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(corpus), str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(MODEL.parent.parent)}
    # This waits for all processes.
    ended = subprocess.run(command, env=environment, capture_output=True, timeout=PATIENCE, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.partial").exists()
    monkeypatch.setattr(preparing, "UNIT", 200)
    whole = prepare(Preparation([str(corpus)], "bytes", workers=1), tmp_path / "whole")
    assert len((tmp_path / ".out.partial" / "units").read_bytes().splitlines()) > 1
    assert files(prepare(Preparation([str(corpus)], "bytes", workers=1), tmp_path / "out")) == files(whole)


def _under_signals(unit: list[Piece]) -> list[Ids]:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(os.getpid(), number)
    return worker.encode("bytes", unit)


def test_a_signal_to_a_whole_group_is_answered_by_the_parent_alone(tmp_path: Path) -> None:
    """A worker that it ended while ids were on the way left the parent waiting for the rest of them."""
    units = [[Piece("a.txt", "ab", 2, last=True)] for _ in range(3)]
    with Spool(tmp_path, 257, "") as spool:
        found = list(preparing._in_order(_under_signals, iter(units), spool, 2))
    assert [counts for _, counts in found] == [[2], [2], [2]]


def _killed_on_b(unit: list[Piece]) -> list[Ids]:
    if unit[0].text == "b":
        os.kill(os.getpid(), signal.SIGKILL)
    return worker.encode("bytes", unit)


def test_a_killed_worker_is_told_and_the_others_end(tmp_path: Path) -> None:
    units = [[Piece("a.txt", text, 1, last=True)] for text in "aaabaaa"]
    with Spool(tmp_path, 257, "") as spool, pytest.raises(ResourceError, match="probably for its memory"):
        list(preparing._in_order(_killed_on_b, iter(units), spool, 2))


HEARD = """
import signal
from concurrent.futures import ProcessPoolExecutor
from data_tools import encode

def blocked(number):
    return signal.pthread_sigmask(signal.SIG_BLOCK, [])

if __name__ == "__main__":
    with ProcessPoolExecutor(1, mp_context=encode.server()) as pool:
        print(pool.submit(blocked, 0).result() >= set(encode.ASKING), blocked(0) & set(encode.ASKING))
"""


def test_signals_while_the_workers_server_starts_are_the_parents(tmp_path: Path) -> None:
    (tmp_path / "heard.py").write_text(HEARD)
    environment = os.environ | {"PYTHONPATH": str(MODEL.parent.parent)}
    command = [sys.executable, str(tmp_path / "heard.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("True set()\n", "")


def test_a_signal_while_a_worker_starts_is_heard_behind_it() -> None:
    """Else the worker ends in a traceback, as what it is to read is gone."""
    reached = []
    with pytest.raises(KeyboardInterrupt), worker.undisturbed():
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(len(range(99)))
    assert reached == [99] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("damage", ["none", "half a unit", "half a line", "flipped", "text", "shorter"])
def test_prepare_goes_on_from_the_units_that_were_finished(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """Stopped after ten units; what is left is damaged or the text is changed; no token of the result differs."""
    monkeypatch.setattr(preparing, "UNIT", 200)
    done = 0

    def stop(*_: object) -> None:
        nonlocal done
        done += 1
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(Preparation([str(corpus)], "bytes", workers=1, progress=stop), tmp_path / "out")
    ids, units = tmp_path / ".out.partial" / "ids", tmp_path / ".out.partial" / "units"
    match damage:
        case "half a unit":
            ids.write_bytes(ids.read_bytes() + b"\1\0" * 33)
        case "half a line":
            units.write_bytes(units.read_bytes()[:-5])
        case "flipped":
            content = bytearray(ids.read_bytes())
            content[len(content) // 2] ^= 1
            ids.write_bytes(content)
        case "text":
            (corpus / "d.jsonl").write_text(json.dumps({"text": "other text " * 90}))
        case "shorter":
            (corpus / "d.jsonl").unlink()
    encoded = []
    encode = worker.encode

    def count(path: str, unit: list[Piece]) -> list[Ids]:
        encoded.append(unit)
        return encode(path, unit)

    monkeypatch.setattr(worker, "encode", count)
    out = prepare(Preparation([str(corpus)], "bytes", workers=1), tmp_path / "out")
    again = len(encoded)
    assert files(out) == files(prepare(Preparation([str(corpus)], "bytes", workers=1), tmp_path / "whole"))
    reused = {"none": 10, "half a unit": 10, "half a line": 9}.get(damage)
    whole = len(encoded) - again
    assert whole - again == reused if reused else 0 <= again <= whole


def test_a_text_file_of_any_size_takes_little_memory(tmp_path: Path) -> None:
    line = "a line of text that is as long as others, é\n"
    (tmp_path / "a.txt").write_text(line * 500_000)
    tracemalloc.start()
    try:
        digest, size = hashlib.sha256(), 0
        pieces = open_source(str(tmp_path)).pieces(Reading(), Counter())
        for piece in pieces:
            digest.update(piece.text.encode())
            size += len(piece.text)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert piece.last and piece.kept and size == len(line) * 500_000
    assert digest.hexdigest() == hashlib.sha256((tmp_path / "a.txt").read_bytes()).hexdigest()
    assert peak < 12 << 20 < size


LONG = """
import pathlib, resource, sys
from data_tools.prepare import Preparation, prepare

for name in sys.argv[1:]:
    prepare(Preparation([name], "bytes", validation_ppm=0, workers=1), pathlib.Path(name + ".set"))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


@pytest.mark.slow
def test_a_document_of_any_size_takes_no_more_memory(tmp_path: Path) -> None:
    """As a text file: 17 MB take what 6 MB take. As a line of JSON it is as good a document."""
    line = "a line of text that is as long as others, é\n"
    names = ["5.txt", "15.txt", "5.jsonl"]
    for name in names:
        text = line * (int(name.partition(".")[0]) * 25_000)
        (tmp_path / name).write_text(json.dumps({"text": text}) if name.endswith("jsonl") else text)
    environment = os.environ | {"PYTHONPATH": str(MODEL.parent.parent)}
    command = [sys.executable, "-c", LONG, *names]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peaks = [int(peak) for peak in done.stdout.split()]
    assert peaks[1] - peaks[0] < 6, peaks
    for name in names:
        split = Manifest.load(tmp_path / f"{name}.set").splits["train"]
        assert (split.documents, split.bytes) == (1, int(name.partition(".")[0]) * 25_000 * len(line.encode()))


@pytest.mark.parametrize("packed", PACK)
def test_a_line_of_json_above_the_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: str
) -> None:
    """By name, before more of it is read, and however many bad lines are tolerated; a list may be of any length."""
    monkeypatch.setattr(sources, "LONGEST_LINE", 1 << 21)
    longest = b'{"text": "' + b"a" * ((1 << 21) - 13) + b'"}\n'
    path = tmp_path / f"a.jsonl{packed}"
    path.write_bytes(PACK[packed](longest + b'{"text": "' + b"b" * (16 << 20) + b'"}\n'))
    documents = open_source(str(path)).documents(Reading(max_bad=99), Counter())
    assert next(documents).text == "a" * ((1 << 21) - 13)
    tracemalloc.start()
    try:
        expected = r": more than 2,097,152 bytes in a line of JSON; write it as \.txt, or split it$"
        with pytest.raises(DataError, match=re.escape(f"{path}:2") + expected) as caught:
            next(documents)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 << 20 and caught.value.code == 3
    listed = tmp_path / f"b.json{packed}"
    listed.write_bytes(PACK[packed](json.dumps([{"text": f"row {i}" * 9_999} for i in range(60)]).encode()))
    assert len(texts(listed)) == 60


@pytest.mark.parametrize("size", [3, 1 << 16, (1 << 20) - 1, 1 << 20, (1 << 20) + 2])
def test_text_that_is_not_unicode_is_placed_wherever_it_stands(tmp_path: Path, size: int) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * size + b"\xff tail")
    with pytest.raises(DataError, match=rf"a\.txt: byte {size} is not UTF-8"):
        texts(tmp_path)
    ((_, repaired, _),) = texts(tmp_path, Reading("replace"))
    assert repaired == "x" * size + "\ufffd tail" and texts(tmp_path, Reading("skip")) == []


def test_a_full_disk_is_named_and_what_was_done_is_used(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "UNIT", 200)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ResourceError, match="out: the disk is full"):
        prepare(Preparation([str(corpus)], "bytes", workers=1, progress=full), tmp_path / "out")
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.partial" / "ids").stat().st_size > 0
    whole = prepare(Preparation([str(corpus)], "bytes", workers=1), tmp_path / "whole")
    assert files(prepare(Preparation([str(corpus)], "bytes", workers=1), tmp_path / "out")) == files(whole)


def test_a_dataset_of_another_tokenizer_is_refused(corpus: Path, tmp_path: Path) -> None:
    out = prepare(Preparation([str(corpus)], "bytes"), tmp_path / "out")
    with pytest.raises(DataError, match=r"made with tokenizer bytes .* the recipe has python-4k\.model \(SHA-256 "):
        ensure_dataset(Preparation([str(out)], MODEL, validation_ppm=0), tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ok \xff", r"a\.txt: byte 3 is not UTF-8"),
        ("a.txt", b" \n", r"0 documents in .* to train on: 0 held out, dropped: 1 empty"),
        ("a.txt.gz", gzip.compress(b"text" * 100, mtime=0)[:-9], r"a\.txt\.gz: "),
        (
            "a.jsonl",
            b'{"text": "good"}\n{"text": 5}',
            r"a\.jsonl:2: found int under 'text'; expected text; 0 such lines",
        ),
        ("a.jsonl", b'{"text": "good"}\n{"text": ', r"a\.jsonl:2: "),
        ("a.jsonl", b'{"text": "good"}\n{"text": "' + b"\xff", r"a\.jsonl:2: byte 10 is not UTF-8; prepare"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: "),
        ("a.jsonl", b'{"text": "a \\ud800 b"}', r"a\.jsonl:1: character 2 is a lone surrogate"),
        ("a.pdf", b"text", r"0 files to read; \.txt"),
    ],
)
def test_bad_text_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        prepare(Preparation([str(tmp_path / name)], "bytes", workers=1), tmp_path / "out")
    assert (
        "\n" not in str(caught.value) and not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()
    )


@pytest.mark.parametrize(("errors", "texts"), [("replace", ["a � b", "c �", "d"]), ("skip", ["d"])])
def test_policies_for_text_that_is_not_unicode(tmp_path: Path, errors: str, texts: list[str]) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a \\ud800 b"}\n{"text": "c \xff"}\n\n{"none": 1}\n{"text": "d"}')
    dropped: Counter[str] = Counter()
    reading = Reading(errors=errors, max_bad=1)  # type: ignore[arg-type]
    assert [document.text for document in open_source(str(tmp_path)).documents(reading, dropped)] == texts
    assert dropped == {"malformed": 1, "repaired" if errors == "replace" else "invalid": 2}


@pytest.mark.parametrize(
    ("errors", "expected", "counts"),
    [
        ("replace", ["é" * 40, "a" * 50 + "\ufffd" * 2, "b" * 50 + "\ufffd", "end"], {"malformed": 2, "repaired": 2}),
        ("skip", ["é" * 40, "end"], {"malformed": 2, "invalid": 2}),
    ],
)
def test_lines_longer_than_what_is_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, errors: sources.Errors, expected: list[str], counts: dict[str, int]
) -> None:
    monkeypatch.setattr(sources, "READ", 7)
    lines = [
        json.dumps({"text": "é" * 40}, ensure_ascii=False).encode(),
        b'{"text": "' + b"a" * 50 + b'\xff\xff"}',
        b'{"text": "' + b"b" * 50 + rb'\ud800"}',
        b'{"text": "' + b"c" * 90,
        b"[" + b" " * 100,
        b" " * 100,
        b'{"text": "end"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + b"\n".join(lines))
    dropped: Counter[str] = Counter()
    found = list(open_source(str(tmp_path)).documents(Reading(errors, max_bad=2), dropped))
    assert [document.text for document in found] == expected and dropped == counts
    assert found[-1].place == f"{tmp_path / 'a.jsonl'}:7"


def test_the_standard_library_is_a_corpus() -> None:
    source = open_source("python:source")
    places = [document.place for document in source.documents(Reading(), Counter())]
    assert len(places) > 300 and not any("site-packages" in place or "/test/" in place for place in places)
    assert len(open_source("python:source", tests=True).files) >= len(source.files)
    with pytest.raises(DataError, match="no such source"):
        open_source("python:sorce")


def test_preparing_needs_no_torch() -> None:
    code = "import sys, data_tools.commands; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_error_is_one_of_ours(tmp_path: Path) -> None:
    for source in ("", "/nonexistent", str(tmp_path)):
        with pytest.raises(LaspError):
            ensure_dataset(Preparation([source], "bytes", validation_ppm=0), tmp_path / "cache")


@pytest.mark.parametrize("command", ["tokenizer train", "tokenizer check", "synth"])
def test_commands_that_read_text_have_the_options_that_they_advise(tmp_path: Path, command: str) -> None:
    rows = tmp_path / "a.jsonl"
    rows.write_text(
        json.dumps({"text": "The quick brown fox jumps over a lazy dog of 42. " * 200})
        + '\n{"text": "a \\ud800"}\nno JSON\n'
    )
    given = {
        "tokenizer train": ["--out", str(tmp_path / "new.model"), "--vocab", "300"],
        "tokenizer check": ["bytes"],
        "synth": ["--out", str(tmp_path / "new.jsonl"), "--characters", "300", "--documents", "2"],
    }[command]
    asked = ["data", *command.split(), *given[: command == "tokenizer check"], str(rows)]
    asked += given if command != "tokenizer check" else []
    said = str(CliRunner().invoke(app, asked).exception)
    assert said.endswith(f"; {command} --errors replace, or skip, takes it")
    asked += ["--errors", "replace"]
    said = str(CliRunner().invoke(app, asked).exception)
    assert said.endswith(f"0 such lines are tolerated, see {command} --max-bad")
    done = CliRunner().invoke(app, [*asked, "--max-bad", "1"])
    assert "1 repaired, 1 malformed" in done.output


def test_a_cache_that_cannot_be_made_is_told_by_its_key(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text " * 99)
    preparation = Preparation([str(tmp_path / "a.txt")], "bytes", workers=1)
    with pytest.raises(
        SetupError, match=r"^data\.cache: \S+/a\.txt/lasptrain/datasets: Not a directory; .* HOME names"
    ):
        ensure_dataset(preparation, tmp_path / "a.txt" / "lasptrain")


def test_pieces_of_packed_documents_are_called_so(tmp_path: Path) -> None:
    rows = [json.dumps({"text": "abc" * length}) for length in (1, 1, 9, 40, 40, 40)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    asked = Preparation([str(tmp_path / "a.jsonl")], "bytes", validation_ppm=0, workers=1)
    assert ", 6 documents (3 twice), " in str(commands.inspect(prepare(asked, tmp_path / "plain")))
    packed = replace(asked, packing=BestFit(16))
    said = str(commands.inspect(prepare(packed, tmp_path / "packed")))
    pieces = Manifest.load(tmp_path / "packed").splits["train"].documents
    assert pieces > 20 and f", {pieces} pieces (3 documents twice before), " in said
