"""The smallest layout that shows a failure, found by making one choice after another the simplest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from lasptrain.recipe.schema import Recipe

Choice = Mapping[str, Mapping[str, object]]  # keys of sections, and simpler values


def smallest(recipe: Recipe, breaks: Callable[[Recipe], bool]) -> Recipe:
    """Return the recipe with every choice as simple as the failure allows; `breaks(recipe)` is True. Collective.

    Ranks stay as many; a window may be shared by fewer of them.
    """
    changed = True
    while changed:
        changed = False
        for candidate in list(simpler(recipe)):
            if _breaks(candidate, breaks):
                recipe, changed = candidate, True
                break
    return recipe


def _breaks(recipe: Recipe, breaks: Callable[[Recipe], bool]) -> bool:
    try:
        return breaks(recipe)
    except (RuntimeError, ValueError):  # of every rank: a layout that cannot be run explains nothing
        return False


def simpler(recipe: Recipe) -> Iterator[Recipe]:
    """Yield the recipe with one choice made simpler, for each that is not the simplest yet."""
    dp, sp = recipe.mesh.dp, recipe.mesh.sp
    assert isinstance(dp, int) and isinstance(sp, int)
    choices: list[Choice] = [
        {"parallel": {"recompute": "none"}},
        {"train": {"compile": False}},
        {"parallel": {"data_parallel": "ddp", "reduce": "step"}},
        {"train": {"segment": recipe.data.window}},
        *_shared_by_fewer(dp * sp, sp),
        {"mesh": {"scan": "all_gather"}},
        {"train": {"kernel": "reference"}},
        {"data": {"reset_at_documents": False}},
    ]
    for choice in choices:
        candidate = recipe.replace(**choice)
        if candidate != recipe and possible(candidate):
            yield candidate


def _shared_by_fewer(ranks: int, sp: int) -> Iterator[Choice]:
    """Yield meshes of as many ranks whose windows fewer of them share."""
    yield from ({"mesh": {"sp": n, "dp": ranks // n}} for n in range(1, sp) if ranks % n == 0)


def on_fewer_ranks(recipe: Recipe) -> Iterator[tuple[int, Recipe]]:
    """Yield fewer ranks, the fewest first, and the recipe on them, both axes divisors of what they were."""
    dp, sp = recipe.mesh.dp, recipe.mesh.sp
    assert isinstance(dp, int) and isinstance(sp, int)
    meshes = [(i, j) for i in range(1, dp + 1) for j in range(1, sp + 1) if dp % i == sp % j == 0]
    for i, j in sorted(meshes, key=lambda mesh: mesh[0] * mesh[1])[:-1]:
        yield i * j, recipe.replace(mesh={"dp": i, "sp": j})


def possible(recipe: Recipe) -> bool:
    """Return True if the batch splits over the ranks."""
    assert isinstance(recipe.mesh.dp, int)
    return recipe.train.batch % (recipe.mesh.dp * recipe.train.micro_batch) == 0


def told(recipe: Recipe) -> str:
    """Return what is left of a layout, in words."""
    dp, sp = recipe.mesh.dp, recipe.mesh.sp
    assert isinstance(dp, int) and isinstance(sp, int) and isinstance(recipe.train.segment, int)
    segments = recipe.data.window // recipe.train.segment
    kind, kernel = recipe.parallel.data_parallel, recipe.train.kernel
    parts = {
        f"mesh.dp = {dp}": dp > 1,
        f"mesh.sp = {sp}": sp > 1,
        f"mesh.scan = {recipe.mesh.scan}": sp > 1 and recipe.mesh.scan != "all_gather",
        f"{segments} segments": segments > 1,
        f"parallel.data_parallel = {kind}": kind != "ddp",
        f"parallel.recompute = {recipe.parallel.recompute}": recipe.parallel.recompute != "none",
        f"train.kernel = {kernel}": kernel != "reference",
        "train.compile": recipe.train.compile,
        "documents kept apart": recipe.data.reset_at_documents,
    }
    return ", ".join(part for part, there in parts.items() if there) or "one process, one segment"
