"""A linear recurrence as five functions: what `lasptrain.parallel` needs of one, and all that it knows about it.

A recurrence keeps a state per head, and any run of tokens acts on the state that enters it as S ↦ M · S + U: U is the
state that the run makes of nothing, M its transition, linear and acting from the left. `decay_rule` is one such module.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeAlias

from torch import Tensor

Inputs: TypeAlias = tuple[Tensor | None, ...]


class Gates(NamedTuple):
    """Inputs of a recurrence that say how it forgets; None where it has none."""

    log_decay: Tensor | None = None  # [H], [B, T, H] or [B, T, H, K], −∞ to 0
    beta: Tensor | None = None  # [B, T, H], the share of what a key holds that a token replaces


def gates_of(rule: Recurrence, inputs: Inputs) -> Gates:
    """Return what signals of health report of the inputs: the rule's own `gates(inputs)`, nothing if it has none."""
    named = getattr(rule, "gates", None)
    return Gates() if named is None else Gates(*named(inputs))


class Recurrence(Protocol):
    """One linear recurrence: five functions over `inputs`, the tensors that decide what is written to the state.

    inputs[0] is k [B, T, H_k, K], inputs[1] v [B, T, H, V], H a multiple of H_k; the others belong to the recurrence.
    q has the shape of k; outputs, `do` and their like that of v; states and their gradients are [B, H, K, V], at least
    fp32; `doc_ids` as in `lasptrain.ops`.

    | argument | meaning |
    |---|---|
    | `kernel` | name of an implementation |
    | `wanted` | 0: nothing, 1: the state, 2: also `linear`. The others are undefined |
    | `linear` | M of the slice: [B, H] a number, [B, H, K] a number per row, [B, H, K, K] a matrix |
    | `blocks`, `dblocks` | states at edges inside the slice, for `attend` and `grad_inputs`; [] makes them there |
    | `kept`, `rest` | from `attend` to the gradients, and from `grad_query` to `grad_inputs` |

    The lists of the last two rows are private to the kernel. What is undefined has its shape all the same, and `attend`
    runs the same PyTorch operators with `blocks` and without: selective recomputation may keep results of theirs.

    A rule may have a sixth function, `gates(inputs) -> Gates`, for signals of health.
    """

    def summarize(
        self, kernel: str, inputs: Inputs, doc_ids: Tensor | None, wanted: int
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the final state of a slice that starts from zero, `linear` and `blocks`."""
        ...

    def attend(
        self,
        kernel: str,
        q: Tensor,
        inputs: Inputs,
        doc_ids: Tensor | None,
        initial_state: Tensor | None,
        blocks: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the output [B, T, H, V] in the dtype of v, and `kept`."""
        ...

    def grad_initial_state(
        self,
        kernel: str,
        q: Tensor,
        do: Tensor,
        inputs: Inputs,
        doc_ids: Tensor | None,
        kept: list[Tensor],
        wanted: int,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the gradient of the initial state from this slice's outputs alone, `linear` and `dblocks`.

        `linear` is that of the slice, as `summarize` returns it; not transposed.
        """
        ...

    def grad_query(
        self, kernel: str, q: Tensor, inputs: Inputs, do: Tensor, doc_ids: Tensor | None, kept: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return dq and `rest`."""
        ...

    def grad_inputs(
        self,
        kernel: str,
        q: Tensor,
        inputs: Inputs,
        do: Tensor,
        doc_ids: Tensor | None,
        dfinal: Tensor | None,
        dblocks: list[Tensor],
        kept: list[Tensor],
        rest: list[Tensor],
    ) -> Inputs:
        """Return a gradient for each input; None where it has none."""
        ...
