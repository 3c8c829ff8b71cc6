"""Adapter for lm-evaluation-harness (extra `lm-eval`), whose own command line this module runs.

    python -m lasptrain.eval.harness --model lasptrain --model_args path=runs/my_model --tasks lambada_openai

A context is read once for all its continuations, and a document for perplexity as a whole, its state carried from the
first token to the last: nothing is truncated, as the harness would for models with a maximum length.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from lasptrain.eval.generate import Sampling, decode
from lasptrain.eval.inference import Reader, Snapshot
from lasptrain.eval.load import Trained, load_model
from lasptrain.eval.tasks.sample import Encoder

TOKENS = 256  # generated unless a task says otherwise
UNLIMITED = 1 << 24  # maximum length that the harness is given

Pair = tuple[tuple[str, str], list[int], list[int]]  # texts; ids of context and continuation


@register_model("lasptrain")
class Harness(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """The model at `path`: a run, an export or a folder of others. Texts begin with BOS, as documents in training did.

    Args:
        path: as for `lasptrain eval`.
        segment: tokens processed at a time.
        batch_size, max_batch_size, device: given by the harness; texts are read one by one, on a GPU if there is one.
    """

    def __init__(
        self,
        path: str | Trained,
        segment: int = 32768,
        batch_size: object = None,
        max_batch_size: object = None,
        device: object = None,
    ):
        super().__init__()
        trained = path if isinstance(path, Trained) else load_model(Path(path))
        self.encoder, self.reader = Encoder(trained.tokenizer), Reader(trained.model, segment=int(segment))
        self.max_length, self.max_gen_toks = UNLIMITED, TOKENS
        self.batch_size = 1

    @property
    def eot_token_id(self) -> int:
        """BOS: a document ends where the next one begins."""
        return self.encoder.tokenizer.bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Return token ids, after BOS unless `add_special_tokens` is false."""
        ids = self.encoder(string)
        return ids if add_special_tokens is False else [self.eot_token_id, *ids]

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **_: object
    ) -> list[tuple[float, bool]]:
        """Return ln p of each continuation given its context, and true if greedy generation gives it."""
        found: list[tuple[float, bool]] = []
        last: list[int] = []
        past: Snapshot | None = None
        for texts, context, continuation in requests:
            if past is None or context != last:
                last, past = context, self._read(context)
            answer = (0.0, True)
            if continuation:
                nats, hits = self.reader.score(past, continuation[:-1], continuation)
                answer = (-float(nats.sum()), bool(hits.all()))
            self.cache_hook.add_partial("loglikelihood", texts, answer)
            found.append(answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return ln p of each document, read as a whole."""
        found = []
        for (text,) in (request.args for request in requests):
            ids = torch.tensor(self.tok_encode(text))
            found.append(-float(self.reader.losses(ids).sum()) if len(ids) > 1 else 0.0)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to the first of the texts in `until`, BOS, or `max_gen_toks` tokens."""
        found = []
        for context, options in (request.args for request in requests):
            stops = options.get("until") or []
            stops = [stops] if isinstance(stops, str) else list(stops)
            count = int(options.get("max_gen_toks") or self.max_gen_toks)
            found.append(self._continued(self._read(self.tok_encode(context)), stops, count, _sampling(options)))
            self.cache_hook.add_partial("generate_until", (context, options), found[-1])
        return found

    def _continued(self, past: Snapshot, stops: list[str], count: int, sampling: Sampling) -> str:
        tokenizer = self.encoder.tokenizer
        stop = re.compile("|".join(map(re.escape, stops)) or r"(?!)")

        def ended(row: list[int]) -> bool:
            return stop.search(tokenizer.decode(row)) is not None

        (row,) = decode(self.reader.model, past, count, sampling, stop=tokenizer.bos, ended=ended)
        return stop.split(tokenizer.decode(row), maxsplit=1)[0]

    def _read(self, ids: list[int]) -> Snapshot:
        return self.reader.read(torch.tensor([ids]))


def _sampling(options: dict[str, Any]) -> Sampling:
    """Read a task's options: greedy unless `do_sample` or a temperature above 0 is given."""
    temperature = options.get("temperature")
    if options.get("do_sample") is False or not (temperature or options.get("do_sample")):
        return Sampling()
    return Sampling(float(1.0 if temperature is None else temperature), float(options.get("top_p", 1.0)))


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
