"""Adapter for lm-evaluation-harness (extra `lm-eval`), whose `--model lasptrain` it is.

    lm_eval --model lasptrain --model_args path=runs/my_model --tasks lambada_openai --batch_size 16

lm-eval finds it by the entry point `lm_eval.models` of this package; releases up to 0.4.13 know no entry points: with
them it is `python -m lasptrain.eval.harness` and the same options. A context is read once for all its continuations,
several contexts together, and a document for perplexity as a whole, its state carried from the first token to the last:
nothing is truncated, as the harness would for models with a maximum length.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from lasptrain.errors import RecipeError
from lasptrain.eval.generate import Sampling, decode
from lasptrain.eval.inference import Reader, Snapshot
from lasptrain.eval.load import Trained, load_model
from lasptrain.eval.tasks.sample import Encoder

TOKENS = 256  # generated unless a task says otherwise
COUNTS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # that say otherwise, first wins
NEUTRAL = {"num_beams": 1, "top_k": 0, "repetition_penalty": 1.0, "num_return_sequences": 1}  # have no effect here
UNLIMITED = 1 << 24  # maximum length that the harness is given
ROWS = 64  # of a batch that is as large as fits
Options = dict[str, Any]
Pair = tuple[tuple[str, str], list[int], list[int]]  # texts; ids of context and continuation

log = logging.getLogger(__name__)


@register_model("lasptrain")
class Harness(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """The model at `path`: a run, an export or a folder of others. Texts begin with BOS, as documents in training did.

    Args:
        path: as for `lasptrain eval`.
        segment: tokens processed at a time, of all texts of a batch.
        batch_size: texts read together; `auto`: as many as fit into a segment, at most `max_batch_size`.
        device: given by the harness; it is the first GPU if there is one.
    """

    def __init__(
        self,
        path: str | Trained,
        segment: int = 32768,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: object = None,
    ):
        super().__init__()
        trained = path if isinstance(path, Trained) else load_model(Path(path))
        self.encoder, self.segment = Encoder(trained.tokenizer), int(segment)
        self.model = trained.model
        self.max_length, self.max_gen_toks = UNLIMITED, TOKENS
        self.batch_size = batch_size if (automatic := str(batch_size).startswith("auto")) else _rows(batch_size)
        self.most = int(max_batch_size or ROWS) if automatic else _rows(batch_size)
        self._ignored: set[str] = set()

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
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        asked: dict[tuple[int, ...], list[int]] = {}  # requests by their context
        for number, (_texts, context, _continuation) in enumerate(requests):
            asked.setdefault(tuple(context), []).append(number)
        contexts = list(asked)
        for batch in self._batches([len(context) for context in contexts]):
            past = self._read([contexts[index] for index in batch])
            pairs = [(row, number) for row, index in enumerate(batch) for number in asked[contexts[index]]]
            pairs = [(row, number) for row, number in pairs if requests[number][2]]
            for some in self._batches([len(requests[number][2]) for _, number in pairs]):
                rows, numbers = zip(*(pairs[index] for index in some), strict=True)
                scores = self._reader(len(rows)).score_batch(past.pick(rows), [requests[n][2] for n in numbers])
                for number, score in zip(numbers, scores, strict=True):
                    found[number] = score
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return ln p of each document, read as a whole; those that fit into a segment together are read together."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        found = [0.0] * len(texts)
        for batch in self._batches([len(text) for text in texts]):
            asked = [number for number in batch if len(texts[number]) > 1]
            if len(asked) * len(texts[batch[0]]) <= self.segment and len(asked) > 1:
                past = self._read([[self.eot_token_id]] * len(asked))
                scores = self._reader(len(asked)).score_batch(past, [texts[number][1:] for number in asked])
                values = [value for value, _greedy in scores]
            else:
                values = [-float(self._reader(1).losses(torch.tensor(texts[number])).sum()) for number in asked]
            for number, value in zip(asked, values, strict=True):
                found[number] = value
        for request, value in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to the first of the texts in `until`, BOS, or `max_gen_toks` tokens.

        That number may also be called `max_new_tokens`, `max_tokens` or `max_completion_tokens`.
        """
        found = [""] * len(requests)
        alike: dict[str, list[int]] = {}  # requests by their options
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        for numbers in alike.values():
            options = requests[numbers[0]].args[1]
            contexts = [self.tok_encode(requests[number].args[0]) for number in numbers]
            for batch in self._batches([len(context) for context in contexts]):
                texts = self._continued(self._read([contexts[index] for index in batch]), options)
                for index, text in zip(batch, texts, strict=True):
                    found[numbers[index]] = text
                    self.cache_hook.add_partial("generate_until", requests[numbers[index]].args, text)
        return found

    def _continued(self, past: Snapshot, options: Options) -> list[str]:
        """Return the continuations of a batch."""
        tokenizer = self.encoder.tokenizer
        until = options.get("until") or []
        stops = [text for text in ([until] if isinstance(until, str) else until) if text]
        stop = re.compile("|".join(map(re.escape, stops)) or r"(?!)")
        counts = [int(options[key]) for key in COUNTS if options.get(key) is not None]
        self._tell_ignored(options)

        def ended(row: list[int]) -> bool:
            return stop.search(tokenizer.decode(row)) is not None

        rows = decode(
            self.model, past, (counts or [self.max_gen_toks])[0], _sampling(options), stop=tokenizer.bos, ended=ended
        )
        return [stop.split(tokenizer.decode(row), maxsplit=1)[0] for row in rows]

    def _tell_ignored(self, options: Options) -> None:
        """Warn once of each option that would change what is generated, and does not here."""
        known = {"until", "do_sample", "temperature", "top_p", *COUNTS}
        for key in options.keys() - known - self._ignored:
            if options[key] not in (None, False, NEUTRAL.get(key)):
                self._ignored.add(key)
                log.warning("%s=%r: lasptrain does not generate with it, and leaves it out", key, options[key])

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Yield the numbers of texts to be run together, the longest first."""
        order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
        while order:
            fitting = self.most
            if isinstance(self.batch_size, str):
                fitting = min(self.most, max(1, self.segment // max(1, lengths[order[0]])))
            yield order[:fitting]
            del order[:fitting]

    def _reader(self, rows: int) -> Reader:
        return Reader(self.model, segment=max(1, self.segment // rows))

    def _read(self, texts: Sequence[Sequence[int]]) -> Snapshot:
        longest = max(map(len, texts))
        padding = [longest - len(text) for text in texts]
        tokens = torch.tensor(
            [[self.eot_token_id] * pad + list(text) for pad, text in zip(padding, texts, strict=True)]
        )
        return self._reader(len(texts)).read(tokens, padding=padding if any(padding) else None)


def _rows(batch_size: object) -> int:
    """Return a number of texts. RecipeError where it is none."""
    if not str(batch_size).isdecimal() or int(str(batch_size)) < 1:
        raise RecipeError(f"--batch_size: found {batch_size!r}; expected a number from 1, or auto")
    return int(str(batch_size))


def _sampling(options: Options) -> Sampling:
    """Read a task's options: greedy unless `do_sample` or a temperature above 0 is given."""
    temperature = options.get("temperature")
    if options.get("do_sample") is False or not (temperature or options.get("do_sample")):
        return Sampling()
    return Sampling(float(1.0 if temperature is None else temperature), float(options.get("top_p", 1.0)))


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
