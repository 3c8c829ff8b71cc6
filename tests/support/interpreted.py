"""Tests of Triton programs in Triton's interpreter, in a pytest of their own: Triton reads TRITON_INTERPRET when a
program is decorated.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs inside test_in_the_interpreter")


def interpreted(file: str, expression: str) -> str:
    """What pytest prints of those tests of a file that the expression names; they have to pass."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", expression],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def with_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter round to bf16 as a GPU does, and multiply matrices of it, which it holds as integers."""
    from triton.runtime import interpreter

    of = interpreter.tl
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounded(x: Any, dtype: Any, into: Any, mode: Any) -> Any:
        if (dtype, into) != (of.float32, of.bfloat16):
            return convert(x, dtype, into, mode)
        return torch.from_numpy(np.ascontiguousarray(x)).bfloat16().view(torch.int16).numpy().view(np.uint16)

    def exact(x: Any) -> Any:
        if x.dtype.scalar != of.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), of.float32)

    def product(builder: Any, x: Any, y: Any, *others: Any) -> Any:
        return dot(builder, exact(x), exact(y), *others)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", product)
