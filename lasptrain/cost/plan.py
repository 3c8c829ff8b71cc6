"""The cost of a recipe, from its numbers alone: parameters, FLOPs, memory, slices. No torch, no GPU."""

import math
from collections import Counter
from typing import NamedTuple

from lasptrain.architectures.base import Architecture, Work
from lasptrain.cost.gpus import Rates
from lasptrain.errors import ResourceError
from lasptrain.recipe.schema import Recipe, Span
from lasptrain.recipe.sections import REPLICATED, Parallel


def parameters(model: Architecture, vocab: int) -> dict[str, int]:
    """Parameters by part of the model; their sum is the model's. `vocab` is the number of rows of the embedding."""
    parts = Counter({"embedding": vocab * model.dim})
    for layer in range(model.layers):
        parts.update(model.layer_parameters(layer))
    parts["mlp"] = model.layers * 3 * model.dim * model.mlp
    parts["norms"] += (2 * model.layers + 1) * model.dim * model.norm.weighted
    parts["head"] = 0 if model.tie else vocab * model.dim
    return {part: count for part, count in parts.items() if count}


def flops_per_token(model: Architecture, vocab: int, window: int) -> int:
    """Model FLOPs per trained token: 6 per matrix parameter (the output head is one, the embedding's lookup is not),
    and three times the forward of recurrences and of softmax's scores, over a window of one document. Recomputation is
    not work. Left out are convolutions, and the products that give each head one number, such as β: less than 1 %.
    """
    matrices = _matrices(parameters(model, vocab)) + vocab * model.dim
    return 6 * matrices + 3 * sum(model.layer_flops(layer, window) for layer in range(model.layers))


def _matrices(parts: dict[str, int]) -> int:
    """Matrix parameters of all blocks."""
    return sum(parts.get(part, 0) for part in ("mixer", "softmax", "mlp"))


def state_bytes(model: Architecture, size: int = 4) -> int:
    """Bytes that one window carries over all layers: states in fp32, rows in numbers of `size` bytes."""
    states = [model.layer_state(layer) for layer in range(model.layers)]
    return sum(4 * state.values + size * state.rows for state in states)


LONGEST_SLICE = 262_144  # tokens
ENOUGH_SLICE = 32_768  # tokens; longer ones are only worth their memory where they save passes over the window
EFFICIENT_SLICE = 8192  # tokens; shorter ones are taken only where longer ones do not fit
WORTH = 0.01  # of a step's work
SHORTEST_SLICE = 1024  # tokens; a window whose divisors are all shorter or too long is one segment
HEADROOM = 0.92  # of free memory; the rest is for the allocator's gaps


def activation_bytes(recipe: Recipe) -> int:
    """Bytes kept for the backward pass per token of a rank's slice, over all layers."""
    model, mode, compiled = recipe.model, recipe.parallel.recompute, recipe.train.compile
    mixers = sum(model.layer_kept(layer, mode, compiled) for layer in range(model.layers))
    match mode:
        case "full":
            block = model.dim
        case "offload":
            block = 0
        case "selective":
            block = 3 * model.dim + 2 * model.mlp
        case "none":  # the residual stream, the normed inputs, and the MLP's two products; a compiler recomputes more
            block = 3 * model.dim + 2 * model.mlp + (0 if compiled else 5 * model.dim + 2 * model.mlp)
    return _size(recipe) * (model.layers * block + mixers)


def _size(recipe: Recipe) -> int:
    """Bytes of an activation."""
    return {"bf16": 2, "fp32": 4, "fp64": 8}[recipe.train.precision]


def working_bytes(recipe: Recipe) -> int:
    """Bytes per token of the slice that are live during the backward of one block."""
    model = recipe.model
    block = 4 * model.dim + 3 * model.mlp + 2 * model.heads * (model.K + model.V)
    again = activation_bytes(recipe.model_copy(update={"parallel": Parallel()})) // model.layers
    return _size(recipe) * block + (0 if recipe.parallel.recompute == "none" else again)


def fixed_bytes(recipe: Recipe, vocab: int, dp: int, sp: int) -> dict[str, int]:
    """Bytes per rank that do not depend on the slice, by part."""
    count = sum(parameters(recipe.model, vocab).values())
    wide = max(4, _size(recipe))
    shards = _shards(recipe, dp, sp)
    cast = _size(recipe) * count if shards > 1 or _size(recipe) < wide else 0  # weights in compute precision
    whole = count if recipe.parallel.reduce != "segment" else 2 * count // recipe.model.layers
    return {
        "parameters": wide * count // shards + cast,
        "gradients": wide * whole + (wide * count // shards if shards > 1 else 0),
        "optimizer": wide * _optimizer_states(recipe, vocab, dp, sp),
        "loss": recipe.train.loss_chunk * vocab * (wide + _size(recipe)) + 2 * wide * vocab * recipe.model.dim,
    }


def _optimizer_states(recipe: Recipe, vocab: int, dp: int, sp: int) -> int:
    """Numbers that a rank's optimizer keeps: two for each of its parameters, one for those in Muon's matrices.

    With ZeRO-1 it is the rank whose parameters have two, as far as there are enough.
    """
    parts = parameters(recipe.model, vocab)
    count = sum(parts.values())
    others = count - (_matrices(parts) if recipe.optim.kind == "muon" else 0)
    if recipe.parallel.data_parallel != "zero1":
        return (count + others) // _shards(recipe, dp, sp)
    own = max(count // (dp * sp), largest(recipe.model, vocab))
    return own + min(own, others)


def _shards(recipe: Recipe, dp: int, sp: int) -> int:
    """Number of shards of the parameters."""
    return {"ddp": 1, "zero1": 1, "hsdp": sp}.get(recipe.parallel.data_parallel, dp * sp)


def largest(model: Architecture, vocab: int) -> int:
    """Elements of the largest parameter: ZeRO-1 does not split one between ranks."""
    return model.dim * max(vocab, model.mlp, model.heads * max(model.K, model.V))


def memory(recipe: Recipe, vocab: int, dp: int, sp: int, segment: int) -> dict[str, int]:
    """Peak bytes per rank by part, for a segment of `segment` tokens."""
    tokens = recipe.train.micro_batch * segment // sp
    found = {
        **fixed_bytes(recipe, vocab, dp, sp),
        "activations": tokens * activation_bytes(recipe),
        "one block": tokens * working_bytes(recipe),
        "states": 3 * recipe.train.micro_batch * state_bytes(recipe.model, _size(recipe)),
    }
    if not recipe.model.unbounded:
        return found
    found["one block"] += tokens * 16 * recipe.model.query_channels  # parts of o, or of dq, in fp32, and their sums
    return found | {"prefix": _prefix_on_device(recipe, sp, segment)}


def prefix_bytes(recipe: Recipe, sp: int, segment: int) -> tuple[int, int]:
    """Bytes that a rank keeps of a window's keys and values in softmax layers that see all of it, and of their gradient
    in at least fp32, which all segments but the last have. `parallel.prefix: auto` counts as gathered.
    """
    numbers = 2 * recipe.model.key_channels * len(recipe.model.unbounded) * recipe.train.micro_batch
    numbers //= 1 if recipe.parallel.prefix in ("auto", "gathered") else sp
    size, window = _size(recipe), max(segment, recipe.data.window)
    return numbers * window * size, numbers * (window - segment) * max(4, size)


def prefix_sent(recipe: Recipe, sp: int, segments: int) -> int:
    """Bytes that a rank sends of keys and values, and of their gradients, per window: once where they are gathered, or
    else whenever a segment reads a block, forward and backward.
    """
    parallel, size = recipe.parallel, _size(recipe)
    numbers = 2 * recipe.model.key_channels * len(recipe.model.unbounded) * recipe.data.window // sp
    gathered = parallel.prefix in ("auto", "gathered")
    adds = 1 if gathered else (segments + 1) // 2
    reads = 1 if gathered else adds * (3 if parallel.outputs == "again" else 2)
    return numbers * (size * reads + max(4, size) * (sp - 1) * adds) * (sp > 1)


def _prefix_on_device(recipe: Recipe, sp: int, segment: int) -> int:
    """Bytes on a GPU of the prefix: what is kept there, and what of one layer's blocks is on its way or new."""
    size = _size(recipe)
    numbers = 2 * recipe.model.key_channels * recipe.train.micro_batch * segment  # of one block
    new = numbers * 2 * max(4, size)
    match recipe.parallel.prefix:
        case "host":
            return new + numbers * (2 * size + max(4, size))
        case "sharded":
            return new + numbers * 2 * size + sum(prefix_bytes(recipe, sp, segment))
        case _:
            return new + sum(prefix_bytes(recipe, sp, segment))


def oom_advice(recipe: Recipe, vocab: int, dp: int, sp: int, segment: int) -> str:
    """Advice on a rank's memory: its parts by size, largest first, and the recipe's keys that would need less."""
    parts = sorted(memory(recipe, vocab, dp, sp, segment).items(), key=lambda part: -part[1])
    used = ", ".join(f"{name} {size / 2**30:.1f} GiB" for name, size in parts if size >= 2**26)
    parallel, kind = recipe.parallel, recipe.parallel.data_parallel
    several, whole = dp * sp > 1, kind in REPLICATED
    helps = {
        f"train.segment below {segment}": segment > sp * SHORTEST_SLICE,
        "parallel.recompute: full": parallel.recompute in ("none", "selective"),
        f"parallel.data_parallel: zero3 instead of {kind}": several and whole,
        "parallel.reduce: segment": several and not whole and parallel.reduce != "segment",
        f"train.micro_batch below {recipe.train.micro_batch}": recipe.train.micro_batch > 1,
        f"train.loss_chunk below {recipe.train.loss_chunk}": recipe.train.loss_chunk > 1024,
        "parallel.prefix: host": bool(recipe.model.unbounded) and parallel.prefix != "host",
    }
    keys = [key for key, applies in helps.items() if applies]
    return f"expected on each rank: {used or 'little'}; less would need: {', '.join([*keys, 'more GPUs'])}"


def host_memory(recipe: Recipe, vocab: int, dp: int, sp: int, segment: int) -> dict[str, int]:
    """Page-locked bytes per rank by part: the initial states of segments, offloaded activations, the copy that a
    checkpoint is written from beside training, and of softmax layers outputs and a prefix that are kept there.
    """
    segments = recipe.data.window // segment
    offloaded = 0
    if recipe.parallel.recompute == "offload":
        offloaded = segment // sp * activation_bytes(recipe.model_copy(update={"parallel": Parallel()}))
    count, wide = sum(parameters(recipe.model, vocab).values()), max(4, _size(recipe))
    return {
        "states": recipe.train.micro_batch * (segments - 1) * state_bytes(recipe.model, _size(recipe)),
        "activations": recipe.train.micro_batch * offloaded,
        "checkpoint": wide * count // _shards(recipe, dp, sp) + fixed_bytes(recipe, vocab, dp, sp)["optimizer"],
        **({"outputs": kept} if (kept := _outputs_on_host(recipe, sp, segment)) else {}),
        **({"prefix": sum(prefix_bytes(recipe, sp, segment))} if recipe.parallel.prefix == "host" else {}),
    }


def _outputs_on_host(recipe: Recipe, sp: int, segment: int) -> int:
    """Bytes of outputs that softmax layers keep for the second pass: the last layer of the first only makes a state."""
    model = recipe.model
    layers = [] if recipe.parallel.outputs == "again" else [n for n in model.unbounded if n + 1 < model.layers]
    each = model.query_channels * _size(recipe) + model.query_heads * max(4, _size(recipe))
    return len(layers) * each * recipe.train.micro_batch * (recipe.data.window - segment) // sp


def with_reduction(recipe: Recipe, vocab: int, dp: int, sp: int, available: int | None) -> Recipe:
    """Return the recipe with `parallel.reduce: auto` decided: `step`, the cheaper, unless unsharded gradients and all
    else that does not depend on the slice would then take more than two thirds of `available` bytes on a rank.
    """
    if recipe.parallel.reduce != "auto":
        return recipe
    needed = sum(fixed_bytes(recipe, vocab, dp, sp).values())
    tight = available is not None and needed > available * 2 / 3
    often = tight and dp * sp > 1 and recipe.parallel.data_parallel not in REPLICATED
    return recipe.replace(parallel={"reduce": "segment" if often else "step"})


def choose_segment(recipe: Recipe, vocab: int, dp: int, sp: int, available: int | None) -> int:
    """Return the recipe's segment in tokens. `auto` is the longest that divides the window with slices of at most
    ENOUGH_SLICE that fit `available` bytes on each rank (None: unknown); or another, where that makes the step shorter
    by WORTH: a window that fits as a whole needs no second forward pass, and of many segments ranks have more equal
    parts in softmax layers.

    Raises ResourceError where none fits.
    """
    if recipe.train.segment != "auto":
        return recipe.train.segment
    whole = recipe.data.window // sp
    if fitting := _fitting(recipe, vocab, dp, sp, available):
        enough = next((length for length in fitting if length <= ENOUGH_SLICE), fitting[-1])
        others = [length for length in fitting if length >= min(enough, EFFICIENT_SLICE)]
        best = min(others, key=lambda length: work(recipe, vocab, sp, whole // length))
        least, usual = (work(recipe, vocab, sp, whole // length) for length in (best, enough))
        worth = usual - least >= WORTH * least and (available is not None or best < enough)
        return sp * (best if worth else enough)
    assert available is not None
    fixed = sum(fixed_bytes(recipe, vocab, dp, sp).values())
    raise ResourceError(
        f"train.segment: no segment of the {recipe.data.window:,}-token window fits {available / 2**30:.1f} GiB, of "
        f"which {fixed / 2**30:.1f} GiB go to parameters, gradients and optimizer"
        f"{_longest(recipe, vocab, dp, sp, available)}; more GPUs or parallel.recompute: full would"
    )


def _fitting(recipe: Recipe, vocab: int, dp: int, sp: int, available: int | None) -> list[int]:
    """Return the slices in tokens, the longest first, with which a rank needs no more than `available` bytes."""
    room = math.inf if available is None else HEADROOM * available
    segment = recipe.train.segment
    lengths = _slices(recipe.data.window // sp) if segment == "auto" else [segment // sp]
    return [n for n in lengths if sum(memory(recipe, vocab, dp, sp, n * sp).values()) <= room]


def widest(recipe: Recipe) -> Span:
    """The stage whose windows have most tokens at a time, the last of them: what lasts for all stages fits it."""
    return max(recipe.spans(), key=lambda span: (span.recipe.data.window * span.recipe.train.micro_batch, span.number))


PREFIXES = ("gathered", "sharded", "host")  # the fastest first


def with_prefix(recipe: Recipe, vocab: int, dp: int, sp: int, available: int | None, host: int | None = None) -> Recipe:
    """Return the recipe with `parallel.prefix: auto` decided: the first with which slices of EFFICIENT_SLICE fit
    `available` bytes on each rank, or else any; and `parallel.outputs: auto`: kept if all that waits in a rank's host
    memory fits `host` bytes (None: unknown).

    Of a recipe with stages both are those of the `widest`. Raises ResourceError where the prefix fits no memory, or
    where it is told to lie.
    """
    if recipe.stages:
        return recipe.model_copy(
            update={"parallel": with_prefix(widest(recipe).recipe, vocab, dp, sp, available, host).parallel}
        )
    parallel = recipe.parallel
    kinds = PREFIXES if parallel.prefix == "auto" else (parallel.prefix,)
    found = [recipe.replace(parallel={"prefix": kind}) for kind in kinds]
    if not recipe.model.unbounded or available is None:
        kept = "host" if parallel.outputs == "auto" else parallel.outputs
        return found[0].replace(parallel={"outputs": kept})
    fitting = [(one, lengths) for one in found if (lengths := _fitting(one, vocab, dp, sp, available))]
    if not fitting:
        return found[-1]  # and no segment will fit
    long = (one for one, lengths in fitting if lengths[0] >= min(EFFICIENT_SLICE, recipe.data.window // sp))
    chosen = next(long, fitting[0][0])
    segment = choose_segment(chosen, vocab, dp, sp, available)
    needed = host_memory(chosen, vocab, dp, sp, segment)
    if host is None or parallel.outputs != "auto" or sum(needed.values()) <= host:
        chosen = chosen.replace(parallel={"outputs": "host" if parallel.outputs == "auto" else parallel.outputs})
    else:
        chosen = chosen.replace(parallel={"outputs": "again"})
        needed.pop("outputs", None)
    if host is not None and "prefix" in needed and sum(needed.values()) > host:
        room = host - sum(needed.values()) + needed["prefix"]
        longest = max(0, room * recipe.data.window // needed["prefix"]) // SHORTEST_SLICE * SHORTEST_SLICE
        raise ResourceError(
            f"data.window: the keys and values of {recipe.data.window:,} tokens take {needed['prefix'] / 2**30:.1f} "
            f"GiB of host memory on each rank, which has {host / 2**30:.1f} GiB; expected at most {longest:,} tokens"
        )
    return chosen


def _longest(recipe: Recipe, vocab: int, dp: int, sp: int, available: int) -> str:
    """Return words on the longest window that would fit, where a prefix grows with it."""
    unit = sp * SHORTEST_SLICE

    def fits(count: int) -> bool:
        shorter = recipe.replace(data={"window": count * unit})
        return sum(memory(shorter, vocab, dp, sp, unit).values()) <= HEADROOM * available

    low, high = 0, recipe.data.window // unit
    if not recipe.model.unbounded or not fits(1):
        return ""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return f"; the longest window that would: {low * unit:,} tokens"


def _slices(whole: int) -> list[int]:
    """Lengths of slices into which a rank's part of the window may be cut, the longest first."""
    lengths = {part for n in range(1, math.isqrt(whole) + 1) if whole % n == 0 for part in (n, whole // n)}
    return sorted((n for n in lengths if min(SHORTEST_SLICE, whole) <= n <= LONGEST_SLICE), reverse=True) or [whole]


def passes(recipe: Recipe, segments: int) -> float:
    """Work over a window in forward passes: one, two for the backward, and the recomputed ones."""
    return 3 + (segments - 1) / segments + (recipe.parallel.recompute == "full")


# Of the rate of products, that softmax layers reach forward and backward in steps on an H200; runs of milliseconds
# reach 0.85 and 0.78, before its clock falls.
CUDNN = (0.76, 0.70)
FLASH = (0.4, 0.4)  # the same of those that slide


def uneven(sp: int, segments: int) -> float:
    """Work of the last rank that shares a window, in softmax layers that see all before, relative to the mean: in each
    segment it has the last tokens.
    """
    return 1 + (1 - 1 / sp) / segments


def _softmax(recipe: Recipe, sp: int, segments: int) -> float:
    """FLOP per token of softmax attention in all passes, on the rank that has the most, as products take as long.

    Its backward is five products for two. Where a layer sees all before, its outputs are kept for recomputation.
    """
    model, total = recipe.model, 0.0
    forward, back = FLASH if model.sliding_window else CUDNN
    for layer in model.softmax:
        kept = layer in model.unbounded and recipe.parallel.outputs != "again"
        makes = layer + 1 < model.layers and not kept  # of the first pass the last layer's state is enough
        first = (segments - 1) / segments * makes
        again = recipe.parallel.recompute == "full" and layer not in model.unbounded
        total += model.layer_flops(layer, recipe.data.window) * ((1 + first + again) / forward + 2.5 / back)
    return total * (uneven(sp, segments) if model.unbounded else 1)


def work(recipe: Recipe, vocab: int, sp: int, segments: int) -> float:
    """FLOP per token in blocks, on the rank that has the most: of matrices, and of softmax attention as `_softmax`."""
    body = _matrices(parameters(recipe.model, vocab))
    return 2 * body * passes(recipe, segments) + _softmax(recipe, sp, segments)


def seconds_per_token(recipe: Recipe, vocab: int, segments: int, rates: Rates, sp: int = 1) -> float:
    """Predict the seconds that one rank of `sp` takes for one token of its slices, exchanges hidden.

    Matrix products count at their measured rate; recurrences and pointwise work by the bytes they move. A window of
    more than one segment has a second forward of all but the last segment.
    """
    model = recipe.model
    more = passes(recipe, segments) - 3
    products = work(recipe, vocab, sp, segments) + 6 * vocab * model.dim
    recurrence = sum(_recurrence_seconds(model.recurrence_work(layer), more, rates) for layer in model.mixers)
    pointwise = 2 * model.layers * (12 * model.dim + 3 * model.mlp) * (3 + more)
    logits = vocab * 14
    return products / rates.products + recurrence + (pointwise + logits) / (COPIES * rates.copies)


def softmax_share(recipe: Recipe, vocab: int, segments: int, rates: Rates, sp: int) -> float:
    """Part of `seconds_per_token` that softmax attention takes."""
    return _softmax(recipe, sp, segments) / rates.products / seconds_per_token(recipe, vocab, segments, rates, sp)


COPIES = 0.8  # of the rate of copies, that pointwise work and recurrences reach
PRODUCTS = 0.5  # of the rate of products, that those inside a recurrence reach


def _recurrence_seconds(work: Work, more: float, rates: Rates) -> float:
    """Seconds per token of a recurrence in both directions, and `more` times forward."""
    moved, products = (both + more * forward for forward, both in work)
    return max(moved / (COPIES * rates.copies), products / (PRODUCTS * rates.products))


DISTANCES = (4096, 32768, 131072, 1 << 20, 1 << 22)  # tokens


def memory_horizon(model: Architecture, window: int) -> list[list[int]]:
    """Per layer, the number of heads at which a token still weighs more than 1/1000, or in a softmax layer is seen,
    after each of DISTANCES.
    """
    table = model.decays(window)
    seen = [model.query_heads * (far < (model.sliding_window or math.inf)) for far in DISTANCES]
    weighed = [[sum(slope * far < 1.001 * math.log(1000) for slope in layer) for far in DISTANCES] for layer in table]
    return [seen if index in model.softmax else heads for index, heads in enumerate(weighed)]


def effective_context(model: Architecture, window: int) -> float:
    """The largest distance in tokens at which at least one head in a quarter of the recurrent layers, or a softmax
    layer, still sees; may be inf.
    """
    if model.softmax and model.sliding_window is None:
        return math.inf
    table = model.decays(window)
    table = [layer for index, layer in enumerate(table) if index not in model.softmax]
    far = sorted((math.inf if min(layer) == 0 else math.log(1000) / min(layer) for layer in table), reverse=True)
    return max(float(model.sliding_window or 0), far[math.ceil(len(far) / 4) - 1] if far else 0.0)


class Layout(NamedTuple):
    """Division of a step's tokens: `segment`, `slice` and `tokens_per_step` in tokens, the rest counts."""

    dp: int
    sp: int
    segments: int
    segment: int
    slice: int
    micro_batches: int
    tokens_per_step: int


def layout(recipe: Recipe, dp: int, sp: int, vocab: int = 0, available: int | None = None) -> Layout:
    """Return the layout of a step on a dp × sp mesh, with `available` bytes on each rank (None: enough)."""
    window, train = recipe.data.window, recipe.train
    segment = choose_segment(recipe, vocab, dp, sp, available)
    micro_batches = train.batch // (dp * train.micro_batch)
    return Layout(dp, sp, window // segment, segment, segment // sp, micro_batches, train.batch * window)
