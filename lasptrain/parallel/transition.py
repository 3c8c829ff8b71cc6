"""The effect of a run of tokens on the state that enters it: maps that apply, compose and transpose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Transition(NamedTuple):
    """A linear map of states [B, H, K, V] from the left: S ↦ linear · (S turned by `angle`, moved up by `rows`).

    Where keys are rotated, the origin moves to the end of the run: the first half of the key rows are cosine features,
    the second half sine features (LRPE, arXiv:2307.14995). Angle and rows are the same on every rank and go only with a
    number per head, which commutes with them.
    """

    linear: Tensor | None  # [B, H] numbers, [B, H, K] a number per row, [B, H, K, K] matrices; None: nothing is left
    angle: Tensor | None = None  # [H, K/2] radians
    rows: int = 0  # by which the state moves up along K, with zeros moving in; down where negative

    @property
    def forgets(self) -> bool:
        """True if nothing is left of any state, so that the result need not wait for it."""
        return self.linear is None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that differ from rank to rank; `like` takes those of another rank."""
        return () if self.linear is None else (self.linear,)

    def like(self, tensors: Sequence[Tensor]) -> Transition:
        """Return the transition of another rank from its `tensors`."""
        return self._replace(linear=tensors[0]) if tensors else self

    def apply(self, state: Tensor | None, plus: Tensor) -> Tensor:
        """Return transition · state + plus; a state of None is zero."""
        if state is None or self.linear is None:
            return plus
        state = self._moved(self.rotate(state))
        match self.linear.dim():
            case 2:
                return torch.addcmul(plus, self.linear[..., None, None], state)
            case 3:
                return torch.addcmul(plus, self.linear[..., None], state)
            case _:
                return torch.add(plus, _product(self.linear, state))

    def transpose(self) -> Transition:
        """Return the map that gradients of states take, against the direction of the states."""
        linear = self.linear.mT if self.linear is not None and self.linear.dim() == 4 else self.linear
        return Transition(linear, None if self.angle is None else -self.angle, -self.rows)

    def after(self, first: Transition) -> Transition:
        """Return the map of a run of tokens and the run `first` before it."""
        if self.linear is None or first.linear is None:
            return FORGET
        angles = [one.angle for one in (self, first) if one.angle is not None]
        angle = torch.stack(angles).sum(0) if angles else None
        return Transition(_composed(self.linear, first.linear), angle, self.rows + first.rows)

    def rotate(self, state: Tensor) -> Tensor:
        """Return the state [B, H, K, V] seen from an origin that lies `angle` further on."""
        if self.angle is None:
            return state
        cos, sin = (f(self.angle).to(state.dtype)[..., None] for f in (torch.cos, torch.sin))
        by_cos, by_sin = state.chunk(2, dim=-2)
        return torch.cat([cos * by_cos + sin * by_sin, cos * by_sin - sin * by_cos], dim=-2)

    def _moved(self, state: Tensor) -> Tensor:
        return F.pad(state, [0, 0, -self.rows, self.rows]) if self.rows else state


FORGET = Transition(None)


def _composed(second: Tensor, first: Tensor) -> Tensor:
    """Return second · first, as large as the larger of the two."""
    if second.dim() == first.dim() == 4:
        return _product(second, first)
    if second.dim() == 4:
        return second * (first[..., None, None] if first.dim() == 2 else first[..., None, :])
    return second[(..., *[None] * (first.dim() - second.dim()))] * first[(..., *[None] * (second.dim() - first.dim()))]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a · b in the dtype of b, exact to its rounding.

    In fp64, because tf32, which a user may have allowed for products, would cost three digits at every rank.
    """
    return (a.double() @ b.double()).to(b.dtype)
