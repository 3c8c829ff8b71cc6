"""The command line: one line per error, the right exit code, never a traceback, nothing overwritten."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent
from typing import NamedTuple

import pytest
import typer
from typer.testing import CliRunner

from data_tools.commands import Inspection
from data_tools.packing import BestFit
from data_tools.parts import Part
from data_tools.prepare import Preparation
from lasptrain import __version__
from lasptrain.cli.main import app
from lasptrain.errors import DataError
from tests.support.program import ROOT, start

QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")


class Done(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def lasptrain(*arguments: str, cwd: Path, **environment: str) -> Done:
    """Runs the command in `cwd`."""
    logs = cwd.with_name(f"{cwd.name}-logs")
    started = start("lasptrain", *arguments, folder=cwd, logs=logs, XDG_CACHE_HOME=str(cwd / "cache"), **environment)
    return Done(*started.end())


def refused(code: int, message: str, *arguments: str, cwd: Path, **environment: str) -> None:
    """Asserts that the command ends with `code` and one line that matches `message`."""
    done = lasptrain(*arguments, cwd=cwd, **environment)
    assert done.returncode == code, done.stderr
    assert re.fullmatch(f"error: .*{message}.*\n", done.stderr), done.stderr
    assert not done.stdout


def test_version_and_help(tmp_path: Path) -> None:
    assert lasptrain("--version", cwd=tmp_path).stdout == f"lasptrain {__version__}\n"
    help_text = lasptrain("--help", cwd=tmp_path).stdout
    assert all(command in help_text for command in ("pretrain", "check", "data"))


def commands(app: typer.Typer, name: str = "") -> Iterator[list[str]]:
    """Every command and group, by its words."""
    yield name.split()
    for group in app.registered_groups:
        assert group.typer_instance is not None
        yield from commands(group.typer_instance, f"{name} {group.name}")
    yield from (
        f"{name} {one.name or one.callback.__name__}".split() for one in app.registered_commands if one.callback
    )


@pytest.mark.parametrize("words", list(commands(app)), ids=" ".join)
def test_every_command_has_short_help(words: list[str]) -> None:
    names = [word.replace("_", "-") for word in words]
    shown = [CliRunner().invoke(app, [*names, option]) for option in ("-h", "--help")]
    assert shown[0].exit_code == 0 and "-h, --help" in shown[0].output
    assert shown[0].output == shown[1].output


def test_a_shell_completes_commands() -> None:
    asked = {"_LASPTRAIN_COMPLETE": "complete_bash", "COMP_WORDS": "lasptrain data in", "COMP_CWORD": "2"}
    code = "import sys; sys.argv = ['lasptrain']; from lasptrain.__main__ import main; main()"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | asked, capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr) == (["inspect"], "")


def interrupted(find_spec: str, *arguments: str, code: int = 130) -> None:
    """Asserts that the command ends quietly by a signal, which `find_spec(self, name, *rest)` of an import makes."""
    program = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell in the background has it ignored
        f"class Slow:\n    def find_spec(self, name, *rest):\n{indent(find_spec, 8 * ' ')}\n"
        "sys.meta_path.insert(0, Slow())\n"
        f"sys.argv[1:] = {[*arguments]}\n"
        "from lasptrain.__main__ import main; main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def test_ctrl_c_while_it_is_loaded_ends_it_quietly() -> None:
    """A module that interrupts stands in the place of one that takes long."""
    interrupted("return name == 'typer' and os.kill(os.getpid(), signal.SIGINT) or None")


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 75)])
def test_a_signal_is_not_lost_while_torch_is_loaded(number: str, code: int) -> None:
    """A module in the place of torch's first one swallows the exception."""
    swallowing = (
        "if name.startswith('torch.'):\n"
        "    sys.meta_path.remove(self)\n"
        f"    try: os.kill(os.getpid(), signal.{number})\n"
        "    except BaseException: pass"
    )
    interrupted(swallowing, "bench", "sp", QUICKSTART, "--tokens", "64", "--method", "nope", code=code)


def test_sigterm_removes_what_is_temporary(tmp_path: Path) -> None:
    """A command that has a temporary folder when the signal comes."""
    ending = "if name == 'multiprocessing.popen_spawn_posix': os.kill(os.getpid(), signal.SIGTERM)"
    interrupted(ending, "bench", "saving", QUICKSTART, "--folder", str(tmp_path), code=75)
    assert list(tmp_path.iterdir()) == []


def test_output_that_finds_no_space_is_one_line(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "lasptrain", "check", QUICKSTART],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            cwd=ROOT,
        )
    assert (done.returncode, done.stderr) == (8, "error: output: no space left; expected some\n")
    refused(2, "--step: . holds no recipe.yaml; expected a run", "data", "inspect", ".", "--step", "2", cwd=tmp_path)


@pytest.mark.parametrize(("given", "expected"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_that_wait_leave_the_cores_to_others(given: dict[str, str], expected: str) -> None:
    code = "import os, lasptrain.cli.main as c; c.app = lambda: print(os.environ['OMP_WAIT_POLICY']); c.main()"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"PYTHONPATH": str(ROOT), **given}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{expected}\n"


@pytest.mark.parametrize("arguments", [["pretrian"], ["check", "--nproc", "0", QUICKSTART], ["check", "--nope"]])
def test_usage_errors_end_with_2(tmp_path: Path, arguments: list[str]) -> None:
    done = lasptrain(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_check_shows_what_a_recipe_means_without_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    command = [sys.executable, "-m", "lasptrain", "check", QUICKSTART, "--nproc", "4", "--set", "mesh.sp=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [*command, "--set", "mesh.dp=2"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for expected in ("tnl, 4 layers of 192", "2,703,552", "dp 2 × sp 2, 4 processes", "4,096 tokens per rank"):
        assert expected in " ".join(done.stdout.split())
    assert "16,384 tokens: 2 windows" in done.stdout
    assert list(tmp_path.iterdir()) == [tmp_path / "torch.py"]
    one = lasptrain("check", QUICKSTART, "--set", "model.heads=1", "--set", "model.layers=1", cwd=tmp_path)
    assert "tnl, 1 layer of 192, 1 head\n" in one.stdout


def test_every_problem_of_a_recipe_is_a_line(tmp_path: Path) -> None:
    done = lasptrain("check", QUICKSTART, "--set", "model.dmi=3", "--set", "train.steps=x", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: --set model.dmi=3: model.dmi: no such key; did you mean dim?",
        "error: --set train.steps=x: train.steps: found 'x'; expected an integer",
    ]


def test_recipe_errors(tmp_path: Path) -> None:
    refused(2, "no such file; expected a recipe", "pretrain", "absent.yaml", cwd=tmp_path)
    refused(
        2,
        "data.window: 8192 tokens do not split into mesh.sp = 3 equal slices; nearest: 8190, 8193",
        *("pretrain", QUICKSTART, "--set", "mesh.sp=3"),
        cwd=tmp_path,
    )
    assert not (tmp_path / "runs").exists()


def test_a_mesh_for_another_number_of_processes(tmp_path: Path) -> None:
    arguments = [QUICKSTART, "--nproc", "3", "--set", "mesh.dp=2", "--set", "mesh.sp=2"]
    refused(5, "3 processes do not make dp = 2 × sp = 2.*nearest: --nproc 4", "check", *arguments, cwd=tmp_path)
    refused(5, "3 processes do not make dp = 2 × sp = 2.*nearest: --nproc 4", "pretrain", *arguments, cwd=tmp_path)
    ragged = (
        "data.window: 8192 tokens do not split into mesh.sp = 3 equal slices; nearest: 8190, 8193; or --nproc 2 or 4"
    )
    for command in ("check", "pretrain"):  # where sp is known at launch only
        refused(2, ragged, command, QUICKSTART, "--nproc", "3", cwd=tmp_path)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--with-optimizer"], "--with-optimizer: found without --from; expected both"),
        (["--nnodes", "2"], "--rdzv: missing with --nnodes 2; expected HOST:PORT"),
        (["--nnodes", "2", "--node-rank", "2", "--rdzv", "a:1"], "--node-rank: found 2 of --nnodes 2; expected 0 to 1"),
        (["--rdzv", "somewhere"], "--rdzv: found 'somewhere'; expected HOST:PORT"),
        (["--rdzv", "a:99999"], "--rdzv: found 'a:99999'; expected HOST:PORT"),
    ],
)
def test_options_for_several_machines(tmp_path: Path, options: list[str], message: str) -> None:
    refused(2, message, "pretrain", QUICKSTART, *options, cwd=tmp_path)


def test_data_errors_come_before_any_run(tmp_path: Path) -> None:
    refused(3, "corpus: no such source", "pretrain", QUICKSTART, "--set", "data.source=corpus", cwd=tmp_path)
    refused(3, "absent.model", "pretrain", QUICKSTART, "--set", "data.tokenizer=absent.model", cwd=tmp_path)
    refused(3, "absent.model", "check", QUICKSTART, "--set", "data.tokenizer=absent.model", cwd=tmp_path)
    refused(2, "model.vocab: 100 rows for a tokenizer of 4096", "check", QUICKSTART, "--set", "model.vocab=100",
            cwd=tmp_path)  # fmt: skip
    assert not (tmp_path / "runs").exists()


def test_outputs_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question\n" * 200)
    train = ["data", "tokenizer", "train", "text.txt", "--vocab", "300", "--out"]
    refused(5, "/proc/t.model: No such file or directory", *train, "/proc/t.model", cwd=tmp_path)
    refused(2, r"--out: found synth; expected a name that ends in \.jsonl", "data", "synth", "text.txt",
            "--out", "synth", cwd=tmp_path)  # fmt: skip
    (tmp_path / "empty.txt").touch()
    refused(3, "0 documents in empty.txt to train a tokenizer on", "data", "tokenizer", "train", "empty.txt",
            "--out", "t.model", cwd=tmp_path)  # fmt: skip
    prepare = ["data", "prepare", "empty.txt", "--tokenizer", "bytes", "--out", "shards"]
    refused(3, "0 documents in empty.txt to train on: 0 held out, dropped: 1 empty", *prepare, cwd=tmp_path)


def test_a_plan_that_does_not_fit_names_its_own_option(tmp_path: Path) -> None:
    refused(2, "or --gpus 2 or 4", "plan", QUICKSTART, "--gpus", "3", cwd=tmp_path)


def test_a_tokenizer_that_does_not_match_the_shards(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 200)
    prepared = lasptrain("data", "prepare", "text.txt", "--tokenizer", "bytes", "--out", "shards", cwd=tmp_path)
    assert prepared.returncode == 0, prepared.stderr
    for command in ("check", "pretrain"):
        said = "; expected the first in data.tokenizer"
        refused(
            3, "shards: made with tokenizer bytes", command, QUICKSTART, "--set", "data.source=shards", cwd=tmp_path
        )
        refused(3, said, command, QUICKSTART, "--set", "data.source=shards", cwd=tmp_path)


def test_data_commands_make_inspect_and_verify_a_dataset(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"document {number} says: to be or not to be\n" * 50)
    sources = [f"{number}.txt" for number in range(20)]
    trained = lasptrain("data", "tokenizer", "train", *sources, "--vocab", "300", "--out", "t.model", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "300 pieces" in lasptrain("data", "tokenizer", "inspect", "t.model", cwd=tmp_path).stdout
    shown = lasptrain("data", "tokenizer", "inspect", "bytes", "--text", "ab", cwd=tmp_path).stdout
    assert "'a' 'b'\n2 tokens" in shown
    prepare = ["data", "prepare", *sources, "--tokenizer", "t.model", "--out", "set", "--validation", "200000"]
    assert lasptrain(*prepare, cwd=tmp_path).returncode == 0
    refused(5, "set: it is not empty", *prepare, cwd=tmp_path)
    inspected = lasptrain("data", "inspect", "set", "--window", "64", cwd=tmp_path)
    assert "windows of 64" in inspected.stdout
    assert lasptrain("data", "verify", "set", cwd=tmp_path).returncode == 0
    shard = next((tmp_path / "set").glob("train-*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert lasptrain("data", "verify", "set", cwd=tmp_path).returncode == 3


@pytest.mark.parametrize("command", ["prepare", "import"])
def test_options_of_a_dataset_are_those_of_text_and_of_ids(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Preparation] = []

    def prepare(preparation: Preparation, out: Path) -> Inspection:
        found.append(preparation)
        raise DataError("enough")

    monkeypatch.setattr("data_tools.commands.prepare", prepare)
    given = ["data", command, "a", "--tokenizer", "bytes", "--out", "set", "--seed", "3", "--validation", "7"]
    given += ["--min-tokens", "2", "--max-tokens", "9"]
    fit = ["--packing", "best_fit", "--window", "64", "--long-documents", "cut"]
    for more in (fit, ["--part", "1/2"]):
        assert str(CliRunner().invoke(app, [*given, *more]).exception) == "enough"
    packed, part = found
    for one in found:
        assert (one.seed, one.validation_ppm, one.lengths) == (3, 7, (2, 9))
    assert packed.packing == BestFit(64, "cut") and packed.part is None and part.packing is None
    assert part.part == Part.parse("1/2")
    refused = CliRunner().invoke(app, [*given, *fit, "--part", "1/2"]).exception
    assert str(refused).startswith(
        "--part: found 1/2 with --packing best_fit; expected --packing of lasptrain data merge"
    )


def test_a_bug_shows_its_traceback_once_and_ends_with_70(tmp_path: Path) -> None:
    program = "import lasptrain.cli.main as cli; cli.load = lambda *_: 1 / 0; cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "check", "x.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 70
    assert done.stderr.count("Traceback") == 1


def test_a_signal_that_a_library_makes_an_error_of_is_a_signal(tmp_path: Path) -> None:
    """As pydantic does of what is raised while it builds a class."""
    program = """import os, signal, lasptrain.cli.main as cli
def load(*_):
    try: os.kill(os.getpid(), signal.SIGTERM); [None for _ in range(999)]
    except SystemExit as error: raise ValueError(f"builds no validator: {error}") from error
cli.load = load
cli.main()"""
    command = [sys.executable, "-c", program, "check", "x.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (75, "")


def test_benchmarks_are_refused_before_they_measure(tmp_path: Path) -> None:
    sp = ["bench", "sp", QUICKSTART]
    refused(2, "--tokens, --steps: found neither; expected tokens per rank", *sp, cwd=tmp_path)
    refused(2, "none/x.json: found no folder none; ", *sp, "--steps", "64", "--json", "none/x.json", cwd=tmp_path)


def test_benchmarks_need_a_gpu(tmp_path: Path) -> None:
    for name in ("kernels", "softmax"):
        refused(5, "found no CUDA device", "bench", name, cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    refused(5, "found no CUDA device", "plan", QUICKSTART, "--measure", cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
