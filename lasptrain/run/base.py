"""The model whose weights a run began with, by name, and the terms they came under: RUN/base/. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lasptrain import files
from lasptrain.errors import CheckpointError, ConvertError
from lasptrain.recipe.yaml12 import NotYaml, Reader

FOLDER, RECORD = "base", "base.json"
TERMS = re.compile(r"(licen[cs]e|notice|copying)([^a-z].*)?", re.IGNORECASE)  # names of files, letters of any case
LICENSE = ("license", "license_name", "license_link")  # keys of a model card
CACHED = re.compile(r"models--(.+?)--(.+)")  # folder of a model in the cache of huggingface_hub

Base = dict[str, str]
"""Keys of a model card: base_model, and of LICENSE those that are known."""


def keep(source: Path, run: Path, *, own: bool) -> Base:
    """Write into a new run what a folder of weights says of itself, with its files of terms; return what was found.

    An export of our own (`own`) is no base itself, and names one if it has one. ConvertError for a file of terms that
    cannot be read.
    """
    card = _front_matter(source / "README.md")
    terms = _terms(source)
    found = {key: value for key in LICENSE if isinstance(value := card.get(key), str)}
    if terms and "license" not in found:
        found |= {"license": "other", "license_link": min(terms)}
    name = card.get("base_model") if own else _name(source, card)
    found |= {"base_model": name} if isinstance(name, str) else {}
    if found:
        (run / FOLDER).mkdir()
        files.replace(run / FOLDER / RECORD, json.dumps(found))
        _write(terms, run / FOLDER)
    return found


def carry(origin: Path, run: Path) -> None:
    """Copy the base of the run `origin`, if it has one, into a run that begins with its weights."""
    found, terms = read(origin)
    if found:
        (run / FOLDER).mkdir(exist_ok=True)
        files.replace(run / FOLDER / RECORD, json.dumps(found))
        _write(terms, run / FOLDER)


def read(run: Path) -> tuple[Base, dict[str, bytes]]:
    """Return the base of a run, empty for one without, and its files of terms by name. CheckpointError if damaged."""
    file = run / FOLDER / RECORD
    try:
        found = json.loads(files.read(file, own=True))
        if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
            raise TypeError("no object of texts")
        return found, _terms(run / FOLDER)
    except FileNotFoundError:
        return {}, {}
    except (OSError, ValueError, TypeError, RecursionError, ConvertError) as error:
        raise CheckpointError(f"{file}: not what lasptrain writes ({type(error).__name__}: {error})") from None


def write_terms(run: Path, folder: Path) -> None:
    """Copy a run's files of terms into the folder of an export."""
    _write(read(run)[1], folder)


def _write(terms: Mapping[str, bytes], folder: Path) -> None:
    for name, content in terms.items():
        (folder / name).write_bytes(content)


def _terms(folder: Path) -> dict[str, bytes]:
    """Read the files of terms in a folder."""
    found = {}
    for file in sorted(folder.iterdir()):
        if TERMS.fullmatch(file.name) and not file.is_dir():
            try:
                found[file.name] = files.read(file)
            except OSError as error:
                raise ConvertError(
                    f"{file}: cannot be read ({error.strerror}); the terms of weights are kept"
                ) from None
    return found


def _name(source: Path, card: Mapping[str, Any]) -> str:
    """Return the name of others' model: of its configuration, cache or card, else of its folder."""
    named = _config(source / "config.json").get("_name_or_path")
    if isinstance(named, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", named):
        return named
    for part in reversed(source.absolute().parts):
        if match := CACHED.fullmatch(part):
            return f"{match[1]}/{match[2]}"
    titled = card.get("model_name")
    return titled if isinstance(titled, str) else source.absolute().name


def _config(file: Path) -> dict[str, Any]:
    """Read a config.json; its errors are those of others to tell."""
    try:
        found = json.loads(files.read(file))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _front_matter(file: Path) -> dict[str, Any]:
    """Read the keys at the beginning of a model card; none where there are none that can be read."""
    try:
        parts = files.read(file).decode("utf-8").split("---\n", 2)
        found = Reader().read(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except (OSError, UnicodeDecodeError, NotYaml):
        return {}
    return found if isinstance(found, dict) else {}
