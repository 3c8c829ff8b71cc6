"""Commands that only read a recipe run on systems that lack what Linux has; the others say so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ELSEWHERE = """
import os, signal, sys

class Refusal:
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "syslog"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refusal())
for name in ("fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "syslog"):
    sys.modules.pop(name, None)
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL", "SIGCHLD", "SIGALRM", "SIGQUIT", "pthread_sigmask"):
    delattr(signal, name)
for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_DIRECTORY", "getuid", "sched_getaffinity", "setsid", "killpg"):
    delattr(os, name)

from lasptrain.__main__ import main
sys.argv = ["lasptrain", *sys.argv[1:]]
main()
"""


def elsewhere(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], "pretrain"),
        (["check", "recipes/quickstart.yaml"], "parameters"),
        (["plan", "recipes/1b_4096k.yaml"], "peak memory"),
        (["recipe", "keys"], "optim.lr"),
    ],
    ids=["help", "check", "plan", "keys"],
)
def test_runs_without_what_linux_has(tmp_path: Path, arguments: list[str], expected: str) -> None:
    done = elsewhere(tmp_path, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert expected in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["pretrain", "recipes/quickstart.yaml"],
        ["data", "prepare", "text.txt", "--tokenizer", "bytes", "--out", "set"],
    ],
    ids=["pretrain", "prepare"],
)
def test_what_needs_more_says_so(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "text.txt").write_text("a text")
    done = elsewhere(tmp_path, *arguments)
    assert done.returncode == 5, done.stderr
    assert done.stderr.startswith(f"error: found {sys.platform}, ")
    assert done.stderr.endswith("expected Linux or macOS\n")
    assert done.stderr.count("\n") == 1
