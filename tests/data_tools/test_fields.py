"""Text under keys, paths of keys and columns, as users name it; what is null is empty, what is missing is named."""

import codecs
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from data_tools import commands
from data_tools.fields import as_text, under
from data_tools.prepare import Preparation, ensure_dataset, prepare
from data_tools.prepared import preparations
from data_tools.sources import Reading, open_source
from lasptrain.data.manifest import Manifest
from lasptrain.errors import DataError
from lasptrain.recipe.loading import load

RECIPES = Path(__file__).parents[2] / "recipes"
TEXT = "to be or not to be, that is the question of 300 pieces\n" * 99


def read(path: Path, reading: Reading) -> tuple[list[str], Counter[str]]:
    """The texts of a file, and what was left out of it."""
    dropped: Counter[str] = Counter()
    return [document.text for document in open_source(str(path)).documents(reading, dropped)], dropped


@pytest.mark.parametrize(
    ("row", "field", "expected"),
    [
        ({"text": "a"}, "text", "a"),
        ({"doc": {"text": "a"}}, "doc.text", "a"),
        ({"doc.text": "flat", "doc": {"text": "deep"}}, "doc.text", "flat"),
        ({"a": {"b.c": "d"}}, "a.b.c", "d"),
        ({"text": None}, "text", ""),
        ({"doc": None}, "doc.text", ""),
        ({"text": ["one", "two"]}, "text", "one\ntwo"),
        ({"text": []}, "text", ""),
        ({"text": ["one", 2]}, "text", None),
        ({"text": 5}, "text", None),
        ({"doc": {"text": "a"}}, "doc", None),
    ],
)
def test_a_field_of_a_row(row: Any, field: str, expected: str | None) -> None:
    assert as_text(under(row, field)) == expected


@pytest.mark.parametrize(
    ("row", "field"),
    [({"doc": "text"}, "doc.text"), ({"doc": {}}, "doc.text"), ({}, "."), (["text"], "text"), (None, "text")],
)
def test_a_field_that_is_not_there(row: Any, field: str) -> None:
    with pytest.raises(KeyError):
        under(row, field)


COLUMNS = {
    "text": pyarrow.array(["one", None, "é"]),
    "large": pyarrow.array(["one", None, "é"], pyarrow.large_string()),
    "bytes": pyarrow.array([b"one", None, "é".encode()]),
    "few": pyarrow.array(["one", None, "é"]).dictionary_encode(),
    "list": pyarrow.array([["o", None, "n"], None, ["é"]]),
    "doc": pyarrow.array([{"text": "one", "deep": {"text": "1"}}, None, {"text": "é", "deep": None}]),
}


@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize(
    ("field", "expected"),
    [
        *((name, ["one", "é"]) for name in ("text", "large", "bytes", "few", "doc.text")),
        ("list", ["o\n\nn", "é"]),
        ("doc.deep.text", ["1"]),
    ],
)
def test_a_column_of_a_table(tmp_path: Path, field: str, expected: list[str], repeats: bool) -> None:
    """Also where values repeat so often that only one of each is held."""
    times = 9_999 if repeats else 1
    table = pyarrow.concat_tables([pyarrow.table(COLUMNS)] * times).combine_chunks()
    parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    found, dropped = read(tmp_path / "a.parquet", Reading(field=field))
    assert found == expected * times and dropped == {"empty": times * (3 - len(expected))}


def test_what_is_no_text_is_named_with_what_is_there(tmp_path: Path) -> None:
    table = pyarrow.table(COLUMNS | {"id": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "a.parquet")
    named = "it has text, large, bytes, few, list, doc.text, doc.deep, id; name one with --field, or data.field in a"
    for field, found in {
        "body": "no column 'body'",
        "doc.body": "no column 'doc.body'",
        "id": "column 'id' holds int64; expected text, bytes or lists of them",
        "doc": "column 'doc' holds struct<text: string, deep: struct<text: string>>; expected text, bytes or lists of",
    }.items():
        with pytest.raises(DataError, match=rf"^\S+a\.parquet: {found}.*; {named} recipe$"):
            read(tmp_path / "a.parquet", Reading(field=field, max_bad=9))
    rows = [{"id": 1, "doc": {"text": "a", "n": 2}}, {"\x1b[2J" * 99: 1} | {f"k{i}": 1 for i in range(20)}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    expected = r"a\.jsonl:1: no text under 'text'; it has id, doc\.text, doc\.n; name one with --field, or data\.field"
    with pytest.raises(DataError, match=expected):
        read(tmp_path / "a.jsonl", Reading())
    with pytest.raises(DataError, match=r"it has \\x1b\[2J\\x1b.*…, k0, .*, k10, …; name one") as caught:
        read(tmp_path / "a.jsonl", Reading(max_bad=1))
    assert str(caught.value).isprintable()


def test_bytes_that_are_no_text_follow_the_policy(tmp_path: Path) -> None:
    """Also in a column that says it is text, which no writer checks."""
    raw = pyarrow.array([b"good", b"a \xff", b"end"])
    for name, column in {"bytes": raw, "text": raw.view(pyarrow.string())}.items():
        parquet.write_table(pyarrow.table({name: column}), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=r"a\.parquet:2: byte 2 is not UTF-8; prepare --errors replace"):
            read(tmp_path / "a.parquet", Reading(field=name))
        assert read(tmp_path / "a.parquet", Reading("skip", name)) == (["good", "end"], {"invalid": 1})
        assert read(tmp_path / "a.parquet", Reading("replace", name)) == (["good", "a \ufffd", "end"], {"repaired": 1})


def test_null_is_empty_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "a"}\n{"text": ""}\n')
    (tmp_path / "b.jsonl").write_text('{"text": null}\n' + json.dumps({"text": TEXT}))
    made = commands.prepare(Preparation([str(tmp_path / "a.jsonl")], "bytes", validation_ppm=0), tmp_path / "out")
    for told in (
        commands.train_tokenizer([str(tmp_path / "b.jsonl")], 300, tmp_path / "b.model"),
        commands.synthesize("passkey", [str(tmp_path / "b.jsonl")], (900, 900), 1, 0, False, tmp_path / "c.jsonl"),
    ):
        assert str(told).endswith("\ndropped: 1 empty")
    assert "\n  dropped      2 empty\n" in str(made) and made.manifest.splits["train"].documents == 1


def test_a_mark_at_the_start_of_any_line_is_none_of_it(tmp_path: Path) -> None:
    """As in files that were put one behind another."""
    line = codecs.BOM_UTF8 + b'{"text": "a"}\n'
    for ending in ("jsonl", "json"):
        (tmp_path / f"a.{ending}").write_bytes(line * 3)
        assert read(tmp_path / f"a.{ending}", Reading()) == (["a"] * 3, {})


def test_every_command_and_a_recipe_take_a_field(tmp_path: Path) -> None:
    text = "to be or not to be, that is the question\n" * 200
    source = tmp_path / "a.jsonl"
    source.write_text(json.dumps({"doc": {"body": text}, "text": "other"}) + "\n")
    trained = commands.train_tokenizer([str(source)], 300, tmp_path / "a.model", Reading(field="doc.body"))
    assert trained.vocab == 300
    reading = Reading(field="doc.body")
    commands.synthesize("recall", [str(source)], (900, 900), 1, 0, False, tmp_path / "out.jsonl", reading)
    assert "that is the question" in (tmp_path / "out.jsonl").read_text()
    changes = [f"data.source={source}", "data.tokenizer=bytes", "data.validation=0"]
    kept = []
    for field, size in (("doc.body", len(text)), ("text", 5)):
        (preparation,) = preparations(load(RECIPES / "quickstart.yaml", [*changes, f"data.field={field}"]).data)
        kept.append(ensure_dataset(preparation, tmp_path / "cache"))
        assert Manifest.load(kept[-1]).splits["train"].bytes == size
    assert kept[0] != kept[1]
    assert kept[1] == ensure_dataset(Preparation([str(source)], "bytes", validation_ppm=0), tmp_path / "cache")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_table_gives_the_same_bytes_as_lines(tmp_path: Path, workers: int) -> None:
    found = []
    texts = [f"row {i} " * (i % 50) for i in range(2_000)]
    for name, content in {"parquet": texts, "jsonl": texts}.items():
        folder = tmp_path / name
        folder.mkdir()
        if name == "parquet":
            parquet.write_table(pyarrow.table({"text": content}), folder / "a.parquet", row_group_size=700)
        else:
            (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in content))
        out = prepare(Preparation([str(folder)], "bytes", workers=workers), tmp_path / f"{name}-out")
        found.append([entry.tokens for entry in Manifest.load(out).shards])
    assert found[0] == found[1]
