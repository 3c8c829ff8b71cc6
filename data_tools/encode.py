"""Encoding in a worker process of `prepare`; a module of its own, so that workers import little."""

from __future__ import annotations

import multiprocessing
import os
import threading
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_tools.sources import Piece
from data_tools.tokenizer import Tokenizer, load_tokenizer
from lasptrain.errors import DataError


def end_with_parent() -> None:
    """End this worker when its parent is killed; it would wait for its next unit for ever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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
