"""What a folder may look like after a power cut or a kill: every call that changes a disk is recorded with its effect.

A disk keeps of a file what was in it when it was last synced, and of a folder the names that were in it when the folder
was; everything since then it may have, or not.
"""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

Tree = dict[str, Any]  # names, to bytes of a file or to the Tree of a folder
Choice = Callable[[Any, Any], Any]  # between what a disk has kept and what is there now


class Disk:
    """Records what happens below `root`, of which all is kept at first.

    `unsynced` tells of which paths an fsync is left out, to see what it is good for.
    """

    def __init__(self, root: Path, unsynced: Callable[[Path], bool] = lambda path: False) -> None:
        self._root, self._unsynced = root, unsynced
        self._number: dict[int, int] = {}  # of an inode: they are used again, numbers are not
        self._now: dict[int, Any] = {}  # of a number: bytes of a file, or numbers by name of a folder
        self._kept: dict[int, Any] = {}
        self._look(root)
        self._kept = dict(self._now)

    @contextmanager
    def recording(self, after_each: Callable[[], None]) -> Iterator[None]:
        """Within, `after_each` is called before and after every call that changes the disk."""

        looking = False

        def look() -> None:
            nonlocal looking
            looking = True
            after_each()
            looking = False

        def sync(descriptor: int) -> None:
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            look()
            if not self._unsynced(path):
                self._look(path)
                number = self._number[os.fstat(descriptor).st_ino]
                self._kept[number] = self._now[number]
            look()

        def changing(function: Callable[..., Any], *, gone: bool = False) -> Callable[..., Any]:
            def call(path: Any, *args: Any, **kwargs: Any) -> Any:
                if looking:
                    return function(path, *args, **kwargs)
                if gone:
                    self._look(self._root)
                    self._number.pop(os.stat(path, dir_fd=kwargs.get("dir_fd"), follow_symlinks=False).st_ino, None)
                done = function(path, *args, **kwargs)
                look()
                return done

            return call

        calls: dict[str, Callable[..., Any]] = {
            "mkdir": changing(os.mkdir),
            "rename": changing(os.rename),
            "fsync": sync,
        }
        calls |= {name: changing(getattr(os, name), gone=True) for name in ("unlink", "rmdir")}
        with ExitStack() as stack:
            for name, call in calls.items():
                stack.enter_context(mock.patch.object(os, name, call))
            yield

    def after(self, choose: Choice) -> Tree:
        """The folder as a reader finds it, where `choose` says what is left of each file and of each name."""
        self._look(self._root)
        tree: Tree = self._tree(self._number[self._root.stat().st_ino], choose)
        return tree

    def _look(self, path: Path) -> None:
        """Learn what is there now."""
        found = path.stat()
        number = self._number.setdefault(found.st_ino, len(self._now))
        if stat.S_ISREG(found.st_mode):
            self._now[number] = path.read_bytes()
            return
        self._now.setdefault(number, {})
        names = {}
        for child in path.iterdir():
            self._look(child)
            names[child.name] = self._number[child.stat().st_ino]
        self._now[number] = names

    def _tree(self, number: int, choose: Choice) -> Any:
        now = self._now[number]
        if isinstance(now, bytes):
            return choose(self._kept.get(number, b""), now)
        kept: dict[str, int] = self._kept.get(number, {})
        names = {name: choose(kept.get(name), now.get(name)) for name in sorted(kept.keys() | now.keys())}
        return {name: self._tree(inner, choose) for name, inner in names.items() if inner is not None}


def killed(kept: Any, now: Any) -> Any:
    """The process is gone, the disk goes on."""
    return now


def dark(kept: Any, now: Any) -> Any:
    """The power is gone, and with it what was not synced."""
    return kept


def mixed(chance: random.Random) -> Choice:
    """Some of what was not synced has reached the disk; of a file perhaps its beginning."""

    def choose(kept: Any, now: Any) -> Any:
        if isinstance(now, bytes) and now != kept:
            return chance.choice([kept, now, now[: len(now) // 2]])
        return chance.choice([kept, now])

    return choose


def build(tree: Tree, folder: Path) -> None:
    """Make a folder of that content."""
    folder.mkdir()
    for name, inner in tree.items():
        if isinstance(inner, bytes):
            (folder / name).write_bytes(inner)
        else:
            build(inner, folder / name)
