"""Temporary folders: of a process that is killed the next one removes what is left, and nothing else."""

from __future__ import annotations

import os
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from lasptrain.process.scratch import PREFIX, remove_abandoned, scratch
from tests.support.gloo import CONTEXT, PATIENCE


def wait_inside(folder: str, told: Connection) -> None:
    """A process that has a folder until it is killed."""
    tempfile.tempdir = folder
    with scratch() as mine:
        (mine / "file").write_text("large")
        told.send(str(mine))
        time.sleep(PATIENCE)


def test_what_a_killed_process_leaves_the_next_one_removes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    hears, tells = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=wait_inside, args=(str(tmp_path), tells), daemon=True)
    process.start()
    theirs = Path(hears.recv())
    try:
        with scratch() as mine:
            assert mine.is_dir() and theirs.is_dir()
    finally:
        process.kill()
        process.join()
    assert (theirs / "file").exists()
    remove_abandoned()
    assert not theirs.exists()


def test_only_folders_of_that_name_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    other, target = tmp_path / "lasptrain-other", tmp_path / "target"
    for folder in (other, target):
        folder.mkdir()
    (tmp_path / f"{PREFIX}link").symlink_to(target)
    (tmp_path / f"{PREFIX}file").write_text("")
    with scratch():
        pass
    assert other.is_dir() and target.is_dir() and (tmp_path / f"{PREFIX}file").exists()


def test_temporary_files_are_made_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", "before")
    with scratch() as folder:
        assert os.environ["TMPDIR"] == str(folder) and Path(tempfile.mkdtemp()).parent == folder
    assert os.environ["TMPDIR"] == "before" and list(tmp_path.iterdir()) == []
