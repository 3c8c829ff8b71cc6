"""Rows of JSON that is not in lines are what the json module reads of the whole."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import json_rows, sources
from data_tools.json_rows import rows
from data_tools.sources import Reading, open_source
from lasptrain.errors import DataError

TEXT = st.text(st.one_of(st.sampled_from('"\\\\/\n é😀{}[],:'), st.characters()), max_size=8)
ROWS = st.lists(st.one_of(st.dictionaries(TEXT, TEXT, max_size=3), st.lists(TEXT, max_size=2), TEXT), max_size=6)


@settings(max_examples=100, deadline=None)
@given(ROWS, st.integers(1, 9), st.booleans())
def test_a_list_in_parts_is_the_whole_list(found: list[Any], size: int, pretty: bool) -> None:
    text = json.dumps(found, indent=size if pretty else None, ensure_ascii=pretty) + "\n"
    assert list(rows(text[at : at + size] for at in range(0, len(text), size))) == found


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are read 7 bytes at a time, and rows have 90 characters at most."""
    monkeypatch.setattr(sources, "READ", 7)
    monkeypatch.setattr(json_rows, "LARGEST", 90)


def texts(path: Path, content: str | bytes, reading: Reading = Reading()) -> list[str]:  # noqa: B008  (frozen)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [document.text for document in open_source(str(path)).documents(reading, Counter())]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_file_holds_lines_or_a_list_or_an_object(tmp_path: Path, short: None, indent: int | None) -> None:
    found = [{"id": 1, "text": "é one"}, {"text": "two\n", "deep": {"text": "other"}}]
    one, two = (json.dumps(row, indent=indent) for row in found)
    expected = ["é one", "two\n"]
    for content in (
        json.dumps(found, indent=indent),
        f"\ufeff\n {json.dumps(found, indent=indent)}\n\n",
        f"[\n{one},\n{two}]",
        f"{one}\n{two}\n",
        f"\n{one}\n\n{two}",
    ):
        assert texts(tmp_path / "a.json", content) == expected, content
    assert texts(tmp_path / "a.json", one) == expected[:1]
    assert texts(tmp_path / "a.json", "[ ]\n") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}', "row 2: expected a comma or the end of the list"),
        ('[{"text": "a"} {"text": "b"}]', "row 2: expected a comma or the end of the list"),
        ('[{"text": "a"}]\n{"text": "b"}', "row 2: expected nothing after the list"),
        ('[{"text": "a"},]', "row 2: Expecting value"),
        ('[{"text": "a"}, {"text": "b', "row 2: Unterminated string"),
        ("[" * 80, "row 1: Expecting value"),
        ('[{"text": "a"}, {"text": "' + "b" * 200, "row 2: expected rows of at most 90 characters"),
    ],
)
def test_what_is_neither_lines_nor_a_list_is_refused(tmp_path: Path, short: None, content: str, message: str) -> None:
    """However many bad lines are tolerated: what follows would be lost uncounted."""
    with pytest.raises(DataError, match=rf"a\.json: {message}.*; JSON lines, or one list of rows, fit$"):
        texts(tmp_path / "a.json", content, Reading(max_bad=99))


def test_rows_that_hold_no_text_are_counted(tmp_path: Path, short: None) -> None:
    content = b'[{"text": "a \xff"}, {"text": 5}, 7, {"other": 1}, {"text": "end"}]'
    with pytest.raises(DataError, match=r"a\.json:1: character 2 is a lone surrogate; prepare --errors replace"):
        texts(tmp_path / "a.json", content)
    with pytest.raises(DataError, match=r"a\.json:2: found int under 'text'; expected text; 0 such lines"):
        texts(tmp_path / "a.json", content, Reading("skip"))
    assert texts(tmp_path / "a.json", content, Reading("skip", max_bad=3)) == ["end"]
    assert texts(tmp_path / "a.json", content, Reading("replace", max_bad=3)) == ["a \ufffd", "end"]
