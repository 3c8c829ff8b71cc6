"""Rows of CSV and of Arrow's files: the text that was written, wherever it stands; what is damaged is named."""

from __future__ import annotations

import csv
import io
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import ipc

from data_tools import csv_rows
from data_tools.sources import Reading, open_source
from lasptrain.errors import DataError
from tests.console.test_cli import lasptrain, refused
from tests.data_tools.test_data_tools import PACK

READING = Reading()


def documents(path: Path, reading: Reading = READING, dropped: Counter[str] | None = None) -> list[tuple[str, str]]:
    """(Place behind the name of the file, text) of each."""
    found = open_source(str(path)).documents(reading, Counter() if dropped is None else dropped)
    return [(document.place.removeprefix(f"{path}:"), document.text) for document in found]


UNICODE = st.text(st.characters(codec="utf-8"))


@given(st.lists(st.tuples(UNICODE, UNICODE), min_size=1), st.booleans())
def test_what_the_library_writes_comes_back(rows: list[tuple[str, str]], quoted: bool) -> None:
    written = io.StringIO()
    csv.writer(written, quoting=csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL).writerows([("a", "text"), *rows])
    content = written.getvalue().encode()
    found = [row for _, row in csv_rows.rows(io.BytesIO(content), "text")]
    assert found == [{"a": a, "text": text} for a, text in rows]


CSV = b'id,text,"doc.text"\n1,"one, ""two""\nand three",x\r\n\n2,plain,y\n3,"\xc3\xa9",z\n'


def test_csv_is_read_packed_and_in_any_case(tmp_path: Path) -> None:
    """Its rows stand at their first line; a BOM is none of the first name, nor a blank line a row."""
    want = [("2", 'one, "two"\nand three'), ("5", "plain"), ("6", "é")]
    for packed, pack in PACK.items():
        for name in (f"a.csv{packed}", f"B.CSV{packed.upper()}"):
            (tmp_path / name).write_bytes(pack(b"\xef\xbb\xbf" + CSV))
            assert documents(tmp_path / name) == want
            assert [text for _, text in documents(tmp_path / name, Reading(field="doc.text"))] == ["x", "y", "z"]
    whole = open_source(str(tmp_path))
    done = [document.done for document in whole.documents(READING, Counter())]
    assert len(done) == 3 * 2 * len(PACK) and done == sorted(done) and done[-1] <= whole.bytes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id,body\n1,x\n", "a.csv:2: no text under 'text'; it has id, body; name one with --field"),
        (
            b"text,n\none,1\ntwo,2,3\n",
            "a.csv:3: 3 values for 2 columns; 0 such lines are tolerated, see prepare --max",
        ),
        (b'text,n\n"one" ,1\n', "a.csv: line 2: ',' expected after '\"'; lines of comma-separated values"),
        (b'text,n\none,1\n"two\n\n,2\n', "a.csv: line 3: unexpected end of data; lines of comma-separated values"),
        (b"text,text\none,two\n", "a.csv: line 1: two columns 'text'; expected one"),
        (b"text\nf\xfcr\n", "a.csv:2: character 1 is a lone surrogate; prepare --errors replace, or skip, takes it"),
    ],
)
def test_bad_csv_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message)):
        documents(tmp_path / "a.csv")


def test_bad_rows_are_tolerated_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,n\none,1\ntwo\nf\xfcr,3\n,4\nfive,5\n")
    dropped = Counter[str]()
    assert documents(tmp_path / "a.csv", Reading("replace", max_bad=1), dropped) == [
        ("2", "one"),
        ("4", "f\ufffdr"),
        ("6", "five"),
    ]
    assert dropped == {"malformed": 1, "repaired": 1, "empty": 1}


def test_lines_of_any_length_take_no_more_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a line, nor a quote that never ends."""
    monkeypatch.setattr(csv_rows, "LARGEST", 1000)
    for content, line in ((b"text\n" + b"x" * 1001, 2), (b'text\nfirst\n"' + b"x\n" * 1000, 3)):
        (tmp_path / "a.csv").write_bytes(content)
        with pytest.raises(DataError, match=rf"a\.csv: line {line}: (more than 1,000 char|field larger than)"):
            documents(tmp_path / "a.csv")


TABLE = pyarrow.table(
    {
        "n": range(600),
        "text": [f"row {number}" for number in range(599)] + [None],
        "doc": [{"text": f"text {number}"} for number in range(600)],
        "kind": pyarrow.array(["a", "b"] * 300).dictionary_encode(),
        "parts": [["one", None, "three"]] * 600,
        "raw": pyarrow.array([b"\xff"] * 600),
    }
)


def written(
    opener: Callable[..., ipc.RecordBatchStreamWriter], packed: str | None, table: pyarrow.Table = TABLE
) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with opener(sink, table.schema, options=ipc.IpcWriteOptions(compression=packed)) as writer:
        for batch in table.to_batches(max_chunksize=250):
            writer.write_batch(batch)
    content: bytes = sink.getvalue().to_pybytes()
    return content


FORMS = {
    f"{kind}-{packed or 'plain'}": written(opener, packed)
    for kind, opener in (("file", ipc.new_file), ("stream", ipc.new_stream))
    for packed in (None, "lz4", "zstd")
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_arrow_is_read(tmp_path: Path, form: str) -> None:
    path = tmp_path / "a.ARROW"
    path.write_bytes(FORMS[form])
    rows = [(f"{number + 1}", f"row {number}") for number in range(599)]
    dropped = Counter[str]()
    assert documents(path, dropped=dropped) == rows and dropped == {"empty": 1}
    for field, want in (("doc.text", "text 1"), ("kind", "b"), ("parts", "one\n\nthree")):
        assert documents(path, Reading(field=field))[1] == ("2", want)
    assert documents(path, Reading("replace", "raw"))[0] == ("1", "\ufffd")
    with pytest.raises(DataError, match=r"a\.ARROW:1: byte 0 is not UTF-8; prepare --errors replace"):
        documents(path, Reading(field="raw"))
    with pytest.raises(DataError, match=r"a\.ARROW: no column 'x'; it has n, text, doc\.text, kind, parts, raw; name"):
        documents(path, Reading(field="x"))
    with pytest.raises(DataError, match=r"a\.ARROW: column 'n' holds int64; expected text"):
        documents(path, Reading(field="n"))
    done = [document.done for document in open_source(str(path)).documents(READING, Counter())]
    assert done == sorted(done) and 0 < done[0] < done[-1] <= len(FORMS[form])


@pytest.mark.parametrize("form", FORMS)
def test_damaged_arrow_is_named_or_read(tmp_path: Path, form: str) -> None:
    """Bytes that changed, and the beginnings of files: nothing else is raised, and the process lives."""
    path, dice, whole = tmp_path / "a.arrow", random.Random(0), FORMS[form]
    named = 0
    for _ in range(40):
        content = bytearray(whole[: dice.choice((len(whole), dice.randrange(len(whole))))])
        for _ in range(dice.randrange(4) if content else 0):
            content[dice.randrange(len(content))] = dice.randrange(256)
        path.write_bytes(content)
        try:
            documents(path, Reading("replace"))
        except DataError as error:
            named += str(error).startswith(f"{path}: ") and "\n" not in str(error)
        else:
            named += 1
    assert named == 40
    for beginning in (b"", b"text\n", whole[: len(whole) // 2]):
        path.write_bytes(beginning)
        with pytest.raises(DataError, match=r"a\.arrow: it cannot be read: "):
            documents(path)


def test_what_unpacks_to_more_than_text_is_refused(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["x" * (1 << 25)]})
    (tmp_path / "a.arrow").write_bytes(written(ipc.new_file, "zstd", table))
    with pytest.raises(DataError, match=r"a\.arrow: [\d,]+ bytes unpack to 33,554,\d+ at once; expected text"):
        documents(tmp_path / "a.arrow")


def test_the_command_prepares_both(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,n\n")
    options = ("--tokenizer", "bytes", "--out", "out")
    refused(3, "0 documents in a.csv to train on", "data", "prepare", "a.csv", *options, cwd=tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.csv").write_bytes(CSV)
    (tmp_path / "text" / "b.arrow").write_bytes(FORMS["stream-plain"])
    done = lasptrain("data", "prepare", "text", "--validation", "0", "--field", "doc.text", *options, cwd=tmp_path)
    assert done.returncode == 0 and " 603 documents " in done.stdout, done
