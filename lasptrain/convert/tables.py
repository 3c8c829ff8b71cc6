"""Tables of rules in use: the tensors that one makes and takes, without holding more than a rule's in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from lasptrain.convert.files import TensorSpec
from lasptrain.convert.rules import Rule, Shapes
from lasptrain.errors import ConvertError


def check_sources(table: Sequence[Rule], names: Collection[str], where: str) -> None:
    """Raise ConvertError where the model's tensors are not exactly those that the table takes."""
    _compare({source for rule in table for source in rule.sources}, set(names), where)


def forms(table: Sequence[Rule], shapes: Shapes, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """Return shape and dtype of every tensor of the target, in the table's order."""
    found: dict[str, TensorSpec] = {}
    for rule in table:
        made = rule.to([torch.empty(shapes[source], device="meta") for source in rule.sources])
        kept = torch.float32 if rule.full_precision else dtype
        found |= {name: TensorSpec(tuple(y.shape), kept) for name, y in zip(rule.targets, made, strict=True)}
    return found


def export(
    table: Sequence[Rule], read: Callable[[str], Tensor], dtype: torch.dtype, where: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the target, with one rule in memory at a time. ConvertError for one that is not finite."""
    for rule in table:
        if rule.targets:
            made = rule.to([finite(read(source), source, where) for source in rule.sources])
            kept = torch.float32 if rule.full_precision else dtype
            yield from ((name, y.to(kept)) for name, y in zip(rule.targets, made, strict=True))


def finite(tensor: Tensor, name: str, where: str) -> Tensor:
    """Return `tensor`. ConvertError where an element is NaN or infinite."""
    if not tensor.numel() or all(math.isfinite(float(end)) for end in tensor.aminmax()):  # in no memory of its own
        return tensor
    bad = int((~torch.isfinite(tensor)).sum())
    raise ConvertError(
        f"{where}: {name}: {bad:,} of {tensor.numel():,} elements are NaN or infinite; expected finite weights"
    )


def check_targets(table: Sequence[Rule], shapes: Shapes, found: Shapes, where: str) -> None:
    """Raise ConvertError where a folder's tensors are not exactly those that the table makes, in name and shape."""
    expected = {name: form.shape for name, form in forms(table, shapes, torch.float32).items()}
    _compare(set(expected), set(found), where)
    for name, shape in expected.items():
        if found[name] != shape:
            raise ConvertError(f"{where}: {name} is {list(found[name])}; expected {list(shape)}")


def _compare(expected: set[str], found: set[str], where: str) -> None:
    problems = [
        f"{word} {', '.join(sorted(names)[:4])}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        for word, names in (("has no", expected - found), ("has unknown", found - expected))
        if names
    ]
    if problems:
        raise ConvertError(f"{where}: {'; '.join(problems)}")
