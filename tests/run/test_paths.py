"""Paths as users give them: `~`, names that are not UTF-8, links that lead nowhere: taken, or refused at once."""

import contextlib
import json
import os
import re
import stat
import threading
from collections import Counter
from pathlib import Path

import pytest

from data_tools import commands
from data_tools import folder as folders
from data_tools import prepare as preparing
from data_tools.prepare import Preparation, prepare
from data_tools.prepared import cache_folder
from data_tools.sources import Reading, open_source
from data_tools.tokenizer import load_tokenizer
from lasptrain.data.dataset import TokenDataset
from lasptrain.errors import DataError, SetupError
from lasptrain.files import at_home
from lasptrain.recipe.loading import load
from tests.support.program import ROOT, start

QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")
MODEL = ROOT / "tokenizers" / "python-4k.model"
TEXT = "to be or not to be, that is the question\n" * 30
ODD = os.fsdecode(b"caf\xe9")  # Latin-1, as old archives have it


def lasptrain(*arguments: str, cwd: Path) -> tuple[int, str, str]:
    """Exit code, output and errors of a command, with `cwd` as the home folder."""
    logs = cwd.with_name(f"{cwd.name}-logs")
    return start("lasptrain", *arguments, folder=cwd, logs=logs, HOME=str(cwd), XDG_CACHE_HOME=str(cwd)).end()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("~/a", "/home/me/a"),
        ("~", "/home/me"),
        ("repositories:~/a", "repositories:/home/me/a"),
        *((name, name) for name in ("a/~/b", "./~", "~nobody-of-this-name/a", "python:source", "bytes", "./a//b", "")),
    ],
)
def test_home(given: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert at_home(given) == expected


def test_home_in_a_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    parts = "[{path: ~/a, weight: 1}, {path: 'repositories:~/b', weight: 2}]"
    data = load(QUICKSTART, ["data.tokenizer=~/t.model", f"data.source={parts}", "data.cache=~/c"]).data
    assert not isinstance(data.source, str)
    assert [part.path for part in data.source] == [f"{tmp_path}/a", f"repositories:{tmp_path}/b"]
    assert (data.tokenizer, cache_folder(data)) == (f"{tmp_path}/t.model", tmp_path / "c")
    assert load(QUICKSTART, ["data.source=~/a"]).data.source == f"{tmp_path}/a"


def test_home_on_the_command_line(tmp_path: Path) -> None:
    """In arguments and options, where no shell expands it."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(TEXT)
    (tmp_path / "t.model").write_bytes(MODEL.read_bytes())
    (tmp_path / "r.yaml").write_text(Path(QUICKSTART).read_text())
    for command in (
        "data prepare ~/text --tokenizer=~/t.model --out=~/set --validation 0",
        "data verify ~/set",
        "data inspect ~/set --window 8 --at 0 --tokenizer=~/t.model",
        "data tokenizer check ~/t.model ~/text --against=~/t.model",
        "data tokenizer train repositories:~/ --vocab 330 --out=~/new.model",
        "data synth ~/text --characters 900 --documents 1 --out=~/new.jsonl",
        "check ~/r.yaml --set data.source=~/set --set data.tokenizer=~/t.model --set eval.windows=0",
    ):
        code, _, said = lasptrain(*command.split(), cwd=tmp_path)
        assert code == 0, said
    assert (tmp_path / "new.jsonl").exists() and (tmp_path / "new.model").exists() and not (tmp_path / "~").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_names_that_are_not_utf_8_are_read_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Of the folder that is named, of a file, of the tokenizer, and of the dataset."""
    monkeypatch.setattr(preparing, "UNIT", 200)
    folder = tmp_path / ODD
    folder.mkdir()
    (folder / f"{ODD}.txt").write_text(TEXT)
    model = tmp_path / f"{ODD}.model"
    model.write_bytes(MODEL.read_bytes())
    for number, named in enumerate((folder, folder / f"{ODD}.txt")):
        source = Preparation([str(named)], model, validation_ppm=0, workers=workers)
        dataset = TokenDataset.open(prepare(source, tmp_path / f"{ODD}{number}"))
        assert dataset.manifest.sources[0].name == f"caf\ufffd{named.suffix}"
        assert dataset.manifest.tokenizer.name == "caf\ufffd.model"
        assert commands.verify(dataset.folder).failures == 0
        assert "caf\ufffd" in str(commands.inspect(dataset.folder))


def test_names_in_repositories_that_are_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / ODD).mkdir()
    (tmp_path / ODD / f"{ODD}.py").write_text("pass\n")
    (only,) = open_source(f"repositories:{tmp_path}").documents(Reading(), Counter())
    assert only.text == "# caf\ufffd.py\npass\n"


def test_names_of_very_many_sources_fit(tmp_path: Path) -> None:
    names = []
    for number in range(40):
        names.append(str(tmp_path / f"{number}{'é' * 50}.txt"))
        Path(names[-1]).write_text(TEXT)
    dataset = TokenDataset.open(prepare(Preparation(names, "bytes", validation_ppm=0), tmp_path / "out"))
    assert len(dataset.manifest.sources) == 40


LINKS = {"gone": "nowhere", "loop": "loop", "gone.txt": "nowhere", "loop.model": "loop.model"}


@pytest.fixture
def links(tmp_path: Path) -> Path:
    for name, leads in LINKS.items():
        (tmp_path / name).symlink_to(leads)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


@pytest.mark.parametrize("name", ["gone", "loop", "gone.txt"])
def test_a_source_that_is_a_link_to_nothing_is_named_with_its_end(links: Path, name: str) -> None:
    for reads in (
        lambda: commands.prepare(Preparation([str(links / name)], "bytes"), links / "out"),
        lambda: commands.train_tokenizer([str(links / name)], 300, links / "new.model"),
    ):
        with pytest.raises(
            DataError, match=rf"^{links / name} -> {LINKS[name]}: it cannot be read: (No such|Too many)"
        ):
            reads()
    assert not {"out", ".out.lock", ".out.partial", "new.model"} & {path.name for path in links.iterdir()}


def test_a_tokenizer_that_is_a_link_to_nothing_is_named(links: Path) -> None:
    for name in ("loop.model", "gone"):
        with pytest.raises(
            DataError, match=rf"^{links / name} -> {LINKS[name]}: it cannot be read: (No such|Too many)"
        ):
            load_tokenizer(links / name)
        with pytest.raises(DataError, match=rf"{name} -> {LINKS[name]}"):
            prepare(Preparation([str(links / "text.txt")], links / name), links / "out")
    assert not {".out.lock", ".out.partial"} & {path.name for path in links.iterdir()}


@pytest.mark.parametrize("name", ["gone", "loop", "to"])
def test_an_output_that_is_a_link_is_refused_before_any_text_is_read(
    links: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (links / "folder").mkdir()
    (links / "to").symlink_to("folder")
    monkeypatch.setattr(preparing, "open_source", lambda name: pytest.fail("text was read"))
    with pytest.raises(SetupError, match=rf"^{links / name} -> \w+: is a symbolic link; expected a new folder$"):
        prepare(Preparation([str(links / "text.txt")], "bytes"), links / name)


def test_a_dataset_is_written_to_the_folder_one_is_in(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "here").mkdir()
    with contextlib.chdir(tmp_path / "here"):
        prepare(Preparation(["../a.txt"], "bytes", validation_ppm=0), Path())
    assert commands.verify(tmp_path / "here").failures == 0


def test_a_check_names_a_source_that_is_not_there(links: Path) -> None:
    for name, found in (
        ("nowhere", "nowhere: no such source"),
        ("gone", "gone -> nowhere: it cannot be read: No such"),
    ):
        code, shown, said = lasptrain("check", QUICKSTART, "--set", f"data.source={name}", cwd=links)
        assert code == 3 and re.fullmatch(f"error: {found}.*\n", said), said
        assert not shown


def test_no_lock_stays_behind(tmp_path: Path) -> None:
    """After text that is refused, a tokenizer that is none, and an interrupt; nor does it after success."""
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    (tmp_path / "good.txt").write_text(TEXT)
    (tmp_path / "bad.model").write_text("none")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for preparation, expected in (
        (Preparation([str(tmp_path / "bad.txt")], "bytes"), DataError),
        (Preparation([str(tmp_path / "good.txt")], tmp_path / "bad.model"), DataError),
        (Preparation([str(tmp_path / "good.txt")], "bytes", progress=interrupt), KeyboardInterrupt),
        (Preparation([str(tmp_path / "good.txt")], "bytes", validation_ppm=0), None),
    ):
        with pytest.raises(expected) if expected else contextlib.nullcontext():
            prepare(preparation, tmp_path / "out")
        assert not (tmp_path / ".out.lock").exists()


def test_a_lock_that_its_holder_removed_is_no_lock(tmp_path: Path) -> None:
    """Of many that wait one after another holds the lock, though each removes its file."""
    inside, most, lock = [0], [0], tmp_path / ".out.lock"

    def hold() -> None:
        for _ in range(20):
            with folders._locked(lock, tmp_path / "out", wait=True):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                assert stat.S_ISREG(lock.stat().st_mode)
                inside[0] -= 1

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and not lock.exists()
    with folders._locked(lock, tmp_path / "out", wait=True), pytest.raises(SetupError, match="another process is"):
        prepare(Preparation(["python:source"], "bytes"), tmp_path / "out")


def test_a_place_that_cannot_be_written_is_the_one_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(SetupError, match=r"^\S+/a\.txt: (File exists|Not a directory)$"):
        prepare(Preparation([str(tmp_path / "a.txt")], "bytes"), tmp_path / "a.txt" / "out")
    code, _, said = lasptrain("data", "tokenizer", "inspect", "bytes", "--text", ODD, cwd=tmp_path)
    assert code == 2 and said == "error: --text: found bytes that are not UTF-8; expected text\n"


def test_a_name_with_a_line_end_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a\nb.txt").write_bytes(b"\xff\x1b[2J")
    code, _, said = lasptrain("data", "prepare", "a\nb.txt", "--tokenizer", "bytes", "--out", "o", cwd=tmp_path)
    assert code == 3 and said == "error: a\\nb.txt: byte 0 is not UTF-8; prepare --errors replace, or skip, takes it\n"
    json.dumps(said)
