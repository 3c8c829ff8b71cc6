"""Law 1 for the delta rule in Triton, in Triton's interpreter on the CPU; small sizes. On a GPU: test_gpu_delta."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lasptrain.ops import delta_chunked
from tests.ops.test_delta import Case, low, make
from tests.support.interpreted import inside, interpreted


class Scene(NamedTuple):
    """What `make` makes, and whether it starts from a state."""

    kind: str
    length: int
    keys: int
    values: int
    begins: tuple[int, ...] = ()
    decays: str = "mild"
    beta: float = 1.0
    one_key: bool = False
    heads: tuple[int, int, int] = (1, 1, 2)  # B, Hk, H
    edge: bool = True

    def case(self) -> Case:
        x = make(
            self.kind,
            self.length,
            beta=self.beta,
            one_key=self.one_key,
            decays=self.decays,
            begins=self.begins,
            sizes=(*self.heads, self.keys, self.values),
        )
        return x if self.edge else x._replace(initial_state=None, dfinal=None)


FEW = [  # those that take a few seconds
    Scene("gdn", 1, 16, 32, heads=(2, 1, 2)),
    Scene("gdn", 63, 32, 16, (30,), "strong", heads=(2, 2, 2)),
    Scene("gdn_head", 64, 64, 64, (0,), beta=2.0),
    Scene("delta", 65, 16, 20, beta=2.0, edge=False),
    Scene("gdn", 130, 16, 16, (1, 40, 64, 65, 70, 129), "strong"),
    Scene("gdn", 300, 32, 16, (3, 290), beta=0.1, heads=(1, 1, 1)),
]
REST = [
    Scene("gdn", 65, 96, 192, (64,)),
    Scene("gdn_head", 130, 64, 32, decays="strong", heads=(1, 2, 6)),
    Scene("gdn", 130, 16, 16, beta=0.0),
    Scene("gdn", 300, 32, 64, beta=0.1, heads=(1, 2, 4)),
    Scene("gdn", 300, 64, 32, decays="strong"),
    Scene("gdn", 300, 128, 32, (3, 290), beta=0.1, heads=(1, 1, 1)),
    Scene("delta", 300, 32, 32, one_key=True, heads=(1, 1, 1), edge=False),
    Scene("gdn", 600, 16, 16, (256, 400), beta=0.05, heads=(1, 1, 1)),
    Scene("gdn", 600, 16, 16, decays="strong", beta=0.05, heads=(1, 1, 1)),
    Scene("delta", 600, 16, 16, beta=0.05, heads=(1, 1, 1)),
]


@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["few", "rest"])
def test_in_the_interpreter(few: bool) -> None:
    told = interpreted(__file__, "few_forward or refused or erased" if few else "rest_forward")
    assert f"{2 * len(FEW) + 3 if few else 2 * len(REST)} passed" in told


def error(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖; infinite where a is not finite. Of what a state leaves, beside 1, less than 1e-3 is nothing."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp(min=1e-3)) if bool(torch.isfinite(a).all()) else float("inf")


def forward(module: Any, x: Case, handed_on: bool = True, wanted: int = 2) -> dict[str, Tensor]:
    """All that the forward half makes; what it hands on is as it says to fakes."""
    inputs = (x.k, x.v, x.beta, x.log_decay)
    state, linear, blocks = module.summarize(*inputs, x.doc_ids, wanted)
    o, kept = module.attend(x.q, *inputs, x.doc_ids, x.initial_state, blocks if handed_on else [])
    said = module.blocks_like(*inputs, wanted), module.kept_like(x.q, *inputs)
    for made, like in zip((blocks, kept), said, strict=True):
        assert [(y.shape, y.dtype) for y in made] == [(y.shape, y.dtype) for y in like]
    return {"o": o} | dict((("state", state), ("linear", linear))[:wanted])


def compare_forward(scene: Scene, dtype: torch.dtype, bound: float) -> None:
    """What the forward half makes, with and without what its first part hands to its second, against float64."""
    from lasptrain.ops import delta_triton

    x = scene.case().map(lambda y: y.to(dtype))
    x = x._replace(initial_state=low(x.initial_state))
    want = forward(delta_chunked, x.map(lambda y: y.double()))
    for handed_on, wanted in ((True, 2), (False, 1), (True, 0)):
        got = forward(delta_triton, x, handed_on, wanted)
        for name in got:
            assert error(got[name], want[name]) < bound, (name, handed_on, wanted)


DTYPES = pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.float16, 3e-3)], ids=["fp32", "fp16"])


@inside
@DTYPES
@pytest.mark.parametrize("scene", FEW, ids=str)
def test_few_forward(scene: Scene, dtype: torch.dtype, bound: float) -> None:
    compare_forward(scene, dtype, bound)


@inside
@DTYPES
@pytest.mark.parametrize("scene", REST, ids=str)
def test_rest_forward(scene: Scene, dtype: torch.dtype, bound: float) -> None:
    compare_forward(scene, dtype, bound)


@inside
def test_maps_of_erased_blocks_are_not_read() -> None:
    from lasptrain.ops import delta_triton

    x = make("gdn", 600, begins=(100,), sizes=(1, 1, 1, 16, 16)).map(lambda y: y.float())
    inputs = (x.k, x.v, x.beta, x.log_decay)
    _, _, (inverse, added, maps, decays) = delta_triton.summarize(*inputs, x.doc_ids, 1)
    erased = decays < -40
    assert bool(erased.any()) and not bool(erased.all()) and not maps[erased].any() and bool(maps[~erased].any())
    o, kept = delta_triton.attend(x.q, *inputs, x.doc_ids, x.initial_state, [inverse, added, maps, decays])
    poisoned = maps.masked_fill(erased[..., None, None], float("nan"))
    again, _ = delta_triton.attend(x.q, *inputs, x.doc_ids, x.initial_state, [inverse, added, poisoned, decays])
    assert torch.equal(again, o)
    gradients = [
        delta_triton.grad_initial_state(x.q, x.do, x.k, *inputs[2:], x.doc_ids, [*kept[:2], one, *kept[3:]], 1)[0]
        for one in (kept[2], poisoned)
    ]
    assert torch.equal(*gradients)


@inside
@pytest.mark.parametrize("kind,found", [("kda", "a decay per channel"), ("ssd", "no beta")])
def test_others_are_refused(kind: str, found: str) -> None:
    from lasptrain.ops import delta_triton

    x = make(kind, 65).map(lambda y: y.float())
    with pytest.raises(ValueError) as refusal:
        delta_triton.summarize(x.k, x.v, x.beta, x.log_decay, None, 2)
    assert str(refusal.value).endswith(f"found {found}; use chunked")
