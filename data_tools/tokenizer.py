"""Tokenizers: a sentencepiece model or raw bytes behind one shape, how a model is trained, where long texts are cut."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import sentencepiece

from lasptrain.errors import DataError

BYTES = "bytes"
PIECE = 1 << 16  # characters encoded at once: sentencepiece slows down on longer strings
LONGEST = 1 << 20  # a text without any good place is cut here
GOOD_PLACE = re.compile(r"\n|(?<=\S) ")

# Nothing is unknown, and text survives a round trip exactly: no normalisation, no invented spaces.
SETTINGS: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "user_defined_symbols": ["\n", "\t"],
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "bos_id": 0,
    "unk_id": 1,
    "eos_id": -1,
    "pad_id": -1,
    "num_threads": 1,  # stored in the model, so it is part of its SHA-256
    "max_sentence_length": 4 * LONGEST,
    "minloglevel": 2,
}


class Tokenizer(Protocol):
    """Text ↔ ids. `encode` never emits BOS; `token_bytes[i]` is how many bytes of text id i stands for."""

    name: str
    sha256: str
    vocab_size: int
    bos: int
    token_bytes: list[int]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without BOS."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids. BOS and ids outside of the vocabulary stand for nothing."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, BOS 256: needs no model."""

    name = BYTES
    sha256 = hashlib.sha256(b"lasptrain bytes 1").hexdigest()
    vocab_size = 257
    bos = 256

    def __init__(self) -> None:
        self.token_bytes = [1] * 256 + [0]

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class SentencePieceTokenizer:
    """A sentencepiece model read from a file."""

    def __init__(self, path: Path) -> None:
        """Raises DataError for a file that is no model, or a model without BOS."""
        try:
            content = path.read_bytes()
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (OSError, RuntimeError) as error:
            raise DataError(f"{path}: no sentencepiece model can be read from it; {BYTES!r} needs no file") from error
        self.name = path.name
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.vocab_size: int = self._model.vocab_size()
        self.bos: int = self._model.bos_id()
        if self.bos < 0:
            raise DataError(f"{path}: the model has no BOS piece, and every document starts with one")
        self.token_bytes = [self._bytes_of(i) for i in range(self.vocab_size)]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._model.decode([i for i in ids if i < self.vocab_size and i != self.bos])
        return text

    def _bytes_of(self, token: int) -> int:
        if self._model.is_byte(token):
            return 1
        if self._model.is_control(token) or self._model.is_unknown(token):
            return 0
        return len(self._model.id_to_piece(token).replace("▁", " ").encode())


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer of a path, or the built-in one for "bytes"."""
    return ByteTokenizer() if str(spec) == BYTES else SentencePieceTokenizer(Path(spec))


def train(texts: Iterable[str], vocab: int) -> bytes:
    """Train a BPE model of `vocab` pieces; the same texts give the same bytes. Texts are held in memory."""
    model = io.BytesIO()
    sentences = (piece for text in texts for piece in cut(text, 1 << 12))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences, model_writer=model, vocab_size=vocab, **SETTINGS
        )
    except RuntimeError as error:
        reason = str(error).split(") [")[-1].strip("[] ")
        raise DataError(f"a tokenizer of {vocab} pieces cannot be trained on this text: {reason}") from error
    return model.getvalue()


def cut(text: str, longest: int = PIECE) -> Iterator[str]:
    """Pieces of about `longest` characters that BPE encodes to the same ids as the whole."""
    return Cutter(longest).add(text, last=True)


class Cutter:
    """Cuts a text that comes in parts, however long, where `cut` would cut the whole; holds LONGEST and one part."""

    def __init__(self, longest: int = PIECE) -> None:
        self._longest = longest
        self._rest = ""

    def add(self, text: str, last: bool) -> Iterator[str]:
        """The pieces whose ends are certain with this part of the text; with its last part, all."""
        text, start = self._rest + text, 0
        while len(text) - start > (self._longest if last else self._longest + LONGEST):
            end = _cut_place(text, start, self._longest)
            yield text[start:end]
            start = end
        self._rest = "" if last else text[start:]
        if last and start < len(text):
            yield text[start:]


def cuts_safely(tokenizer: Tokenizer, texts: Iterable[str], probes: int = 1000) -> bool:
    """Whether cutting at good places changed no id at up to `probes` places of these texts."""
    for text in texts:
        places = list(GOOD_PLACE.finditer(text, 1))
        for match in places[:: max(1, len(places) // 10)]:
            place = match.end() if match[0] == "\n" else match.start()
            left, right = text[max(0, place - 128) : place], text[place : place + 128]
            if tokenizer.encode(left + right) != tokenizer.encode(left) + tokenizer.encode(right):
                return False
            probes -= 1
            if probes == 0:
                return True
    return True


class Check(NamedTuple):
    """What a tokenizer does to texts. `changed` names those that do not come back, with the first character that is
    another one; `cuts` is whether long texts may be cut; `differing` counts texts that another tokenizer encodes
    otherwise.
    """

    texts: int
    tokens: int
    bytes: int
    unknown: int
    changed: list[str]
    cuts: bool
    differing: int | None

    @property
    def good(self) -> bool:
        return not self.unknown and not self.changed and not self.differing


def check(tokenizer: Tokenizer, texts: Iterable[tuple[str, str]], other: Tokenizer | None = None) -> Check:
    """How a tokenizer fares on (place, text) pairs: round trip, unknown pieces, cuts, parity with another one.

    U+2581, sentencepiece's own sign for the space, comes back as a space; that is no failure.
    """
    tokens = size = unknown = count = differing = 0
    changed: list[str] = []
    sample: list[str] = []
    for place, text in texts:
        ids = [i for piece in cut(text) for i in tokenizer.encode(piece)]
        back, kept = tokenizer.decode(ids), text.replace("▁", " ")
        if back != kept:
            at = next(
                (i for i, (a, b) in enumerate(zip(kept, back, strict=False)) if a != b), min(len(kept), len(back))
            )
            changed.append(f"{place}: character {at}: {kept[at : at + 20]!r} comes back as {back[at : at + 20]!r}")
        count, tokens, size = count + 1, tokens + len(ids), size + len(text.encode())
        unknown += sum(tokenizer.token_bytes[i] == 0 for i in ids)
        sample += [text] * (len(sample) < 100)
        if other is not None:
            differing += ids != [i for piece in cut(text) for i in other.encode(piece)]
    cuts = cuts_safely(tokenizer, sample)
    return Check(count, tokens, size, unknown, changed, cuts, None if other is None else differing)


def _cut_place(text: str, start: int, longest: int) -> int:
    """After the last newline that keeps the piece short; else before a space that follows a non-space; else late."""
    newline = text.rfind("\n", start, start + longest)
    if newline >= 0:
        return newline + 1
    space = text.rfind(" ", start + 1, start + longest)
    while space > 0 and text[space - 1].isspace():
        space = text.rfind(" ", start + 1, space)
    if space > 0:
        return space
    late = GOOD_PLACE.search(text, start + longest, start + LONGEST)
    if late is None:
        return min(start + LONGEST, len(text))
    return late.end() if late[0] == "\n" else late.start()
