"""Base of every section of a recipe, and the types of its values."""

from collections.abc import Iterator
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field

LARGEST = 2**48  # larger counts are typos; products of two still fit what has to hold them

Count = Annotated[int, Field(ge=1, le=LARGEST)]
Few = Annotated[int, Field(ge=1, le=4096)]  # layers, heads: of which there are lists
Index = Annotated[int, Field(ge=0, le=LARGEST)]
Eps = Annotated[float, Field(gt=0, le=0.01)]  # inside of the root of a norm
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f]+$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]

Problem = tuple[str, str]
"""A key such as `data.window`, and what is wrong with it."""


T = TypeVar("T")


def optional(default: T, meaning: str) -> T:
    """A key that may be left out: its default, and its meaning as `lasptrain recipe keys` has it."""
    return Field(default, description=meaning)


def as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, no conversions (`true` is not 1, `"1"` is not 1), finite."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    def problems(self) -> Iterator[Problem]:
        """Yield keys of this section that do not fit each other."""
        yield from ()
