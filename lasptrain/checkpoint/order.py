"""The tokens that a checkpoint's meta says its model has seen: `order`, the windows of its own steps, of one length or
of several in stages, and `before`, those of the runs that it began with.
"""

from pathlib import Path

from lasptrain.checkpoint.table import Json
from lasptrain.run import origin


def window(meta: Json) -> int:
    """Return the tokens of a window, of the longest in stages: those that the model's decays are for."""
    found: int = meta["order"]["window"] if "window" in meta["order"] else meta["recipe"]["data"]["window"]
    return found


def tokens(meta: Json, step: int) -> dict[int, int]:
    """Return the tokens that `step` steps have read, by the length of their windows, in the order of stages."""
    order = meta["order"]
    stages = order["stages"] if "stages" in order else {"0": order | {"steps": step}}
    found: dict[int, int] = {}
    for stage in stages.values():  # the last one has not ended
        steps = min(step, stage["steps"])
        step -= steps
        found[stage["window"]] = found.get(stage["window"], 0) + steps * stage["batch"] * stage["window"]
    return found


def before(run: Path, meta: Json) -> int | None:
    """Return the tokens that the runs before have read; None where a run began with another and they were not kept."""
    if "before" in meta:
        found: int | None = meta["before"]
        return found
    return None if origin.read(run) else 0
