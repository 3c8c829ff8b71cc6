"""What the program computes and writes, seen from its command line: `python -m tests.support.records FILE` records it.

`records.json` was made once, before names and places in the source were changed; `tests/test_records.py` compares.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import tempfile
from math import fsum, sqrt
from pathlib import Path
from typing import Any

import yaml
from safetensors.numpy import load_file

from tests.support.program import start

WORDS = ["the", "of", "and", "to", "in", "that", "was", "with", "for", "not", "he", "this", "have"]
SIZES = {"dim": 32, "layers": 3, "heads": 2, "mlp": 20}
MODELS: dict[str, dict[str, Any]] = {
    "tnl": {"arch": "tnl", "lrpe": [0, 2]},
    "linear_transformer": {"arch": "linear_transformer", "decay": "none", "normalizer": True, "tie": False},
    "ssd": {"arch": "ssd", "data_dependent": True, "decay": "learned", "conv": 4},
    "ssd with softmax": {"arch": "ssd", "softmax": [1], "kv_heads": 1, "sliding_window": 24},
    "retnet": {"arch": "retnet"},
    "minimax": {"arch": "minimax", "softmax": [0], "sliding_window": 24, "alpha": 2.0},
}
TARGETS = {"tnl": "transnormer", "linear_transformer": "linear_attn", "ssd": "hf"}
TARGETS |= {"ssd with softmax": "safetensors", "retnet": "retnet", "minimax": "hf"}
RECORD = "lasptrain_export.json"  # holds the digest of a checkpoint's bits
LAYOUTS = [(ranks, segments) for ranks in (1, 2) for segments in (1, 3)]
COMMANDS = [
    "check RECIPE",
    "plan RECIPE --gpu h200",
    "check RECIPE --set data.window=95 --set mesh.sp=2",
    "check missing.yaml",
    "pretrain RECIPE --unknown",
    "pretrain RECIPE --set data.source=missing --run nodata",
    "pretrain RECIPE --nproc 2 --set mesh.dp=3 --set train.batch=3 --run nomesh",
    "pretrain RECIPE --set optim.lr=1e300 --set model.layers=2 --run nonumber",
    "pretrain RECIPE --set train.seed=5 --run RUN",
    "eval text",
    "ckpt verify text",
    "ckpt verify RUN",
    "convert RUN --to retnet --out nowhere",
    "convert RUN --to safetensors --out RUN-weights",
    "data verify shards",
    "data verify text",
]


def text(folder: Path) -> None:
    """Twelve documents of words, the same everywhere."""
    seed = 1
    lines = []
    for length in range(60, 300, 20):
        words = []
        for _ in range(length):
            seed = (seed * 1103515245 + 12345) & 0x7FFFFFFF
            words.append(WORDS[(seed >> 16) % len(WORDS)])
        lines.append(json.dumps({"text": " ".join(words)}) + "\n")
    folder.mkdir()
    (folder / "words.jsonl").write_text("".join(lines))


def recipe(arch: str) -> dict[str, Any]:
    return {
        "model": MODELS[arch] | SIZES,
        "data": {"source": "shards", "tokenizer": "bytes", "window": 96, "validation": 150_000},
        "optim": {"lr": 1e-2, "warmup": 1},
        "train": {"steps": 3, "batch": 2, "precision": "fp64", "kernel": "chunked"},
        "checkpoint": {"every": 2},
        "eval": {"every": 2, "windows": 2},
    }


class Program:
    """The command line, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *arguments: str) -> None:
        code, printed, said = self.end(*arguments)
        assert code == 0, (arguments, code, printed, said)

    def end(self, *arguments: str) -> tuple[int, str, str]:
        """Exit code, what is printed, and what is said on stderr."""
        return start("lasptrain", *arguments, folder=self.folder, logs=self.folder / "logs").end()

    def codes(self) -> dict[str, int]:
        """The exit code of every one of COMMANDS, on the first run of tnl."""
        names = {"RECIPE": "tnl-1-1.yaml", "RUN": "tnl-1-1", "RUN-weights": "tnl-1-1-weights"}
        return {line: self.end(*(names.get(word, word) for word in line.split()))[0] for line in COMMANDS}

    def prepare(self) -> dict[str, str]:
        """The shards, and the digest of every file of them."""
        text(self.folder / "text")
        self("data", "prepare", "text", "--tokenizer", "bytes", "--out", "shards", "--validation", "150000")
        return digests(self.folder / "shards")

    def train(self, arch: str, ranks: int, segments: int) -> dict[str, Any]:
        """What a run of three steps shows and leaves, and the same as an export."""
        name = f"{arch.replace(' ', '-')}-{ranks}-{segments}"
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe(arch)))
        keys = [f"mesh.sp={ranks}", "mesh.dp=1", f"train.segment={96 // segments}"]
        options = [word for key in keys for word in ("--set", key)]
        self("pretrain", f"{name}.yaml", "--nproc", str(ranks), "--run", name, *options)
        rows = [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]
        steps = [row for row in rows if "event" not in row]
        found: dict[str, Any] = {
            "loss": [row["loss"] for row in steps],
            "grad_norm": [row["grad_norm"] for row in steps],
            "validation": [row["loss"] for row in rows if row.get("event") == "eval"],
            "keys": sorted({f"{row.get('event', 'step')}: {' '.join(sorted(row))}" for row in rows}),
        }
        self("convert", name, "--to", "safetensors", "--out", f"{name}-weights", "--no-verify")
        found["parameters"] = parameters(self.folder / f"{name}-weights")
        return found

    def export(self, arch: str) -> dict[str, Any]:
        """The files of an export of the run on one rank in one segment; of weights their names, sums and norms."""
        name = f"{arch.replace(' ', '-')}-1-1"
        self("convert", name, "--to", TARGETS[arch], "--out", f"{name}-export", "--no-verify")
        out = self.folder / f"{name}-export"
        return {"files": digests(out, but=(".safetensors", ".md", RECORD)), "weights": parameters(out)}


def digests(folder: Path, but: tuple[str, ...] = ()) -> dict[str, str]:
    """SHA-256 of every file."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.endswith(but))
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def parameters(folder: Path) -> dict[str, list[Any]]:
    """Shape, dtype, sum and norm of every tensor in a folder's safetensors, and the digest of its bits."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, value in load_file(file).items():
            numbers = [float(x) for x in value.ravel()]
            bits = hashlib.sha256(struct.pack(f"{len(numbers)}d", *numbers)).hexdigest()
            norm = sqrt(fsum(x * x for x in numbers))
            found[name] = [list(value.shape), str(value.dtype), fsum(numbers), norm, bits]
    return dict(sorted(found.items()))


def record() -> dict[str, Any]:
    """All of it."""
    with tempfile.TemporaryDirectory() as folder:
        program = Program(Path(folder))
        found: dict[str, Any] = {"shards": program.prepare(), "runs": {}, "exports": {}}
        for arch in MODELS:
            for ranks, segments in LAYOUTS:
                found["runs"][f"{arch}, {ranks} ranks, {segments} segments"] = program.train(arch, ranks, segments)
            found["exports"][arch] = program.export(arch)
        found["codes"] = program.codes()
    return found


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(record(), indent=1) + "\n")
