"""The nearest numbers that fit, for messages that refuse one."""

from collections.abc import Callable


def multiples(value: int, of: int) -> str:
    below = value // of * of
    return f"{below}, {below + of}" if below else str(of)


def nearest_fits(value: int, fits: Callable[[int], bool], largest: int | None = None) -> str:
    """Return the nearest numbers below and above `value` that fit, searched nearby only; empty if there are none."""
    reach = 1 << 16
    top = value + reach if largest is None else min(largest, value + reach)
    start = min(value, top)
    below = next((n for n in range(start, max(0, start - reach), -1) if fits(n)), None)
    above = next((n for n in range(value + 1, top + 1) if fits(n)), None)
    return ", ".join(str(n) for n in (below, above) if n is not None)
