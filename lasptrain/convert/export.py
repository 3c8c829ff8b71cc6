"""Export of a run: the newest checkpoint as a folder that another library loads and `restore` can read back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_tools.tokenizer import BYTES
from lasptrain import __version__, architectures
from lasptrain.checkpoint import order, steps
from lasptrain.checkpoint.single import CheckpointReader
from lasptrain.convert import card, configs, files, tables, targets, tokenizer, verify
from lasptrain.convert.target import Target
from lasptrain.errors import CheckpointError
from lasptrain.files import atomic_folder, read
from lasptrain.ops.precision import DTYPES
from lasptrain.recipe.formats import FORMAT
from lasptrain.recipe.loading import dump_saved
from lasptrain.recipe.schema import Recipe
from lasptrain.run import base
from lasptrain.run.folder import recipe_of

RECORD = "lasptrain_export.json"
TRIES = 5  # of a run that goes on training, and deletes what is read


@dataclass(frozen=True)
class Exported:
    """Summary of an export, for people."""

    folder: Path
    target: Target
    tensors: int
    bytes: int
    tokenizer: str
    parity: verify.Parity | str  # errors of logits, or why nothing was compared

    def lines(self) -> Iterator[str]:
        yield f"{self.folder}: {self.target.name}, {self.tensors} tensors, {self.bytes:,} bytes"
        yield f"runs in    {self.target.runs_in}"
        yield f"tokenizer  {self.tokenizer}"
        yield f"verified   {self.parity}"


def export(run: Path, out: Path, to: str, dtype: str = "fp32", *, force: bool = False, check: bool = True) -> Exported:
    """Write the newest step of `run` as the target `to` into the new folder `out`.

    Args:
        dtype: of the tensors, `fp32` or `bf16`; what must stay fp32 does.
        force: replace `out` if it exists.
        check: compare logits in the target's library, where it is installed.

    Raises ConvertError, or CheckpointError for a damaged step or a folder that is no run; then `out` is as it was.
    """
    for _ in range(TRIES):
        newest = steps.committed(run)[:1]
        try:
            return _export(run, out, to, dtype, force, check)
        except Exception:
            if all(steps.folder_of(run, step).exists() for step in newest):
                raise
    raise CheckpointError(f"{run}: each step is replaced while it is read; expected a larger checkpoint.keep")


def _export(run: Path, out: Path, to: str, dtype: str, force: bool, check: bool) -> Exported:
    recipe = recipe_of(run)
    step = CheckpointReader(run)
    model = architectures.model(step.meta["model"])
    target = targets.resolve(to, model)
    table = target.rules(model, step.shapes)
    tables.check_sources(table, step.shapes, str(step.folder))
    forms = tables.forms(table, step.shapes, DTYPES[dtype])
    with atomic_folder(out, force, RECORD) as folder:
        files.write(folder, forms, tables.export(table, step.read, DTYPES[dtype], str(step.folder)))
        special = tokenizer.special(recipe.data.tokenizer)
        name = str(DTYPES[dtype]).removeprefix("torch.")
        config = configs.config(target, model, special.ids(), name, order.window(step.meta))
        if target.code:
            shutil.copy(Path(__file__).with_name(target.code), folder)
        _json(folder / "config.json", config)
        _json(folder / "generation_config.json", special.ids() | configs.generation(target))
        told = BYTES if recipe.data.tokenizer == BYTES else tokenizer.export(Path(recipe.data.tokenizer), folder)
        parity = _verify(folder, run, target, dtype) if check else "not compared: --no-verify"
        base.write_terms(run, folder)
        _json(folder / RECORD, _record(step, recipe, target.name, dtype, parity))
        page = card.text(run, recipe, step, target, told, str(parity), out.name)
        (folder / "README.md").write_text(page, encoding="utf-8")
    return Exported(out, target, len(forms), sum(form.bytes for form in forms.values()), told, parity)


def _json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _record(
    step: CheckpointReader, recipe: Recipe, target: str, dtype: str, parity: verify.Parity | str
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "lasptrain": __version__,
        "target": target,
        "dtype": dtype,
        "step": step.step,
        "checkpoint": json.loads(read(step.folder / steps.MANIFEST, own=True))["sha256"],
        "meta": step.meta,
        "recipe": dump_saved(recipe),
        "slopes": {key: step.read(key).tolist() for key in step.shapes if key.endswith("mixer.slope")},
        "parity": parity if isinstance(parity, str) else parity._asdict(),
    }


def _verify(folder: Path, run: Path, target: Target, dtype: str) -> verify.Parity | str:
    library = target.library
    if library is None:
        return "not compared: no other library computes it here"
    if not verify.installed(library.name):
        return f"not compared: {library.name} is not installed (pip install {library.package})"
    if library.gpu_only and not torch.cuda.is_available():
        return f"not compared: {library.package} runs on GPUs only, and here is none"
    return verify.compare(folder, run, exact=dtype == "fp32")
