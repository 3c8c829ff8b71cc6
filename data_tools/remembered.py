"""The datasets that a run reads, RUN/data.json: it goes on with them without the text they were made of.

Text is told by its content, so its folder may move. Where the text has changed since, the run goes on with the dataset
that was made of it then, and says so; other text in another place is another run's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from data_tools import hub
from data_tools.prepare import FOUND, Preparation, ensure_dataset, is_dataset
from data_tools.prepared import cache_folder, sources
from data_tools.sources import PYTHON_SOURCE, REPOSITORIES, Source
from lasptrain import files
from lasptrain.data import manifest as manifests
from lasptrain.data.dataset import TokenDataset
from lasptrain.data.manifest import Manifest, SourceEntry
from lasptrain.errors import CheckpointError, DataError
from lasptrain.recipe.sections import Data
from lasptrain.run import folder as runs

FILE = "data.json"

Told = Callable[[str], None]


@dataclass(frozen=True)
class Remembered:
    """One source of a run: its path in the recipe, the folder of its dataset, and what both held."""

    source: str
    folder: str
    fingerprint: str
    content: str
    tokenizer: str
    text: tuple[SourceEntry, ...]

    def find(self, cache: Path) -> Path | None:
        """Return the dataset's folder where it still is, or is in `cache`; None where it is gone."""
        for folder in (Path(self.folder), cache / "datasets" / Path(self.folder).name):
            if (folder / manifests.FILE).is_file() and Manifest.load(folder).fingerprint == self.fingerprint:
                return folder
        return None

    def changed(self, source: Source, moved: bool) -> str | None:
        """Say how text differs from what the dataset was made of; None if it does not.

        Much text in its old place, of its old size, is taken for the same without reading it all.
        """
        (there,) = self.text
        if source.revision:
            return None if source.sha256 == there.sha256 else f"revision {source.revision}, then {there.revision}"
        found, expected = (f"{n:,} files of {size:,} bytes" for n, size in (_size(source), (there.files, there.bytes)))
        if found != expected:
            return f"{found}, then {expected}"
        if (moved or source.bytes <= FOUND) and there.sha256 not in _digests(source, self.source):
            return f"other content in {found}"
        return None


def _size(source: Source) -> tuple[int, int]:
    return len(source.files), source.bytes


def _digests(source: Source, name: str) -> Iterator[str]:
    """Digests of text; of a single file also under the name that it had."""
    yield source.sha256
    if len(source.files) == 1:
        yield source.named(Path(name).name)


def remember(run: Path, data: Data, parts: Sequence[TokenDataset]) -> None:
    """Write which datasets the run reads, one for each source."""
    kept = [
        Remembered(
            name,
            str(part.folder.absolute()),
            part.fingerprint,
            part.manifest.content,
            part.tokenizer_sha256,
            part.manifest.sources,
        )
        for (name, _), part in zip(sources(data), parts, strict=True)
    ]
    files.replace(run / FILE, json.dumps(TypeAdapter(list[Remembered]).dump_python(kept, mode="json"), indent=1))


def recall(run: Path | None, data: Data) -> list[Remembered] | None:
    """Return the datasets that a run with checkpoints reads; None for others, and for a run of other sources."""
    if run is None or not runs.committed(run):
        return None
    kept = _kept(run)
    return kept if len(kept) == len(sources(data)) else None


def revisions(run: Path | None, data: Data) -> list[str | None]:
    """Return the revision of each dataset of the Hub at which a run began, also before its first checkpoint."""
    kept = {one.source: one.text[0].revision for one in _kept(run) if len(one.text) == 1} if run else {}
    return [kept.get(name) for name, _ in sources(data)]


def other_tokenizer(run: Path, data: Data, sha256: str) -> Iterator[str]:
    """Yield a line where a run, whose weights another one takes, was trained with another tokenizer than its own."""
    if {kept.tokenizer for kept in _kept(run)} - {sha256}:
        yield f"data.tokenizer: {data.tokenizer} is not the one that {run} was trained with; its ids mean other text"


def _kept(run: Path) -> list[Remembered]:
    try:
        return TypeAdapter(list[Remembered]).validate_json(files.read(run / FILE, own=True))
    except (OSError, ValidationError):
        return []  # a run of before there was such a file


def folders(data: Data, kept: list[Remembered]) -> list[Path] | None:
    """Return the folders of datasets that a run reads; None where one is gone."""
    found = [one.find(cache_folder(data)) for one in kept]
    return [folder for folder in found if folder is not None] if None not in found else None


def checked_folders(data: Data, kept: list[Remembered], preparing: list[Preparation], told: Told) -> list[Path]:
    """Return the folders of datasets with which a run goes on, after a look at the text; `told` gets what has changed.

    Raises CheckpointError for other text or another tokenizer, DataError where text and dataset are both gone.
    """
    return [_checked(data, one, preparation, told) for one, preparation in zip(kept, preparing, strict=True)]


def _checked(data: Data, kept: Remembered, preparation: Preparation, told: Told) -> Path:
    (source,) = preparation.sources
    if preparation.tokenizer.sha256 != kept.tokenizer:
        raise CheckpointError(f"data.tokenizer: {data.tokenizer} is not the one that this run was trained with")
    folder = kept.find(cache_folder(data))
    if is_dataset(source):
        if Manifest.load(Path(source)).content != kept.content:
            raise CheckpointError(_other(source, "other tokens"))
        return ensure_dataset(preparation, cache_folder(data))
    moved = source != kept.source
    if not exists(source, of_hub=moved or any(text.revision for text in kept.text)):
        if folder is None or moved:
            gone = "" if moved else f", and so is {kept.folder}, which was made of it"
            raise DataError(f"data.source: {source} is gone{gone}; expected one of both")
        told(f"data.source: {source} is gone; the run goes on with {folder}, which was made of it")
        return folder
    changed = kept.changed(preparation.opened[0], moved) if len(kept.text) == 1 else "other text"
    if changed and (moved or folder is None):
        raise CheckpointError(_other(source, changed))
    if changed:
        told(
            f"data.source: the text in {source} has changed since this run began ({changed}); the run goes on with "
            f"{folder}, which was made of it then; --fresh or --from trains a new run on it as it is now"
        )
    return folder or ensure_dataset(preparation, cache_folder(data))


def _other(source: str, what: str) -> str:
    found = f"data.source: {source} is not what this run was trained on: {what}"
    return f"{found}; use --fresh for a new run, or --from for one that begins with its weights"


def exists(source: str, of_hub: bool = True) -> bool:
    """True for a source whose text is there; `of_hub`: also for a dataset of the Hub, which is not asked."""
    return source == PYTHON_SOURCE or hub.exists(source, of_hub) or Path(source.removeprefix(REPOSITORIES)).exists()
