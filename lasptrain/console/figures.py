"""Figures drawn by matplotlib, which is optional."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lasptrain.errors import SetupError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure_class() -> type[Figure]:
    """Return matplotlib's Figure; SetupError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SetupError("--plot: matplotlib is not installed; expected it, pip install 'lasptrain[plot]'") from None
    return Figure
