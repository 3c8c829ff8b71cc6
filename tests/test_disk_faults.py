"""Files of a run that refuse, are links, or are left over: what is ours goes on or ends in one line, with its code."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lasptrain import files
from lasptrain.errors import CheckpointError, LaspError, RecipeError, SetupError
from lasptrain.recipe.loading import load
from lasptrain.recipe.schema import Recipe
from lasptrain.run import auto, origin
from lasptrain.run import folder as runs
from lasptrain.run.metrics import Metrics

RECIPE = """
model: {arch: tnl, dim: 8, layers: 1, heads: 1, mlp: 8, vocab: 320}
data: {source: text, tokenizer: bytes, window: 64}
optim: {lr: 1e-3}
train: {steps: 2, batch: 2}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return load(tmp_path / "tiny.yaml")


class Refusing:
    """Lets functions of `os` raise an error from their call number `first` on, for `times` calls."""

    def __init__(self, patch: pytest.MonkeyPatch, number: int, *names: str, first: int = 1, times: int = 10**9) -> None:
        self.calls, self._number, self._when = 0, number, range(first, first + times)
        for name in names:
            patch.setattr(os, name, self._refusing(getattr(os, name)))

    def _refusing(self, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls in self._when:
                raise OSError(self._number, os.strerror(self._number))
            return function(*args, **kwargs)

        return call


# The first start


@pytest.mark.fault("an end, or a disk that refuses, at the very first start", times=12)
def test_a_first_start_that_dies_anywhere_leaves_a_folder_that_is_accepted(recipe: Recipe, tmp_path: Path) -> None:
    """Killed before the n-th call that changes the disk, for every n, or refused by it: the next start goes through."""
    for kind in (KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")):
        for number in range(100):
            run = tmp_path / f"{type(kind).__name__}-{number}"
            with pytest.MonkeyPatch.context() as patch:
                calls = iter(range(number))
                for owner, name in ((os, "mkdir"), (os, "write"), (os, "fsync"), (os, "rename"), (os, "ftruncate")):
                    patch.setattr(owner, name, dying(getattr(owner, name), calls, kind))
                patch.setattr(Path, "replace", dying(Path.replace, calls, kind))
                if isinstance(kind, type):  # a kill cleans nothing up
                    patch.setattr(Path, "unlink", lambda *_, **__: None)
                try:
                    begin(run, recipe)
                    break
                except (KeyboardInterrupt, LaspError, OSError) as error:
                    assert not isinstance(error, LaspError) or error.code == 8
            if not isinstance(kind, type):
                assert not run.exists() or not list(filter(files.hidden, run.iterdir()))
            begin(run, recipe)
            assert not list(filter(files.hidden, run.iterdir()))
        assert number > 5


def dying(function: Any, calls: Any, error: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            raise error
        return function(*args, **kwargs)

    return call


def begin(run: Path, recipe: Recipe) -> None:
    with runs.lock(run):
        runs.adopt(run, recipe)
        (run / runs.RANKS).mkdir(exist_ok=True)


def test_files_of_strangers_are_still_refused(recipe: Recipe, tmp_path: Path) -> None:
    for name in ("notes.txt", ".recipe.yaml.bak", ".ssh"):
        run = tmp_path / name / "run"
        run.mkdir(parents=True)
        (run / name).touch()
        with pytest.raises(SetupError, match="holds files but no recipe"):
            begin(run, recipe)


@pytest.mark.fault("a signal, wherever a run is")
def test_a_signal_while_the_program_loads(tmp_path: Path) -> None:
    """A program that has not begun: imports have, and nothing else."""
    script = "import os, signal, sys; sys.argv[1:] = ['pretrain', 'x.yaml']\n"
    script += "import importlib.abc\nclass Stop(importlib.abc.MetaPathFinder):\n"
    script += " def find_spec(self, name, *_):\n"
    script += "  if name == 'lasptrain.cli.main': os.kill(os.getpid(), signal.SIGTERM)\n"
    script += "sys.meta_path.insert(0, Stop())\nfrom lasptrain.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (75, "")


# Links, FIFOs


@pytest.mark.fault("a link or a FIFO in a run folder", times=22)
@pytest.mark.parametrize("name", [*runs.FILES, "checkpoints", "ranks", "tensorboard", "profile"])
def test_nothing_of_a_run_follows_a_link_or_waits_for_a_fifo(recipe: Recipe, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("mine")
    target = outside / "precious" if name in runs.FILES else outside
    for make in (lambda path: path.symlink_to(target), os.mkfifo):
        run = tmp_path / f"run-{make is os.mkfifo}"
        begin(run, recipe)
        path = run / name
        if path.exists():
            path.rmdir() if path.is_dir() else path.unlink()
        make(path)
        with pytest.raises(LaspError, match=f"{name}: is|holds no {name}|holds files") as caught, runs.lock(run):
            pass
        assert caught.value.code == 5
        for look in (runs.recipe_of, runs.committed, origin.read, lambda run: auto.load(recipe, run, "here")):
            try:
                look(run)
            except (CheckpointError, RecipeError) as error:
                assert name in str(error)
    assert (outside / "precious").read_text() == "mine" and len(list(outside.iterdir())) == 1


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard", "status.json"])
def test_a_link_made_while_a_run_begins_is_not_written_through(tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine\n")
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(outside)
    try:
        with Metrics(run, steps=2) as metrics:
            metrics.log(1, loss=1.0)
    except LaspError:
        pass
    assert outside.read_text() == "mine\n"


def test_a_recipe_that_is_a_fifo_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "recipe.yaml")
    began = time.monotonic()
    with pytest.raises(RecipeError, match="no regular file"):
        load(tmp_path / "recipe.yaml")
    assert time.monotonic() - began < 1
