"""Files of a run that refuse, are links, or are left over: what is ours goes on or ends in one line, with its code."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lasptrain import files
from lasptrain.cli import main
from lasptrain.errors import CheckpointError, LaspError, RecipeError, ResourceError, SetupError
from lasptrain.process import interface
from lasptrain.process.failure import Failure, failure_of, write_final_status
from lasptrain.process.scratch import scratch
from lasptrain.recipe.loading import load
from lasptrain.recipe.schema import Recipe
from lasptrain.run import auto, origin
from lasptrain.run import folder as runs
from lasptrain.run.metrics import Metrics, read_metrics
from lasptrain.run.outlets import PATIENCE, Outlet
from tests.support.clock import Clock

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


# The first start


@pytest.mark.fault("an end, or a disk that refuses, at the very first start")
def test_a_first_start_that_dies_anywhere_leaves_a_folder_that_is_accepted(
    recipe: Recipe, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Killed before the n-th call that changes the disk, for every n, or refused by it: the next start goes through."""
    died = 0
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
        died += number
    record_property("times", died)


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


@pytest.mark.fault("a link or a FIFO in a run folder", times=2)
@pytest.mark.parametrize("name", [*runs.FILES, "checkpoints", "ranks", "tensorboard", "profile", "eval"])
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


# Files that are only looked at


def write_some(run: Path, steps: int = 6) -> None:
    with Metrics(run, steps=steps) as metrics:
        for step in range(1, steps + 1):
            metrics.log(step, loss=float(step))


@pytest.mark.fault("a disk that refuses to write")
@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ENOSPC])
@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard", "status.json"])
def test_an_error_of_a_file_of_display_is_told_and_the_file_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, number: int
) -> None:
    monkeypatch.setattr("lasptrain.run.metrics.RENEWED", -1.0)
    open_, write, seen = os.open, os.write, list[int]()

    def refusing(descriptor: int, data: bytes) -> int:
        if name.removesuffix(".json") in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            seen.append(descriptor)
            if len(seen) == 2:
                write(descriptor, data[: len(data) // 2])  # a part is there already
                raise OSError(number, os.strerror(number))
        return write(descriptor, data)

    def unopened(path: Any, *args: Any, **kwargs: Any) -> int:
        if name == "status.json" and "status.json" in str(path):
            seen.append(0)
            if len(seen) == 2:
                raise OSError(number, os.strerror(number), str(path))
        return open_(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refusing)
        patch.setattr(os, "open", unopened)
        write_some(tmp_path)
    assert len(seen) > 4
    told, missed = [message for message in caplog.messages if name in message], "writes that it has missed: 1"
    assert [os.strerror(number) in told[0], "written again" in told[1]] == [True, True]
    assert [missed in message for message in told[2:]] == ([True] if name == "tensorboard" else [])
    assert [record["loss"] for record in read_metrics(tmp_path)] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "finished"
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert {2.0, 3.0, 4.0, 5.0, 6.0} <= {event.value for event in events}


def test_a_file_that_stays_broken_ends_training_after_a_while(tmp_path: Path) -> None:
    for number, kind in ((errno.ENOSPC, ResourceError), (errno.EIO, SetupError)):
        clock = Clock()
        outlet = Outlet(tmp_path / "metrics.jsonl", clock)

        def refuse(number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        outlet(refuse)
        clock.seconds += PATIENCE
        outlet(refuse)
        clock.seconds += 1
        with pytest.raises(kind, match=f"metrics.jsonl: {os.strerror(number)}, for 301 s"):
            outlet(refuse)
        with pytest.raises(kind):
            Outlet(tmp_path, clock)(refuse, last=True)


def test_the_end_is_written_into_status_json_where_there_is_no_room_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "status.json").write_text(json.dumps({"state": "running", "step": 7, "filling": "x" * 200}))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "replace", full)
    write_final_status(tmp_path, Failure(1, 8, "OSError", "no space left", 0.0))
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["code"], status["step"]) == ("failed", 8, 7)


def test_a_full_disk_is_told_with_the_name_of_what_is_written(tmp_path: Path) -> None:
    """A write does not know its own: it was said of `output`."""
    out = tmp_path / "new"
    for writing in (files.whole(out), files.atomic_folder(out, False, "mark")):
        with pytest.raises(OSError, match="No space left") as caught, writing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        assert caught.value.filename == str(out) and not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="/proc/new"), files.atomic_folder(Path("/proc/new"), False, "mark"):
        pass
    with pytest.raises(OSError, match="/proc/new"):
        files.replace(Path("/proc/new"), "")


def test_what_a_killed_process_left_is_removed_and_what_is_written_is_not(tmp_path: Path) -> None:
    out, other = tmp_path / "new[1]", tmp_path / ".new.tmp-0123abcd"
    code = (
        "import os, sys; from pathlib import Path; from lasptrain.files import atomic_folder\n"
        "with atomic_folder(Path(sys.argv[1]), False, 'mark') as new:\n"
        "    (new / 'mark').touch(); print(new, flush=True); sys.stdin.read()"
    )
    other.mkdir()
    writing = subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert writing.stdout is not None
        hidden = Path(writing.stdout.readline().strip())
        with pytest.raises(OSError, match="stop"), files.atomic_folder(out, False, "mark") as mine:
            assert hidden.is_dir() and mine != hidden
            raise OSError("stop")
        assert sorted(tmp_path.iterdir()) == sorted([other, hidden])
    finally:
        writing.kill()
        writing.communicate()
    with files.atomic_folder(out, False, "mark"):
        assert not hidden.exists()
    assert sorted(tmp_path.iterdir()) == sorted([other, out])


def test_what_an_error_of_the_disk_means() -> None:
    for number, named, code in (
        (errno.EIO, False, 5),
        (errno.EMFILE, False, 5),
        (errno.EACCES, True, 5),
        (errno.EFBIG, False, 8),
        (errno.EDQUOT, True, 8),
        (errno.EINVAL, False, 70),
    ):
        failure = failure_of(0, OSError(number, os.strerror(number), *(["file"] if named else [])))
        assert failure.code == code and ("\n" in failure.message) is (code == 70)


# Temporary folders, interfaces, the command line


def test_a_temporary_folder_without_room_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(SetupError, match="TMPDIR: No usable temporary directory"), scratch():
        pass


def test_ranks_talk_over_the_route_where_the_name_of_a_machine_is_a_loopback_address(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"node7": "127.0.1.1", "node8": "10.0.0.8", "10.0.0.1": "10.0.0.1", "127.0.0.1": "127.0.0.1"}
    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    monkeypatch.setattr(socket, "gethostbyname", names.__getitem__)
    monkeypatch.setattr(interface, "_source", lambda host, port: "10.0.0.7")
    monkeypatch.setattr(interface, "of", {"10.0.0.7": "eth1"}.get)
    monkeypatch.setenv(interface.VARIABLE, "")  # so that it is what it was in the end
    monkeypatch.delenv(interface.VARIABLE)
    interface.choose("127.0.0.1", 29400)
    assert interface.VARIABLE not in os.environ
    interface.choose("10.0.0.1", 29400)
    assert os.environ[interface.VARIABLE] == "eth1"
    said = "the name of this machine, node7, is a loopback address: ranks talk over eth1, which leads to 10.0.0.1"
    assert capsys.readouterr().err == f"{said}; GLOO_SOCKET_IFNAME names another\n"
    for name, user in (("node7", "ib0"), ("node8", None)):
        monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
        monkeypatch.delenv(interface.VARIABLE, raising=False)
        if user:
            monkeypatch.setenv(interface.VARIABLE, user)
        interface.choose("10.0.0.1", 29400)
        assert os.environ.get(interface.VARIABLE) == user
    monkeypatch.undo()
    assert interface.of("127.0.0.1") == "lo" and interface.of("192.0.2.9") is None


def test_an_error_of_the_disk_is_one_line_of_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], signals: None
) -> None:
    for number, code, line in (
        (errno.EIO, 5, "error: a file: Input/output error\n"),
        (errno.EMFILE, 5, "error: a file: Too many open files\n"),
        (errno.EFBIG, 8, "error: output: no space left; expected some\n"),
    ):

        def fail(number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(main, "app", fail)
        with pytest.raises(SystemExit) as end:
            main.main()
        assert (end.value.code, capsys.readouterr().err) == (code, line)
