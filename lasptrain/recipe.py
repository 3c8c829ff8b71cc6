"""The recipe: every choice of a run, read from one YAML file and frozen. A section is a class, a key is a field.

`load` reads a file, applies `--set` overrides, and reports everything that does not fit at once, one line each:
`FILE:LINE: section.key: what was found; what fits`. A value is right or it is refused, never repaired.

YAML here is a small subset with the number rules of YAML 1.2: `1e-4` is a float, `012` is 12, `yes` and `1:30` are
strings. Anchors, tags, merge keys and duplicate keys are refused. Nothing here imports torch.
"""

import difflib
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from lasptrain.errors import RecipeError, SetupError

LARGEST = 2**48  # larger counts are typing errors, and products of two still fit what has to hold them

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
    """What all sections share: frozen, no unknown keys, no conversions (`true` is not 1, `"1"` is not 1), finite."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    def problems(self) -> Iterator[Problem]:
        """Keys of this section that do not fit each other."""
        yield from ()


class Model(Section):
    """What is trained. `heads` heads of key dim K and value dim V on a residual stream of `dim` channels."""

    arch: Literal["tnl", "linear_transformer", "ssd", "retnet", "minimax"]
    dim: Count
    layers: Count
    heads: Count
    key_dim: Count | None = None  # K, per head; dim / heads if not given
    value_dim: Count | None = None  # V, per head; dim / heads if not given, in a retnet twice that
    mlp: Count  # width of the MLP
    vocab: Count | Literal["auto"] = "auto"  # rows of the embedding; auto: the tokenizer's, up to a multiple of 64
    # learned: begins as window, and is trained
    decay: Literal["tnl", "minimax_hf", "tnl_paper", "alibi", "retnet", "window", "learned", "none"] = "tnl"
    lrpe: Annotated[tuple[Index, ...], BeforeValidator(_tuple)] = (0,)  # tnl: indices of the layers with LRPE
    tie: bool = True  # the output head is the embedding
    normalizer: bool = False  # linear_transformer: divide by q · Σk
    data_dependent: bool = False  # ssd: the input says how much each token writes and forgets
    conv: Annotated[int, Field(ge=0, le=16)] = 0  # ssd: tokens seen by a convolution of q, k and v; 0: none
    softmax: Annotated[tuple[Index, ...], BeforeValidator(_tuple)] = ()  # ssd, minimax: layers of softmax attention
    kv_heads: Count | None = None  # softmax: heads of k and v; as many as of q if not given
    sliding: Count | None = None  # softmax: tokens that a token sees, itself included; none: all before it
    rotary: Annotated[float, Field(gt=1, le=1e12)] | None = 10000.0  # softmax: base of rotary positions; none: without
    alpha: Annotated[float, Field(gt=0, le=1e3)] | None = None  # minimax: what multiplies the residual; (2·layers)^¼

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_others(cls, value: Any) -> Any:
        """LRPE and the decay that is the default belong to tnl."""
        match value.get("arch") if isinstance(value, dict) else None:
            case "linear_transformer":
                return {"lrpe": (), **value}
            case "ssd":
                return {"lrpe": (), "decay": "window", **value}
            case "retnet":
                return {"lrpe": (), "decay": "retnet", **value}
            case "minimax":
                return {"lrpe": (), "decay": "minimax_hf", **value}
        return value

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
        """Heads that do not divide the width, LRPE on layers that do not exist, keys of the other architecture."""
        if (self.key_dim is None or self.value_dim is None) and self.dim % self.heads:
            nearest = _nearest(self.heads, lambda heads: self.dim % heads == 0)
            yield (
                "model.heads",
                f"{self.heads} heads do not divide model.dim = {self.dim}; "
                f"nearest: {nearest} (or give model.key_dim and model.value_dim)",
            )
        for layer in self.lrpe:
            if layer >= self.layers:
                yield "model.lrpe", f"there is no layer {layer}; the {self.layers} layers are 0 to {self.layers - 1}"
        if list(self.lrpe) != sorted(set(self.lrpe)):
            yield "model.lrpe", f"found {list(self.lrpe)}; write {sorted(set(self.lrpe))}"
        if self.arch == "linear_transformer" and self.decay != "none":
            yield "model.decay", f"found {self.decay!r}; a linear_transformer does not decay, write decay: none"
        if self.lrpe and self.arch != "tnl":
            yield "model.lrpe", f"found {list(self.lrpe)}; only arch: tnl has LRPE, leave it out"
        if self.normalizer and self.arch != "linear_transformer":
            yield "model.normalizer", "found true; only arch: linear_transformer has a normalizer, leave it out"
        if self.arch == "retnet" and self.K % 2:
            yield (
                "model.key_dim",
                f"{self.K} channels do not make pairs to rotate; nearest: {self.K - 1 or 2}, {self.K + 1}",
            )
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

    def _softmax_problems(self) -> Iterator[Problem]:
        for layer in self.softmax:
            if layer >= self.layers:
                yield "model.softmax", f"there is no layer {layer}; the {self.layers} layers are 0 to {self.layers - 1}"
        if list(self.softmax) != sorted(set(self.softmax)):
            yield "model.softmax", f"found {list(self.softmax)}; write {sorted(set(self.softmax))}"
        if self.softmax and self.arch not in ("ssd", "minimax"):
            yield "model.softmax", f"found {list(self.softmax)}; only arch: ssd and minimax mix layers, leave it out"
        for key in ("kv_heads", "sliding"):
            if getattr(self, key) is not None and not self.softmax:
                yield (
                    f"model.{key}",
                    f"found {getattr(self, key)} without model.softmax; name its layers, or leave it out",
                )
        if not self.softmax:
            return
        if self.dim % self.heads:
            nearest = _nearest(self.heads, lambda heads: self.dim % heads == 0)
            yield "model.heads", f"{self.heads} softmax heads do not divide model.dim = {self.dim}; nearest: {nearest}"
        elif self.rotary is not None and self.dim // self.heads % 2:
            yield (
                "model.rotary",
                f"{self.dim // self.heads} channels of a head do not make pairs to rotate; expected null, or another "
                "model.heads",
            )
        if self.kv_heads and self.heads % self.kv_heads:
            nearest = _nearest(self.kv_heads, lambda heads: self.heads % heads == 0)
            yield "model.kv_heads", f"{self.kv_heads} do not divide model.heads = {self.heads}; nearest: {nearest}"


class Part(Section):
    """One of several sources, and how many windows come from it, as a weight."""

    path: Text
    weight: Annotated[float, Field(gt=0, le=1e9)]


class Data(Section):
    """What it is trained on: one stream of documents, cut into windows; or several, mixed."""

    # the Python library's own source, a prepared folder, or text to prepare; or several, each with path and weight
    source: Annotated[
        Annotated[Text, Tag("text")] | Annotated[tuple[Part, ...], Tag("parts")],
        Discriminator(lambda value: "parts" if isinstance(value, tuple) else "text"),
        BeforeValidator(_tuple),
    ] = "python:source"
    mix_block: Count = 1024  # windows in which several sources come in exactly their shares
    tokenizer: Text = "tokenizers/python-4k.model"  # a sentencepiece model, or bytes
    window: Count  # tokens
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
        """No source at all, or documents cut by a packing that cuts none."""
        if not self.source:
            yield "data.source", "found []; expected text, or sources each with path and weight"
        if self.long_documents == "cut" and self.packing != "best_fit":
            yield "data.long_documents", f"found 'cut' with packing: {self.packing}; only best_fit cuts documents"
        if self.packing == "best_fit" and self.window < 2:
            yield "data.window", f"found {self.window} with packing: best_fit; expected 2 tokens or more"


class Mesh(Section):
    """How ranks are arranged; sp is what others call context parallelism. `mesh: auto` is both axes auto."""

    dp: Count | Literal["auto"] = "auto"
    sp: Count | Literal["auto"] = "auto"
    scan: Literal["auto", "ring", "all_gather", "all_scan"] = "auto"  # the cheapest of LASP, LASP-2, ZeCO

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, value: Any) -> Any:
        return {} if value == "auto" else value


REPLICATED = ("ddp", "zero1")  # kinds of data parallelism whose parameters and gradients are whole on every rank


class Parallel(Section):
    """How parameters and activations are kept."""

    # sharded over ranks are: ddp nothing, zero1 the optimizer, zero2 and zero3 (or fsdp) all, of which zero2 gathers
    # parameters once per update; hsdp all over sp, replicated over dp
    data_parallel: Literal["ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp"] = "zero3"
    recompute: Literal["none", "full", "selective", "offload"] = "none"
    reduce: Literal["auto", "step", "segment"] = "auto"  # when gradients are summed over ranks

    def problems(self) -> Iterator[Problem]:
        """Reduction per segment where gradients are not sharded."""
        if self.reduce == "segment" and self.data_parallel in REPLICATED:
            found = f"found 'segment' with data_parallel: {self.data_parallel}"
            yield "parallel.reduce", f"{found}; it saves memory with zero2, zero3 and hsdp"


class Optim(Section):
    """AdamW and its learning rate as a function of step."""

    lr: Annotated[float, Field(gt=0, le=10)]
    min_lr: Fraction = 0.0  # what is left of lr at the end, as a fraction of it
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: Index = 0  # steps
    decay: Count | None = None  # wsd: steps of the final decay; a fifth of all steps if not given
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], BeforeValidator(_tuple)
    ] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.1
    clip: Annotated[float, Field(ge=0)] = 1.0  # of the gradient norm; 0 is off

    def problems(self) -> Iterator[Problem]:
        """A final decay where the schedule has none."""
        if self.decay is not None and self.schedule != "wsd":
            yield "optim.decay", f"found {self.decay}; only schedule: wsd has a final decay, leave it out"


class Train(Section):
    """How long, in what pieces, in what precision, on which kernel."""

    steps: Count
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
        """A kernel that cannot compute in the precision."""
        if self.kernel == "triton" and self.precision == "fp64":
            yield "train.kernel", "found 'triton' with train.precision = fp64; expected chunked or reference"


class Checkpoint(Section):
    """When the state is saved and how many of them stay."""

    every: Count = 100  # steps
    keep: Count = 2
    milestone: Index = 0  # steps whose multiples stay for good; 0: none
    patience: Index = 2  # saves in a row that may fail before the run ends


class Guard(Section):
    """What follows a step whose loss or gradient norm is not finite, or whose norm is a spike.

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
    tasks: Annotated[tuple[Task, ...], BeforeValidator(_tuple)] = ()  # asked of the model whenever its loss is taken
    lengths: Annotated[tuple[Count, ...], BeforeValidator(_tuple)] = ()  # of tasks, in tokens; data.window if not given
    samples: Count = 5  # of each task and length


class Launch(Section):
    """Processes."""

    timeout: Count = 600  # seconds that a rank waits for another
    hang: Count = 300  # seconds without a finished segment after which a rank is taken for hung
    grace: Count = 120  # seconds that ranks get to save when they are asked to stop


class Recipe(Section):
    """A whole run. `name` is the file's stem unless written out; it names the run folder."""

    name: Name = "run"
    model: Model
    data: Data
    mesh: Mesh = Mesh()
    parallel: Parallel = Parallel()
    optim: Optim
    train: Train
    checkpoint: Checkpoint = Checkpoint()
    guard: Guard = Guard()
    eval: Eval = Eval()
    launch: Launch = Launch()

    def problems(self) -> Iterator[Problem]:
        """Keys of different sections that do not fit each other."""
        yield from _window(self)
        yield from _batch(self)
        yield from _schedule(self)
        if self.train.compile and self.parallel.recompute == "selective":
            yield "parallel.recompute", "found 'selective' with train.compile = true; expected none or full"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        found = [
            problem for section in (self, *(getattr(self, name) for name in SECTIONS)) for problem in section.problems()
        ]
        if found:
            raise ValueError("\n".join(f"{key}: {text}" for key, text in found))
        return self


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Recipe.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}


def _window(recipe: Recipe) -> Iterator[Problem]:
    window, segment = recipe.data.window, recipe.train.segment
    if window < 2:
        yield "data.window", "1 token has no next one to learn; expected at least 2"
    if segment != "auto" and window % segment:
        nearest = _nearest(segment, lambda tokens: window % tokens == 0, window)
        yield "train.segment", f"{segment} tokens do not divide data.window = {window}; nearest: {nearest}"
    elif recipe.mesh.sp != "auto":
        yield from _slices(recipe, recipe.mesh.sp)
    if segment not in ("auto", window) and recipe.model.softmax and recipe.model.sliding is None:
        yield (
            "train.segment",
            f"{segment} tokens with softmax layers that see all of data.window = {window}; expected {window} or auto, "
            "or a window for them to slide over: model.sliding",
        )


def _slices(recipe: Recipe, sp: int) -> Iterator[Problem]:
    """Windows and segments that `sp` ranks cannot share equally."""
    window, segment = recipe.data.window, recipe.train.segment
    if recipe.eval.window is not None and recipe.eval.window % sp:
        yield (
            "eval.window",
            f"{recipe.eval.window} tokens do not split into mesh.sp = {sp} equal slices; "
            f"nearest: {_multiples(recipe.eval.window, sp)}",
        )
    if segment != "auto" and segment % sp:
        nearest = _nearest(segment, lambda tokens: window % tokens == 0 and tokens % sp == 0, window)
        yield (
            "train.segment",
            f"{segment} tokens do not split into mesh.sp = {sp} equal slices"
            + (
                f"; nearest that divide data.window: {nearest}"
                if nearest
                else f", nor does data.window = {window}; nearest windows: {_multiples(window, sp)}"
            ),
        )
    elif window % sp:
        yield (
            "data.window",
            f"{window} tokens do not split into mesh.sp = {sp} equal slices; nearest: {_multiples(window, sp)}",
        )


def _batch(recipe: Recipe) -> Iterator[Problem]:
    batch, micro, dp = recipe.train.batch, recipe.train.micro_batch, recipe.mesh.dp
    ranks = 1 if dp == "auto" else dp
    if batch % (ranks * micro):
        parts = f"micro-batches of {micro}" if ranks == 1 else f"mesh.dp = {ranks} × micro_batch = {micro}"
        yield (
            "train.batch",
            f"{batch} windows do not split into {parts}; nearest: {_multiples(batch, ranks * micro)}",
        )


def _schedule(recipe: Recipe) -> Iterator[Problem]:
    steps, optim = recipe.train.steps, recipe.optim
    if optim.warmup >= steps:
        yield "optim.warmup", f"{optim.warmup} of train.steps = {steps} steps; expected at most {steps - 1}"
    elif optim.decay is not None and optim.warmup + optim.decay > steps:
        yield (
            "optim.decay",
            f"{optim.decay} steps after optim.warmup = {optim.warmup} exceed train.steps = {steps}; "
            f"expected at most {steps - optim.warmup}",
        )


def _multiples(value: int, of: int) -> str:
    below = value // of * of
    return f"{below}, {below + of}" if below else str(of)


def _nearest(value: int, fits: Callable[[int], bool], largest: int | None = None) -> str:
    """The nearest numbers below and above `value` that fit, searched nearby only; empty if there are none."""
    reach = 1 << 16
    top = value + reach if largest is None else min(largest, value + reach)
    below = next((n for n in range(min(value, top), max(0, value - reach), -1) if fits(n)), None)
    above = next((n for n in range(value + 1, top + 1) if fits(n)), None)
    return ", ".join(str(n) for n in (below, above) if n is not None)


def resolve_mesh(recipe: Recipe, world: int, option: str = "--nproc") -> tuple[int, int]:
    """(dp, sp) for `world` ranks; auto × auto takes as many as train.batch keeps busy for dp, and the rest for sp.

    Raises SetupError, naming what fits, where the recipe's mesh is for another number of ranks, and RecipeError, as
    `load` does where it knows sp, where only the length of windows or segments is in the way.
    """
    dp, sp = recipe.mesh.dp, recipe.mesh.sp
    micro_batches = recipe.train.batch // recipe.train.micro_batch
    tokens = recipe.data.window if recipe.train.segment == "auto" else recipe.train.segment

    lengths = (tokens, recipe.eval.window or tokens)

    def pair(world: int, lengths: tuple[int, ...]) -> tuple[int, int] | None:
        for ranks in range(min(world, micro_batches), 0, -1):
            split = world // ranks
            if (
                world % ranks == 0
                and dp in ("auto", ranks)
                and sp in ("auto", split)
                and micro_batches % ranks == 0
                and all(length % split == 0 for length in lengths)
            ):
                return ranks, split
        return None

    found = pair(world, lengths)
    if found is not None:
        return found
    largest = world + 1024 if world < 4096 else None
    fits = _nearest(world, lambda n: pair(n, lengths) is not None, largest).replace(", ", " or ")
    ragged = pair(world, ())
    if ragged is not None:
        other = f"; or {option} {fits}" if fits else ""
        raise RecipeError("\n".join(f"{key}: {text}{other}" for key, text in _slices(recipe, ragged[1])))
    raise SetupError(
        f"mesh: {world} process{'es do' if world > 1 else ' does'} not make dp = {dp} × sp = {sp} "
        f"with {micro_batches} micro-batches and slices of {tokens} tokens; "
        + (f"nearest: {option} {fits}" if fits else "no nearby number of processes does")
    )


def resolve_vocabulary(model: Model, pieces: int) -> int:
    """Rows of the embedding for a tokenizer of `pieces`; auto rounds up to 64. RecipeError where they are too few."""
    if model.vocab == "auto":
        return -(-pieces // 64) * 64
    if model.vocab < pieces:
        raise RecipeError(
            f"model.vocab: {model.vocab} rows for a tokenizer of {pieces} pieces; expected at least {pieces}"
        )
    return model.vocab


def with_vocabulary(recipe: Recipe, pieces: int) -> Recipe:
    """The recipe with its vocabulary as a number, see `resolve_vocabulary`."""
    model = recipe.model.model_copy(update={"vocab": resolve_vocabulary(recipe.model, pieces)})
    return recipe.model_copy(update={"model": model})


def load(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Reads a recipe and applies overrides (`section.key=value`). RecipeError holds every problem, one per line."""
    file = find_file(Path(path))
    source = _Source(file if file is not None else Path(path))
    for override in overrides or []:
        source.override(override)
    recipe = source.validate()
    tokenizer = recipe.data.tokenizer
    if tokenizer != "bytes":
        found = find_file(Path(tokenizer), source.file.absolute().parent.parent)
        if found is not None:
            data = recipe.data.model_copy(update={"tokenizer": str(found)})
            recipe = recipe.model_copy(update={"data": data})
    return recipe


def find_file(path: Path, beside: Path | None = None) -> Path | None:
    """`path` as it stands, under `beside`, or the copy that came with the package; None if there is none."""
    package = Path(__file__).parent
    roots = [Path(), *([beside] if beside else []), package.parent, package / "_files"]
    return next((root / path for root in roots if _exists(root / path)), None)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name no file can have
        return False


def dump(recipe: Recipe) -> str:
    """The recipe as YAML that `load` reads back as the same recipe."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class Scalar(NamedTuple):
    """A value's pattern in plain style, the letters it may start with, and how to read it (YAML 1.2, core schema)."""

    tag: str
    pattern: re.Pattern[str]
    first: str
    read: Callable[[str], object]


_SCALARS = (
    Scalar("null", re.compile(r"(~|null|Null|NULL|)\Z"), "~nN", lambda text: None),
    Scalar("bool", re.compile(r"(true|True|TRUE|false|False|FALSE)\Z"), "tTfF", lambda text: text.lower() == "true"),
    Scalar("int", re.compile(r"[-+]?[0-9]+\Z"), "-+0123456789", int),
    Scalar("int", re.compile(r"0o[0-7]+\Z"), "0", lambda text: int(text, 8)),
    Scalar("int", re.compile(r"0x[0-9a-fA-F]+\Z"), "0", lambda text: int(text, 16)),
    Scalar(
        "float",
        re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z"),
        "-+.0123456789",
        float,
    ),
    Scalar(
        "float",
        re.compile(r"[-+]?\.(inf|Inf|INF)\Z|\.(nan|NaN|NAN)\Z"),
        "-+.",
        lambda text: float(text.replace(".", "")),
    ),
)


class _Dumper(yaml.SafeDumper):
    """Quotes what a reader of YAML 1.1 or 1.2 would not take for a string; lists on one line."""


for _scalar in _SCALARS:
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_scalar.tag}", _scalar.pattern, list(_scalar.first))
_Dumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)

_MAX_BYTES, _MAX_DEPTH, _MAX_VALUES = 1 << 20, 32, 10_000

Path_ = tuple[str | int, ...]
"""Where a value stands: ("model", "lrpe", 0)."""


class _NotYaml(Exception):
    """The text cannot be read any further."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(text)
        self.line = line


def _line(mark: Any) -> int:
    return mark.line + 1 if mark else 1


class _Reader:
    """Builds plain values from YAML events and remembers where each stood and how it was written.

    Events, not nodes: nothing is expanded, nothing recurses deeper than the limit, and tags and anchors are visible.
    """

    def __init__(self) -> None:
        self.lines: dict[Path_, int] = {}
        self.written: dict[Path_, str] = {}
        self.problems: list[tuple[int, Path_, str]] = []
        self._values = 0

    def read(self, text: str) -> object:
        """The value of the one document in `text`; _NotYaml where there is none to be read."""
        try:
            return self._document(yaml.parse(text, Loader=yaml.SafeLoader))
        except yaml.reader.ReaderError as error:
            offset = len(text[: error.position].encode())
            line = text.count("\n", 0, error.position) + 1
            found = f"U+{ord(text[error.position]):04X}"
            raise _NotYaml(line, f"byte {offset}: found the character {found}; expected text") from None
        except yaml.MarkedYAMLError as error:
            hint = "; indent with spaces, not tabs" if "\\t" in str(error.problem) else ""
            raise _NotYaml(_line(error.problem_mark), f"not YAML: {error.problem}{hint}") from None

    def _document(self, events: Iterator[yaml.Event]) -> object:
        self._events = events
        next(events)
        if isinstance(next(events), yaml.StreamEndEvent):
            return None
        value = self._value(next(events), ())
        next(events)
        after = next(events)
        if not isinstance(after, yaml.StreamEndEvent):
            self._refuse(after, (), "found a second document; expected one")
        return value

    def _refuse(self, event: yaml.Event, path: Path_, text: str) -> None:
        self.problems.append((_line(event.start_mark), path, text))

    def _value(self, event: yaml.Event, path: Path_) -> object:
        self._values += 1
        if self._values > _MAX_VALUES or len(path) > _MAX_DEPTH:
            limit = f"{_MAX_VALUES} values" if self._values > _MAX_VALUES else f"{_MAX_DEPTH} levels"
            raise _NotYaml(_line(event.start_mark), f"found more than {limit}; expected a recipe")
        self.lines.setdefault(path, _line(event.start_mark))
        if isinstance(event, yaml.AliasEvent):
            self._refuse(event, path, f"found the alias *{event.anchor}; write the value out")
            return None
        assert isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent)
        if event.anchor is not None:
            self._refuse(event, path, f"found the anchor &{event.anchor}; anchors are not used here, leave it out")
        if event.tag is not None:
            self._refuse(event, path, f"found the tag {event.tag}; tags are not used here, leave it out")
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, path)
        return self._list(path) if isinstance(event, yaml.SequenceStartEvent) else self._dict(path)

    def _scalar(self, event: yaml.ScalarEvent, path: Path_) -> object:
        text = event.value
        if event.style is not None:
            return text
        self.written[path] = text
        for scalar in _SCALARS:
            if scalar.pattern.match(text):
                if len(text) > 100:
                    self._refuse(event, path, f"found a number of {len(text)} characters; expected at most 100")
                    return None
                return scalar.read(text)
        return text

    def _list(self, path: Path_) -> list[object]:
        values: list[object] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            values.append(self._value(event, (*path, len(values))))
        return values

    def _dict(self, path: Path_) -> dict[str, object]:
        values: dict[str, object] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._key(event, path)
            where = (*path, key)
            line = _line(event.start_mark)
            if key in values:
                first = self.lines[where]
                self._refuse(event, where, f"given twice, on line {first} and on line {line}; keep one")
                self._value(next(self._events), where)
            else:
                self.lines[where] = line
                values[key] = self._value(next(self._events), where)
        return values

    def _key(self, event: yaml.Event, path: Path_) -> str:
        before = len(self.problems)
        key = self._value(event, (*path, "?"))
        self.lines.pop((*path, "?"), None)
        written = self.written.pop((*path, "?"), None)
        if len(self.problems) == before:
            if written == "<<":
                self._refuse(event, path, "found the merge key <<; write the keys out")
            elif not isinstance(key, str):
                self._refuse(event, path, f"found {_show(key, written)} as a key; expected a word")
        return written if written is not None else str(key)


class _Source:
    """A recipe's file on its way to a Recipe: raw values, where each came from, and every problem so far."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.origins: dict[Path_, str] = {}
        self.written: dict[Path_, str] = {}
        self.problems: list[tuple[str, Path_, str]] = []
        reader = _Reader()
        try:
            raw = reader.read(_read_text(file))
        except _NotYaml as error:
            raise RecipeError(f"{file}:{error.line}: {error}") from None
        self.written.update(reader.written)
        self.origins.update({path: f"{file}:{line}" for path, line in reader.lines.items()})
        self.problems += [(f"{file}:{line}", path, text) for line, path, text in reader.problems]
        if not isinstance(raw, dict):
            found = "nothing" if raw is None else f"a {_kind(raw)}"
            raise RecipeError(f"{file}:1: found {found}; expected sections such as model:, data:, train:")
        self.raw: dict[str, object] = raw
        if raw.get("mesh") == "auto":
            raw["mesh"] = {}

    def override(self, text: str) -> None:
        """Applies one `section.key=value`; its value is read by the rules of the file."""
        key, equals, value = text.partition("=")
        path = tuple(key.strip().split("."))
        origin = f"--set {text}"
        if not equals or not all(path) or len(path) > 2:
            self.problems.append((origin, (), "expected section.key=value"))
            return
        reader = _Reader()
        try:
            parsed = reader.read(value)
        except _NotYaml as error:
            self.problems.append((origin, path, str(error)))
            return
        self.problems += [(origin, path + inner, problem) for _, inner, problem in reader.problems]
        self.written = {k: v for k, v in self.written.items() if k[: len(path)] != path}
        self.written.update({path + inner: written for inner, written in reader.written.items()})
        self.origins = {k: v for k, v in self.origins.items() if k[: len(path)] != path or k == path}
        self.origins[path] = origin
        if len(path) == 1:
            self.raw[path[0]] = {} if path == ("mesh",) and parsed == "auto" else parsed
        else:
            section = self.raw.setdefault(path[0], {})
            if isinstance(section, dict):
                section[path[1]] = parsed

    def validate(self) -> Recipe:
        """The recipe, or RecipeError with every problem in the order of the file."""
        broken = [path for _, path, _ in self.problems]
        sections: dict[str, Any] = {"name": self.raw.get("name", self.file.stem)}
        self._unknown_sections()
        self._name(sections["name"])
        for name, section in SECTIONS.items():
            try:
                sections[name] = section.model_validate(self.raw.get(name, {}))
            except ValidationError as error:
                self._invalid(name, error.errors(include_url=False), broken)
            else:
                self._add(sections[name].problems())
        if len(sections) == len(SECTIONS) + 1:
            self._add(Recipe.model_construct(**sections).problems())
        if self.problems:
            raise RecipeError("\n".join(self._report()))
        return Recipe(**sections)

    def _add(self, problems: Iterator[Problem]) -> None:
        self.problems += [(self._origin(path := tuple(key.split("."))), path, text) for key, text in problems]

    def _origin(self, path: Path_) -> str:
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins[path] if path else str(self.file)

    def _report(self) -> list[str]:
        def place(problem: tuple[str, Path_, str]) -> tuple[bool, int]:
            line = problem[0].rpartition(":")[2]
            return problem[0].startswith("--set"), int(line) if line.isdigit() else 0

        return [
            f"{origin}: {'.'.join(map(str, path))}{': ' if path else ''}{text}"
            for origin, path, text in sorted(self.problems, key=place)
        ]

    def _unknown_sections(self) -> None:
        known = [*SECTIONS, "name"]
        for key in self.raw:
            if key not in known and key != "<<":
                inner = [path for path in self.origins if path[:1] == (key,)]  # of --set key.name=…, which has no other
                origin = self._origin((key,) if (key,) in self.origins or not inner else inner[0])
                self.problems.append((origin, (key,), f"no such section; {_suggest(key, known)}"))

    def _name(self, name: object) -> None:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            shown = repr(name if not isinstance(name, str) or len(name) < 60 else name[:56] + "…")
            self.problems.append(
                (
                    self._origin(("name",)),
                    ("name",),
                    f"found {shown}; expected 1 to 100 letters, digits, dots, dashes or underscores"
                    + ("" if "name" in self.raw else " (rename the file or write name: …)"),
                )
            )

    def _invalid(self, section: str, errors: list[ErrorDetails], broken: list[Path_]) -> None:
        fields = SECTIONS[section].model_fields
        grouped: dict[Path_, list[ErrorDetails]] = {}
        for error in errors:
            path = (section, *_location(error))
            if not any(path[: len(b)] == b for b in broken if b):
                grouped.setdefault(path, []).append(error)
        for path, same in grouped.items():
            match same[0]["type"]:
                case "extra_forbidden":
                    key = str(path[-1])
                    text = f"no such key; {_suggest(key, list(fields), _elsewhere(section, key))}"
                case "missing":
                    text = f"missing; expected {_EXPECTED.get(path, 'a value')}"
                case _:
                    text = self._mismatch(path, same)
            self.problems.append((self._origin(path), path, text))

    def _mismatch(self, path: Path_, errors: list[ErrorDetails]) -> str:
        value = errors[0]["input"]
        written = self.written.get(path)
        expected = " or ".join(dict.fromkeys(_expectation(error) for error in errors))
        text = f"found {_show(value, written)}; expected {expected}"
        if any(error["type"] == "string_type" for error in errors) and written:
            text += f', quote it: "{written}"'
        elif any(error["type"] == "int_type" for error in errors) and isinstance(value, float) and value.is_integer():
            text += f", write {int(value)}"
        return text


_EXPECTED: dict[Path_, str] = {
    ("model", "arch"): "tnl, ssd, retnet, minimax or linear_transformer",
    ("model", "dim"): "the width of the model, such as 256",
    ("model", "layers"): "the number of layers, such as 4",
    ("model", "heads"): "the number of heads, such as 4",
    ("model", "mlp"): "the width of the MLP, such as 704",
    ("data", "window"): "tokens of a training sequence, such as 8192",
    ("optim", "lr"): "a learning rate, such as 5e-4",
    ("train", "steps"): "the number of optimizer steps, such as 1000",
}


def _location(error: ErrorDetails) -> Path_:
    """Where the value stands: pydantic appends the branch of a union, which is no key of ours."""
    place = error["loc"][:1]
    for part in error["loc"][1:]:
        if isinstance(part, int) or isinstance(place[-1], int):  # an item of a list, or a key of an item
            place += (part,)
    return place


def _expectation(error: ErrorDetails) -> str:
    context = error.get("ctx", {})
    match error["type"]:
        case "int_type" | "int_from_float" | "int_parsing":
            return "an integer"
        case "float_type":
            return "a number"
        case "finite_number":
            return "a finite number"
        case "bool_type":
            return "true or false"
        case "string_type" | "string_unicode":
            return "text"
        case "literal_error":
            return str(context["expected"]).replace("'", "")
        case "greater_than_equal":
            return f"at least {context['ge']:g}"
        case "greater_than":
            return f"more than {context['gt']:g}"
        case "less_than_equal":
            return f"at most {context['le']:g}"
        case "less_than":
            return f"less than {context['lt']:g}"
        case "tuple_type":
            return "a list such as [0]"
        case "missing":
            return "one more value"
        case "too_long":
            return f"{context['max_length']} values"
        case "string_too_short" | "string_too_long" | "string_pattern_mismatch":
            return "1 to 4096 printable characters"
        case "model_type" | "model_attributes_type":
            return "keys and values"
        case _:
            return error["msg"]


def _show(value: object, written: str | None) -> str:
    if written is not None:
        text = "nothing" if written == "" else written if not isinstance(value, str) else repr(written)
    else:
        text = repr(value)
    return text if len(text) <= 60 else text[:56] + "…"


def _kind(value: object) -> str:
    return "list" if isinstance(value, list) else "single value"


@functools.cache
def _sections_with(key: str) -> tuple[str, ...]:
    return tuple(name for name, section in SECTIONS.items() if key in section.model_fields)


def _elsewhere(section: str, key: str) -> tuple[str, ...]:
    return tuple(f"{name}.{key}" for name in _sections_with(key) if name != section)


def _suggest(word: str, known: list[str], elsewhere: tuple[str, ...] = ()) -> str:
    close = elsewhere or difflib.get_close_matches(word, known, n=1)
    return f"did you mean {' or '.join(close)}?" if close else f"expected one of {', '.join(known)}"


def _read_text(file: Path) -> str:
    """The file as text. RecipeError where it is missing, too large or not UTF-8; a byte order mark is allowed."""
    try:
        with file.open("rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        near = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {file.parent / near[0]}?" if near else "; expected a recipe, a .yaml file"
        raise RecipeError(f"{file}: no such file{hint}") from None
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{file}: {getattr(error, 'strerror', None) or error}; expected a recipe, a .yaml file"
        ) from None
    if len(data) > _MAX_BYTES:
        raise RecipeError(f"{file}: larger than 1 MiB; expected a recipe, a .yaml file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
