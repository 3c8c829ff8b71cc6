"""Lines of JSON read in parts are what the json module reads as a whole."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_tools import sources
from data_tools.long_json import text_under
from data_tools.sources import Reading, open_source
from lasptrain.errors import DataError

CHARACTERS = st.one_of(st.sampled_from('"\\/\n\t é😀\x00\ud83d\ude00u{}[],:'), st.characters())
TEXT = st.text(CHARACTERS, max_size=12)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)


def whole(line: str) -> str | None:
    """What the json module finds; None where it refuses, or finds no text."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    text = found.get("text") if isinstance(found, dict) else None
    return text if isinstance(text, str) else None


def in_parts(line: str, size: int) -> str | None:
    try:
        return "".join(text_under("text", (line[at : at + size] for at in range(0, len(line), size))))
    except ValueError:
        return None


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(TEXT, VALUES, max_size=3), TEXT, TEXT, st.booleans(), st.integers(1, 9), st.data())
@example({}, "\ud83d", "\ude00", True, 8, None)
def test_parts_are_read_as_the_whole(
    others: dict[str, Any], before: str, text: str, escaped: bool, size: int, data: st.DataObject | None
) -> None:
    """Also where a character is missing, exchanged or too many: both refuse, or both find the same."""
    line = json.dumps({**others, "text": before + text}, ensure_ascii=escaped, indent=size % 3 or None) + "\n"
    assert in_parts(line, size) == whole(line) is not None
    if data is None:
        return
    at, instead = (
        data.draw(st.integers(0, len(line) - 1)),
        data.draw(st.sampled_from(['"', "\\", "{", "]", "1", ",", ""])),
    )
    for end in (at, at + 1):
        changed = line[:at] + instead + line[end:]
        twice = '"text"' in changed.replace('"text"', "", 1)  # the last one counts for json, none here
        assert in_parts(changed, size) == whole(changed) or (twice and in_parts(changed, size) is None), changed


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": 5}', "no text under 'text': character 10"),
        ('{"other": 5}', "no text under 'text': character 12"),
        ('{"text": "a", "text": "b"}', "'text' stands there twice"),
        ('{"a": ' + "[" * 1000, "nested more than 200 deep"),
        ('{"' + "k" * 70_000 + '": 1}', "expected a key of at most 65,536 characters"),
        ('["text"]', "expected an object"),
    ],
)
def test_what_is_no_object_with_a_text(line: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        list(text_under("text", iter([line])))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are long from 40 bytes on, and are read 7 bytes at a time."""
    monkeypatch.setattr(sources, "LONG_LINE", 40)
    monkeypatch.setattr(sources, "READ", 7)


@pytest.mark.parametrize(
    ("errors", "texts", "counted"),
    [
        ("replace", ["é" * 40, "a" * 50 + "\ufffd" * 2, "b" * 50 + "\ufffd", "end"], {"malformed": 2, "repaired": 2}),
        ("skip", ["é" * 40, "end"], {"malformed": 2, "invalid": 2}),
    ],
)
def test_long_lines_stand_beside_short_ones(
    tmp_path: Path, short: None, errors: sources.Errors, texts: list[str], counted: dict[str, int]
) -> None:
    lines = [
        json.dumps({"text": "é" * 40}, ensure_ascii=False).encode(),
        b'{"text": "' + b"a" * 50 + b'\xff\xff"}',
        b'{"text": "' + b"b" * 50 + rb'\ud800"}',
        b'{"text": "' + b"c" * 90,
        b" " * 100,
        b'{"text": "end"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    dropped: Counter[str] = Counter()
    reading = Reading(errors, max_bad=2)
    found = list(open_source(str(tmp_path)).documents(reading, dropped))
    assert [document.text for document in found] == texts and dropped == counted
    assert found[-1].place == f"{tmp_path / 'a.jsonl'}:6"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'"' + b"x" * 60 + b"\xff", r"a\.jsonl:2: byte 70 is not UTF-8; prepare --errors replace, or skip"),
        (b'"' + b"x" * 60 + rb"\udc00", r"a\.jsonl:2: character 60 is a lone surrogate; prepare --errors"),
        (b'"' + b"x" * 60, r"a\.jsonl:2: expected the end of a string.*: character 70; 0 such lines are tolerated"),
    ],
)
def test_what_is_wrong_with_a_long_line_is_placed(tmp_path: Path, short: None, text: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "ok"}\n{"text": ' + text)
    with pytest.raises(DataError, match=message):
        list(open_source(str(tmp_path)).documents(Reading(), Counter()))
