"""Words in what is printed."""


def times(count: int, word: str, plural: str = "s") -> str:
    """Return the count and its noun, such as `1 window` or `2 windows`; `plural`: what more than one add to it."""
    return f"{count:,} {word}{plural if count != 1 else ''}"
