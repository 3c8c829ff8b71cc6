"""Predicted cost of sharing a window, from α–β models of the links between GPUs. No torch, no GPU."""

from __future__ import annotations

import math
from typing import NamedTuple

from lasptrain.cost.gpus import Rates
from lasptrain.cost.plan import parameters, seconds_per_token, state_bytes
from lasptrain.recipe.schema import Recipe
from lasptrain.recipe.sections import REPLICATED


class Link(NamedTuple):
    """A link between two GPUs: seconds before a message's first byte arrives, then bytes/s."""

    latency: float
    bandwidth: float


class Links(NamedTuple):
    """The links of a cluster whose machines have `node` GPUs each; neighbouring ranks are on one machine."""

    inside: Link = Link(10e-6, 300e9)  # NVLink
    between: Link = Link(25e-6, 40e9)  # one 400 Gbit/s adapter per GPU
    node: int = 8
    gather: Link | None = None  # of all ranks of one machine, where it is known to differ from `inside`

    def hops(self, ranks: int) -> list[Link]:
        """Return the links from each of `ranks` ranks to the next."""
        return [self.inside if rank % self.node else self.between for rank in range(1, ranks)]

    def slowest(self, ranks: int) -> Link:
        """Return the link that bounds a collective of `ranks` ranks."""
        return self.between if ranks > self.node else self.gather or self.inside


ASSUMED = Links()
MOST_PARTS = 8


def parts(ranks: int) -> int:
    """Number of parts into which the all-scan cuts a state."""
    return max(1, min(MOST_PARTS, ranks - 1))


def scan_seconds(ranks: int, size: int, links: Links, *, carried: bool = False, beside: int = 0) -> dict[str, float]:
    """Seconds that each scan takes to bring `size` bytes of state through `ranks` ranks, in one direction.

    With n ranks, S bytes (in an all-gather those of a transition `beside` them too), latency α and bandwidth β of a
    link, until the last rank has its initial state:

        ring        Σ (α + S/β) over the n − 1 links         from neighbour to neighbour
        all_gather  ⌈log₂ n⌉ · α + (n − 1) · S/β             every state to every rank, by the slowest link
        all_scan    Σ (α + S/(P·β)) + (P − 1) · its largest  the ring with the state in P parts, sent on as they come

    `carried`: another segment follows, and the last rank of a chain sends the final state to the first: one message
    more for ring and all_scan, none for all_gather, whose ranks have it. One rank takes no time.
    """
    if ranks == 1:
        return dict.fromkeys(("ring", "all_gather", "all_scan"), 0.0)
    hops, slowest = links.hops(ranks), links.slowest(ranks)
    far = links.inside if ranks <= links.node else links.between
    back = (far.latency + size / far.bandwidth) * carried
    count = parts(ranks)
    pieces = [hop.latency + size / count / hop.bandwidth for hop in hops]
    return {
        "ring": sum(hop.latency + size / hop.bandwidth for hop in hops) + back,
        "all_gather": math.ceil(math.log2(ranks)) * slowest.latency + (ranks - 1) * (size + beside) / slowest.bandwidth,
        "all_scan": sum(pieces) + (count - 1) * max(pieces) + back,
    }


def with_scan(recipe: Recipe, sp: int, segment: int, links: Links = ASSUMED) -> Recipe:
    """Return the recipe with `mesh.scan: auto` decided: the cheapest for one layer's state of a micro-batch."""
    if recipe.mesh.scan != "auto":
        return recipe
    costs = scan_seconds(sp, _state(recipe), links, carried=segment < recipe.data.window, beside=_transition(recipe))
    return recipe.replace(mesh={"scan": min(costs, key=costs.__getitem__)})


def _state(recipe: Recipe) -> int:
    """Bytes of one layer's state of a micro-batch."""
    return recipe.train.micro_batch * state_bytes(recipe.model) // recipe.model.layers


def _transition(recipe: Recipe) -> int:
    """Bytes of the largest transition of a layer, for a micro-batch."""
    model = recipe.model
    return 4 * recipe.train.micro_batch * max(model.layer_state(layer).transition for layer in range(model.layers))


def weights_sent(recipe: Recipe, vocab: int, ranks: int) -> float:
    """Bytes that a rank sends per step for gradients and parameters: replicated, gradients are all-reduced; sharded,
    they are reduce-scattered, and parameters in compute precision gathered once (`zero2`) or for forward and backward.
    """
    count = sum(parameters(recipe.model, vocab).values())
    narrow = {"bf16": 2, "fp32": 4, "fp64": 8}[recipe.train.precision]
    wide, kind = max(4, narrow), recipe.parallel.data_parallel
    each = 2 * wide if kind in REPLICATED else wide + narrow * (1 if kind == "zero2" else 2)
    return count * each * (ranks - 1) / ranks


def step_seconds(
    recipe: Recipe, vocab: int, ranks: int, tokens: int, rates: Rates, links: Links = ASSUMED, segments: int = 1
) -> dict[str, float | None]:
    """Seconds of a step in which each rank has `tokens` tokens, by method; None where it cannot take so many ranks.

    `none` shares nothing; it and the scans take the window in `segments` segments, the others in one. A scan hides
    behind the products for queries and gate, and in the backward behind the gradient of queries. Ulysses and Megatron
    wait for what they send, and all for parameters and gradients, once per step. Ring Attention sends a block while it
    works on one, and the last rank works on all of them. Activations have 16 bits, the gradients that Ring Attention
    passes on 32.
    """
    model = recipe.model
    width = model.heads * (model.K + model.V)
    link = links.slowest(ranks)
    weights = weights_sent(recipe, vocab, ranks) / link.bandwidth
    unshared, uneven = (tokens * seconds_per_token(recipe, vocab, segments, rates, sp) + weights for sp in (1, ranks))
    forward = 2 * tokens / segments * model.dim * width / rates.products
    backward = 4 * tokens / segments * width / (0.8 * rates.copies)
    scans = {
        name: sum(max(0.0, seconds - hidden) for hidden in (forward, backward))
        for name, seconds in scan_seconds(ranks, _state(recipe), links, beside=_transition(recipe)).items()
    }

    def sending(size: float, messages: int) -> float:
        return messages * link.latency + size / link.bandwidth

    traded = 4 * tokens * width * (ranks - 1) / ranks
    work = 2 * tokens * width / (0.8 * rates.copies)
    block = 2 * tokens * width
    waiting = {
        "ulysses": 2 * sending(traded, 4),
        "ring_attention": (ranks - 1) * (max(work, sending(block, 1)) + max(2 * work, sending(3 * block, 2))),
        "megatron": sending(8 * 2 * (ranks - 1) * tokens * model.dim, 8),
    }
    whole = tokens * seconds_per_token(recipe, vocab, 1, rates) + weights
    found: dict[str, float | None] = {"none": unshared}
    found |= {name: uneven + segments * model.layers * seconds for name, seconds in scans.items()}
    found |= {name: whole + model.layers * seconds for name, seconds in waiting.items()}
    return found if model.heads % ranks == 0 else found | {"ulysses": None, "megatron": None}
