"""The config.json with which a target computes what our model does, and the model that others' describes. No torch."""

from __future__ import annotations

from lasptrain import architectures
from lasptrain.architectures.base import Architecture
from lasptrain.convert.rules import Shapes
from lasptrain.convert.target import Json, Target
from lasptrain.convert.targets import MODEL_TYPES
from lasptrain.errors import ConvertError

UNBOUNDED = 1 << 24  # positions of a model without a limit; other runtimes refuse longer prompts
FREE = {"architectures", "dtype", "max_position_embeddings"}  # keys that do not change the result, whatever the target
DEPTHS = {"num_hidden_layers", "decoder_layers", "num_layers", "n_layer", "n_layers"}  # keys of a number of layers


def config(target: Target, model: Architecture, special: Json, dtype: str, window: int = UNBOUNDED) -> Json:
    """Return the config.json of `model` for a target.

    Args:
        special: its keys for the ids of tokens that begin, end and pad a text.
        dtype: of the tensors, such as float32.
        window: tokens of a training window, beyond which softmax layers never saw.
    """
    common: Json = {"vocab_size": model.vocab, "tie_word_embeddings": model.tie, "dtype": dtype} | special
    common |= {"max_position_embeddings": window if model.softmax else UNBOUNDED}
    common |= {"architectures": [target.loads_as]} if target.loads_as else {}
    return common | {"model_type": target.model_type} | target.config(model)


def generation(target: Target) -> Json:
    """Return the keys of generation_config.json besides special tokens."""
    return {"do_sample": False} | target.generation


def check(target: Target, found: Json, model: Architecture, where: str) -> None:
    """Raise ConvertError where a config.json differs from ours for `model` in a key that both have."""
    kind = found.get("model_type")
    free = FREE.union(target.free)
    for key, value in config(target, model, {}, "").items():
        if key not in free and key in found and found[key] != value:
            raise ConvertError(f"{where}: {key} is {found[key]!r}, the recipe's model has {value!r}")
    if kind != target.model_type:
        raise ConvertError(f"{where}: model_type is {kind!r}; expected {target.model_type!r}")


def check_compatible(target: Target, theirs: Architecture, ours: Architecture, where: str) -> None:
    """Raise ConvertError where a folder's model and the recipe's differ in a key of `target`'s config.json."""
    check(target, config(target, theirs, {}, ""), ours, where)


def target_of(config: Json, where: str) -> Target:
    """Return the target whose class others' config.json names. ConvertError for another class."""
    kind = config.get("model_type")
    target = MODEL_TYPES.get(kind) if isinstance(kind, str) else None
    if target is None:
        raise ConvertError(f"{where}: model_type is {kind!r}; expected {', '.join(MODEL_TYPES)}")
    return target


def check_depth(layers: int, shapes: Shapes, where: str) -> None:
    """Raise ConvertError for more layers than tensors, before anything is made for each."""
    if layers > len(shapes):
        raise ConvertError(f"{where}: {layers:,} layers, with {len(shapes):,} tensors; expected tensors for each")


def described(config: Json, shapes: Shapes, where: str) -> tuple[Target, Architecture]:
    """Return the target and the model that others' config.json describes, for tensors of these shapes.

    A missing key has its class's default. ConvertError names the key that our models cannot express.
    """
    target = target_of(config, where)
    try:
        for key in config.keys() & DEPTHS:
            if isinstance(config[key], int):
                check_depth(config[key], shapes, f"{where}: {key}")
        keys = target.keys(config, where)
        if target.embedding not in shapes:
            raise ConvertError(f"{where}: no tensor beside it is named {target.embedding}")
        model = architectures.model({"vocab": shapes[target.embedding][0]} | keys)
    except (LookupError, AttributeError, TypeError, ValueError, ArithmeticError) as error:
        reason = str(error).replace("\n", " ")
        raise ConvertError(f"{where}: describes no model ({type(error).__name__}: {reason})") from None
    for key, text in model.problems():
        raise ConvertError(f"{where}: describes no model of ours: {key}: {text}")
    return target, model
