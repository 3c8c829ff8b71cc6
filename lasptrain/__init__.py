"""Pretrain linear-attention language models on sequences of millions of tokens.

For programs with models of their own: `linear_attention` and `delta_rule` on one device, `ShardedRecurrence` over
ranks. They are imported on first use, because most commands need no torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_FOUND_IN = {
    "linear_attention": "lasptrain.parallel.functional",
    "delta_rule": "lasptrain.parallel.functional",
    "ShardedRecurrence": "lasptrain.parallel.recurrence",
}


def __getattr__(name: str) -> Any:
    if name not in _FOUND_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_FOUND_IN[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_FOUND_IN]
