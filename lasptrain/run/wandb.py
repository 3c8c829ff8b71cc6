"""Weights & Biases: one run there for a run folder, however often it goes on. Needs the extra `wandb`."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lasptrain import files
from lasptrain.console.tables import show
from lasptrain.errors import SetupError
from lasptrain.recipe.schema import Recipe
from lasptrain.run.tracker import Rows

if TYPE_CHECKING:
    import wandb

FILE, FOLDER = "wandb.json", "wandb"
PATIENCE = 30.0  # seconds that a start, and what is still to be sent at the end, may take


class WeightsAndBiases:
    """A tracker that logs to wandb, whose own files are in RUN/wandb. `WANDB_MODE=offline` sends nothing.

    Each value stands at its `step`: those of steps that are trained again stand beside the earlier ones.
    """

    def __init__(self) -> None:
        self._run: wandb.Run | None = None

    def start(self, recipe: Recipe, run: Path) -> None:
        """Begin the run, or go on with it. Raises SetupError where it cannot, and what else wandb raises."""
        try:
            self._begin(recipe, run)
        except OSError as error:  # a disk may be tried again, a start is not
            raise SetupError(str(error)) from error

    def _begin(self, recipe: Recipe, run: Path) -> None:
        import wandb

        settings = wandb.Settings(
            console="off",
            silent=True,
            save_code=False,
            init_timeout=PATIENCE,
            finish_timeout=PATIENCE,
            finish_timeout_raises=True,
        )
        mode = wandb.setup(settings).settings.mode
        kept = mode in ("offline", "dryrun")
        if not kept and mode != "disabled" and not wandb.login(prompt=False, verify=False):
            raise SetupError("found no API key; expected wandb login, WANDB_API_KEY or WANDB_MODE=offline")
        self._run = wandb.init(
            project=recipe.track.project,
            name=recipe.name,
            id=_identity(run / FILE),
            resume="allow",
            dir=run,
            config=recipe.model_dump(mode="json"),
            settings=settings,
        )
        if mode != "disabled":
            show(f"curves     {f'wandb sync {Path(self._run.dir).parent}' if kept else self._run.url}")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log values at a step."""
        self._log({**values, "step": step})

    def table(self, step: int, name: str, rows: Rows) -> None:
        """Log a table at a step."""
        import wandb

        data = [list(row.values()) for row in rows]
        self._log({name: wandb.Table(columns=list(rows[0]), data=data), "step": step})

    def close(self, *, failed: bool = False) -> None:
        """Wait until all is sent, for a while, and end the run."""
        if self._run is not None:
            self._run.finish(exit_code=int(failed))
        self._run = None

    def _log(self, values: dict[str, object]) -> None:
        assert self._run is not None
        self._run.log(values)


def _identity(file: Path) -> str:
    """Return the id that a run folder has at wandb, made at its first start."""
    try:
        return str(json.loads(files.read(file, own=True))["id"])
    except FileNotFoundError:
        identity = secrets.token_hex(4)
        files.replace(file, json.dumps({"id": identity}))
        return identity
