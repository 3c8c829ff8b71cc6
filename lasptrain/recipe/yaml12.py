"""A small subset of YAML with the number rules of YAML 1.2: `1e-4` is a float, `012` is 12, `yes` and `1:30`
are strings.

Anchors, tags, merge keys and duplicate keys are refused.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from lasptrain.recipe.schema import Recipe


def dump(recipe: Recipe) -> str:
    """Return the recipe as YAML that `load` reads back as the same recipe."""
    sections = recipe.model_dump(mode="json")
    stages = [{key: value for key, value in stage.items() if value is not None} for stage in sections.pop("stages")]
    sections |= {"stages": stages} if stages else {}
    return yaml.dump(sections, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


Read = Callable[[str], object]
# By the core schema of YAML 1.2: tag and pattern of a value in plain style, and how to read it.
_SCALARS: tuple[tuple[str, str, Read], ...] = (
    ("null", r"~|null|Null|NULL|", lambda text: None),
    ("bool", r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    ("int", r"[-+]?[0-9]+", int),
    ("int", r"0o[0-7]+", lambda text: int(text, 8)),
    ("int", r"0x[0-9a-fA-F]+", lambda text: int(text, 16)),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", float),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", lambda text: float(text.replace(".", ""))),
)


class _Dumper(yaml.SafeDumper):
    """YAML writer that quotes strings which YAML 1.1 or 1.2 would read as something else; lists on one line."""


for _tag, _pattern, _ in _SCALARS:
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"({_pattern})\Z"), None)
_Dumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)

MAX_BYTES, _MAX_DEPTH, _MAX_VALUES = 1 << 20, 32, 10_000

Path_ = tuple[str | int, ...]
"""Path of a value: ("model", "lrpe", 0)."""


class NotYaml(Exception):
    """The text cannot be read any further."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(text)
        self.line = line


def _line(mark: Any) -> int:
    return mark.line + 1 if mark else 1


class Reader:
    """Builds plain values from YAML events and records the line of each and how it was written.

    Events, not nodes: nothing is expanded, nothing recurses deeper than the limit, and tags and anchors are visible.
    """

    def __init__(self) -> None:
        self.lines: dict[Path_, int] = {}
        self.written: dict[Path_, str] = {}
        self.problems: list[tuple[int, Path_, str]] = []
        self._values = 0

    def read(self, text: str) -> object:
        """Return the value of the one document in `text`. NotYaml where it cannot be read."""
        try:
            return self._document(yaml.parse(text, Loader=yaml.SafeLoader))
        except yaml.reader.ReaderError as error:
            offset = len(text[: error.position].encode())
            line = text.count("\n", 0, error.position) + 1
            found = f"U+{ord(text[error.position]):04X}"
            raise NotYaml(line, f"byte {offset}: found the character {found}; expected text") from None
        except yaml.MarkedYAMLError as error:
            hint = "; indent with spaces, not tabs" if "\\t" in str(error.problem) else ""
            raise NotYaml(_line(error.problem_mark), f"not YAML: {error.problem}{hint}") from None

    def _document(self, events: Iterator[yaml.Event]) -> object:
        self._events = events
        next(events)
        if isinstance(next(events), yaml.StreamEndEvent):
            return None
        value = self._value(next(events), ())
        next(events)
        after = next(events)
        if not isinstance(after, yaml.StreamEndEvent):
            self._refuse(after, (), "found a second document; expected one")
        return value

    def _refuse(self, event: yaml.Event, path: Path_, text: str) -> None:
        self.problems.append((_line(event.start_mark), path, text))

    def _value(self, event: yaml.Event, path: Path_) -> object:
        self._values += 1
        if self._values > _MAX_VALUES or len(path) > _MAX_DEPTH:
            limit = f"{_MAX_VALUES} values" if self._values > _MAX_VALUES else f"{_MAX_DEPTH} levels"
            raise NotYaml(_line(event.start_mark), f"found more than {limit}; expected a recipe")
        self.lines.setdefault(path, _line(event.start_mark))
        if isinstance(event, yaml.AliasEvent):
            self._refuse(event, path, f"found the alias *{event.anchor}; write the value out")
            return None
        assert isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent)
        if event.anchor is not None:
            self._refuse(event, path, f"found the anchor &{event.anchor}; anchors are not used here, leave it out")
        if event.tag is not None:
            self._refuse(event, path, f"found the tag {event.tag}; tags are not used here, leave it out")
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, path)
        return self._list(path) if isinstance(event, yaml.SequenceStartEvent) else self._dict(path)

    def _scalar(self, event: yaml.ScalarEvent, path: Path_) -> object:
        text = event.value
        if event.style is not None:
            return text
        self.written[path] = text
        read = next((read for _, pattern, read in _SCALARS if re.fullmatch(pattern, text)), str)
        if read is not str and len(text) > 100:
            self._refuse(event, path, f"found a number of {len(text)} characters; expected at most 100")
            return None
        return read(text)

    def _list(self, path: Path_) -> list[object]:
        values: list[object] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            values.append(self._value(event, (*path, len(values))))
        return values

    def _dict(self, path: Path_) -> dict[str, object]:
        values: dict[str, object] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            where = (*path, key := self._key(event, path))
            line = _line(event.start_mark)
            if key in values:
                self._refuse(event, where, f"given twice, on line {self.lines[where]} and on line {line}; keep one")
            else:
                self.lines[where] = line
            value = self._value(next(self._events), where)
            values.setdefault(key, value)
        return values

    def _key(self, event: yaml.Event, path: Path_) -> str:
        before = len(self.problems)
        key = self._value(event, (*path, "?"))
        self.lines.pop((*path, "?"), None)
        written = self.written.pop((*path, "?"), None)
        if len(self.problems) == before:
            if written == "<<":
                self._refuse(event, path, "found the merge key <<; write the keys out")
            elif not isinstance(key, str):
                self._refuse(event, path, f"found {shown(key, written)} as a key; expected a word")
        return written if written is not None else str(key)


def shown(value: object, written: str | None) -> str:
    if written is not None:
        text = "nothing" if written == "" else written if not isinstance(value, str) else repr(written)
    else:
        text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:56] + "…"
