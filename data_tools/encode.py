"""Encoding in a worker process of `prepare`; a module of its own, so that workers import little."""

from __future__ import annotations

import multiprocessing.context
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_tools.sources import Piece
from data_tools.tokenizer import Tokenizer, load_tokenizer
from lasptrain.errors import DataError

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # some: not on Windows
ASKING = [signal.Signals[name] for name in NAMES if hasattr(signal, name)]  # signals that ask a program to end


def server() -> multiprocessing.context.ForkServerContext:
    """Start the process that forks workers; it imports once, whatever this process has done. None of them hears ASKING:
    these signals are this process's to answer, also while the others start.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "data_tools.encode"])
    resource_tracker.ensure_running()  # which would unblock signals
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return context


def end_with_parent() -> None:
    """End this worker with its parent only: when that is killed, as it would wait for its next unit for ever.

    A signal to all processes of a group is the parent's to answer: a worker that it ends while it sends ids leaves the
    parent waiting for their rest.
    """
    parent = multiprocessing.parent_process()
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        if parent:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Hear signals at the end of this context only: a worker that is being started would end in a traceback."""
    if threading.current_thread() is not threading.main_thread():  # which alone hears them
        yield
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    before = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in before:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


@lru_cache(maxsize=1)
def _tokenizer(spec: str | Path) -> Tokenizer:
    return load_tokenizer(spec)


def encode(tokenizer_path: str | Path, unit: list[Piece]) -> list[npt.NDArray[np.uint32]]:
    """Encode each piece, without BOS: uint32 [tokens]. Raises DataError for BOS or an id outside of the vocabulary."""
    tokenizer = _tokenizer(tokenizer_path)
    encoded: list[npt.NDArray[np.uint32]] = []
    for piece in unit:
        ids = np.asarray(tokenizer.encode(piece.text), np.uint32)
        wrong = np.flatnonzero((ids == tokenizer.bos) | (ids >= tokenizer.vocab_size))
        if wrong.size:
            raise DataError(
                f"{piece.place}: token {ids[wrong[0]]} at {wrong[0]}: BOS inside of a document, or outside of "
                f"the vocabulary of {tokenizer.vocab_size}"
            )
        encoded.append(ids)
    return encoded
