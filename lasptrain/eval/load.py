"""Loading of trained models: a run's newest checkpoint, an export, or a folder of others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from data_tools.tokenizer import Tokenizer, load_tokenizer
from lasptrain import ops
from lasptrain.architectures.base import Architecture
from lasptrain.checkpoint import load
from lasptrain.convert.export import RECORD
from lasptrain.convert.restore import open_weights
from lasptrain.errors import CheckpointError
from lasptrain.models.language_model import LanguageModel, on_meta
from lasptrain.ops.precision import DTYPES
from lasptrain.parallel import mesh as meshes
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.parallel.shard import fill
from lasptrain.recipe.schema import Recipe
from lasptrain.run import folder as runs

CONFIG, TOKENIZER = "config.json", "tokenizer.model"


@dataclass(frozen=True)
class Trained:
    """A trained model, whole on this rank, with its recipe and tokenizer."""

    path: Path
    recipe: Recipe
    model: LanguageModel
    tokenizer: Tokenizer
    step: int


def load_model(path: Path) -> Trained:
    """Load the newest intact checkpoint of the run `path`, or the weights in a folder that `convert --from` reads.

    Collective over the process group, where there is one. Raises CheckpointError where `path` is neither, holds no
    checkpoint or a tokenizer of more pieces than the model has rows, ConvertError where weights do not fit its config.
    """
    return _of_run(path) if _is_run(path) else _of_folder(path)


def window(path: Path) -> int:
    """Return the window, in tokens, that the model of a run or a folder was trained on. Raises as `load_model` does."""
    return runs.recipe_of(path).data.window if _is_run(path) else open_weights(path).origin.window


def tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer of a run, or of a folder: its own copy first, as the recipe's may be on another machine.

    Raises as `load_model` does.
    """
    if _is_run(path):
        return load_tokenizer(runs.recipe_of(path).data.tokenizer)
    copy = path / TOKENIZER
    return load_tokenizer(copy if copy.is_file() else open_weights(path).origin.recipe.data.tokenizer)


def _is_run(path: Path) -> bool:
    """True for a run, false for a folder of weights. CheckpointError where it is neither."""
    if (path / runs.RECIPE).is_file():
        return True
    if (path / RECORD).is_file() or (path / CONFIG).is_file():
        return False
    raise CheckpointError(
        f"{path}: found no {runs.RECIPE}, no {RECORD} and no {CONFIG}; expected a run folder such as runs/quickstart, "
        "a folder that lasptrain convert wrote, or one of a format that it reads"
    )


def _of_run(path: Path) -> Trained:
    recipe = runs.recipe_of(path)
    model = _empty(recipe, recipe.model, recipe.data.window)
    with meshes.single_process_group():
        loaded = load.load(path, model, None)
    if loaded is None:
        raise CheckpointError(f"{path}: found no checkpoint; expected a run that has saved one")
    return Trained(path, recipe, model, tokenizer(path), loaded.step)


def _of_folder(path: Path) -> Trained:
    weights = open_weights(path)
    origin = weights.origin
    known = tokenizer(path)
    rows = origin.model.vocab
    if isinstance(rows, int) and known.vocab_size > rows:
        found = f"{path}: the tokenizer {known.name} has {known.vocab_size} pieces, the model {rows} rows"
        raise CheckpointError(f"{found}; expected at least as many rows")
    model = _empty(origin.recipe, origin.model, origin.window)
    with torch.no_grad():
        fill(model, ((name, weights.read(name)) for name in weights.empty.state_dict()))
    return Trained(path, origin.recipe, model, known, origin.step)


def _empty(recipe: Recipe, cfg: Architecture, window: int) -> LanguageModel:
    """Return the model on this rank's device, with uninitialised weights."""
    device = meshes.device()
    attention = ShardedRecurrence(ops.select("auto", device, cfg.kernels))
    dtype = DTYPES[recipe.train.precision]
    model = on_meta(cfg, window, attention, dtype=dtype, loss_chunk=recipe.train.loss_chunk)
    model.to_empty(device=device).requires_grad_(False)
    return model
