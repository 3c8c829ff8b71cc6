"""The model card of an export: model, data, tokens seen and losses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from data_tools.hub import HUB, without_folder
from lasptrain import __version__, architectures
from lasptrain.checkpoint import order
from lasptrain.checkpoint.single import CheckpointReader
from lasptrain.convert.libraries.servers import SOURCES
from lasptrain.convert.target import Json, Target
from lasptrain.recipe.schema import Recipe
from lasptrain.recipe.sections import Part
from lasptrain.recipe.yaml12 import dump
from lasptrain.run import base


def text(
    run: Path, recipe: Recipe, step: CheckpointReader, target: Target, tokenizer: str, parity: str, folder: str
) -> str:
    """Return the README.md of the export of `step` in a folder of this name.

    `tokenizer` and `parity` say what lies there for texts, and how logits compare.
    """
    library = "transformers" if "transformers" in target.runs_in else "lasptrain"
    rows = {
        "architecture": recipe.model.arch,
        "steps": f"{step.step:,}",
        "tokens seen": "; ".join(_seen(run, step)),
        "data fingerprint": f"`{step.meta['dataset']}`",
        **_losses(run, step.step),
        "format": f"{target.name}, for {target.runs_in}",
        "tokenizer": tokenizer.replace("|", r"\|"),
        "verified": parity,
    }
    return "\n".join(
        [
            "---",
            f"library_name: {library}",
            "pipeline_tag: text-generation",
            *(f"{key}: {_yaml(value)}" for key, value in base.read(run)[0].items()),
            "---",
            f"# {recipe.name}",
            "",
            f"Trained and exported by lasptrain {__version__}. {target.advice}".rstrip(),
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows.items()),
            "",
            "Every document of the training data began with BOS, so a prompt should too. BOS ends a text as "
            "well: the next document would begin there.",
            "",
            *_serving(target, step.meta["model"], recipe.data.tokenizer, folder),
            "```yaml",
            dump(_portable(recipe)).rstrip(),
            "```",
            "",
        ]
    )


def _seen(run: Path, step: CheckpointReader) -> Iterator[str]:
    """Yield the tokens that the run has read, the runs that it began with, and those who made its first weights."""
    read, before = order.tokens(step.meta, step.step), order.before(run, step.meta)
    yield f"{sum(read.values()):,}, in windows of {', '.join(f'{window:,}' for window in read)}"
    if before != 0:
        yield f"{'an unknown number' if before is None else f'{before:,}'} before, by the runs that it began with"
    if name := base.read(run)[0].get("base_model"):
        yield f"an unknown number before, by {name}, whose weights were imported"


def _serving(target: Target, model: Json, tokenizer: str, folder: str) -> Iterator[str]:
    """Yield how to serve the export by each server that the target names, or why that cannot be."""
    for service in target.services:
        reason = next(service.reasons(architectures.model(model), tokenizer), None)
        if reason is not None:
            yield from (f"{service.server}: no, {reason}.", "")
            continue
        needs = ", ".join(filter(None, (SOURCES[service.server], service.proviso(tokenizer))))
        yield from (f"{service.server} ({needs}). {service.remark}", "")
        yield from ("```sh", *service.commands(folder, tokenizer), "```", "")


def _yaml(text: str) -> str:
    """Quote a text where it might be read as something else."""
    return text if re.fullmatch(r"[A-Za-z][\w./-]+", text) else json.dumps(text)


def _portable(recipe: Recipe) -> Recipe:
    """The recipe with names instead of paths: a card is for other machines than the one that made it."""
    data = recipe.data
    own = {"source": _named(data.source), "tokenizer": _name(data.tokenizer), "cache": None}
    stages = [stage.model_copy(update={"source": _named(stage.source)}) for stage in recipe.stages]
    return recipe.replace(data=own).model_copy(update={"stages": tuple(stages)})


def _named(source: str | tuple[Part, ...] | None) -> str | tuple[Part, ...] | None:
    if source is None or isinstance(source, str):
        return source and _name(source)
    return tuple(part.model_copy(update={"path": _name(part.path)}) for part in source)


def _name(path: str) -> str:
    """The last part of a path, behind `repositories:` too; `python:source` is one already, as are names of the Hub."""
    if path.startswith(HUB):
        return without_folder(path)
    kind, colon, folder = path.rpartition(":")
    return f"{kind}{colon}{Path(folder).name}"


def _losses(run: Path, step: int) -> dict[str, str]:
    """The last losses up to `step` that the run reported."""
    found: dict[str, str] = {}
    file = run / "metrics.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            record = json.loads(line)
            if record["step"] <= step and "loss" in record:
                name = "held-out loss" if record.get("event") == "eval" else "training loss"
                found[name] = f"{record['loss']:.4f} nats per token at step {record['step']:,}"
        except (ValueError, KeyError, TypeError):
            continue  # the last line of a run that was killed may be torn
    return found
