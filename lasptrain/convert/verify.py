"""Verification of an export: its logits in its own library, in a process of its own, against ours in float64.

python -m lasptrain.convert.verify FOLDER RUN      prints one line of JSON
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasptrain import architectures
from lasptrain.architectures.base import Architecture
from lasptrain.checkpoint import order, single
from lasptrain.convert.targets import MODEL_TYPES
from lasptrain.errors import ConvertError
from lasptrain.models.language_model import on_meta
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.parallel.shard import fill

LENGTH, PREFIX, PIECES, SHORT, GREEDY = 83, 40, (20, 21, 1, 41), 60, 16  # tokens
CHUNK = 128  # tokens of the largest chunk that no configuration names
TOLERANCE = 1e-4  # of fp32 logits, times the largest logit where that exceeds 1


class Parity(NamedTuple):
    """Largest errors of fp32 logits against ours in float64; `scale` is our largest logit."""

    scale: float
    full: float
    decode: float  # token by token after a prefix, past the largest window, convolution and chunk
    chunked: float  # prefill in uneven pieces
    padded: float  # a shorter text in a batch, padded on the left
    generated: float  # at each token of greedy texts, in a batch padded on the left
    greedy: int  # number of equal tokens
    ended: bool  # each of these texts ends with the end token, followed by padding
    gated: bool  # errors beyond tolerance are refused
    library: str

    def __str__(self) -> str:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in self.errors().items())
        return (
            f"{self.library}: largest errors of logits up to {self.scale:.1f}: {errors}; "
            f"{self.greedy} of {GREEDY} greedy tokens equal; texts {'end' if self.ended else 'do not end'}"
            + ("" if self.gated else "; not gated: weights were rounded")
        )

    def errors(self) -> dict[str, float]:
        """Return the errors by name."""
        return {name: getattr(self, name) for name in ("full", "decode", "chunked", "padded", "generated")}

    def problems(self) -> list[str]:
        """Return the errors beyond tolerance."""
        allowed = TOLERANCE * max(1.0, self.scale)
        wrong = [f"{name} {error:.1e}" for name, error in self.errors().items() if not error <= allowed]
        wrong += [f"greedy {self.greedy} of {GREEDY}"] if self.greedy < GREEDY else []
        return wrong + ([] if self.ended else ["texts do not end"])


def installed(library: str) -> bool:
    """True if a package is installed, without importing it; a folder of that name does not count."""
    spec = find_spec(library)
    return spec is not None and spec.origin is not None


def compare(folder: Path, run: Path, exact: bool) -> Parity:
    """Compare `folder` with the newest step of `run`. ConvertError beyond tolerance if `exact`."""
    command = [sys.executable, "-m", "lasptrain.convert.verify", str(folder.absolute()), str(run.absolute())]
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | quiet, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ConvertError(f"verification: the export does not load or run: {reason}")
    parity = Parity(**json.loads(lines[-1]))._replace(gated=exact)
    if exact and (problems := parity.problems()):
        raise ConvertError(f"verification: {', '.join(problems)}; expected at most {TOLERANCE:g} × logit scale")
    return parity


Reference = Callable[..., Tensor]  # (tokens [B, T], keep = T) → logits [B, keep, vocab] of the last ones


def reference(run: Path) -> Reference:
    """Return our model's logits as a function: float64, token by token."""
    step = single.CheckpointReader(run)
    cfg = architectures.model(step.meta["model"])
    return logits_of(cfg, order.window(step.meta), step.shapes, step.read)


def logits_of(cfg: Architecture, window: int, names: Collection[str], read: Callable[[str], Tensor]) -> Reference:
    """Return the logits of a model, of tensors read by name, as `reference` does."""
    model = on_meta(cfg, window, ShardedRecurrence("reference"), dtype=torch.float64)
    model.to_empty(device="cpu")
    with torch.no_grad():
        fill(model, ((name, read(name)) for name in names))

    @torch.no_grad()
    def logits(tokens: Tensor, keep: int = 0) -> Tensor:
        x, _ = model.hidden(tokens)
        x = model.norm(x[:, -keep:])
        return torch.nn.functional.linear(x, model.head_weight)

    return logits


def measure(model: Any, ours: Reference, vocab: int, library: str) -> Parity:
    """Compare `model` with `ours`: in one forward, with its cache, padded, and generating."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab, (1, _length(model.config)), generator=generator)
    before = tokens.shape[1] - LENGTH
    want = ours(tokens, LENGTH)
    batch, mask = _padded(model, tokens)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(batch, attention_mask=mask, position_ids=position, logits_to_keep=SHORT).logits[1:]
    generated, greedy, ended = _generated(model, ours, batch, mask)
    return Parity(
        scale=float(want.abs().max()),
        full=_error(model(tokens.to(model.device), use_cache=False, logits_to_keep=LENGTH).logits, want),
        decode=_error(_cached(model, tokens, [before + PREFIX] + [1] * (LENGTH - PREFIX)), want),
        chunked=_error(_cached(model, tokens, [before + PIECES[0], *PIECES[1:]]), want),
        padded=_error(padded, want[:, :SHORT]),
        generated=generated,
        greedy=greedy,
        ended=ended,
        gated=True,
        library=library,
    )


def _length(config: Any) -> int:
    """Return a length in tokens at which decoding crosses the largest window, convolution and chunk of an export."""
    reach = max([CHUNK, *(getattr(config, key, None) or 0 for key in MODEL_TYPES[config.model_type].reaches)])
    return max(LENGTH, reach + (LENGTH - PREFIX) // 2)


def _error(got: Tensor, want: Tensor) -> float:
    return float((got.double().cpu() - want).abs().max())


def _cached(model: Any, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
    """Run pieces of these lengths one after another with a cache; return the last LENGTH logits."""
    cache, start, found = None, 0, []
    for piece in tokens.to(model.device).split(list(lengths), dim=1):
        position = torch.arange(start, start + piece.shape[1], device=piece.device)[None]
        out = model(piece, past_key_values=cache, use_cache=True, position_ids=position, logits_to_keep=LENGTH)
        cache, start = out.past_key_values, start + piece.shape[1]
        found.append(out.logits)
    return torch.cat(found, dim=1)[:, -LENGTH:]


def _padded(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return a batch [2, T] of a text and its beginning, padded on the left, and the mask of its tokens."""
    rest = LENGTH - SHORT
    padding = tokens.new_full((1, rest), model.generation_config.pad_token_id or 0)
    batch = torch.cat([tokens, torch.cat([padding, tokens[:, :-rest]], dim=1)]).to(model.device)
    mask = torch.ones_like(batch)
    mask[1, :rest] = 0
    return batch, mask


def _generated(model: Any, ours: Reference, batch: Tensor, mask: Tensor) -> tuple[float, int, bool]:
    """Generate greedily from `batch`: the largest error of logits, how many tokens equal ours, and true if texts end.

    Each token is compared with our choice after those before it. The end token, which a model may never emit, is forced
    at a different place in each row; only the folder's own configuration makes it end the text.
    """
    config, start, counts = model.generation_config, batch.shape[1], (GREEDY // 2, GREEDY)
    ends = [config.eos_token_id] if isinstance(config.eos_token_id, int) else config.eos_token_id
    if not ends:
        raise ConvertError("generation_config.json names no end of a text")

    def ending(text: Tensor, logits: Tensor) -> Tensor:
        logits = _without(logits, ends)
        for row, count in enumerate(counts):
            if text.shape[1] >= start + count:
                logits[row, ends[-1]] = torch.inf
        return logits

    out = model.generate(
        batch,
        attention_mask=mask,
        max_new_tokens=GREEDY + 2,
        do_sample=False,
        logits_processor=[ending],
        output_logits=True,
        return_dict_in_generate=True,
    )
    text, logits = out.sequences.cpu(), torch.stack(out.logits, 1)
    error, equal, ended = 0.0, GREEDY, text.shape[1] == start + GREEDY + 1
    for row, count in enumerate(counts):
        own = text[row : row + 1, start - int(mask[row].sum()) : start + count]
        want = ours(own[:, :-1], count)
        error = max(error, _error(logits[row : row + 1, :count], want))
        same = int((own[:, -count:] == _without(want, ends).argmax(-1)).int().cumprod(1).sum())
        equal = equal if same == count else min(equal, same)
        end, *padding = text[row, start + count :].tolist()
        ended &= end == ends[-1] and set(padding) <= {config.pad_token_id}
    return error, equal, ended


def _without(logits: Tensor, ids: list[int]) -> Tensor:
    """Copy logits with these ids at −∞."""
    return logits.index_fill(-1, torch.tensor(ids, device=logits.device), -torch.inf)


def unexpected_keys(info: dict[str, Collection[Any]], computed: tuple[str, ...]) -> dict[str, list[str]]:
    """Return the missing, unexpected or mismatched keys from transformers' loading info, without computed ones."""
    found = {kind: [str(name) for name in names if not str(name).endswith(computed)] for kind, names in info.items()}
    return {kind: sorted(names) for kind, names in found.items() if names}


@torch.no_grad()
def main(folder: str, run: str) -> None:
    """Measure the parity of FOLDER with RUN and print it as JSON."""
    import transformers

    transformers.logging.set_verbosity_error()
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    target = MODEL_TYPES[config["model_type"]]
    assert target.library is not None, "no library runs our own format"
    import_module(target.library.module)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=target.code is not None
    )
    if strange := unexpected_keys(info, target.computed):
        raise ConvertError(f"keys: {strange}")
    target.library.prepare(model)
    versions = f"{target.library.name} {import_module(target.library.name).__version__}"
    found = measure(model.eval(), reference(Path(run)), model.config.vocab_size, versions)
    sys.stdout.write(json.dumps(found._asdict()) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
