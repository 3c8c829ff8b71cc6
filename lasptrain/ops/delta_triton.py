"""The delta rule with a decay per head and token in Triton, for GPUs: its two halves as one kernel.

Signatures and shapes: `lasptrain.ops.delta_rule`.
"""

from importlib import import_module
from typing import Any

from lasptrain.ops.delta_triton_forward import attend, blocks_like, kept_like, summarize

__all__ = ["attend", "blocks_like", "kept_like", "summarize"]


def __getattr__(name: str) -> Any:
    """Return a function of the backward half."""
    return getattr(import_module("lasptrain.ops.delta_triton_back"), name)
