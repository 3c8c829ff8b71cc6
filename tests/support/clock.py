"""A clock for what takes one as an argument: how late it is is said, not waited for."""

from __future__ import annotations


class Clock:
    """Tells `seconds`, which go on by `tick` before every look at it, and else when they are set."""

    def __init__(self, seconds: float = 0.0, tick: float = 0.0) -> None:
        self.seconds, self._tick = seconds, tick

    def __call__(self) -> float:
        self.seconds += self._tick
        return self.seconds
