"""A Hub of datasets on this machine: a client sees what it would see of the real one, as far as it asks."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NAME = "me/set"

Files = dict[str, bytes]


class FakeHub(ThreadingHTTPServer):
    """A server of one dataset, with the files of each commit; `main` is the newest. `asked` has what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commits: dict[str, Files] = {}
        self.main = ""
        self.asked: list[str] = []

    def commit(self, files: Files) -> str:
        """Make these files the newest commit and return its name."""
        self.main = hashlib.sha1(repr(files).encode(), usedforsecurity=False).hexdigest()
        self.commits[self.main] = files
        return self.main

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving() -> Iterator[FakeHub]:
    """Serve until the end of the block."""
    with FakeHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        match path.strip("/").split("/"):
            case ["api", "datasets", "me", "set", "revision", name] if files := self._files(name):
                self._send(json.dumps({"id": NAME, "sha": self._commit(name), "siblings": []}).encode())
            case ["api", "datasets", "me", "set", "tree", name] if files := self._files(name):
                self._send(json.dumps([_entry(file, content) for file, content in files.items()]).encode())
            case ["datasets", "me", "set", "resolve", name, file] if files := self._files(name):
                if file in files:
                    tag = f'"{_digest(files[file])}"'
                    self._send(files[file], {"X-Repo-Commit": self._commit(name), "ETag": tag})
                else:
                    self._refuse("EntryNotFound")
            case ["api", "datasets", "me", "set", "tree", name, *_] if self._files(name):
                self._refuse("EntryNotFound")
            case [_, "me", "set", *_] | [_, _, "me", "set", *_]:
                self._refuse("RevisionNotFound")
            case _:
                self._refuse("RepoNotFound")

    do_HEAD = do_GET

    def _commit(self, name: str) -> str:
        return self.server.main if name == "main" else name

    def _files(self, name: str) -> Files | None:
        return self.server.commits.get(self._commit(name))

    def _refuse(self, what: str) -> None:
        self._send(b"", {"X-Error-Code": what}, 404)

    def _send(self, content: bytes, headers: dict[str, str] | None = None, code: int = 200) -> None:
        self.send_response(code)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def _entry(file: str, content: bytes) -> dict[str, str | int]:
    return {"type": "file", "path": file, "size": len(content), "oid": _digest(content)}


def _digest(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
