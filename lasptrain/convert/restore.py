"""The way back: a folder in another library's format becomes a run that `lasptrain pretrain` continues."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from lasptrain import checkpoint
from lasptrain import recipe as recipes
from lasptrain import run as runs
from lasptrain.convert import configs, files, tables
from lasptrain.convert.export import RECORD
from lasptrain.errors import ConvertError
from lasptrain.models.language_model import LanguageModel
from lasptrain.parallel.attention import Attention
from lasptrain.recipe import Model, Recipe


@dataclass(frozen=True)
class Origin:
    """What a run begins with: the recipe, the step it has reached, and what its checkpoints must agree with."""

    target: str
    recipe: Recipe
    step: int
    meta: dict[str, Any]
    slopes: dict[str, list[float]]

    @property
    def model(self) -> Model:
        return Model.model_validate(self.meta["model"])

    @property
    def window(self) -> int:
        window: int = self.meta["order"]["window"]
        return window


def restore(source: Path, out: Path, recipe: Path | None = None, *, force: bool = False) -> Path:
    """Write the run folder `out` with the weights in `source`; its optimizer has no moments yet. Returns `out`.

    An export of ours knows its recipe and step. With `recipe` a new training starts at step 0 from the weights.
    Raises ConvertError, or RecipeError for the recipe; then `out` is as it was.
    """
    weights = open_weights(source, None if recipe is None else recipes.load(recipe))
    origin = weights.origin
    with files.whole_folder(out, force) as new:
        runs.write(new / runs.RECIPE, recipes.dump(origin.recipe))
        checkpoint.write(new, origin.step, weights.empty, weights.read, origin.meta)
    return out


@dataclass(frozen=True)
class Weights:
    """A folder in another library's format, checked and not yet read.

    `empty` is its model on the meta device; `read` gives a tensor of it by name, in fp32.
    """

    origin: Origin
    empty: LanguageModel
    read: Callable[[str], Tensor]


def open_weights(source: Path, recipe: Recipe | None = None) -> Weights:
    """The weights in `source`: of an export of ours, or with `recipe` of others. ConvertError where they do not fit."""
    folder = files.Folder(source)
    origin = _known(folder) if recipe is None else _given(folder, recipe)
    model = origin.model
    with torch.device("meta"):
        empty = LanguageModel(model, origin.window, Attention("reference"))
    shapes = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    config = folder.json("config.json")
    if config is None and origin.target != "safetensors":
        raise ConvertError(f"{source}: holds no config.json; expected a folder that a converter wrote")
    if config is not None:
        configs.check(origin.target, config, model, f"{source / 'config.json'}")
    table = tables.TABLES[origin.target](model, shapes)
    tables.check_sources(table, shapes, "the recipe's model")
    tables.check_targets(table, shapes, folder.shapes, str(source))
    slopes = {f"layers.{i}.mixer.slope": slope for i, slope in enumerate(empty.decays().tolist())} | origin.slopes
    return Weights(origin, empty, _Reader(table, shapes, folder, slopes).read)


def _known(folder: files.Folder) -> Origin:
    """From the record of an export of ours."""
    record = folder.json(RECORD)
    where = folder.path / RECORD
    if record is None:
        raise ConvertError(f"{where}: missing; expected an export of lasptrain, or --recipe for weights of others")
    try:
        with tempfile.TemporaryDirectory() as name:
            file = Path(name, "recipe.yaml")
            file.write_text(record["recipe"], encoding="utf-8")
            recipe = recipes.load(file)
        origin = Origin(record["target"], recipe, record["step"], record["meta"], record["slopes"])
        if origin.target in tables.TABLES and origin.model.vocab != "auto":
            return origin
    except (KeyError, TypeError, AttributeError, ValidationError) as error:
        raise ConvertError(f"{where}: not what lasptrain writes ({type(error).__name__}: {error})") from None
    raise ConvertError(f"{where}: target {record['target']!r}; expected {', '.join(tables.TABLES)}")


def _given(folder: files.Folder, recipe: Recipe) -> Origin:
    """For weights of others: the recipe says what they are and what they will be trained on."""
    from lasptrain.data.source import open_dataset

    config = folder.json("config.json") or {}
    target = config.get("model_type")
    if target not in tables.TABLES:
        raise ConvertError(
            f"{folder.path / 'config.json'}: model_type is {target!r}; expected {', '.join(tables.TABLES)}"
        )
    dataset = open_dataset(recipe.data)
    recipe = recipes.with_vocabulary(recipe, dataset.vocab_size)
    with torch.device("meta"):
        model = LanguageModel(recipe.model, recipe.data.window, Attention("reference"))
    meta = {
        "model": recipe.model.model_dump(mode="json"),
        "decays": model.decays().tolist(),
        "dataset": dataset.fingerprint,
        "order": {
            "seed": recipe.data.seed,
            "window": recipe.data.window,
            "batch": recipe.train.batch,
            "reset_at_documents": recipe.data.reset_at_documents,
        },
    }
    return Origin(target, recipe, 0, meta, {})


class _Reader:
    """Our tensors, made from a folder's one rule at a time."""

    def __init__(
        self,
        table: list[tables.Rule],
        shapes: tables.Shapes,
        folder: files.Folder,
        slopes: dict[str, list[float]],
    ):
        self.rules = {source: rule for rule in table for source in rule.sources}
        self.shapes, self.folder, self.slopes = shapes, folder, slopes
        for rule in table:
            if not rule.sources:
                rule.back([folder.read(name) for name in rule.targets], [])
        self.made: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        """A tensor of ours by its name, in fp32."""
        if name not in self.made:
            rule = self.rules[name]
            found = [self.folder.read(target).float() for target in rule.targets]
            made = rule.back(found, [self.shapes[source] for source in rule.sources])
            self.made = dict(zip(rule.sources, made, strict=True))
        tensor = self.made.pop(name)
        return self._slope(name, tensor) if name.endswith("mixer.slope") else tensor

    def _slope(self, name: str, found: Tensor) -> Tensor:
        """Slopes are the numbers that were written down; what the target has of them must agree."""
        exact = torch.tensor(self.slopes[name], dtype=torch.float32)
        if self.rules[name].targets and not torch.allclose(found, exact, rtol=1e-2, atol=1e-9):
            raise ConvertError(f"{self.folder.path}: the decays of {name} are not those of the recipe")
        return exact
