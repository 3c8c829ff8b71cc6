"""torch.compile takes the operators of `lasptrain.ops` as they are: no graph break, same results."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lasptrain import architectures, train
from lasptrain.eval.inference import Reader
from lasptrain.models.language_model import LanguageModel, initial_values
from lasptrain.ops import decay_rule
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.parallel.shard import fill
from lasptrain.recipe.loading import load
from lasptrain.training.job import build
from tests.recipe.test_recipe import RECIPES
from tests.support.gloo import spawn
from tests.support.kernel_cases import Case, Inputs, backward, error, inputs


def everything(x: Inputs) -> tuple[Tensor, ...]:
    """All five operators, on the plain PyTorch kernel."""
    kernel, given, doc_ids = "chunked", (x.k, x.v, x.log_decay), x.doc_ids
    state, decay, blocks = decay_rule.summarize(kernel, given, doc_ids, 2)
    o, kept = decay_rule.attend(kernel, x.q, given, doc_ids, x.initial_state, blocks)
    dinitial, backwards, dblocks = decay_rule.grad_initial_state(kernel, x.q, x.do, given, doc_ids, kept, 2)
    dq, rest = decay_rule.grad_query(kernel, x.q, given, x.do, doc_ids, kept)
    dk, dv, dlog = decay_rule.grad_inputs(kernel, x.q, given, x.do, doc_ids, x.dfinal, dblocks, kept, rest)
    assert dk is not None and dv is not None
    return state, decay, o, dinitial, dq, dk, dv, backwards, *([] if dlog is None else [dlog])


@pytest.mark.parametrize("decay", ["none", "head", "token"])
def test_no_graph_break(decay: str) -> None:
    from lasptrain.ops import chunked

    x = inputs(Case(70, 32, 16, decay, (5,)), torch.float32, torch.device("cpu"))
    found = torch.compile(everything, backend="aot_eager", fullgraph=True)(x)
    want = backward(chunked, x)
    for name, got in zip(want, found, strict=False):
        assert error(got, want[name]) < 1e-6, name


@pytest.mark.filterwarnings("ignore")  # the compiler itself does what warns
@pytest.mark.parametrize(
    "own", [pytest.param({"arch": "tnl"}, marks=pytest.mark.slow), {"arch": "ssd", "data_dependent": True, "conv": 4}]
)
def test_blocks_compile_with_and_without_gradients(own: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    cfg = architectures.model({"dim": 32, "layers": 2, "heads": 2, "mlp": 48, "vocab": 64, **own})
    tokens = torch.randint(64, (1, 40), generator=torch.Generator().manual_seed(0))

    def measured(fuse: bool) -> dict[str, Tensor]:
        model = LanguageModel(cfg, 40, ShardedRecurrence("chunked"), dtype=torch.bfloat16, loss_chunk=16)
        fill(model, initial_values(model, 0, torch.device("cpu")))
        for block in model.blocks if fuse else ():
            block.compile_parts()
        with torch.no_grad():
            state = model(tokens, output_final_state=True).final_state[-1][0]
        model(tokens, tokens).loss.backward()
        return {"state": state} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    want = measured(False)
    for name, found in measured(True).items():
        assert error(found, want[name]) < 2e-2, name


@pytest.mark.filterwarnings("ignore")  # the compiler itself does what warns
def test_a_reader_compiles_what_reads_whole_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    cfg = architectures.model({"arch": "ssd", "dim": 32, "layers": 1, "heads": 2, "mlp": 48, "vocab": 64, "conv": 4})
    model = LanguageModel(cfg, 40, ShardedRecurrence("chunked"))
    fill(model.requires_grad_(False), initial_values(model, 0, torch.device("cpu")))
    tokens = torch.randint(64, (1, 100), generator=torch.Generator().manual_seed(0))
    told: list[tuple[int, int]] = []
    fused = Reader(model, segment=32, fuse=True, told=lambda done, total: told.append((done, total)))
    assert error(fused.read(tokens).logits, Reader(model).read(tokens).logits) < 1e-5
    assert told == [(0, 100), (32, 100), (64, 100), (96, 100)]


@pytest.mark.filterwarnings("ignore")  # the compiler itself does what warns
def test_a_compiled_convolution_keeps_no_more_than_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    length = 128

    def kept(conv: int) -> int:
        """Bytes that a block keeps of its tokens for the backward."""
        own = {"dim": 32, "layers": 1, "heads": 2, "mlp": 48, "vocab": 64, "conv": conv}
        cfg = architectures.model({"arch": "ssd", "data_dependent": True, **own})
        model = LanguageModel(cfg, length, ShardedRecurrence("chunked"), dtype=torch.bfloat16, loss_chunk=64)
        fill(model, initial_values(model, 0, torch.device("cpu")))
        model.blocks[0].compile_parts()
        found: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            if length in x.shape[:2]:
                found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(torch.zeros(1, length, dtype=torch.int64), torch.zeros(1, length, dtype=torch.int64)).loss
        assert loss is not None and loss.requires_grad
        return sum(found.values())

    assert 0 < kept(4) <= kept(0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler itself does what warns
def test_ddp_compiles_the_same_graphs_as_fsdp() -> None:
    assert spawn(2, graphs, "ddp") == spawn(2, graphs, "zero3") != [0, 0]


def graphs(rank: int, world: int, kind: str) -> int:
    """How many are compiled of a block whose weights are more than one of DDP's buckets."""
    made: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        made.append(graph)
        return graph.forward

    model = ["model.dim=512", "model.layers=1", "model.heads=2", "model.mlp=8192", "train.compile=true"]
    place = ["mesh.dp=2", "mesh.sp=1", "train.batch=2", "train.micro_batch=1", "data.window=64", "train.loss_chunk=64"]
    recipe = load(RECIPES / "quickstart.yaml", [*model, *place, f"parallel.data_parallel={kind}"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend=backend))
        train.train_step(build(recipe), 0)
    return len(made)
