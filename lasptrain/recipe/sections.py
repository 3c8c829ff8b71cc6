"""The sections of a recipe: every key, what it means, what fits, and its default. Nothing here imports torch."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from lasptrain.architectures.section import Count, Fraction, Index, Problem, Section, Seed, Text, as_tuple, optional
from lasptrain.architectures.stack import Recompute
from lasptrain.files import at_home

FilePath = Annotated[Text, AfterValidator(at_home)]  # may begin with `~`


class Part(Section):
    """One of several sources; `weight` sets its share of the windows."""

    path: FilePath = Field(description="a source, as text")
    weight: Annotated[float, Field(gt=0, le=1e9)] = Field(description="a share of the windows, relative to the others")


Source = Annotated[
    Annotated[FilePath, Tag("text")] | Annotated[tuple[Part, ...], Tag("parts")],
    Discriminator(lambda value: "parts" if isinstance(value, tuple) else "text"),
    BeforeValidator(as_tuple),
]


class Data(Section):
    """The training data: one stream of documents, cut into windows; or several, mixed."""

    source: Source = optional(
        "python:source",
        "a prepared folder, text to prepare, hf:NAME (a dataset), or the Python library's own source; or several, "
        "each with path and weight",
    )
    mix_block: Count = optional(1024, "windows over which several sources have exactly their shares")
    field: Text = optional("text", "the key, or the.path.of.keys, of rows that holds the text")
    tokenizer: FilePath = optional(
        "tokenizers/python-4k.model",
        "a .model, a tokenizer.json, a folder that holds one, or bytes",
    )
    window: Count = Field(description="tokens of a training sequence, such as 8192")  # `seq_len` elsewhere
    seed: Seed = optional(0, "of the order of windows")
    validation: Annotated[int, Field(ge=0, lt=1_000_000)] = optional(20_000, "documents held out, per million")
    packing: Literal["concat", "best_fit"] = optional(
        "concat",
        "documents one after another; or best_fit: windows of whole documents, no padding",
    )
    long_documents: Literal["continue", "cut"] = optional(
        "continue", "best_fit: what exceeds a window heads another, or is left out"
    )
    reset_at_documents: bool = optional(True, "a document never sees another")
    repeat: bool = optional(False, "fill a window that is longer than the corpus by reading it again")
    cache: FilePath | None = optional(None, "where prepared shards are kept; ${XDG_CACHE_HOME:-~/.cache}/lasptrain")

    def problems(self) -> Iterator[Problem]:
        """Yield a missing source, or documents cut by a packing that cuts none."""
        if not self.source:
            yield "data.source", "found []; expected text, or sources each with path and weight"
        if self.long_documents == "cut" and self.packing != "best_fit":
            yield "data.long_documents", f"found 'cut' with packing: {self.packing}; only best_fit cuts documents"
        if self.packing == "best_fit" and self.window < 2:
            yield "data.window", f"found {self.window} with packing: best_fit; expected 2 tokens or more"


class Mesh(Section):
    """The dp × sp mesh of ranks; sp is context parallelism elsewhere. `mesh: auto` makes both axes auto."""

    dp: Count | Literal["auto"] = optional(
        "auto", "groups of ranks that each have windows of their own; auto: as many as train.batch keeps busy"
    )
    sp: Count | Literal["auto"] = optional("auto", "ranks that share a window (context parallelism); auto: the others")
    scan: Literal["auto", "ring", "all_gather", "all_scan"] = optional(
        "auto",
        "how states cross ranks: LASP, LASP-2, ZeCO; auto: the cheapest",
    )

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, value: Any) -> Any:
        return {} if value == "auto" else value


REPLICATED = ("ddp", "zero1")  # kinds of data parallelism whose parameters and gradients are whole on every rank


class Parallel(Section):
    """Sharding of parameters and gradients, and recomputation of activations."""

    data_parallel: Literal["ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp"] = optional(
        "zero3",
        "sharded over ranks: ddp nothing, zero1 the optimizer, zero2 and zero3 (or fsdp) everything, but zero2 "
        "gathers parameters once per update; hsdp shards everything over sp and replicates it over dp",
    )
    recompute: Recompute = optional(
        "none",
        "activations that are kept: none, all; full, a block's input; selective, also the outputs of matrix products "
        "and mixers; offload, all, in host memory",
    )
    reduce: Literal["auto", "step", "segment"] = optional("auto", "when gradients are summed over ranks")
    prefix: Literal["auto", "gathered", "sharded", "host"] = optional(
        "auto",
        "keys and values of a window in softmax layers that see all of it: gathered on every rank, sharded over "
        "the ranks that share it, or sharded in host memory; auto: the first that fits",
    )
    outputs: Literal["auto", "host", "again"] = optional(
        "auto",
        "outputs of such layers in all segments but the last: kept in host memory for a window's second pass, or "
        "computed again; auto: kept where they fit",
    )

    def problems(self) -> Iterator[Problem]:
        """Yield a reduction per segment where gradients are not sharded."""
        if self.reduce == "segment" and self.data_parallel in REPLICATED:
            found = f"found 'segment' with data_parallel: {self.data_parallel}"
            yield "parallel.reduce", f"{found}; it saves memory with zero2, zero3 and hsdp"


class Optim(Section):
    """The optimizer and its learning rate as a function of step."""

    kind: Literal["adamw", "muon"] = optional(
        "adamw",
        "muon: the momentum of each matrix of a layer is orthogonalised, all else has AdamW; for the same "
        "learning rates",
    )
    lr: Annotated[float, Field(gt=0, le=10)] = Field(description="a learning rate, such as 5e-4")
    min_lr: Fraction = optional(0.0, "the learning rate at the end, as a fraction of lr")
    schedule: Literal["cosine", "wsd", "constant"] = optional("cosine", "of the learning rate after the warm-up")
    warmup: Index = optional(0, "steps over which the learning rate rises")
    decay: Count | None = optional(None, "wsd: steps of the final decay; a fifth of all steps if not given")
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], BeforeValidator(as_tuple)
    ] = optional((0.9, 0.95), "of AdamW: decay of the first and of the second moment")
    eps: Annotated[float, Field(gt=0, le=1)] = optional(1e-8, "of AdamW")
    momentum: Annotated[float, Field(ge=0, lt=1)] = optional(0.95, "muon: of matrices")
    weight_decay: Annotated[float, Field(ge=0, le=10)] = optional(0.1, "of matrices, decoupled")
    clip: Annotated[float, Field(ge=0)] = optional(1.0, "largest gradient norm; 0 is off")

    def problems(self) -> Iterator[Problem]:
        """Yield a final decay where the schedule has none, and a momentum where the optimizer has none."""
        if self.decay is not None and self.schedule != "wsd":
            yield "optim.decay", f"found {self.decay}; only schedule: wsd has a final decay, leave it out"
        if self.momentum != Optim.model_fields["momentum"].default and self.kind != "muon":
            yield "optim.momentum", f"found {self.momentum:g}; only kind: muon has one, AdamW has optim.betas"


class Train(Section):
    """Length, batch, precision and kernel of training."""

    steps: Count = Field(description="the number of optimizer steps, such as 1000")
    batch: Count = optional(1, "windows per optimizer step, over all ranks")
    micro_batch: Count = optional(1, "windows per rank and forward")
    precision: Literal["bf16", "fp32", "fp64"] = optional("bf16", "of activations and matrix products")
    segment: Count | Literal["auto"] = optional("auto", "tokens of a window that are on the GPUs at one time")
    compile: bool = optional(False, "compile the layers with torch.compile")
    kernel: Literal["auto", "reference", "chunked", "triton"] = optional(
        "auto",
        "implementation of the recurrence; auto: the fastest there is",
    )
    seed: Seed = optional(0, "of the weights")
    loss_chunk: Count = optional(2048, "tokens whose logits exist at one time")
    z_loss: Annotated[float, Field(ge=0, le=1)] = optional(
        0.0,
        "factor of log² Z in the loss, Z being the softmax's denominator, mean over labels: keeps logits from drifting",
    )
    profile: Annotated[tuple[Count, ...], BeforeValidator(as_tuple)] = optional(
        (), "steps whose trace goes to RUN/profile"
    )

    def problems(self) -> Iterator[Problem]:
        """Yield a kernel that cannot compute in the precision."""
        if self.kernel == "triton" and self.precision == "fp64":
            yield "train.kernel", "found 'triton' with train.precision = fp64; expected chunked or reference"


class Stage(Section):
    """A number of steps, and keys that have another value in them; the others are as the recipe says."""

    steps: Count = Field(description="the number of optimizer steps of the stage, such as 1000")
    window: Count | None = optional(None, "in place of data.window, which is that of the longest stage")
    source: Source | None = optional(None, "in place of data.source")
    batch: Count | None = optional(None, "in place of train.batch")
    micro_batch: Count | None = optional(None, "in place of train.micro_batch")
    segment: Count | Literal["auto"] | None = optional(None, "in place of train.segment")
    lr: Annotated[float, Field(gt=0, le=10)] | None = optional(None, "in place of optim.lr; the schedule goes on")
    dp: Count | Literal["auto"] | None = optional(None, "in place of mesh.dp")
    sp: Count | Literal["auto"] | None = optional(None, "in place of mesh.sp; auto: each stage has its own")

    @property
    def keys(self) -> dict[str, Any]:
        """The keys that have another value, by the names that they have in the recipe's sections."""
        return {name: value for key, name in OVERRIDDEN.items() if (value := getattr(self, key)) is not None}


OVERRIDDEN = {  # key of a stage: of the recipe
    "window": "data.window",
    "source": "data.source",
    "batch": "train.batch",
    "micro_batch": "train.micro_batch",
    "segment": "train.segment",
    "lr": "optim.lr",
    "dp": "mesh.dp",
    "sp": "mesh.sp",
}


class Checkpoint(Section):
    """The schedule of checkpoints, and how many are kept."""

    every: Count = optional(100, "steps between checkpoints")
    keep: Count = optional(2, "newest checkpoints that stay")
    keep_every: Index = optional(0, "steps whose multiples stay for good; 0: none")
    max_failures: Index = optional(2, "saves in a row that may fail before the run ends")


class Guard(Section):
    """The response to a step whose loss or gradient norm is not finite, or whose norm is a spike.

    stop: end the run; its weights are those of the step before, saved. skip: leave the step out. rollback: go back to
    the weights of a checkpoint at least `back` steps older and on with the data that follows.
    """

    nonfinite: Literal["stop", "skip", "rollback"] = optional(
        "stop",
        "what follows a loss or gradient norm that is not finite",
    )
    spike: Literal["ignore", "warn", "stop", "skip", "rollback"] = optional(
        "ignore",
        "what follows a gradient norm that is a spike",
    )
    factor: Annotated[float, Field(gt=1, le=1e6)] = optional(
        10.0,
        "a spike is that many times the median of the last 64 norms",
    )
    back: Count = optional(100, "rollback: steps that the checkpoint is older, at least")
    limit: Count = optional(3, "steps in a row that may be left out")


Task = Literal[
    "passkey",
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "kv_retrieval",
    "pairs",
    "copy",
    "mqar",
]


class Eval(Section):
    """Loss on held-out documents while training, and long-context tasks."""

    every: Index = optional(50, "steps between measurements of the held-out loss; 0: only at the end")
    windows: Index = optional(4, "held-out windows; 0: no text is held out, and no loss of it measured")
    window: Count | None = optional(None, "tokens of a held-out window; data.window if not given")
    sample: Index = optional(64, "tokens continued by the model in the summary")
    tasks: Annotated[tuple[Task, ...], BeforeValidator(as_tuple)] = optional(
        (),
        "long-context tasks, run whenever the held-out loss is measured",
    )
    lengths: Annotated[tuple[Count, ...], BeforeValidator(as_tuple)] = optional(
        (), "tokens of the tasks' texts; data.window if not given"
    )
    samples: Count = optional(5, "questions of each task and length")


class Track(Section):
    """Programs that show curves, tables and samples of a run, and signals of its health beside the loss."""

    trackers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(as_tuple)] = optional(
        ("tensorboard",),
        "programs that show the run",
    )
    project: Text = optional("lasptrain", "of wandb (Weights & Biases)")
    health_every: Index = optional(0, "steps between signals of health, see lasptrain/run/README.md; 0: none")

    def problems(self) -> Iterator[Problem]:
        """Yield a tracker that is named twice."""
        if len(set(self.trackers)) < len(self.trackers):
            yield "track.trackers", f"found {list(self.trackers)}; expected each once"


class Launch(Section):
    """Timeouts of processes."""

    timeout: Count = optional(600, "seconds that a rank waits for another")
    hang: Count = optional(300, "seconds without a finished segment after which a rank counts as hung")
    grace: Count = optional(120, "seconds that ranks get to save when they are asked to stop")
