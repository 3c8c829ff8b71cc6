"""Resolution of `auto` for a number of ranks and a tokenizer's number of pieces."""

from lasptrain.architectures.base import Architecture
from lasptrain.architectures.nearest import nearest_fits
from lasptrain.errors import RecipeError, SetupError
from lasptrain.recipe.schema import Recipe, ragged_slices


def resolve_mesh(recipe: Recipe, world: int, option: str = "--nproc") -> tuple[int, int]:
    """Return (dp, sp) for `world` ranks; auto × auto gives dp as many as train.batch keeps busy, and sp the rest.

    Raises SetupError, naming what fits, where the recipe's mesh is for another number of ranks, and RecipeError where
    only the length of windows or segments does not fit, as `load` does where sp is a number.
    """
    dp, sp = recipe.mesh.dp, recipe.mesh.sp
    micro_batches = recipe.train.batch // recipe.train.micro_batch
    tokens = recipe.data.window if recipe.train.segment == "auto" else recipe.train.segment
    lengths = (tokens, recipe.eval.window or tokens)

    def pair(world: int, lengths: tuple[int, ...]) -> tuple[int, int] | None:
        for ranks in range(min(world, micro_batches), 0, -1):
            split = world // ranks
            given = dp in ("auto", ranks) and sp in ("auto", split)
            divides = world % ranks == micro_batches % ranks == 0 and not any(length % split for length in lengths)
            if given and divides:
                return ranks, split
        return None

    if found := pair(world, lengths):
        return found
    largest = world + 1024 if world < 4096 else None
    fits = nearest_fits(world, lambda n: pair(n, lengths) is not None, largest).replace(", ", " or ")
    if ragged := pair(world, ()):
        other = f"; or {option} {fits}" if fits else ""
        raise RecipeError("\n".join(f"{key}: {text}{other}" for key, text in ragged_slices(recipe, ragged[1])))
    raise SetupError(
        f"mesh: {world} process{'es do' if world > 1 else ' does'} not make dp = {dp} × sp = {sp} "
        f"with {micro_batches} micro-batches and slices of {tokens} tokens; "
        + (f"nearest: {option} {fits}" if fits else "no nearby number of processes does")
    )


def resolve_meshes(recipe: Recipe, world: int, option: str = "--nproc") -> list[tuple[int, int]]:
    """Return (dp, sp) of each stage, as `resolve_mesh` does; of all steps where there are none.

    Raises its errors, which name the stage, and RecipeError where stages need the same mesh and have others.
    """
    found = []
    for span in recipe.spans():
        try:
            found.append(resolve_mesh(span.recipe, world, option))
        except RecipeError as error:
            raise RecipeError(recipe.told(span.number, str(error))) from None
        except SetupError as error:
            raise SetupError(f"stages[{span.number}]: {error}" if recipe.stages else str(error)) from None
    if len(sizes := sorted({sp for _, sp in found})) > 1 and recipe.parallel.data_parallel == "hsdp":
        found_sp = f"found 'hsdp', which shards over sp, with stages of sp = {' and '.join(map(str, sizes))}"
        raise RecipeError(f"parallel.data_parallel: {found_sp}; expected zero3, or one mesh.sp for all")
    return found


def with_meshes(recipe: Recipe, world: int) -> Recipe:
    """Return the recipe with its mesh as numbers, and those of its stages where they differ; see `resolve_meshes`."""
    found = resolve_meshes(recipe, world)
    dp, sp = found[recipe.longest.number]
    recipe, same = recipe.replace(mesh={"dp": dp, "sp": sp}), len(set(found)) == 1
    if not recipe.stages:
        return recipe
    own = [{"dp": None, "sp": None} if same else {"dp": dp, "sp": sp} for dp, sp in found]
    stages = (stage.model_copy(update=keys) for stage, keys in zip(recipe.stages, own, strict=True))
    return recipe.model_copy(update={"stages": tuple(stages)})


def resolve_vocabulary(model: Architecture, pieces: int) -> int:
    """Return the embedding's rows for a tokenizer of `pieces`; auto rounds up to 64. RecipeError for too few rows."""
    if model.vocab == "auto":
        return -(-pieces // 64) * 64
    if model.vocab < pieces:
        found = f"model.vocab: {model.vocab} rows for a tokenizer of {pieces} pieces"
        raise RecipeError(f"{found}; expected at least {pieces}")
    return model.vocab


def with_vocabulary(recipe: Recipe, pieces: int) -> Recipe:
    """Return the recipe with its vocabulary as a number; see `resolve_vocabulary`."""
    return recipe.replace(model={"vocab": resolve_vocabulary(recipe.model, pieces)})
