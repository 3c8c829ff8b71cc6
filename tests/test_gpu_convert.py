"""Exports to flash-linear-attention compute the same there, on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lasptrain.convert import verify
from lasptrain.convert.export import export
from tests.test_convert import MODELS, loaded, make_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not verify.installed("fla"), reason="needs flash-linear-attention"),
    pytest.mark.filterwarnings("ignore"),  # of another library
]


@pytest.mark.parametrize("name", ["linear_transformer", "linear_transformer-sum", "retnet"])
def test_flash_linear_attention_computes_the_same(tmp_path: Path, name: str) -> None:
    target, model = MODELS[name]
    run = make_run(tmp_path, model)
    exported = export(run, tmp_path / "out", target)
    print(exported.parity)
    assert isinstance(exported.parity, verify.Parity) and exported.parity.scale > 1
    import fla.models  # noqa: F401  makes its classes known to transformers

    theirs, ours = loaded(tmp_path / "out").cuda(), verify.reference(run)
    tokens = torch.randint(4096, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, got = ours(tokens), theirs(tokens.cuda()).logits.cpu().double()
    error = float((got - want).abs().max())
    print(f"chunk kernels: {error:.1e} of {float(want.abs().max()):.1f}")
    assert error < 5e-3 * float(want.abs().max())  # TF32
