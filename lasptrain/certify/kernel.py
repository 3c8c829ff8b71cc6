"""Every kernel is the recurrence: outputs and gradients on the recipe's own tensors against the definition in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasptrain.certify.check import Check, Error, judge, not_run, of_parameters
from lasptrain.certify.layout import places_of
from lasptrain.certify.measured import opened
from lasptrain.certify.text import Held, planted, windows_of
from lasptrain.certify.trial import Trial
from lasptrain.ops import decay_rule
from lasptrain.ops.recurrence import Inputs, Recurrence
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.parallel.shard import reshard
from lasptrain.recipe.schema import Recipe
from lasptrain.training.job import Job

NAME, DEFINITION = "kernel", "token by token, fp64"
TOKENS = 200  # several chunks, and no whole number of them; a shorter slice is repeated
LAYERS = 4
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2}
NAMES = {3: ("k", "v", "log_decay"), 4: ("k", "v", "beta", "log_decay")}  # by number of inputs


@dataclass
class Call:
    """The inputs that a layer gave the recurrence, for one window."""

    layer: int
    rule: Recurrence
    inputs: Inputs
    doc_ids: Tensor | None
    angle: Tensor | None
    q: Tensor | None = None


def check(trial: Trial) -> list[Check]:
    """Compare the recurrences of the first layers, in the recipe's precision and exactly. Collective."""
    recipes = dict.fromkeys([trial.recipe.train.precision, trial.strict])
    return [one for precision in recipes for one in _check(trial.recipe.replace(train={"precision": precision}))]


def _check(recipe: Recipe) -> list[Check]:
    if not recipe.model.mixers:
        return [not_run(NAME, "outputs and gradients", DEFINITION, "no layer of the model is a recurrence")]
    with opened(recipe) as job:
        kernel = job.model.attention.kernel
        if kernel == "reference":
            return [not_run(NAME, "outputs and gradients", DEFINITION, "train.kernel: reference is the definition")]
        calls = _calls(job)
    found = [_compared(call, kernel) for call in calls[:LAYERS]]
    worst = max(found, key=lambda error: error.size)
    first = calls[0]
    k, v = first.inputs[:2]
    assert k is not None and v is not None
    tolerance = TOLERANCES[v.dtype]
    shapes = f"{len(found)} layers, {k.shape[1]} tokens, {v.shape[2]} heads, K {k.shape[3]}, V {v.shape[3]}"
    about = f"outputs and gradients of {kernel}, {recipe.train.precision}"
    return [judge(NAME, about, DEFINITION, worst, tolerance, shapes)]


def _calls(job: Job) -> list[Call]:
    """Return what the layers give the recurrence for this rank's first slice, documents planted. Collective."""
    bos, vocab = job.dataset.bos, job.dataset.vocab_size
    job.loader.split = Held(planted(windows_of(job.loader, 0), bos, vocab, places_of(job.recipe)))
    piece = job.loader.read_step(0)[0][0].to(job.device)
    with torch.no_grad(), _overheard(job.model.attention) as calls:
        job.wrapped(piece.tokens, piece.labels, piece.doc_ids, per_token=True)
    reshard(job.model)
    return calls


@contextmanager
def _overheard(attention: ShardedRecurrence) -> Iterator[list[Call]]:
    """Collect what `attention` is given."""
    calls: list[Call] = []
    begin, finish = attention.begin, attention.finish

    def began(inputs: Inputs, doc_ids: Tensor | None, **given: Any) -> Any:
        own = tuple(None if x is None else _first(x, inputs) for x in inputs)
        calls.append(Call(len(calls), given.get("rule", decay_rule), own, _numbers(doc_ids), given.get("angle")))
        return begin(inputs, doc_ids, **given)

    def finished(pending: Any, q: Tensor) -> Any:
        calls[-1].q = _repeated(q)
        return finish(pending, q)

    attention.begin, attention.finish = began, finished  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        del attention.begin, attention.finish


def _first(x: Tensor, inputs: Inputs) -> Tensor:
    """Return the first tokens of the first window of an input that has tokens, all of another."""
    k = inputs[0]
    assert k is not None
    return _repeated(x) if x.shape[:2] == k.shape[:2] else x.detach().clone()


def _repeated(x: Tensor) -> Tensor:
    """Return TOKENS tokens [1, TOKENS, …] of the first window of x [B, T, …], again from its start after its end."""
    return x[0, torch.arange(TOKENS, device=x.device) % x.shape[1]][None].detach().clone()


def _numbers(doc_ids: Tensor | None) -> Tensor | None:
    """Return the numbers of documents of these tokens: those that start in the slice start again."""
    if doc_ids is None:
        return None
    starts = torch.diff(doc_ids[:1], dim=1, prepend=doc_ids[:1, :1] * 0)
    return _repeated(starts).cumsum(1, dtype=doc_ids.dtype)


def _compared(call: Call, kernel: str) -> Error:
    """Return the largest error of a kernel over outputs and gradients, relative to the norm of each.

    With documents and as one: only then something of the state that enters leaves.
    """
    assert call.q is not None
    found = []
    for doc_ids in [None] if call.doc_ids is None else [None, call.doc_ids]:
        given = Given.of(call, doc_ids)
        want = given.wide().run("reference")
        found.append(of_parameters(given.run(kernel), want))
    worst = max(found, key=lambda error: error.size)
    return worst._replace(parameter=f"layer {call.layer} {worst.parameter}")


class Given(NamedTuple):
    """Everything that a recurrence is given in both directions."""

    rule: Recurrence
    doc_ids: Tensor | None
    angle: Tensor | None
    q: Tensor
    inputs: Inputs
    carry: Tensor  # the state that enters
    do: Tensor
    dfinal: Tensor  # the gradient of the state that leaves

    @classmethod
    def of(cls, call: Call, doc_ids: Tensor | None) -> Given:
        """Return what a layer gave, with a random state and gradients."""
        q, (k, v, *_) = call.q, call.inputs
        assert q is not None and k is not None and v is not None
        random = torch.Generator(k.device).manual_seed(0)
        state = (len(k), v.shape[2], k.shape[3], v.shape[3])
        carry, do, dfinal = (
            torch.randn(shape, generator=random, device=k.device) for shape in (state, tuple(v.shape), state)
        )
        angle = None if call.angle is None else call.angle.detach()
        wide = torch.promote_types(k.dtype, torch.float32)
        return cls(call.rule, doc_ids, angle, q, call.inputs, carry.to(wide), do.to(v.dtype), dfinal.to(wide))

    def wide(self) -> Given:
        """Return the same numbers in fp64."""
        inputs = tuple(None if x is None else x.double() for x in self.inputs)
        q, carry, do, dfinal = (x.double() for x in (self.q, self.carry, self.do, self.dfinal))
        return self._replace(q=q, inputs=inputs, carry=carry, do=do, dfinal=dfinal)

    def run(self, kernel: str) -> dict[str, Tensor]:
        """Return outputs and gradients of a kernel by name."""
        q, carry = (x.clone().requires_grad_() for x in (self.q, self.carry))
        # Constant log decays [H] have no gradient.
        inputs = tuple(None if x is None else x.clone().requires_grad_(x.dim() > 1) for x in self.inputs)
        recurrence = ShardedRecurrence(kernel)
        pending = recurrence.begin(
            inputs, self.doc_ids, rule=self.rule, angle=self.angle, carry=carry, output_final_state=True
        )
        o, final_state = recurrence.finish(pending, q)
        assert final_state is not None
        torch.autograd.backward([o, final_state], [self.do, self.dfinal])
        names = NAMES.get(len(inputs), tuple(f"input {number}" for number in range(len(inputs))))
        leaves = {"q": q, **dict(zip(names, inputs, strict=True)), "initial_state": carry}
        gradients = {f"gradient of {name}": x.grad for name, x in leaves.items() if x is not None}
        made = {"outputs": o.detach(), "final_state": final_state.detach()}
        return made | {name: x for name, x in gradients.items() if x is not None}
