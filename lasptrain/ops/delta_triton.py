"""The delta rule with a decay per head and token in Triton, for GPUs: its two halves as one kernel.

Signatures and shapes: `lasptrain.ops.delta_rule`.
"""

from lasptrain.ops.delta_triton_back import dblocks_like, grad_initial_state, grad_inputs, grad_query, rest_like
from lasptrain.ops.delta_triton_forward import attend, blocks_like, kept_like, summarize

__all__ = [
    "attend",
    "blocks_like",
    "dblocks_like",
    "grad_initial_state",
    "grad_inputs",
    "grad_query",
    "kept_like",
    "rest_like",
    "summarize",
]
