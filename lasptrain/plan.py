"""What a recipe will cost, from its numbers alone: parameters, floating-point operations, slices. No torch, no GPU."""

from typing import NamedTuple

from lasptrain.errors import ResourceError
from lasptrain.recipe import Model, Recipe


def parameters(model: Model, vocab: int) -> dict[str, int]:
    """Parameters by part of the model; their sum is the model's. `vocab` is the number of rows of the embedding."""
    D, H, K, V, F, L = model.dim, model.heads, model.K, model.V, model.mlp, model.layers
    gated = model.arch == "tnl"
    parts = {
        "embedding": vocab * D,
        "mixer": L * ((2 * H * K + H * V + gated * H * V) * D + D * H * V),
        "mlp": L * 3 * D * F,
        "lrpe": len(model.lrpe) * H * K,
        "norms": 0 if gated else L * (2 * D + V) + D,
        "head": 0 if model.tie else vocab * D,
    }
    return {part: count for part, count in parts.items() if count}


def flops_per_token(model: Model, vocab: int) -> int:
    """Model FLOPs per trained token: 6 per matrix parameter (the output head is one, the embedding's lookup is not)
    and three times the recurrences' forward, whose state update and read cost 2·K·V each. Recomputation is not work.
    """
    parts = parameters(model, vocab)
    matrices = parts["mixer"] + parts["mlp"] + vocab * model.dim
    return 6 * matrices + 3 * sum(4 * keys * model.V * model.heads for keys in _state_keys(model))


def state_bytes(model: Model) -> int:
    """Bytes of one window's states over all layers, in fp32."""
    return sum(4 * keys * model.V * model.heads for keys in _state_keys(model))


def _state_keys(model: Model) -> list[int]:
    """Key dim of each layer's state: LRPE doubles it (cosine and sine)."""
    return [model.K * (2 if layer in model.lrpe else 1) for layer in range(model.layers)]


LONGEST_SLICE = 32_768  # tokens; longer ones are no faster and only need more memory
SHORTEST_SLICE = 1024  # tokens; a window whose divisors are all shorter or too long is one segment
HEADROOM = 0.92  # of free memory; the rest is for the allocator's gaps


def activation_bytes(recipe: Recipe) -> int:
    """Bytes kept for the backward pass per token of a rank's slice."""
    model, train = recipe.model, recipe.train
    size = {"bf16": 2, "fp32": 4, "fp64": 8}[train.precision]
    D, HK, HV, F = model.dim, model.heads * model.K, model.heads * model.V, model.mlp
    if recipe.parallel.recompute == "full":
        return size * D * model.layers
    inputs = 4 * D  # residual stream twice, two normed inputs
    mixer = 4 * HK + 3 * HV  # q and k before and after their activation, v, gate, o
    if recipe.parallel.recompute == "selective":
        return size * model.layers * (2 * D + 2 * HK + 3 * HV + 2 * F)
    eager = 0 if train.compile else 3 * D + 2 * HV + 2 * F  # what no compiler recomputes
    return size * model.layers * (inputs + mixer + 2 * F + eager)


def working_bytes(recipe: Recipe) -> int:
    """Bytes per token of the slice that live while one block or the loss is being computed."""
    model = recipe.model
    size = {"bf16": 2, "fp32": 4, "fp64": 8}[recipe.train.precision]
    block = 6 * model.dim + 3 * model.mlp + 4 * model.heads * (model.K + model.V)
    return size * block * (2 if recipe.parallel.recompute == "full" else 1)


def state_memory(recipe: Recipe, vocab: int, ranks: int) -> dict[str, int]:
    """Bytes per rank that do not depend on the slice: parameters, gradients, optimizer, logits."""
    count = sum(parameters(recipe.model, vocab).values())
    wide = 8 if recipe.train.precision == "fp64" else 4
    narrow = 2 if recipe.train.precision == "bf16" else wide
    shards = ranks if recipe.parallel.data_parallel == "fsdp" else 1
    logits = recipe.train.loss_chunk * vocab * (2 * wide + narrow)
    return {
        "parameters": wide * count // shards + narrow * count,
        "gradients": wide * count + (wide * count // shards if shards > 1 else 0),
        "optimizer": 2 * wide * count // shards,
        "loss": logits + vocab * recipe.model.dim * wide,
    }


def choose_segment(recipe: Recipe, vocab: int, dp: int, sp: int, memory: int | None) -> int:
    """The segment that `train.segment: auto` means: the longest that divides the window and whose slices are no longer
    than LONGEST_SLICE and fit `memory` bytes of each rank, which is None where nothing is known of it.

    Raises ResourceError where not even the shortest fits.
    """
    window, rows = recipe.data.window, recipe.train.micro_batch
    fixed = sum(state_memory(recipe, vocab, dp * sp).values())
    per_token = rows * (activation_bytes(recipe) + working_bytes(recipe))
    room = LONGEST_SLICE if memory is None else min(LONGEST_SLICE, int(HEADROOM * memory - fixed) // per_token)
    whole = window // sp
    for length in range(min(room, whole), min(SHORTEST_SLICE, whole) - 1, -1):
        if whole % length == 0:
            return length * sp
    if memory is None or whole * per_token + fixed <= HEADROOM * memory:
        return window
    raise ResourceError(
        f"train.segment: no segment of the {window:,}-token window fits {memory / 2**30:.1f} GiB; "
        f"{fixed / 2**30:.1f} GiB go to parameters, gradients and optimizer; use more GPUs or parallel.recompute: full"
    )


class Layout(NamedTuple):
    """How the tokens of a step are cut, in tokens unless said otherwise."""

    dp: int
    sp: int
    segments: int
    segment: int
    slice: int
    micro_batches: int
    tokens_per_step: int


def layout(recipe: Recipe, dp: int, sp: int) -> Layout:
    """How a step's windows fall on a dp × sp mesh; `train.segment: auto` as on a machine with memory enough."""
    window, train = recipe.data.window, recipe.train
    segment = choose_segment(recipe, 0, dp, sp, None) if train.segment == "auto" else train.segment
    return Layout(
        dp=dp,
        sp=sp,
        segments=window // segment,
        segment=segment,
        slice=segment // sp,
        micro_batches=train.batch // (dp * train.micro_batch),
        tokens_per_step=train.batch * window,
    )
