"""Treatment of steps whose loss or gradient is not one to learn from: the recipe's `guard`. No torch.

A step that is left out changes no weight and still counts, so that data stays a function of the step.
"""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any, Literal

from lasptrain.recipe.sections import Guard as Policy

Verdict = Literal["accept", "warn", "skip", "rollback", "stop"]

LATELY = 64  # norms, against whose median a spike is measured
ENOUGH = 16  # norms seen before anything is called a spike


class Guard:
    """Judge of steps, in order; all ranks reach the same verdict, because loss and norm are the same on all."""

    def __init__(self, policy: Policy | None = None) -> None:
        self._policy = policy or Policy()
        self._norms: list[float] = []
        self._left_out = 0  # steps in a row
        self.verdict: Verdict = "accept"
        self.reason = ""
        self.advice = ""

    def judge(self, loss: float, norm: float) -> Verdict:
        """Return the verdict on a step of this loss and gradient norm.

        If it is not `accept`, `reason` says why, and `advice` which setting would have let training go on.
        """
        self.verdict, self.reason, self.advice = self._judge(loss, norm)
        if self.verdict in ("skip", "rollback"):
            self._left_out += 1
            if self._left_out > self._policy.limit:
                self.reason += f", and the {self._policy.limit} steps before were left out (guard.limit)"
                self.verdict, self.advice = "stop", f"guard.limit={2 * self._policy.limit}"
        elif self.verdict != "stop":
            self._left_out = 0
            if self._policy.spike != "ignore":
                self._norms = [*self._norms, norm][-LATELY:]
        return self.verdict

    def _judge(self, loss: float, norm: float) -> tuple[Verdict, str, str]:
        policy = self._policy
        if not (math.isfinite(loss) and math.isfinite(norm)):
            reason = f"loss {loss}, gradient norm {norm}; expected finite numbers"
            return policy.nonfinite, reason, "guard.nonfinite=skip"
        if policy.spike != "ignore" and len(self._norms) >= ENOUGH:
            usual = median(self._norms)
            if norm > policy.factor * usual:
                reason = f"gradient norm {norm:.3g}, {norm / usual:.0f} times the usual {usual:.3g}"
                return policy.spike, reason, "guard.spike=skip"
        return "accept", "", ""

    def state(self) -> dict[str, Any]:
        """Return the part of the past that later verdicts depend on, as JSON."""
        return {"norms": self._norms, "left_out": self._left_out}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `state`."""
        norms: Sequence[float] = state.get("norms", ())
        self._norms, self._left_out = [float(norm) for norm in norms][-LATELY:], int(state.get("left_out", 0))
