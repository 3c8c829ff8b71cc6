"""The wheel holds what a user needs, outside of any clone."""

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def run(*command: str, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run("-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), folder=ROOT)
    [file] = folder.glob("*.whl")
    return file


def test_everything_is_in_it(wheel: Path) -> None:
    names = set(ZipFile(wheel).namelist())
    modules = {str(f.relative_to(ROOT)) for top in ("lasptrain", "data_tools") for f in (ROOT / top).rglob("*.py")}
    recipes = {f"lasptrain/_files/recipes/{file.name}" for file in (ROOT / "recipes").glob("*.yaml")}
    assert names >= modules | recipes | {"lasptrain/_files/tokenizers/python-4k.model", "lasptrain/py.typed"}
    others = {name.split("/")[0] for name in names} - {"lasptrain", "data_tools"}
    assert [name for name in others if not name.endswith(".dist-info")] == []


def test_it_runs_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    site, folder = tmp_path / "site", tmp_path / "empty"
    folder.mkdir()
    run("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(wheel), folder=folder)

    def lasptrain(*arguments: str) -> str:
        return run("-m", "lasptrain", *arguments, folder=folder, PYTHONPATH=str(site), XDG_CACHE_HOME=str(tmp_path))

    where = run("-c", "import lasptrain; print(lasptrain.__file__)", folder=folder, PYTHONPATH=str(site))
    assert Path(where.strip()).is_relative_to(site)
    assert "parameters" in lasptrain("check", "recipes/quickstart.yaml")
    assert "peak memory" in lasptrain("plan", "recipes/1b_4096k.yaml")
    assert "optim.lr" in lasptrain("recipe", "keys")
    (folder / "small.txt").write_text("a text\n" * 500)
    lasptrain("data", "prepare", "small.txt", "--tokenizer", "tokenizers/python-4k.model", "--out", "set")
    assert "good" in lasptrain("data", "verify", "set")
