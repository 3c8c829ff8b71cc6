"""An exported model is the model: its logits in its own library, in a process of its own, against ours in float64.

python -m lasptrain.convert.verify FOLDER RUN      prints one line of JSON
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasptrain import checkpoint
from lasptrain.convert.foreign import COMPUTED
from lasptrain.errors import ConvertError
from lasptrain.models.language_model import LanguageModel
from lasptrain.parallel.attention import Attention
from lasptrain.parallel.shard import fill
from lasptrain.recipe import Model

LENGTH, PREFIX, PIECES, SHORT, GREEDY = 83, 40, (20, 21, 1, 41), 60, 16  # tokens
OF_FLA = ("linear_attn", "retnet")  # what flash-linear-attention computes
UNCOUNTED = "the library counts the tokens of a minimax cache in layer 0, which is linear here"
TOLERANCE = 1e-4  # of logits in fp32, for each unit of their largest that exceeds one


class Parity(NamedTuple):
    """Largest errors of fp32 logits against ours in float64, and the largest of these; None: not measured."""

    scale: float
    full: float
    decode: float  # token by token after a prefix
    chunked: float | None  # prefill in uneven pieces
    padded: float  # a shorter text in a batch, padded on the left
    greedy: int  # equal tokens
    gated: bool  # whether a larger error would have been refused
    library: str

    def __str__(self) -> str:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in self.errors().items())
        return (
            f"{self.library}: largest errors of logits up to {self.scale:.1f}: {errors}; "
            f"{self.greedy} of {GREEDY} greedy tokens equal"
            + ("" if self.chunked is not None else f"; prefill in pieces not compared: {UNCOUNTED}")
            + ("" if self.gated else "; not gated: weights were rounded")
        )

    def errors(self) -> dict[str, float]:
        """Those that were measured."""
        found = {"full": self.full, "decode": self.decode, "chunked": self.chunked, "padded": self.padded}
        return {name: error for name, error in found.items() if error is not None}

    def problems(self) -> list[str]:
        """What is beyond tolerance."""
        allowed = TOLERANCE * max(1.0, self.scale)
        wrong = [f"{name} {error:.1e}" for name, error in self.errors().items() if not error <= allowed]
        return wrong + ([f"greedy {self.greedy} of {GREEDY}"] if self.greedy < GREEDY else [])


def installed(library: str) -> bool:
    """Whether a package is there, without importing it; a folder of that name is none."""
    spec = find_spec(library)
    return spec is not None and spec.origin is not None


def compare(folder: Path, run: Path, exact: bool) -> Parity:
    """Compare `folder` with the newest step of `run`. ConvertError beyond tolerance, where `exact`."""
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


def reference(run: Path) -> Callable[[Tensor], Tensor]:
    """Ours in float64, token by token: tokens [B, T] to logits [B, T, vocab]."""
    step = checkpoint.Opened(run)
    cfg = Model.model_validate(step.meta["model"])
    with torch.device("meta"):
        model = LanguageModel(cfg, step.meta["order"]["window"], Attention("reference"), dtype=torch.float64).double()
    model.to_empty(device="cpu")
    with torch.no_grad():
        fill(model, ((name, step.read(name)) for name in step.shapes))

    @torch.no_grad()
    def logits(tokens: Tensor) -> Tensor:
        x, _ = model.hidden(tokens)
        x = model.norm(x)
        return torch.nn.functional.linear(x, model.head_weight)

    return logits


def measure(model: Any, ours: Callable[[Tensor], Tensor], vocab: int, library: str) -> Parity:
    """Every way of asking `model`, compared with `ours`."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab, (1, LENGTH), generator=generator)
    want = ours(tokens)

    def error(got: Tensor, of: Tensor) -> float:
        return float((got.double().cpu() - of).abs().max())

    full = model(tokens.to(model.device), use_cache=False).logits
    one = [PREFIX] + [1] * (LENGTH - PREFIX)
    return Parity(
        scale=float(want.abs().max()),
        full=error(full, want),
        decode=error(_cached(model, tokens, one), want),
        chunked=error(_cached(model, tokens, PIECES), want) if _counts_tokens(model.config) else None,
        padded=_padded(model, tokens, ours(tokens[:, :SHORT]), error),
        greedy=_greedy(model, ours, tokens[:, :PREFIX]),
        gated=True,
        library=library,
    )


def _counts_tokens(config: Any) -> bool:
    """Whether its cache knows how many tokens it holds: not of minimax stacks whose softmax layers are all later ones.

    They decode token by token and generate as they should.
    """
    kinds = getattr(config, "layer_types", None) or []
    return config.model_type != "minimax" or kinds[0] == "full_attention" or "full_attention" not in kinds


def _cached(model: Any, tokens: Tensor, lengths: Any) -> Tensor:
    """Logits of pieces of these lengths, one after another."""
    cache, start, found = None, 0, []
    for piece in tokens.to(model.device).split(list(lengths), dim=1):
        position = torch.arange(start, start + piece.shape[1], device=piece.device)[None]
        out = model(piece, past_key_values=cache, use_cache=True, position_ids=position)
        cache, start = out.past_key_values, start + piece.shape[1]
        found.append(out.logits)
    return torch.cat(found, dim=1)


def _padded(model: Any, tokens: Tensor, want: Tensor, error: Callable[[Tensor, Tensor], float]) -> float:
    rest = LENGTH - SHORT
    batch = torch.cat([tokens, torch.cat([tokens.new_zeros(1, rest), tokens[:, :SHORT]], dim=1)]).to(model.device)
    mask = torch.ones_like(batch)
    mask[1, :rest] = 0
    position = (mask.cumsum(1) - 1).clamp(min=0)
    return error(model(batch, attention_mask=mask, position_ids=position).logits[1:, rest:], want)


def _greedy(model: Any, ours: Callable[[Tensor], Tensor], prompt: Tensor) -> int:
    """How many tokens of its greedy text are ours too: each is our choice after those before it."""
    prompt = prompt.to(model.device)
    if model.config.model_type in OF_FLA:
        text = _continued(model, prompt)
    else:
        text = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=GREEDY, do_sample=False, pad_token_id=0
        )
    text = text.cpu()
    if text.shape[1] != PREFIX + GREEDY:
        return 0
    want = ours(text)[:, PREFIX - 1 : -1].argmax(-1)  # after a text that is ours as far as all before it are equal
    return int((text[:, PREFIX:] == want).int().cumprod(1).sum())


def _continued(model: Any, text: Tensor) -> Tensor:
    """Greedy text by cached calls: generate() of flash-linear-attention 0.6.0 under transformers 5.24 finds others."""
    cache, rest = None, text
    for _ in range(GREEDY):
        out = model(rest, past_key_values=cache, use_cache=True)
        cache, rest = out.past_key_values, out.logits[:, -1:].argmax(-1)
        text = torch.cat([text, rest], dim=1)
    return text


def strangers(info: dict[str, Any]) -> dict[str, list[str]]:
    """Keys that are missing, unexpected or mismatched, of what transformers says about loading."""
    found = {kind: [str(name) for name in names if not str(name).endswith(COMPUTED)] for kind, names in info.items()}
    return {kind: sorted(names) for kind, names in found.items() if names}


@torch.no_grad()
def main(folder: str, run: str) -> None:
    """Measure and print."""
    import transformers

    transformers.logging.set_verbosity_error()
    custom = (Path(folder) / "modeling_transnormer.py").exists()
    kind = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["model_type"]
    library = import_module("fla.models" if kind in OF_FLA else "transformers").__name__.split(".")[0]
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=custom
    )
    if strange := strangers(info):
        raise ConvertError(f"keys: {strange}")
    if kind in OF_FLA:
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        for layer in model.model.layers:
            layer.attn.mode = "fused_recurrent"  # its other kernels multiply in TF32
    versions = f"{library} {import_module(library).__version__}"
    found = measure(model.eval(), reference(Path(run)), model.config.vocab_size, versions)
    sys.stdout.write(json.dumps(found._asdict()) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
