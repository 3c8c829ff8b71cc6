"""Laws 2 and 4 through the front door: runs that are killed, resumed, moved to another mesh, or fed nonsense."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from data_tools.dataset import open_dataset
from lasptrain import train
from lasptrain.checkpoint.steps import compare_meta
from lasptrain.cli.main import app
from lasptrain.console import stdio
from lasptrain.console.tables import figures
from lasptrain.data.loader import Slice
from lasptrain.errors import CheckpointError, NumericalError, RecipeError
from lasptrain.models.language_model import Output
from lasptrain.ops.cross_entropy import IGNORED
from lasptrain.parallel import mesh as meshes
from lasptrain.recipe.loading import load
from lasptrain.recipe.schema import Recipe
from lasptrain.recipe.sections import Parallel, Part
from lasptrain.run import auto
from lasptrain.run.metrics import Metrics, read_metrics
from lasptrain.training.job import build, fingerprint_of
from tests.recipe.test_recipe import RECIPES
from tests.support import program
from tests.support.gloo import PATIENCE, spawn
from tests.support.program import Started

RECIPE = """
model: {arch: tnl, dim: 16, layers: 2, heads: 2, mlp: 24}
data: {source: SOURCE, tokenizer: bytes, window: 240, cache: CACHE, validation: 300000}
optim: {lr: 1e-2, schedule: constant}
train: {steps: 6, batch: 4, precision: fp32}
checkpoint: {every: 2, keep: 2}
eval: {every: 3, windows: 2, sample: 4}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, and text enough for it."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "text").mkdir()
    for i in range(40):
        (folder / "text" / f"{i}.txt").write_text(f"Document {i} counts: " + " ".join(str(i * j) for j in range(i * 5)))
    text = RECIPE.replace("SOURCE", str(folder / "text")).replace("CACHE", str(folder / "cache"))
    (folder / "tiny.yaml").write_text(text)
    return folder


def start(folder: Path, *arguments: str) -> Started:
    command = ["lasptrain", "pretrain", "tiny.yaml", *arguments]
    return program.start(*command, folder=folder, logs=folder / "logs", OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")


def pretrain(folder: Path, run: str, *arguments: str) -> str:
    code, printed, said = start(folder, "--run", run, *arguments).end()
    assert code == 0, printed + said
    return printed


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["full", "gone"])
def test_training_outlives_the_reader_of_its_output(folder: Path, reader: str) -> None:
    command = [sys.executable, "-m", "lasptrain", "pretrain", "tiny.yaml", "--run", reader]
    environment = os.environ | {"PYTHONPATH": str(program.ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    reading, writing = os.pipe()
    os.close(reading)
    with Path("/dev/full").open("w") as full:
        output = full if reader == "full" else writing
        done = subprocess.run(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / reader / "status.json").read_text())["state"] == "finished"


def test_too_little_held_out_text_is_refused_before_the_run_begins(folder: Path) -> None:
    """By `check` too, in the same words."""
    text, tokens = folder / "text", open_dataset(load(folder / "tiny.yaml").data).split("validation").tokens
    for asked, window in ((2, 24000), (100, 240)):
        changes = ("mesh.sp=8", f"eval.windows={asked}", f"eval.window={window}")
        options = ["--nproc", "8", *(part for change in changes for part in ("--set", change))]
        code, _, said = start(folder, "--run", "short", *options).end()
        fit, longest = tokens // window, max(n for n in range(8, tokens, 8) if tokens // n >= asked)
        assert code == 3 and said == (
            f"error: eval.windows: found {asked} of {window:,} tokens, but {fit} fit into the {tokens:,} tokens of "
            f"{text} that are held out; expected eval.windows: {fit} or eval.window: {longest} at most, or more held "
            "out by data.validation (prepare --validation)\n"
        )
        assert not (folder / "short").exists()
        checked = program.start("lasptrain", "check", "tiny.yaml", *options, folder=folder, logs=folder / "logs").end()
        assert checked == (3, "", said)


def test_a_text_of_one_document_trains_without_a_held_out_loss(folder: Path) -> None:
    (folder / "one.txt").write_text("One document counts: " + " ".join(map(str, range(2000))))
    one = ["--set", "data.source=one.txt", "--set", "data.validation=0", "--set", "train.steps=2"]
    code, _, said = start(folder, "--run", "one", *one).end()
    assert (
        code == 3 and "0 fit into the 0 tokens of one.txt that are held out; expected eval.windows: 0 at most" in said
    )
    pretrain(folder, "one", *one, "--set", "eval.windows=0")
    assert [record.get("event") for record in read_metrics(folder / "one")] == [None, None]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run)]


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> list[float]:
    output = pretrain(folder, "undisturbed")
    assert "unigram entropy" in output and "committed step 6" in output
    found = losses(folder / "undisturbed")
    assert len(found) == 6 and found[-1] < found[0]
    return found


@pytest.mark.slow
@pytest.mark.fault("kill -9 or a signal at a random time of a whole run")
def test_a_killed_run_continues_bitwise(folder: Path, undisturbed: list[float]) -> None:
    process = start(folder, "--run", "killed", "--set", "checkpoint.every=2")
    metrics = folder / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + PATIENCE
    while not (metrics.exists() and metrics.read_text().count('"grad_norm"') >= 3):
        assert time.monotonic() < deadline and process.process.is_alive()
        time.sleep(0.001)
    process.send(signal.SIGKILL)
    process.end()
    assert not (folder / "killed" / "checkpoints" / "step-6").exists()
    pretrain(folder, "killed")
    assert losses(folder / "killed") == undisturbed


@pytest.mark.slow
def test_a_run_continues_on_another_mesh(folder: Path, undisturbed: list[float]) -> None:
    shutil.copytree(folder / "undisturbed", folder / "moved")  # as it was after step 4
    shutil.rmtree(folder / "moved" / "checkpoints" / "step-6")
    pretrain(folder, "moved", "--set", "train.steps=5", "--nproc", "3", "--set", "mesh.sp=3", "--set", "mesh.scan=ring")
    pretrain(folder, "moved", "--nproc", "2", "--set", "mesh.dp=2", "--set", "parallel.data_parallel=ddp")
    resumed = [line for line in (folder / "moved" / "metrics.jsonl").read_text().splitlines() if "resumed" in line]
    assert [json.loads(line)["step"] for line in resumed] == [4, 5]
    assert losses(folder / "moved") == pytest.approx(undisturbed, rel=2e-5)


MOVES = (
    # Update, kind of data parallelism, dp, sp, tokens of a segment: every kind is written and read by another one.
    (1, "zero1", 2, 2, 120),
    (2, "zero2", 1, 4, 120),
    (3, "hsdp", 2, 2, 120),
    (4, "zero1", 1, 4, 80),
    (5, "zero3", 2, 2, 80),
    (6, "zero1", 4, 1, 240),
)


def move(rank: int, world: int, file: Path, run: Path) -> None:
    """Train on one mesh, then to each update of MOVES on another one, in one life of the ranks."""
    train.train(load(file, ["mesh.dp=2", "mesh.sp=2", "train.segment=120"]), run.with_name("mesh"))
    for steps, kind, dp, sp, segment in MOVES:
        overrides = [f"parallel.data_parallel={kind}", f"mesh.dp={dp}", f"mesh.sp={sp}", f"train.segment={segment}"]
        overrides += [f"train.steps={steps}", "checkpoint.every=1", "optim.clip=0.05"]
        overrides += ["mesh.scan=all_scan", "parallel.reduce=segment"] if kind == "hsdp" else []
        train.train(load(file, overrides), run)


@pytest.mark.slow
def test_a_mesh_is_one_device_and_every_kind_of_data_parallelism_continues_every_other(
    folder: Path, group: None, undisturbed: list[float]
) -> None:
    for run in ("mesh", "kinds", "clipped"):
        (folder / run).mkdir()
    train.train(load(folder / "tiny.yaml", ["optim.clip=0.05"]), folder / "clipped")
    spawn(4, move, folder / "tiny.yaml", folder / "kinds")
    assert losses(folder / "mesh") == pytest.approx(undisturbed, rel=2e-5)
    for key in ("loss", "grad_norm"):
        found, want = ([record[key] for record in read_metrics(folder / run)] for run in ("kinds", "clipped"))
        assert found == pytest.approx(want, rel=2e-5), key
    assert min(want) > 0.05  # so that every update was clipped
    for step in (3, 6):
        found, want = (
            next(record["loss"] for record in read_metrics(folder / run, "eval") if record["step"] == step)
            for run in ("kinds", "clipped")
        )
        assert found == pytest.approx(want, rel=2e-5)


@pytest.mark.slow
def test_two_launchers_make_one_mesh(folder: Path, undisturbed: list[float]) -> None:
    common = ["--run", "nodes", "--nnodes", "2", "--nproc", "1", "--rdzv", f"127.0.0.1:{free_port()}"]
    nodes = [start(folder, *common, "--node-rank", str(rank)) for rank in (0, 1)]
    ends = [node.end() for node in nodes]
    assert [code for code, *_ in ends] == [0, 0], ends
    assert losses(folder / "nodes") == pytest.approx(undisturbed, rel=2e-5)


@pytest.mark.slow
def test_a_new_run_begins_with_the_weights_of_another(folder: Path, undisturbed: list[float]) -> None:
    """On another mesh too; with an order of windows that the old run may not have."""
    new = ["--from", "undisturbed@4", "--with-optimizer", "--nproc", "2", "--set", "data.seed=1"]
    said = pretrain(folder, "new", *new, "--set", "train.steps=1")
    assert f"begins with the weights and the optimizer of {folder}/undisturbed@4\n" in said
    assert losses(folder / "new")[0] < undisturbed[0]


def poisoned(rank: int, world: int, recipe: Recipe) -> bool:
    job = build(recipe)
    train.train_step(job, 0)
    with torch.no_grad():
        dict(job.model.named_parameters())["layers.0.mixer.out.weight"].fill_(float("nan") if rank == 1 else 1.0)
    before = [p.detach().clone() for p in job.model.parameters()]
    with pytest.raises(NumericalError, match="step 2"):
        train.train_step(job, 1)
    return all(
        torch.equal(a, b.detach()) or a.isnan().any() for a, b in zip(before, job.model.parameters(), strict=True)
    )


@pytest.mark.fault("a loss that is no number, or a spike")
def test_a_loss_that_is_no_number_stops_before_the_update(folder: Path) -> None:
    recipe = load(folder / "tiny.yaml", ["parallel.data_parallel=ddp"])
    assert spawn(2, poisoned, recipe) == [True, True]


class _Counts(nn.Module):
    """A model whose loss is its only weight times the number of labels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, tokens: Tensor, labels: Tensor, *_: Any, **__: Any) -> Output:
        return Output(self.weight * (labels != IGNORED).sum(), [])


def test_labels_are_counted_exactly_however_many_there_are(group: None) -> None:
    """One more than there are integers in fp32, and a number by which fp32 cannot divide exactly."""
    for count in ((1 << 24) + 1, 3):
        model = _Counts()
        labels = torch.zeros((), dtype=torch.int64).expand(1, count)
        micro_batch = (Slice(labels, labels, None),)
        loss, _ = train.gradients(model, 0, meshes.build(1, 1), Parallel(data_parallel="ddp"), [micro_batch])
        assert model.weight.grad is not None
        assert [float(loss), float(model.weight.grad)] == pytest.approx([1, 1], rel=1e-15, abs=0), count


@pytest.mark.parametrize("window", [240, 128])
def test_held_out_loss_is_told_by_position_and_per_byte(folder: Path, group: None, tmp_path: Path, window: int) -> None:
    """In segments as of whole windows; the same in JSON lines and in TensorBoard. No number is of a window's last token
    alone.
    """
    job = build(load(folder / "tiny.yaml", [f"data.window={window}", f"train.segment={window // 4}"]))
    found = train.evaluate(job)
    job.loader.close()
    by_position, sizes = defaultdict[int, list[float]](list), 0
    for start in (0, window):
        row = job.dataset.whole("validation").read(start, window + 1)
        doc_ids = (row[:-1] == job.dataset.bos).cumsum(0).int()
        with torch.no_grad():
            out = job.model(
                row[None, :-1], row[None, 1:], doc_ids[None], None, output_final_state=False, per_token=True
            )
        for position, loss in enumerate(out.loss.flatten().tolist(), 1):
            by_position[1 << (min(position, window - 1).bit_length() - 1)].append(loss)
        sizes += int(job.dataset.token_bytes[row[1:]].sum())
    assert found is not None
    wanted = {f"loss_at_{start}": fmean(losses) for start, losses in by_position.items()}
    total = sum(sum(losses) for losses in by_position.values())
    wanted |= {"loss": total / 2 / window, "bits_per_byte": total / math.log(2) / sizes}
    with Metrics(tmp_path, steps=3) as metrics:
        metrics.log_eval(3, **found.scalars())
    (record,) = read_metrics(tmp_path, "eval")
    assert {key: record[key] for key in wanted} == pytest.approx(wanted, rel=1e-5) and len(wanted) == (
        10 if window == 240 else 9
    )
    assert len(by_position[64]) == 2 * (64 if window == 240 else 65)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = {key: events.Scalars(f"eval/{key}")[0].value for key in wanted}
    assert shown == pytest.approx(wanted, rel=1e-5)


def test_epochs_and_jumps_of_the_learning_rate_are_told(
    folder: Path, group: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "again").mkdir()
    changes = ["optim.schedule=cosine", "data.validation=900000", "eval.every=0", "train.steps=3"]
    train.train(load(folder / "tiny.yaml", changes), folder / "again")
    first = capsys.readouterr().out
    changes[-1] = "train.steps=6"
    recipe = load(folder / "tiny.yaml", changes)
    train.train(recipe, folder / "again")
    second = capsys.readouterr().out
    source = folder / "text"
    tokens = open_dataset(recipe.data).whole("train").tokens
    windows = tokens // 240
    assert f"training reads {figures(12 / windows)} epochs of {source}: {tokens:,} tokens" in first
    starts = {step: epoch for epoch in range(2, 9) if (step := (epoch - 1) * windows // 4 + 1) <= 6}
    said = re.findall(r"epoch (\d+) begins at step (\d+): (.*)", first + second)
    assert said == [(str(epoch), str(step), str(source)) for step, epoch in starts.items()] and len(said) > 1
    events = read_metrics(folder / "again", "epoch")
    assert [(event["step"], event["epochs"]) for event in events] == [(s, {str(source): e}) for s, e in starts.items()]
    assert "learning rate" not in first.split("continue")[0]
    assert "--set train.steps=6; schedule cosine then raises the learning rate again" in first
    assert "learning rate of step 4: 5.00e-03 with train.steps = 6, 0.00e+00 with the 3 before" in second
    app(["check", str(folder / "tiny.yaml"), *(f"--set={change}" for change in changes)], standalone_mode=False)
    assert f" {figures(24 / windows)} epochs of {source}: {tokens:,} tokens" in capsys.readouterr().out


def test_chosen_steps_are_profiled(folder: Path, group: None) -> None:
    (folder / "profiled").mkdir()
    chosen = ["train.steps=2", "train.profile=[2]", "eval.every=0"]
    train.train(load(folder / "tiny.yaml", chosen), folder / "profiled")
    (trace,) = (folder / "profiled" / "profile").iterdir()
    assert trace.name == "step-2.json.gz"
    with gzip.open(trace, "rt") as file:
        assert any("lasptrain::attend" in event.get("name", "") for event in json.load(file)["traceEvents"])


def test_what_auto_came_to_is_kept_for_the_next_start(tmp_path: Path) -> None:
    recipe, prefix = load(RECIPES / "quickstart.yaml"), {"prefix": "sharded", "outputs": "again"}
    auto.store(recipe, tmp_path, "1 × 2 × CPU", {"segment": 4096, "reduce": "step", "scan": "all_gather", **prefix})
    found = auto.load(recipe, tmp_path, "1 × 2 × CPU")
    assert (found.train.segment, found.parallel.reduce, found.mesh.scan) == (4096, "step", "all_gather")
    given = load(RECIPES / "quickstart.yaml", ["train.segment=2048"])
    assert auto.load(given, tmp_path, "1 × 2 × CPU").train.segment == 2048  # what is said outright stands
    assert auto.load(recipe, tmp_path, "2 × 2 × CPU") == recipe
    for damaged in ("{", '{"place": "1 × 2 × CPU", "values": {"scan": "guess"}}', '{"place": "1 × 2 × CPU"}'):
        (tmp_path / auto.FILE).write_text(damaged)
        assert auto.load(recipe, tmp_path, "1 × 2 × CPU") == recipe


@pytest.mark.slow
def test_a_run_is_the_same_in_any_environment(folder: Path, undisturbed: list[float]) -> None:
    """No home, no UTF-8, another clock and other hashes; data prepared there too."""
    strange = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "TZ": "Pacific/Kiritimati"}
    strange |= {"PATH": os.environ["PATH"], "PYTHONHASHSEED": "7", "PYTHONPATH": str(program.ROOT)}
    command = [sys.executable, "-m", "lasptrain", "pretrain", "tiny.yaml", "--run", "strange"]
    command += ["--set", f"data.cache={folder / 'elsewhere'}"]
    done = subprocess.run(command, cwd=folder, env=strange, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and "committed step 6" in done.stdout
    assert losses(folder / "strange") == undisturbed


def test_an_argument_is_text_in_any_locale() -> None:
    assert stdio.argument("--prompt", os.fsdecode("größer".encode())) == "größer"
    with pytest.raises(RecipeError, match="--prompt: found bytes that are not UTF-8"):
        stdio.argument("--prompt", os.fsdecode(b"\xff"))


def test_a_run_that_mixed_its_sources_in_another_order_is_told_how_to_go_on(folder: Path, group: None) -> None:
    recipe = load(folder / "tiny.yaml")
    sources = (Part(path=str(recipe.data.source), weight=1), Part(path=str(folder / "text" / "39.txt"), weight=1))
    job = build(recipe.replace(data={"source": sources, "repeat": True, "validation": 0}))
    job.loader.close()
    now = fingerprint_of(job, 3)
    order = {key: value for key, value in now["order"].items() if key != "mixed"}
    assert order == fingerprint_of(job, 0)["order"]  # of weights that have read nothing
    compare_meta(folder, now, now)
    with pytest.raises(CheckpointError, match=r"order\.mixed: None.*\n.* pretrain --from that run goes on"):
        compare_meta(folder, now, now | {"order": order})
