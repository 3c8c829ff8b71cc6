"""Softmax attention as an ingredient of any architecture: its checks and costs, from the keys of the base."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic_core import PydanticCustomError

from lasptrain.architectures.nearest import nearest_fits
from lasptrain.architectures.section import Problem
from lasptrain.console.tables import figures

if TYPE_CHECKING:
    from lasptrain.architectures.base import Architecture, Recompute

EVERY = re.compile(r"every (\d{1,6})(?:st|nd|rd|th)")


def spelled_out(value: object, layers: Any) -> object:
    """Return the indices that `every 4th` means among `layers` layers; a list as a tuple, anything else as it is.

    Raises PydanticCustomError where the layers do not divide.
    """
    if isinstance(value, list):
        return tuple(value)
    found = EVERY.fullmatch(value) if isinstance(value, str) else None
    if found is None or not isinstance(layers, int):
        return value
    step = int(found[1])
    if not step or layers % step:
        fits = nearest_fits(step, lambda n: layers % n == 0, layers)
        raise PydanticCustomError("every", f"a step that divides model.layers = {layers}; nearest: {fits}")
    return tuple(range(step - 1, layers, step))


def problems(model: Architecture) -> Iterator[Problem]:
    """Yield keys of softmax layers that do not fit each other, or have no such layer."""
    if not model.softmax:
        given = model.model_fields_set
        for key in ("kv_heads", "sliding_window", "softmax_heads", "softmax_dim"):
            if (found := getattr(model, key)) is not None and key in given:
                yield f"model.{key}", f"found {found} without model.softmax; name its layers, or leave it out"
        return
    if model.softmax_norm == "after" and model.residual is not None:
        found = "found 'after' where the residual carries the normalised value"
        yield "model.softmax_norm", f"{found}; expected before"
    heads, key = model.query_heads, "softmax_heads" if model.softmax_heads else "heads"
    if model.softmax_dim is None and model.dim % heads:
        nearest = nearest_fits(heads, lambda n: model.dim % n == 0)
        yield f"model.{key}", f"{heads} softmax heads do not divide model.dim = {model.dim}; nearest: {nearest}"
    elif model.rotary is not None and (odd := model.rotated) % 2:
        found = f"{odd} channels of a head do not make pairs to rotate"
        yield "model.rotary", f"{found}; expected null, or another model.{'softmax_dim' if model.softmax_dim else key}"
    if model.kv_heads and heads % model.kv_heads:
        nearest = nearest_fits(model.kv_heads, lambda n: heads % n == 0)
        yield "model.kv_heads", f"{model.kv_heads} do not divide model.{key} = {heads}; nearest: {nearest}"


def description(model: Architecture) -> str:
    """Return what the layers are, in a line."""
    seen = "all tokens before" if model.sliding_window is None else f"the last {model.sliding_window:,} tokens"
    turned = "no positions" if model.rotary is None else f"rotary positions of base {figures(model.rotary, 6)}"
    more = [f"on {model.rotated} of {model.head_dim} channels"] if model.rotary and model.rotary_fraction < 1 else []
    more += [f"q and k normed per {model.qk_norm}"] if model.qk_norm != "none" else []
    more += ["an output gate"] * model.softmax_gate + ["norms after"] * (model.softmax_norm == "after")
    heads = f"{model.kv_heads or model.query_heads} key heads"
    return f"layers {', '.join(map(str, model.softmax))}: {heads}, over {seen}, {', '.join([turned, *more])}"


def parameters(model: Architecture) -> dict[str, int]:
    """Return a layer's parameters: matrices as `softmax`, norms of q and k as `norms`."""
    wide, narrow = model.query_channels, model.key_channels
    matrices = model.dim * (2 * wide + 2 * narrow + wide * model.softmax_gate)
    norms = {"none": 0, "head": 2 * model.head_dim, "whole": wide + narrow}[model.qk_norm]
    return {"softmax": matrices} | ({"norms": norms} if norms else {})


def flops(model: Architecture, window: int) -> int:
    """Return the FLOPs per token of scores and sums over a window of one document: 2 each per channel and key seen."""
    reach = min(model.sliding_window or window, window)
    seen = reach - reach * (reach - 1) // (2 * window)  # on average: the first tokens see fewer
    return 4 * model.query_channels * seen


def kept(model: Architecture, recompute: Recompute, compiled: bool) -> int:
    """Return the numbers per token that a layer keeps for its backward: q, its rotation, o, and keys and values as
    made, as rows, joined with those before, and rotated.
    """
    wide, narrow = model.query_channels, model.key_channels
    more = wide * model.softmax_gate + (wide + narrow) * (model.qk_norm != "none")
    match recompute:
        case "none":
            return 3 * wide + 8 * narrow + more + (0 if compiled else 2 * (wide + narrow))
        case "selective":
            return wide + 2 * narrow + wide * model.softmax_gate
        case _:
            return 0
