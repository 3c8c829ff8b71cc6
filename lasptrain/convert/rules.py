"""Rules of names and numbers: what turns our tensors into a target's, and back. Torch is imported when a rule is used.

A table is a list of rules. Every tensor of ours and of the target is in exactly one rule, so a missing or extra one is
an error on either side, and shapes follow from running the same rules on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lasptrain.errors import ConvertError

if TYPE_CHECKING:
    from torch import Tensor

    Forward = Callable[[list[Tensor]], list[Tensor]]
    Backward = Callable[[list[Tensor], list[tuple[int, ...]]], list[Tensor]]

Shapes = Mapping[str, tuple[int, ...]]

NO_DECAY = -30.0  # ln of a slope that stands for zero: decay a = 1 to 1e-13


@dataclass(frozen=True)
class Rule:
    """`to` makes `targets` from our `sources`; `back` makes our tensors from the target's and our shapes.

    `full_precision`: stays fp32 whatever the dtype of the export.
    """

    targets: tuple[str, ...]
    sources: tuple[str, ...]
    to: Forward
    back: Backward
    full_precision: bool = False


def rows(target: str, *sources: str, full_precision: bool = False) -> Rule:
    """Concatenate the rows of the sources; one source stays as it is."""

    def to(xs: list[Tensor]) -> list[Tensor]:
        import torch

        return [torch.cat(xs) if len(xs) > 1 else xs[0]]

    def back(ys: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
        return list(ys[0].split([shape[0] for shape in shapes]))

    return Rule((target,), sources, to, back, full_precision)


def rows_above_zeros(target: str, sources: Sequence[str], count: int) -> Rule:
    """Concatenate the rows of the sources and `count` rows of zeros, which stand for a decay without its token."""

    def to(xs: list[Tensor]) -> list[Tensor]:
        import torch

        return [torch.cat([*xs, xs[0].new_zeros(count, xs[0].shape[1])])]

    def back(ys: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
        parts = list(ys[0].split([*(shape[0] for shape in shapes), count]))
        rest = parts.pop()
        if not rest.is_meta and rest.any():
            raise ConvertError(f"{target}: the decay depends on the token, that of the recipe does not")
        return parts

    return Rule((target,), tuple(sources), to, back)


def rows_by_head(target: str, sources: Sequence[str], heads: int) -> Rule:
    """Interleave the sources' rows [H·K, D] by head: all sources of head 0, then all of head 1, and so on."""

    def to(xs: list[Tensor]) -> list[Tensor]:
        import torch

        return [torch.stack([x.unflatten(0, (heads, -1)) for x in xs], 1).flatten(0, 2)]

    def back(ys: list[Tensor], _: list[tuple[int, ...]]) -> list[Tensor]:
        return [y.flatten(0, 1) for y in ys[0].unflatten(0, (heads, len(sources), -1)).unbind(1)]

    return Rule((target,), tuple(sources), to, back)


def halves(*targets: str, source: str, dim: int, factor: float = 1.0) -> Rule:
    """Split the rows (dim 0) or columns (1) in halves, multiplied by `factor`; powers of two are exact."""

    def back(ys: list[Tensor], _: list[tuple[int, ...]]) -> list[Tensor]:
        import torch

        return [torch.cat(ys, dim) / factor]

    return Rule(targets, (source,), lambda xs: [x * factor for x in xs[0].chunk(2, dim)], back)


def shaped(target: str, source: str, shape: Sequence[int], full_precision: bool = False) -> Rule:
    """Reshape the source."""
    return Rule(
        (target,),
        (source,),
        lambda xs: [xs[0].reshape(shape)],
        lambda ys, shapes: [ys[0].reshape(shapes[0])],
        full_precision,
    )


def convolutions(targets: Sequence[str], source: str, channels: Sequence[int]) -> Rule:
    """Split a convolution [C, n] into several of these channels, each [c, 1, n]."""

    def back(ys: list[Tensor], _: list[tuple[int, ...]]) -> list[Tensor]:
        import torch

        return [torch.cat(ys).squeeze(1)]

    return Rule(tuple(targets), (source,), lambda xs: [x.unsqueeze(1) for x in xs[0].split(list(channels))], back)


def copies(target: str, other: str, source: str) -> Rule:
    """Write a source twice; what comes back must be equal."""

    def back(ys: list[Tensor], _: list[tuple[int, ...]]) -> list[Tensor]:
        import torch

        if not ys[0].is_meta and not torch.equal(*ys):
            raise ConvertError(f"{target} and {other} differ; our model has one tensor for both")
        return [ys[0]]

    return Rule((target, other), (source,), lambda xs: [xs[0], xs[0]], back)


def fixed(target: str, value: Callable[[], Tensor], full_precision: bool = False) -> Rule:
    """Make a tensor of the target that is the same for every model."""

    def back(ys: list[Tensor], _: list[tuple[int, ...]]) -> list[Tensor]:
        import torch

        if not ys[0].is_meta and not torch.equal(ys[0].float(), value()):
            raise ConvertError(f"{target}: holds other numbers than our model has there; it cannot be expressed")
        return []

    return Rule((target,), (), lambda _: [value()], back, full_precision)


def constant(target: str, shape: Sequence[int], number: float, full_precision: bool = False) -> Rule:
    """Make a tensor of the target that holds one number."""

    def value() -> Tensor:
        import torch

        return torch.full(tuple(shape), number)

    return fixed(target, value, full_precision)


def logarithm(target: str, slope: str) -> Rule:
    """Take ln of the slopes; zero becomes NO_DECAY. `back` is inexact, so an export records its slopes as numbers."""
    return Rule(
        (target,),
        (slope,),
        lambda xs: [xs[0].log().where(xs[0] > 0, NO_DECAY)],
        lambda ys, _: [ys[0].exp().where(ys[0] > NO_DECAY, 0.0)],
        full_precision=True,
    )


def implied(slope: str) -> Rule:
    """Leave out slopes that the target computes from its configuration."""

    def back(_: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
        import torch

        return [torch.empty(shapes[0])]

    return Rule((), (slope,), lambda _: [], back)


def renamed(names: Mapping[str, str], prefix: str, own: str) -> list[Rule]:
    """Rename tensors of a layer: the target's names, each with ours, behind the prefixes `prefix` and `own`."""
    return [rows(f"{prefix}{target}", f"{own}{source}") for target, source in names.items()]


def ends(embedding: str, norm: str | None, *, tie: bool) -> list[Rule]:
    """Rename the embedding, the last norm, and the head unless it is tied."""
    table = [rows(embedding, "embed.weight")]
    table += [rows(norm, "norm.weight")] if norm else []
    return table if tie else [*table, rows("lm_head.weight", "head.weight")]
