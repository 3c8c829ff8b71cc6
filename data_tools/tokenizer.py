"""Tokenizers: sentencepiece, tokenizer.json or raw bytes behind one protocol; training; cutting of long texts."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import sentencepiece

from data_tools.fields import listed
from data_tools.files import naming, one_line
from lasptrain.errors import DataError, RecipeError, SetupError
from lasptrain.files import read, utf8
from lasptrain.recipe.loading import find_file

BYTES = "bytes"
MODEL, FAST = "tokenizer.model", "tokenizer.json"  # names in a folder; of sentencepiece first, which is faster
FIT = f"a {FAST}, a folder that holds one, a sentencepiece .model, or {BYTES}"
PIECE = 1 << 16  # characters encoded at once: sentencepiece slows down on longer strings
LONGEST = 1 << 20  # a text without any good place is cut here
SPARE = 1 << 12  # numbers of tokens that any tokenizer may leave out
LARGEST = 1 << 26  # bytes of a tokenizer's file
CONFIG = "tokenizer_config.json"  # beside a tokenizer.json
MARK = "▁"  # U+2581, by which sentencepiece writes a space
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
    """Text ↔ ids. `encode` never emits BOS; `token_bytes[i]` is the number of bytes of text of id i."""

    name: str
    sha256: str
    vocab_size: int
    bos: int
    token_bytes: list[int]

    def encode(self, text: str) -> list[int]:
        """Encode a text, without BOS."""

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids. BOS and ids outside of the vocabulary stand for nothing."""


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

    def __init__(self, path: Path, bos: int | None = None) -> None:
        """Read a model. Raises DataError for a file that is no model, or a model without BOS, unless it is given."""
        content = _content(path)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise DataError(f"{path}: no sentencepiece model can be read from it; {FIT} fits") from error
        self.name = utf8(path.name)
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.vocab_size: int = self._model.vocab_size()
        named: int = self._model.bos_id()
        if named < 0 and bos is None:
            raise DataError(
                f"{path}: the model has no BOS piece, and every document starts with one; expected a model that was "
                f"trained with bos_id, or a {FAST} whose {CONFIG} names another piece as bos_token"
            )
        self.bos = named if bos is None or named >= 0 else bos
        try:
            self.token_bytes = [self._bytes_of(i) for i in range(self.vocab_size)]
        except UnicodeDecodeError:
            raise DataError(f"{path}: the model has pieces that are not UTF-8; expected text in each") from None

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


class FastTokenizer:
    """A `tokenizer.json` of Hugging Face's tokenizers; the package `tokenizers` reads it."""

    def __init__(self, path: Path, bos: int | None = None) -> None:
        """Read a tokenizer. Raises SetupError without the package, DataError for a file that is none or, unless `bos`
        is given, has none.
        """
        try:
            from tokenizers import Tokenizer as Reader
        except ImportError:
            raise SetupError(f"{path}: needs the package tokenizers: pip install tokenizers") from None
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # texts come one by one; no threads, we may fork
        content = _content(path)
        try:
            parsed = json.loads(content)
            self._model = Reader.from_str(content.decode())
        except Exception as error:  # the package raises nothing more exact
            raise DataError(f"{path}: no tokenizer can be read from it ({one_line(error)})") from None
        self._model.encode_special_tokens = True  # "<s>" in a text is text
        self._model.no_truncation()
        self._model.no_padding()
        self.name = utf8(path.name)
        self.sha256 = hashlib.sha256(content).hexdigest()
        numbers = self._model.get_vocab().values()
        self.vocab_size: int = 1 + max(numbers, default=0)
        if self.vocab_size > 2 * len(numbers) + SPARE:  # some leave out a few
            found = f"{len(numbers):,} tokens with numbers up to {self.vocab_size - 1:,}"
            raise DataError(f"{path}: {found}; expected numbers with few left out")
        added = {token["id"]: token for token in parsed.get("added_tokens") or []}
        special = {number for number, token in added.items() if token["special"]}
        named = _bos_of(path, parsed)
        number = None if named is None else self._model.token_to_id(named)
        number = bos if number is None else number
        if number is None:
            found = "names no BOS" if named is None else f"names {one_line(named)} as BOS, which it does not have"
            held = listed(added[number]["content"] for number in sorted(special))
            raise DataError(
                f"{path}: {found}, and every document starts with one; expected bos_token in {CONFIG} beside it, the "
                f'text of a token: {{"bos_token": "…"}}; special tokens there: {held}'
            )
        self.bos: int = number
        self._bos_text = self._spelled(self._model.id_to_token(number) or "")
        if unknown := parsed["model"].get("unk_token"):
            special.add(self._model.token_to_id(unknown))
        byte_level = "ByteLevel" in json.dumps([parsed.get("decoder"), parsed.get("pre_tokenizer")])
        self._space = MARK if keeps_mark(self) else " "
        self.token_bytes = [
            0 if i in special else self._bytes_of(i, byte_level and i not in added) for i in range(self.vocab_size)
        ]

    def encode(self, text: str) -> list[int]:
        (found,) = self._model.encode_batch_fast([text], add_special_tokens=False)  # without places in the text
        ids: list[int] = found.ids
        if self.bos in ids:  # "<s>" was in the text, and a model may know it as a piece
            return [letter for i in ids for letter in (self._bos_text if i == self.bos else [i])]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        known = [i for i in ids if i < self.vocab_size and i != self.bos]
        text: str = self._model.decode(known, skip_special_tokens=False)
        return text

    def _spelled(self, text: str) -> list[int]:
        """Return the ids of the letters of BOS, or of their bytes; BOS where one has none."""
        ids: list[int | None] = []
        for letter in text:
            whole = self._model.token_to_id(letter)
            ids += [self._model.token_to_id(f"<0x{i:02X}>") for i in letter.encode()] if whole is None else [whole]
        return [self.bos if None in ids else i for i in ids if i is not None]

    def _bytes_of(self, token: int, byte_level: bool) -> int:
        piece: str = self._model.id_to_token(token) or ""
        if byte_level:
            return len(piece)  # one character for each byte
        return 1 if re.fullmatch("<0x[0-9A-F]{2}>", piece) else len(piece.replace(MARK, self._space).encode())


def _content(path: Path) -> bytes:
    with naming(path):
        return read(path, LARGEST)


def _bos_of(path: Path, parsed: dict[str, Any]) -> str | None:
    """Find BOS: named in the configuration beside a tokenizer, or the first token that it puts before a text."""
    try:
        named = json.loads(read(path.with_name(CONFIG), LARGEST))["bos_token"]
        named = named["content"] if isinstance(named, dict) else named
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        named = None
    if named and isinstance(named, str):
        return named.encode("utf-8", "replace").decode()
    parts = [parsed.get("post_processor") or {}]
    parts += parts[0].get("processors") or []
    first: dict[str, Any] = next((part["single"][0] for part in parts if part.get("single")), {})
    found: str | None = first.get("SpecialToken", {}).get("id")
    return found


def load_tokenizer(spec: str | Path, bos: int | None = None) -> Tokenizer:
    """Load the tokenizer of a path, a tokenizer.json, a folder that holds one or a sentencepiece model, or the built-in
    one for "bytes".

    `bos` is BOS of one that names none; RecipeError where another is named, or it is no id.
    """
    tokenizer: Tokenizer
    if str(spec) == BYTES:
        tokenizer = ByteTokenizer()
    else:
        path = tokenizer_file(Path(spec))
        tokenizer = FastTokenizer(path, bos) if path.suffix == ".json" else SentencePieceTokenizer(path, bos)
    if bos is not None and tokenizer.bos != bos:
        raise RecipeError(f"--bos: found {bos}; {tokenizer.name} names {tokenizer.bos}, expected that or none")
    if not 0 <= tokenizer.bos < tokenizer.vocab_size:
        raise RecipeError(f"--bos: found {bos}; expected an id of the vocabulary of {tokenizer.vocab_size:,}")
    return tokenizer


def tokenizer_file(path: Path) -> Path:
    """Return a tokenizer's file, where `path` is the folder that holds it, or the name of one that is shipped.

    DataError for a folder without one.
    """
    with naming(path):
        path = find_file(path) or path
        if not path.is_dir():
            return path
        for name in (MODEL, FAST):
            if (path / name).is_file():
                return path / name
    raise DataError(f"{path}: holds no {MODEL} and no {FAST}; {FIT} fits")


def train(texts: Iterable[str], vocab: int) -> bytes:
    """Train a BPE model of `vocab` pieces; the same texts give the same bytes. Texts are held in memory."""
    model = io.BytesIO()
    sentences = (piece for text in texts for piece in cut(text, 1 << 12))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences, model_writer=model, vocab_size=vocab, **SETTINGS
        )
    except RuntimeError as error:
        most = re.search(r"too high .* a value <= (\d+)", str(error))
        reason = f"expected at most {most[1]}" if most else str(error).split(") [")[-1].strip("[] ")
        raise DataError(f"a tokenizer of {vocab} pieces cannot be trained on this text: {reason}") from error
    return model.getvalue()


def cut(text: str, longest: int = PIECE) -> Iterator[str]:
    """Cut a text into pieces of about `longest` characters that BPE encodes to the same ids as the whole."""
    return Cutter(longest).add(text, last=True)


class Cutter:
    """Incremental `cut` for a text that comes in parts, however long: the same pieces; holds LONGEST and one part."""

    def __init__(self, longest: int = PIECE) -> None:
        self._longest = longest
        self._rest = ""

    def add(self, text: str, last: bool) -> Iterator[str]:
        """Take a part of the text; yields the pieces whose ends are then certain, with the `last` part all."""
        text, start = self._rest + text, 0
        while len(text) - start > (self._longest if last else self._longest + LONGEST):
            end = _cut_place(text, start, self._longest)
            yield text[start:end]
            start = end
        self._rest = "" if last else text[start:]
        if last and start < len(text):
            yield text[start:]


def cuts_safely(tokenizer: Tokenizer, texts: Iterable[str], probes: int = 1000) -> bool:
    """True if cutting changed no id at up to `probes` good places of these texts."""
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


def keeps_mark(tokenizer: Tokenizer) -> bool:
    """True if U+2581 comes back as what it is, False if as a space, which it stands for in sentencepiece's models."""
    return MARK in tokenizer.decode(tokenizer.encode(f"a{MARK}b"))


class Check(NamedTuple):
    """Result of a tokenizer's check. `changed` names the texts that do not come back, with the first character that
    differs; `cuts`: long texts may be cut; `unknown` counts tokens, `differing` texts that another tokenizer encodes
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
    """Check a tokenizer on (place, text) pairs: round trip, unknown pieces, cuts, parity with another one.

    U+2581, sentencepiece's own sign for the space, may come back as a space; that is no failure.
    """
    keeps = keeps_mark(tokenizer)
    tokens = size = unknown = count = differing = 0
    changed: list[str] = []
    sample: list[str] = []
    for place, text in texts:
        ids = [i for piece in cut(text) for i in tokenizer.encode(piece)]
        back, kept = tokenizer.decode(ids), text if keeps else text.replace(MARK, " ")
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
    """Find the end of a piece: after the last newline that keeps it short; else before a space that follows a
    non-space; else late.
    """
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
