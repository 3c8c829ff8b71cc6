"""What a recipe will cost, from its numbers alone: parameters, floating-point operations, slices. No torch, no GPU."""

from typing import NamedTuple

from lasptrain.recipe import Model, Recipe

AUTO_SLICE = 32_768  # tokens; longer ones are no faster and only need more memory


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
    """How a step's windows fall on a dp × sp mesh. `train.segment: auto` cuts windows into equal slices of at most
    AUTO_SLICE tokens, or not at all where no such cut leaves slices worth having.
    """
    window, train = recipe.data.window, recipe.train
    if train.segment == "auto":
        whole = window // sp
        length = next((n for n in range(min(AUTO_SLICE, whole), 1023, -1) if whole % n == 0), whole)
        segment = length * sp
    else:
        segment = train.segment
    return Layout(
        dp=dp,
        sp=sp,
        segments=window // segment,
        segment=segment,
        slice=segment // sp,
        micro_batches=train.batch // (dp * train.micro_batch),
        tokens_per_step=train.batch * window,
    )
