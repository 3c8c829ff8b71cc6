"""The `order` of a checkpoint's meta: which windows its steps have read, of one length, or of several in stages."""

from lasptrain.checkpoint.table import Json


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
