"""Inputs of a window that a rival keeps between `begin` and `finish`, and those that it refuses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lasptrain.errors import SetupError
from lasptrain.ops import decay_rule
from lasptrain.ops.recurrence import Inputs, Recurrence
from lasptrain.parallel.recurrence import SavedStates


class Pending(NamedTuple):
    """Tensors that a method keeps between `begin` and `finish`."""

    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    angle: Tensor | None


def whole_windows(name: str, doc_ids: Tensor | None, carry: Tensor | None, output_final_state: bool) -> None:
    """Raise SetupError for anything but a window in one segment and without documents."""
    if doc_ids is not None or carry is not None or output_final_state:
        raise SetupError(f"{name}: takes neither documents nor segments; set data.reset_at_documents=false")


def begun(
    name: str,
    inputs: Inputs,
    doc_ids: Tensor | None,
    *,
    rule: Recurrence = decay_rule,
    angle: Tensor | None = None,
    carry: Tensor | None = None,
    saved: SavedStates | None = None,
    output_final_state: bool = False,
) -> Pending:
    """Keep inputs of the decay rule and angle: the arguments of `ShardedRecurrence.begin`.

    Raises SetupError for anything but the decay rule over a window in one segment and without documents.
    """
    if rule is not decay_rule:
        raise SetupError(f"{name}: takes linear attention with a decay per head alone")
    whole_windows(name, doc_ids, carry, output_final_state)
    k, v, log_decay = inputs
    assert k is not None and v is not None
    return Pending(k, v, log_decay, angle)


def rotated(x: Tensor, angle: Tensor | None, slices: int) -> Tensor:
    """Rotate features [B, T, H, K], cosine then sine half, as if positions began `slices` slices further left; a slice
    turns by `angle` [H, K/2] radians, None for no rotation.
    """
    if angle is None or slices == 0:
        return x
    phase = angle * slices
    cos, sin = phase.cos().to(x.dtype), phase.sin().to(x.dtype)
    by_cos, by_sin = x.chunk(2, dim=-1)
    return torch.cat([by_cos * cos - by_sin * sin, by_sin * cos + by_cos * sin], dim=-1)
