"""Load a recipe from a file and `--set` overrides, or report all that does not fit at once, one line each:

`FILE:LINE: section.key: what was found; what fits`.
"""

import difflib
import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from lasptrain import architectures, files
from lasptrain.architectures.section import Problem, Section
from lasptrain.errors import RecipeError
from lasptrain.recipe import synonyms
from lasptrain.recipe.formats import FORMAT, RENAMED, is_format, upgraded
from lasptrain.recipe.schema import SECTIONS, Recipe
from lasptrain.recipe.sections import OVERRIDDEN, Stage
from lasptrain.recipe.yaml12 import MAX_BYTES, NotYaml, Path_, Reader, dump, shown


def load(path: str | Path, overrides: list[str] | None = None, written: int = FORMAT) -> Recipe:
    """Read a recipe and apply overrides (`section.key=value`). RecipeError holds every problem, one per line.

    `written`: the format where the file does not say one; keys of an earlier one get their present names.
    """
    source = _Source(find_file(Path(path)) or Path(path))
    source.upgrade(written)
    for override in overrides or []:
        source.override(override)
    recipe = source.validate()
    tokenizer = recipe.data.tokenizer
    if tokenizer != "bytes":
        found = find_file(Path(tokenizer), source.file.absolute().parent.parent)
        if found is not None:
            recipe = recipe.replace(data={"tokenizer": str(found)})
    return recipe


def dump_saved(recipe: Recipe) -> str:
    """Return the recipe as YAML that says its format, for a run folder."""
    return f"format: {FORMAT}\n{dump(recipe)}"


def find_file(path: Path, beside: Path | None = None) -> Path | None:
    """Return `path` as it stands, under `beside`, or the copy shipped with the package; None if there is none."""
    package = Path(__file__).parent.parent
    roots = [Path(), *([beside] if beside else []), package.parent, package / "_files"]
    return next((root / path for root in roots if _exists(root / path)), None)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # no file can have this name
        return False


class _Source:
    """A recipe being loaded: raw values, the origin of each, and every problem so far."""

    def __init__(self, file: Path) -> None:
        self.file = file
        reader = Reader()
        try:
            raw = reader.read(_read_text(file))
        except NotYaml as error:
            raise RecipeError(f"{file}:{error.line}: {error}") from None
        self.written = reader.written
        self.origins = {path: f"{file}:{line}" for path, line in reader.lines.items()}
        self.problems = [(f"{file}:{line}", path, text) for line, path, text in reader.problems]
        if not isinstance(raw, dict):
            found = "nothing" if raw is None else f"a {_kind(raw)}"
            raise RecipeError(f"{file}:1: found {found}; expected sections such as model:, data:, train:")
        self.raw: dict[str, object] = raw
        if raw.get("mesh") == "auto":
            raw["mesh"] = {}

    def upgrade(self, written: int) -> None:
        """Give keys that an earlier format wrote their present names. RecipeError where the format is a later one."""
        number = self.raw.pop("format", written)
        if not is_format(number):
            self._add([("format", f"found {shown(number, self.written.get(('format',)))}; expected 1 to {FORMAT}")])
            return
        if number > FORMAT:
            raise RecipeError(f"{self.file}: format {number!r}, of a newer lasptrain; expected at most {FORMAT}")
        for name, values in self.raw.items():
            if isinstance(values, dict):
                self.raw[name] = upgraded(name, values, number)

    def override(self, text: str) -> None:
        """Apply one `section.key=value`; its value is read by the rules of the file."""
        key, equals, value = text.partition("=")
        path = tuple(key.strip().split("."))
        origin = f"--set {text}"
        if not equals or not all(path) or len(path) > 2:
            self.problems.append((origin, (), "expected section.key=value"))
            return
        reader = Reader()
        try:
            parsed = reader.read(value)
        except NotYaml as error:
            self.problems.append((origin, path, str(error)))
            return
        self.problems += [(origin, path + inner, problem) for _, inner, problem in reader.problems]
        self.written = {k: v for k, v in self.written.items() if k[: len(path)] != path}
        self.written.update({path + inner: written for inner, written in reader.written.items()})
        self.origins = {k: v for k, v in self.origins.items() if k[: len(path)] != path or k == path}
        self.origins[path] = origin
        section = self.raw if len(path) == 1 else self.raw.setdefault(path[0], {})
        if isinstance(section, dict):
            section[path[-1]] = {} if path == ("mesh",) and parsed == "auto" else parsed

    def validate(self) -> Recipe:
        """Return the recipe, or raise RecipeError with every problem in the order of the file."""
        broken = [path for _, path, _ in self.problems]
        sections: dict[str, Any] = {"name": self.raw.get("name", self.file.stem)}
        self._unknown_sections()
        self._name(sections["name"])
        for name, section in self._classes().items():
            try:
                sections[name] = section.model_validate(self.raw.get(name, {}))
            except ValidationError as error:
                self._invalid(name, section, error.errors(include_url=False), broken)
            else:
                self._add(sections[name].problems())
        if (stages := self._stages(broken)) is not None:
            sections["stages"] = stages
        if len(sections) == len(SECTIONS) + 2:
            self._add(Recipe.model_construct(**sections).problems())
        if self.problems:
            raise RecipeError("\n".join(self._report()))
        return Recipe(**sections)

    def _stages(self, broken: list[Path_]) -> tuple[Stage, ...] | None:
        """Return the stages, or None where they are none."""
        raw = self.raw.get("stages", [])
        if not isinstance(raw, list):
            found = "keys" if isinstance(raw, dict) else shown(raw, self.written.get(("stages",)))
            self._add([("stages", f"found {found}; expected a list, such as [{{steps: 1000, window: 4096}}, …]")])
            return None
        try:
            return _STAGES.validate_python(raw)
        except ValidationError as error:
            self._invalid("stages", Stage, error.errors(include_url=False), broken)
            return None

    def _classes(self) -> dict[str, type[Section]]:
        """Return the class of each section; of the model that of its architecture, or none where that is unknown."""
        model = self.raw.get("model")
        if not isinstance(model, dict):
            return dict(SECTIONS)
        try:
            return {**SECTIONS, "model": architectures.named(model.get("arch"))}
        except RecipeError as error:
            key, _, text = str(error).partition(": ")
            self._add([(key, text)])
            return {name: section for name, section in SECTIONS.items() if name != "model"}

    def _add(self, problems: Iterable[Problem]) -> None:
        self.problems += [(self._origin(path := _path(key)), path, text) for key, text in problems]

    def _origin(self, path: Path_) -> str:
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins[path] if path else str(self.file)

    def _report(self) -> list[str]:
        def place(problem: tuple[str, Path_, str]) -> tuple[bool, int]:
            line = problem[0].rpartition(":")[2]
            return problem[0].startswith("--set"), int(line) if line.isdigit() else 0

        return [
            f"{origin}: {_key(path)}{': ' if path else ''}{text}"
            for origin, path, text in sorted(self.problems, key=place)
        ]

    def _unknown_sections(self) -> None:
        known = [*SECTIONS, "stages", "name"]
        for key in self.raw:
            if key not in known and key != "<<":
                inner = [path for path in self.origins if path[:1] == (key,)]  # --set key.name=… has no other origin
                origin = self._origin((key,) if (key,) in self.origins or not inner else inner[0])
                self.problems.append((origin, (key,), f"no such section; {_suggest(key, known, _elsewhere('', key))}"))

    def _name(self, name: object) -> None:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            found = shown(name, self.written.get(("name",)))
            hint = "" if "name" in self.raw else " (rename the file or write name: …)"
            hint = f', quote it: "{found}"' if isinstance(name, int | float) else hint
            text = f"found {found}; expected 1 to 100 letters, digits, dots, dashes or underscores{hint}"
            self._add([("name", text)])

    def _invalid(self, section: str, kind: type[Section], errors: list[ErrorDetails], broken: list[Path_]) -> None:
        fields = kind.model_fields
        grouped: dict[Path_, list[ErrorDetails]] = {}
        for error in errors:
            path = (section, *_location(error))
            if not any(path[: len(b)] == b for b in broken if b):
                grouped.setdefault(path, []).append(error)
        for path, same in grouped.items():
            match same[0]["type"]:
                case "extra_forbidden":
                    key = str(path[-1])
                    text = f"no such key{_instead(section, key, list(fields))}"
                case "missing":
                    whole = len(path) == (3 if section == "stages" else 2)  # not a key of a value
                    meaning = fields[str(path[-1])].description if whole else None
                    text = f"missing; expected {meaning or 'a value'}"
                case _:
                    text = self._mismatch(path, same)
            self.problems.append((self._origin(path), path, text))

    def _mismatch(self, path: Path_, errors: list[ErrorDetails]) -> str:
        value = errors[0]["input"]
        written = self.written.get(path)
        expected = " or ".join(dict.fromkeys(_expectation(error) for error in errors))
        text = f"found {shown(value, written)}; expected {expected}"
        if any(error["type"] == "string_type" for error in errors) and written:
            text += f', quote it: "{written}"'
        elif any(error["type"] == "int_type" for error in errors) and isinstance(value, float) and value.is_integer():
            text += f", write {int(value)}"
        return text


_STAGES = TypeAdapter(tuple[Stage, ...])


def _path(key: str) -> Path_:
    """Path of a key such as data.window or stages[1].window."""
    return tuple(int(part) if part.isdecimal() else part for part in re.split(r"[].[]+", key) if part)


def _key(path: Path_) -> str:
    """Key of a path; a stage is stages[1], an item of a list in a section its number."""
    stage = f"[{path[1]}]" if path[:1] == ("stages",) and len(path) > 1 else ""
    return ".".join([f"{path[0]}{stage}", *map(str, path[2 if stage else 1 :])]) if path else ""


def _location(error: ErrorDetails) -> Path_:
    """Path of the value: pydantic's location without the union branches that it appends, which are no keys of ours."""
    place = error["loc"][:1]
    for part in error["loc"][1:]:
        if isinstance(part, int) or isinstance(place[-1], int):  # an item of a list, or a key of an item
            place += (part,)
    return place


_TYPES = {
    "an integer": ("int_type", "int_from_float", "int_parsing"),
    "a number": ("float_type",),
    "a finite number": ("finite_number",),
    "true or false": ("bool_type",),
    "text": ("string_type", "string_unicode"),
    "at least {ge}": ("greater_than_equal",),
    "more than {gt}": ("greater_than",),
    "at most {le}": ("less_than_equal",),
    "less than {lt}": ("less_than",),
    "one more value": ("missing",),
    "{max_length} values": ("too_long",),
    "1 to 4096 printable characters": ("string_too_short", "string_too_long", "string_pattern_mismatch"),
    "keys and values": ("model_type", "model_attributes_type"),
}
_EXPECTED = {kind: text for text, kinds in _TYPES.items() for kind in kinds}  # by pydantic's type of error


def _expectation(error: ErrorDetails) -> str:
    context = {name: _figure(limit) for name, limit in error.get("ctx", {}).items()}
    if error["type"] == "literal_error":
        return str(context["expected"]).replace("'", "")
    if error["type"] == "tuple_type":
        value = error["input"]
        return (
            f"a list such as [{value}]" if isinstance(value, int | float | str) and len(str(value)) < 40 else "a list"
        )
    return _EXPECTED[error["type"]].format(**context) if error["type"] in _EXPECTED else error["msg"]


def _figure(limit: object) -> object:
    """Format a limit as it can be written in a recipe; what is no number stays."""
    return f"{limit:g}" if isinstance(limit, float) else limit


def _kind(value: object) -> str:
    return "list" if isinstance(value, list) else "single value"


@functools.cache
def _sections_with(key: str) -> tuple[str, ...]:
    return tuple(name for name, section in SECTIONS.items() if key in section.model_fields)


def _elsewhere(section: str, key: str) -> tuple[str, ...]:
    """Return where a key is to be found: in other sections, or under the name that this recipe has for it."""
    found = tuple(f"{name}.{key}" for name in _sections_with(key) if name != section)
    if not found and (other := synonyms.ours(key)):
        found = (other.removeprefix(f"{section}."),)
        if section == "stages":
            found = tuple(own for own, name in OVERRIDDEN.items() if name == other) or found
    return found


def _instead(section: str, key: str, known: list[str]) -> str:
    """Say where a key that a section does not have is to be found."""
    if new := RENAMED.get(f"{section}.{key}"):
        return f"; it is called {new} now"
    if section == "model" and (others := architectures.having(key)):
        return f" of this arch, only of {' and '.join(others)}; leave it out"
    return f"; {_suggest(key, known, _elsewhere(section, key))}"


def _suggest(word: str, known: list[str], elsewhere: tuple[str, ...] = ()) -> str:
    close = elsewhere or difflib.get_close_matches(word, known, n=1)
    return f"did you mean {' or '.join(close)}?" if close else f"expected one of {', '.join(known)}"


def _read_text(file: Path) -> str:
    """Return the file's text. RecipeError where it is missing, too large or not UTF-8; a byte order mark is allowed."""
    try:
        with files.regular(file) as stream:
            data = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        near = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {file.parent / near[0]}?" if near else "; expected a recipe, a .yaml file"
        raise RecipeError(f"{file}: no such file{hint}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"{file}: {reason}; expected a recipe, a .yaml file") from None
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{file}: larger than 1 MiB; expected a recipe, a .yaml file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
