"""Shapes of what a recurrence is given: compared in plain Python, since this runs for every layer of every segment."""

from __future__ import annotations

from torch import Tensor

from lasptrain.ops.recurrence import Inputs


def check_slice(inputs: Inputs, doc_ids: Tensor | None, angle: Tensor | None, carry: Tensor | None) -> None:
    """Raise ValueError for arguments of `ShardedRecurrence.begin` whose shapes do not fit each other."""
    k, v, *others = inputs
    if k is None or k.dim() != 4 or v is None or v.dim() != 4:
        raise ValueError(f"k, v: expected [B, T, H_k, K] and [B, T, H, V], found {_found(k)} and {_found(v)}")
    b, t, key_heads, key_dim = k.shape
    batch, tokens, heads, value_dim = v.shape
    if batch != b or tokens != t or heads % key_heads:
        raise ValueError(f"v: expected [{b}, {t}, a multiple of {key_heads}, V] beside k, found {_found(v)}")
    for index, x in enumerate(others, 2):
        if x is not None and x.shape != (heads,) and x.shape[:3] != (b, t, heads):
            raise ValueError(f"inputs[{index}]: expected [{heads}] or [{b}, {t}, {heads}, …], found {_found(x)}")
    if doc_ids is not None:
        check("doc_ids", doc_ids, (b, t))
    if angle is not None and angle.shape != (1, key_dim // 2):
        check("angle", angle, (heads, key_dim // 2))
    if carry is not None:
        check("carry", carry, (b, heads, key_dim, value_dim))


def check_query(q: Tensor, inputs: Inputs) -> None:
    """Raise ValueError if q does not have the shape of the key among the inputs."""
    k = inputs[0]
    assert k is not None
    check("q", q, k.shape)


def check(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError if x does not have this shape."""
    if x.shape != shape:
        raise ValueError(f"{name}: expected {list(shape)}, found {_found(x)}")


def _found(x: Tensor | None) -> str:
    return "None" if x is None else str(list(x.shape))
