"""torch.compile takes the operators of `lasptrain.ops` as they are: no graph break, same results."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lasptrain import ops
from tests.kernel_cases import Case, Inputs, backward, error, inputs


def everything(x: Inputs) -> tuple[Tensor, ...]:
    """All five operators, on the plain PyTorch kernel."""
    kernel = "chunked"
    state, blocks = ops.summarize(kernel, x.k, x.v, x.log_decay, x.doc)
    o, prefix = ops.attend(kernel, x.q, x.k, x.v, x.log_decay, x.doc, x.entering, blocks)
    dentering, dblocks = ops.grad_entering(kernel, x.q, x.do, x.log_decay, x.doc)
    dq, row = ops.grad_query(kernel, x.q, x.k, x.v, x.do, x.log_decay, x.doc, prefix)
    rest = ops.grad_key_value(kernel, x.q, x.k, x.v, x.do, x.log_decay, x.doc, x.dleaving, dblocks, prefix, row)
    return state, o, dentering, dq, *rest


@pytest.mark.parametrize("decay", ["none", "head", "token"])
def test_no_graph_break(decay: str) -> None:
    from lasptrain.ops import chunked

    x = inputs(Case(70, 32, 16, decay, (5,)), torch.float32, torch.device("cpu"))
    found = torch.compile(everything, backend="aot_eager", fullgraph=True)(x)
    want = backward(chunked, x)
    for name, got in zip(want, found, strict=False):
        assert error(got, want[name]) < 1e-6, name
