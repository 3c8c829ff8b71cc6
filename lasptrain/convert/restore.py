"""Import: a folder in another library's format becomes a run that `lasptrain pretrain` continues."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from data_tools.tokenizer import FAST, MODEL, load_tokenizer
from lasptrain import architectures
from lasptrain.architectures.base import Architecture
from lasptrain.architectures.section import LARGEST
from lasptrain.checkpoint import order, single
from lasptrain.convert import configs, files, tables
from lasptrain.convert.export import RECORD
from lasptrain.convert.rules import Rule, Shapes
from lasptrain.convert.target import Json, Target
from lasptrain.convert.targets import TARGETS
from lasptrain.convert.tokenizer import lines
from lasptrain.errors import ConvertError, DataError
from lasptrain.files import atomic_folder, replace
from lasptrain.models.language_model import LanguageModel, on_meta
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.recipe.formats import FORMAT, is_format, upgraded
from lasptrain.recipe.loading import dump_saved, load
from lasptrain.recipe.resolve import with_vocabulary
from lasptrain.recipe.schema import Recipe, recipe_name
from lasptrain.run import base
from lasptrain.run import folder as runs
from lasptrain.training.optimizer import build_optimizer

Slopes = dict[str, list[float]]  # by tensor
WINDOW = 4096  # tokens of a training window, for a run without a recipe


@dataclass(frozen=True)
class Origin:
    """The start of a run: its recipe, the step reached, and the `meta` that its checkpoints must match."""

    target: Target
    recipe: Recipe
    step: int
    meta: Json
    slopes: Slopes | None  # exact values; None: take the folder's
    theirs: Json | None = None  # config.json of others, whose tensors may differ from those of an export

    @property
    def model(self) -> Architecture:
        return architectures.model(self.meta["model"])

    @property
    def window(self) -> int:
        return order.window(self.meta)

    def table(self, shapes: Shapes) -> list[Rule]:
        """Return the rules that make our tensors of these shapes from the folder's."""
        table = [rule for rule in self.target.rules(self.model, shapes) if not self._computed(rule)]
        return table if self.theirs is None else self.target.reading(table, self.theirs, self.model)

    def _computed(self, rule: Rule) -> bool:
        return bool(rule.targets) and all(name.endswith(self.target.computed) for name in rule.targets)


def restore(
    source: Path,
    out: Path,
    recipe: Path | None = None,
    *,
    force: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the run folder `out` with the weights in `source`; its optimizer has no moments yet. Returns `out`.

    An export of ours holds its recipe and step. With `recipe`, and for a folder of others, training starts at step 0
    from the weights; without one it takes the folder's model and tokenizer and the default data.
    Raises ConvertError, or RecipeError for the recipe; then `out` is as it was.
    """
    given = None if recipe is None else load(recipe)
    if given is None and not (source / RECORD).is_file():
        given = described(foreign(source))
    elif given is not None and (other := _other_ids(source, given.data.tokenizer)) is not None:
        tell(f"tokenizer: {given.data.tokenizer} of the recipe makes other ids of {other!r} than the one in {source}")
    weights = open_weights(source, given)
    if weights.left_out:
        tell(f"left out: {len(weights.left_out)} tensors that our model has not: {_families(weights.left_out)}")
    origin = weights.origin
    meta = origin.meta if origin.meta["dataset"] else origin.meta | {"dataset": _fingerprint(origin.recipe)}
    with atomic_folder(out, force, runs.RECIPE) as new:
        replace(new / runs.RECIPE, dump_saved(origin.recipe))
        optimizer = build_optimizer(weights.empty, origin.recipe.optim)
        single.write(new, origin.step, weights.empty, optimizer, weights.read, meta)
        ours = (source / RECORD).is_file()
        kept = base.keep(source, new, own=ours)
        tell(_told(kept, ours))
    return out


@dataclass(frozen=True)
class Weights:
    """A folder in another library's format, checked and not yet read.

    `empty` is its model on the meta device; `read` gives a tensor of it by name, in fp32.
    """

    origin: Origin
    empty: LanguageModel
    read: Callable[[str], Tensor]
    left_out: list[str]  # names of tensors of others that are not part of the model


def open_weights(source: Path, recipe: Recipe | None = None) -> Weights:
    """Open the weights in `source`: an export of ours, or a folder of others, by `recipe` or its own configuration.

    Without `recipe` the training data of others' weights are unknown. ConvertError where weights do not fit.
    """
    ours = recipe is None and (source / RECORD).is_file()
    folder = files.Folder(source) if ours else foreign(source)
    origin = known_export(folder) if ours else foreign_folder(folder, recipe)
    configs.check_depth(origin.model.layers, folder.shapes, str(source))
    empty = on_meta(origin.model, origin.window, ShardedRecurrence("reference"))
    shapes = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    table = origin.table(shapes)
    tables.check_sources(table, shapes, "the recipe's model")
    saved = {name: shape for name, shape in folder.shapes.items() if not name.endswith(origin.target.computed)}
    tables.check_targets(table, shapes, saved, str(source))
    scheduled = {f"layers.{i}.mixer.slope": slope for i, slope in enumerate(empty.decays().tolist())}
    slopes = {**scheduled, **(origin.slopes or {})}
    return Weights(
        origin, empty, _Reader(table, shapes, folder, slopes, exact=origin.slopes is not None).read, folder.left_out
    )


def known_export(folder: files.Folder) -> Origin:
    """Return the origin of an export of ours, by its record, with which its config.json must agree."""
    origin = _recorded(folder)
    config = folder.json("config.json") if origin.target.arch is None else _config(folder)
    if config is not None:
        configs.check(origin.target, config, origin.model, f"{folder.path / 'config.json'}")
    return origin


def _recorded(folder: files.Folder) -> Origin:
    record = folder.json(RECORD)
    where = folder.path / RECORD
    if record is None:
        raise ConvertError(f"{where}: missing; expected an export of lasptrain, or --recipe for weights of others")
    if not is_format(number := record.get("format")):
        raise ConvertError(f"{where}: not what lasptrain writes (format {number!r}; expected 1 to {FORMAT})")
    if number > FORMAT:
        raise ConvertError(f"{where}: format {number}, of a newer lasptrain; expected at most {FORMAT}")
    try:
        recipe = _loaded(record["recipe"], number)
        meta = record["meta"] | {"model": upgraded("model", record["meta"]["model"], number)}
        model = architectures.model(meta["model"])
        fitting = {name: target for name, target in TARGETS.items() if target.expresses(model.arch)}
        _check_record(record, where)
        if record["target"] in fitting and model.vocab != "auto":
            return Origin(fitting[record["target"]], recipe, record["step"], meta, record["slopes"])
    except (KeyError, TypeError, AttributeError, ValidationError) as error:
        raise ConvertError(f"{where}: not what lasptrain writes ({type(error).__name__}: {error})") from None
    raise ConvertError(f"{where}: target {record['target']!r}; expected {', '.join(fitting)}")


def foreign(source: Path) -> files.Folder:
    """Open a folder of others, with the names that its target's rules have."""
    folder = files.Folder(source)
    folder.rename(configs.target_of(_config(folder), str(source / "config.json")).canonical)
    return folder


def _check_record(record: Json, where: Path) -> None:
    """Raise ConvertError for a step, an order or slopes that no run has."""
    step, window, slopes = record["step"], order.window(record["meta"]), record["slopes"]
    before = record["meta"].get("before") or 0
    for key, number, least in (("step", step, 0), ("meta.order.window", window, 1), ("meta.before", before, 0)):
        if type(number) is not int or not least <= number <= LARGEST:
            raise ConvertError(f"{where}: {key}: found {number!r:.99}; expected a number from {least} on")
    if slopes is not None and not (isinstance(slopes, dict) and all(map(_are_numbers, slopes.values()))):
        raise ConvertError(f"{where}: slopes: found {slopes!r:.99}; expected lists of numbers by tensor, or null")


def _are_numbers(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, float | int) for value in values)


def foreign_folder(folder: files.Folder, recipe: Recipe | None) -> Origin:
    """Return the origin of others' weights: the model by their configuration, the further training by the recipe."""
    config, where = _theirs(folder), str(folder.path / "config.json")
    target, theirs = configs.described(config, folder.shapes, where)
    if recipe is None:
        recipe = described(folder)
    else:
        recipe = with_vocabulary(recipe, load_tokenizer(recipe.data.tokenizer).vocab_size)
        if recipe.model.arch != theirs.arch:
            raise ConvertError(f"{where}: describes a model of arch {theirs.arch}, the recipe's is {recipe.model.arch}")
        configs.check_compatible(target, theirs, recipe.model, where)
    model = on_meta(recipe.model, recipe.data.window, ShardedRecurrence("reference"))
    read: Json = {"seed": recipe.data.seed, "window": recipe.data.window, "batch": recipe.train.batch}
    read |= {"reset_at_documents": recipe.data.reset_at_documents}
    decays = model.decays().tolist()
    meta = {"model": recipe.model.model_dump(mode="json"), "decays": decays, "dataset": None, "order": read}
    return Origin(target, recipe, 0, meta, slopes=None, theirs=config)


def described(folder: files.Folder) -> Recipe:
    """Return a recipe with the model and tokenizer of a folder of others; its other keys are a starting point."""
    config, where = _theirs(folder), str(folder.path / "config.json")
    _, model = configs.described(config, folder.shapes, where)
    positions = config.get("max_position_embeddings") or WINDOW
    if not isinstance(positions, int) or positions < 1:
        raise ConvertError(f"{where}: max_position_embeddings is {positions!r}; expected a number of tokens")
    text = {"name": recipe_name(folder.path.name), "model": model.model_dump(mode="json")}
    text |= {"data": {"tokenizer": str(tokenizer_of(folder.path)), "window": min(WINDOW, positions)}}
    return _loaded(json.dumps(text | {"optim": {"lr": 1e-4}, "train": {"steps": 1000}}))


def tokenizer_of(folder: Path) -> Path:
    """Return the tokenizer's file in a folder. ConvertError where there is none of a known name."""
    for name in (MODEL, FAST):
        if (folder / name).is_file():
            return folder.absolute() / name
    raise ConvertError(f"{folder}: holds no tokenizer.model and no tokenizer.json; expected one, or --recipe")


def _other_ids(folder: Path, tokenizer: str) -> str | None:
    """Return a text of which the tokenizer in a folder, where there is one, makes other ids; None if there is none."""
    try:
        theirs = load_tokenizer(tokenizer_of(folder))
    except (ConvertError, DataError):
        return None
    ours = load_tokenizer(tokenizer)
    return next((line for line in lines(1000) if ours.encode(line) != theirs.encode(line)), None)


def _loaded(text: str, written: int = FORMAT) -> Recipe:
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "recipe.yaml")
        file.write_text(text, encoding="utf-8")
        return load(file, written=written)


def _config(folder: files.Folder) -> Json:
    config = folder.json("config.json")
    if config is None:
        raise ConvertError(f"{folder.path}: holds no config.json; expected a folder that a converter wrote")
    return config


def _theirs(folder: files.Folder) -> Json:
    """Return the part of others' config.json that describes the model."""
    config, where = _config(folder), str(folder.path / "config.json")
    return configs.target_of(config, where).unwrapped(config, where)


def _families(names: list[str]) -> str:
    """Return the beginnings of names, each with its number."""
    counts = Counter(".".join(name.split(".")[:2]) for name in names)
    return ", ".join(f"{beginning} ({count})" for beginning, count in counts.items())


def _fingerprint(recipe: Recipe) -> str:
    """Return the fingerprint of the recipe's data, which are prepared first if need be."""
    from data_tools.dataset import open_dataset

    return open_dataset(recipe.data).fingerprint


def _told(kept: base.Base, ours: bool) -> str:
    """Return what is said of a base: its name and its licence."""
    if ours and not kept:
        return "base: none, it is an export without one"
    license_ = kept.get("license", "unknown: no file and no card beside the weights names one")
    return f"base: {kept.get('base_model', 'none')}, license {license_}"


class _Reader:
    """Makes our tensors from a folder's, one rule at a time."""

    def __init__(self, table: list[Rule], shapes: Shapes, folder: files.Folder, slopes: Slopes, exact: bool):
        self.rules = {source: rule for rule in table for source in rule.sources}
        self.shapes, self.folder, self.slopes, self.exact = shapes, folder, slopes, exact
        for rule in table:
            if not rule.sources:
                rule.back([folder.read(name) for name in rule.targets], [])
        self.made: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        """Return one of our tensors by name, in fp32."""
        if name not in self.made:
            rule = self.rules[name]
            found = [self._found(target) for target in rule.targets]
            made = rule.back(found, [self.shapes[source] for source in rule.sources])
            self.made = dict(zip(rule.sources, made, strict=True))
        tensor = self.made.pop(name)
        return self._slope(name, tensor) if name.endswith("mixer.slope") else tensor

    def _found(self, target: str) -> Tensor:
        """Return a tensor of the folder, in fp32. ConvertError where it is not finite."""
        return tables.finite(self.folder.read(target, torch.float32), target, str(self.folder.path))

    def _slope(self, name: str, found: Tensor) -> Tensor:
        """Return the recorded slopes, with which the target's must agree; without a record, the target's."""
        if self.rules[name].targets and not self.exact:
            return found
        exact = torch.tensor(self.slopes[name], dtype=torch.float32)
        if self.rules[name].targets and not torch.allclose(found, exact, rtol=1e-2, atol=1e-9):
            raise ConvertError(f"{self.folder.path}: the decays of {name} are not those of the recipe")
        return exact
