"""The findings of a proof: a table for people, and a file with every number, the hardware, versions and digests."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.padding import Padding
from rich.table import Table

import lasptrain
from lasptrain import files
from lasptrain.certify.check import Check
from lasptrain.certify.trial import Size, Trial
from lasptrain.console.tables import number
from lasptrain.parallel.mesh import device_name
from lasptrain.recipe.schema import Recipe
from lasptrain.recipe.yaml12 import dump

FORMAT = 1
WIDEST = 84  # of a column, for a table of 120 columns
PACKAGES = ("lasptrain", "torch", "triton", "numpy", "safetensors", "transformers", "flash-linear-attention")


@dataclass(frozen=True)
class Certificate:
    """The checks of a recipe on some ranks; `smallest`, by name of a check that fails, the smallest layout it needs."""

    recipe: Recipe  # as it was given
    trial: Trial  # as it was run
    ranks: int
    sizes: list[Size]
    checks: list[Check]
    smallest: dict[str, str]
    seconds: float
    peak: int  # bytes of memory: of the rank whose GPU held most, or of all ranks together on CPUs; 0: not known

    @property
    def holds(self) -> bool:
        """True if something was checked and nothing failed."""
        verdicts = {one.verdict for one in self.checks}
        return "holds" in verdicts and "fails" not in verdicts

    def summary(self) -> str:
        """Return the verdict in a line."""
        counts = Counter(one.verdict for one in self.checks)
        told = [f"{counts['holds']} comparisons hold", f"{counts['fails']} fail", f"{counts['not run']} not run"]
        verdict = "CERTIFIED" if self.holds else "NOT CERTIFIED"
        if self.holds and (unknown := self.unproved()):
            verdict += f", but for {', '.join(unknown)}"
        return f"{verdict}: {', '.join(told)}, in {self.seconds:.0f} s and {self.peak / 2**30:.1f} GiB"

    def unproved(self) -> list[str]:
        """Return the checks of which no comparison was run."""
        run = {one.check for one in self.checks if one.verdict != "not run"}
        return [name for name in dict.fromkeys(one.check for one in self.checks) if name not in run]

    def lines(self) -> list[str]:
        """Return the verdict, and the smallest layouts that show what failed."""
        return [
            self.summary(),
            *(f"{check}: the smallest layout that fails: {told}" for check, told in self.smallest.items()),
        ]

    def table(self) -> Table:
        """Return the checks as a table."""
        mesh, kind = self.trial.recipe.mesh, self.trial.recipe.parallel.data_parallel
        scan = f", {mesh.scan}" if mesh.sp != 1 else ""
        where = f"{self.ranks} × {device_name()}, dp {mesh.dp} × sp {mesh.sp}{scan}, {kind}"
        table = Table(title=f"{self.recipe.name}: {where};\n{'; '.join(map(str, self.sizes))}")
        table.add_column("compared", max_width=WIDEST, overflow="fold")  # nothing of a parameter's name is lost
        for column in ("error", "tolerance"):
            table.add_column(column, justify="right")
        table.add_column("verdict")
        last, beside = None, None
        for one in self.checks:
            if one.check != last:
                table.add_section()
            if (one.check, one.reference) != (last, beside):
                table.add_row(f"{one.check}, with: {one.reference}")
            place = one.note if one.verdict == "not run" else _place(one)
            told = Padding("; ".join(filter(None, (one.compared, place))), (0, 0, 0, 2))
            table.add_row(told, number(one.error, ".1e"), number(one.tolerance, ".1e"), one.verdict)
            last, beside = one.check, one.reference
        return table

    def write(self, file: Path) -> None:
        """Write everything as JSON."""
        files.replace(file, json.dumps(self.content(), indent=1, allow_nan=False) + "\n")

    def content(self) -> dict[str, Any]:
        """Return everything as JSON; errors that are not finite as text."""
        given = dump(self.recipe)
        return {
            "format": FORMAT,
            "verdict": "holds" if self.holds else "fails",
            "summary": self.summary(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(self.seconds, 1),
            "hardware": hardware(self.ranks),
            "versions": versions(),
            "code_sha256": code_digest(),
            "recipe_sha256": hashlib.sha256(given.encode()).hexdigest(),
            "recipe": given,
            "certified_recipe": dump(self.trial.recipe),
            "memory": {"planned": self.trial.planned, "peak": self.peak},
            "sizes": [size._asdict() for size in self.sizes],
            "checks": [{key: _finite(value) for key, value in one._asdict().items()} for one in self.checks],
            "smallest": self.smallest,
        }


def _place(one: Check) -> str:
    """Return where the largest error is, and of a failure everything that is known."""
    parts = [one.where() if one.error else "", one.note if one.verdict == "fails" else ""]
    return "; ".join(part for part in parts if part)


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and value - value != 0 else value


def hardware(ranks: int) -> dict[str, Any]:
    """Return what the ranks ran on."""
    return {
        "ranks": ranks,
        "device": device_name(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that compute, those that are installed."""
    found = {"python": platform.python_version(), "lasptrain": lasptrain.__version__}
    for package in PACKAGES[1:]:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def code_digest() -> str:
    """Return the SHA-256 over the names and contents of the package's own files of Python."""
    root = Path(lasptrain.__file__).parent
    digest = hashlib.sha256()
    for folder in (root, root.parent / "data_tools"):
        for file in sorted(folder.rglob("*.py")):
            digest.update(f"{file.relative_to(root.parent).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()
