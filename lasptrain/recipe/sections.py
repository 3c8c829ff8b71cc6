"""The sections of a recipe: every key, what it means, what fits, and its default. Nothing here imports torch."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from lasptrain.recipe.nearest import nearest_fits

LARGEST = 2**48  # larger counts are typos; products of two still fit what has to hold them

Count = Annotated[int, Field(ge=1, le=LARGEST)]
Index = Annotated[int, Field(ge=0, le=LARGEST)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f]+$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]

Problem = tuple[str, str]
"""A key such as `data.window`, and what is wrong with it."""


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, no conversions (`true` is not 1, `"1"` is not 1), finite."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    def problems(self) -> Iterator[Problem]:
        """Yield keys of this section that do not fit each other."""
        yield from ()


class Model(Section):
    """The model: `heads` heads of key dim K and value dim V on a residual stream of `dim` channels."""

    arch: Literal["tnl", "linear_transformer", "ssd", "retnet", "minimax"] = Field(
        description="tnl, ssd, retnet, minimax or linear_transformer"
    )
    dim: Count = Field(description="the width of the model, such as 256")
    layers: Count = Field(description="the number of layers, such as 4")
    heads: Count = Field(description="the number of heads, such as 4")
    key_dim: Count | None = None  # K, per head; dim / heads if not given
    value_dim: Count | None = None  # V, per head; dim / heads if not given, in a retnet twice that
    mlp: Count = Field(description="the width of the MLP, such as 704")
    vocab: Count | Literal["auto"] = "auto"  # rows of the embedding; auto: the tokenizer's, up to a multiple of 64
    # learned: starts as window, then trained
    decay: Literal["tnl", "minimax_hf", "tnl_paper", "alibi", "retnet", "window", "learned", "none"] = "tnl"
    lrpe: Annotated[tuple[Index, ...], BeforeValidator(_tuple)] = (0,)  # tnl: indices of the layers with LRPE
    tie: bool = True  # the output head is the embedding
    normalizer: bool = False  # linear_transformer: divide by q · Σk
    data_dependent: bool = False  # ssd: step and decay depend on the input
    conv: Annotated[int, Field(ge=0, le=16)] = 0  # ssd: tokens seen by a convolution of q, k and v; 0: none
    softmax: Annotated[tuple[Index, ...], BeforeValidator(_tuple)] = ()  # ssd, minimax: layers of softmax attention
    kv_heads: Count | None = None  # softmax: heads of k and v; as many as of q if not given
    sliding_window: Count | None = None  # softmax: tokens that a token sees, itself included; none: all before it
    rotary: Annotated[float, Field(gt=1, le=1e12)] | None = 10000.0  # softmax: base of rotary positions; none: without
    alpha: Annotated[float, Field(gt=0, le=1e3)] | None = None  # minimax: what multiplies the residual; (2·layers)^¼

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_others(cls, value: Any) -> Any:
        """Fill in the defaults of the other architectures: the fields' own LRPE and decay are tnl's."""
        decays = {"linear_transformer": "tnl", "ssd": "window", "retnet": "retnet", "minimax": "minimax_hf"}
        arch = value.get("arch") if isinstance(value, dict) else None
        return {"lrpe": (), "decay": decays[arch], **value} if isinstance(arch, str) and arch in decays else value

    @property
    def K(self) -> int:
        """Key dim per head."""
        return self.key_dim or self.dim // self.heads

    @property
    def V(self) -> int:
        """Value dim per head."""
        return self.value_dim or (2 if self.arch == "retnet" else 1) * self.dim // self.heads

    @property
    def residual(self) -> float:
        """α of a minimax block."""
        return self.alpha or float((2 * self.layers) ** 0.25)

    def problems(self) -> Iterator[Problem]:
        """Yield heads that do not divide the width, LRPE on layers that do not exist, keys of other architectures."""
        if (self.key_dim is None or self.value_dim is None) and self.dim % self.heads:
            nearest = nearest_fits(self.heads, lambda heads: self.dim % heads == 0)
            fits = f"nearest: {nearest} (or give model.key_dim and model.value_dim)"
            yield "model.heads", f"{self.heads} heads do not divide model.dim = {self.dim}; {fits}"
        yield from self._layer_problems("model.lrpe", self.lrpe)
        if self.arch == "linear_transformer" and self.decay != "none":
            yield "model.decay", f"found {self.decay!r}; a linear_transformer does not decay, write decay: none"
        if self.lrpe and self.arch != "tnl":
            yield "model.lrpe", f"found {list(self.lrpe)}; only arch: tnl has LRPE, leave it out"
        if self.normalizer and self.arch != "linear_transformer":
            yield "model.normalizer", "found true; only arch: linear_transformer has a normalizer, leave it out"
        if self.arch == "retnet" and self.K % 2:
            nearest = f"{self.K - 1 or 2}, {self.K + 1}"
            yield "model.key_dim", f"{self.K} channels do not make pairs to rotate; nearest: {nearest}"
        if self.data_dependent and self.arch != "ssd":
            yield "model.data_dependent", "found true; only arch: ssd has a decay that the data says, leave it out"
        if self.conv == 1:
            yield "model.conv", "found 1, which sees no other token; expected 0 or at least 2"
        if self.conv and self.arch != "ssd":
            yield "model.conv", f"found {self.conv}; only arch: ssd has a convolution, leave it out"
        if self.alpha is not None and self.arch != "minimax":
            yield "model.alpha", f"found {self.alpha:g}; only arch: minimax multiplies its residual, leave it out"
        yield from self._softmax_problems()
        if self.decay == "learned" and not self.data_dependent:
            yield "model.decay", "found 'learned'; only arch: ssd with data_dependent: true learns it, write window"
        if self.data_dependent and self.decay == "none":
            yield "model.decay", "found 'none'; with data_dependent = true expected a schedule, such as window"

    def _layer_problems(self, key: str, layers: tuple[int, ...]) -> Iterator[Problem]:
        for layer in layers:
            if layer >= self.layers:
                yield key, f"there is no layer {layer}; the {self.layers} layers are 0 to {self.layers - 1}"
        if list(layers) != sorted(set(layers)):
            yield key, f"found {list(layers)}; write {sorted(set(layers))}"

    def _softmax_problems(self) -> Iterator[Problem]:
        yield from self._layer_problems("model.softmax", self.softmax)
        if self.softmax and self.arch not in ("ssd", "minimax"):
            yield "model.softmax", f"found {list(self.softmax)}; only arch: ssd and minimax mix layers, leave it out"
        for key in ("kv_heads", "sliding_window"):
            if (found := getattr(self, key)) is not None and not self.softmax:
                yield f"model.{key}", f"found {found} without model.softmax; name its layers, or leave it out"
        if not self.softmax:
            return
        if self.dim % self.heads:
            nearest = nearest_fits(self.heads, lambda heads: self.dim % heads == 0)
            yield "model.heads", f"{self.heads} softmax heads do not divide model.dim = {self.dim}; nearest: {nearest}"
        elif self.rotary is not None and self.dim // self.heads % 2:
            found = f"{self.dim // self.heads} channels of a head do not make pairs to rotate"
            yield "model.rotary", f"{found}; expected null, or another model.heads"
        if self.kv_heads and self.heads % self.kv_heads:
            nearest = nearest_fits(self.kv_heads, lambda heads: self.heads % heads == 0)
            yield "model.kv_heads", f"{self.kv_heads} do not divide model.heads = {self.heads}; nearest: {nearest}"


class Part(Section):
    """One of several sources; `weight` sets its share of the windows."""

    path: Text
    weight: Annotated[float, Field(gt=0, le=1e9)]


class Data(Section):
    """The training data: one stream of documents, cut into windows; or several, mixed."""

    # the Python library's own source, a prepared folder, or text to prepare; or several, each with path and weight
    source: Annotated[
        Annotated[Text, Tag("text")] | Annotated[tuple[Part, ...], Tag("parts")],
        Discriminator(lambda value: "parts" if isinstance(value, tuple) else "text"),
        BeforeValidator(_tuple),
    ] = "python:source"
    mix_block: Count = 1024  # windows over which several sources have exactly their shares
    tokenizer: Text = "tokenizers/python-4k.model"  # a sentencepiece model, or bytes
    window: Count = Field(description="tokens of a training sequence, such as 8192")  # `seq_len` elsewhere
    seed: Seed = 0  # of the order of windows
    validation: Annotated[int, Field(ge=0, lt=1_000_000)] = 20_000  # documents held out, per million
    packing: Literal["concat", "best_fit"] = "concat"  # one after another; or windows of whole documents, no padding
    long_documents: Literal["continue", "cut"] = (
        "continue"  # best_fit: what exceeds a window heads another, or is left out
    )
    reset_at_documents: bool = True  # a document never sees another
    repeat: bool = False  # fill a window that is longer than the corpus by reading it again
    cache: Text | None = None  # where prepared shards are kept; ${XDG_CACHE_HOME:-~/.cache}/lasptrain

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

    dp: Count | Literal["auto"] = "auto"
    sp: Count | Literal["auto"] = "auto"
    scan: Literal["auto", "ring", "all_gather", "all_scan"] = "auto"  # LASP, LASP-2, ZeCO; auto: the cheapest

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, value: Any) -> Any:
        return {} if value == "auto" else value


REPLICATED = ("ddp", "zero1")  # kinds of data parallelism whose parameters and gradients are whole on every rank


class Parallel(Section):
    """Sharding of parameters and gradients, and recomputation of activations."""

    # sharded over ranks: ddp nothing, zero1 the optimizer, zero2 and zero3 (or fsdp) everything, but zero2 gathers
    # parameters once per update; hsdp shards everything over sp and replicates it over dp
    data_parallel: Literal["ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp"] = "zero3"
    recompute: Literal["none", "full", "selective", "offload"] = "none"  # activation checkpointing
    reduce: Literal["auto", "step", "segment"] = "auto"  # when gradients are summed over ranks

    def problems(self) -> Iterator[Problem]:
        """Yield a reduction per segment where gradients are not sharded."""
        if self.reduce == "segment" and self.data_parallel in REPLICATED:
            found = f"found 'segment' with data_parallel: {self.data_parallel}"
            yield "parallel.reduce", f"{found}; it saves memory with zero2, zero3 and hsdp"


class Optim(Section):
    """AdamW and its learning rate as a function of step."""

    lr: float = Field(gt=0, le=10, description="a learning rate, such as 5e-4")
    min_lr: Fraction = 0.0  # at the end, as a fraction of lr
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: Index = 0  # steps
    decay: Count | None = None  # wsd: steps of the final decay; a fifth of all steps if not given
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], BeforeValidator(_tuple)
    ] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.1
    clip: Annotated[float, Field(ge=0)] = 1.0  # largest gradient norm; 0 is off

    def problems(self) -> Iterator[Problem]:
        """Yield a final decay where the schedule has none."""
        if self.decay is not None and self.schedule != "wsd":
            yield "optim.decay", f"found {self.decay}; only schedule: wsd has a final decay, leave it out"


class Train(Section):
    """Length, batch, precision and kernel of training."""

    steps: Count = Field(description="the number of optimizer steps, such as 1000")
    batch: Count = 1  # windows per optimizer step, over all ranks
    micro_batch: Count = 1  # windows per rank and forward
    precision: Literal["bf16", "fp32", "fp64"] = "bf16"
    segment: Count | Literal["auto"] = "auto"  # tokens of a window that are on the GPUs at one time
    compile: bool = False
    kernel: Literal["auto", "reference", "chunked", "triton"] = "auto"
    seed: Seed = 0  # of the weights
    loss_chunk: Count = 2048  # tokens whose logits exist at one time
    profile: Annotated[tuple[Count, ...], BeforeValidator(_tuple)] = ()  # steps whose trace goes to RUN/profile

    def problems(self) -> Iterator[Problem]:
        """Yield a kernel that cannot compute in the precision."""
        if self.kernel == "triton" and self.precision == "fp64":
            yield "train.kernel", "found 'triton' with train.precision = fp64; expected chunked or reference"


class Checkpoint(Section):
    """The schedule of checkpoints, and how many are kept."""

    every: Count = 100  # steps
    keep: Count = 2
    keep_every: Index = 0  # steps whose multiples stay for good; 0: none
    max_failures: Index = 2  # saves in a row that may fail before the run ends


class Guard(Section):
    """The response to a step whose loss or gradient norm is not finite, or whose norm is a spike.

    stop: end the run; its weights are those of the step before, saved. skip: leave the step out. rollback: go back to
    the weights of a checkpoint at least `back` steps older and on with the data that follows.
    """

    nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    spike: Literal["ignore", "warn", "stop", "skip", "rollback"] = "ignore"
    factor: Annotated[float, Field(gt=1, le=1e6)] = 10.0  # a spike is that many times the median of the last 64 norms
    back: Count = 100  # steps
    limit: Count = 3  # steps in a row that may be left out


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

    every: Index = 50  # steps; 0: only at the end
    windows: Count = 4
    window: Count | None = None  # tokens of a held-out window; data.window if not given
    sample: Index = 64  # tokens continued by the model in the summary
    tasks: Annotated[tuple[Task, ...], BeforeValidator(_tuple)] = ()  # run whenever the held-out loss is measured
    lengths: Annotated[tuple[Count, ...], BeforeValidator(_tuple)] = ()  # of tasks, in tokens; data.window if not given
    samples: Count = 5  # of each task and length


class Launch(Section):
    """Timeouts of processes."""

    timeout: Count = 600  # seconds that a rank waits for another
    hang: Count = 300  # seconds without a finished segment after which a rank counts as hung
    grace: Count = 120  # seconds that ranks get to save when they are asked to stop
