"""A trained model from where it was written: a run's newest checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from data_tools.tokenizer import Tokenizer, load_tokenizer
from lasptrain import checkpoint, ops
from lasptrain import recipe as recipes
from lasptrain import run as runs
from lasptrain.errors import CheckpointError
from lasptrain.models.language_model import LanguageModel
from lasptrain.parallel import mesh as meshes
from lasptrain.parallel.attention import Attention
from lasptrain.recipe import Recipe

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Trained:
    """A model, whole on this rank, and what its texts are made of."""

    path: Path
    recipe: Recipe
    model: LanguageModel
    tokenizer: Tokenizer
    step: int


def load_model(path: Path) -> Trained:
    """The newest intact checkpoint of the run `path`. Collective over the process group, where there is one.

    Raises CheckpointError where there is none.
    """
    file = path / runs.RECIPE
    if not file.is_file():
        raise CheckpointError(f"{path}: found no {runs.RECIPE}; expected a run folder such as runs/quickstart")
    recipe = recipes.load(file)
    device = meshes.device()
    dtype = DTYPES[recipe.train.precision]
    with torch.device("meta"):
        attention = Attention(ops.select("auto", device))
        model = LanguageModel(
            recipe.model, recipe.data.window, attention, dtype=dtype, loss_chunk=recipe.train.loss_chunk
        )
        model.to(torch.promote_types(dtype, torch.float32))
    model.to_empty(device=device).requires_grad_(False)
    with meshes.alone():
        loaded = checkpoint.load(path, model, None)
    if loaded is None:
        raise CheckpointError(f"{path}: found no checkpoint; expected a run that has saved one")
    return Trained(path, recipe, model, load_tokenizer(recipe.data.tokenizer), loaded.step)
