"""The tokenizer of an export: its own file, and a fast tokenizer if that gives the same ids."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.fast_tokenizer import BYTE, CONTROL, UNKNOWN, protocol, tokenizer_json
from data_tools.tokenizer import BYTES, CONFIG, FAST, load_tokenizer, tokenizer_file
from lasptrain import files
from lasptrain.convert.verify import installed
from lasptrain.errors import DataError

LINES = 10_000
MAP = "special_tokens_map.json"
ALONE = "tokenizer.model only, for sentencepiece; transformers would make other ids of a text"

DEFAULTS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
    "split_special_tokens": True,  # "<s>" in a text is text
    "padding_side": "left",  # texts of a batch are continued on the right
}

Token = tuple[int, str]  # id and text
Json = dict[str, Any]


@dataclass(frozen=True)
class Special:
    """The tokens that begin, end and pad a text.

    A document ends where the next one begins, so BOS ends a text. So does an end that the tokenizer itself names,
    which its files then keep: weights of others were trained to emit it.
    """

    bos: Token
    end: Token
    pad: Token

    def ids(self) -> Json:
        """Return the keys of config.json and generation_config.json."""
        bos, end = self.bos[0], self.end[0]
        return {"bos_token_id": bos, "eos_token_id": bos if end == bos else [end, bos], "pad_token_id": self.pad[0]}

    def texts(self) -> Json:
        """Return the keys of a fast tokenizer's files."""
        return {"bos_token": self.bos[1], "eos_token": self.end[1], "pad_token": self.pad[1]}


def special(spec: str) -> Special:
    """Return the special tokens of the tokenizer at the path `spec`, or of "bytes".

    Padding is the tokenizer's own pad token, else its unknown token if bytes cover all text, else the end. A pad token
    is left out of fine-tuning losses and gradients, so it should not be BOS.
    """
    bos = load_tokenizer(spec).bos
    if spec == BYTES:
        return Special(*[(bos, "")] * 3)
    path = tokenizer_file(Path(spec))
    found = _named(path, bos) if path.suffix == ".json" else _of_pieces(path)
    end = found.get("eos", found["bos"])
    return Special(found["bos"], end, found.get("pad") or found.get("unk") or end)


def _of_pieces(path: Path) -> dict[str, Token]:
    """Read the special tokens of a sentencepiece model; `unk` only if it falls back to bytes."""
    model = protocol.ModelProto.FromString(path.read_bytes())
    spec, kinds = model.trainer_spec, [piece.type for piece in model.pieces]
    controls = {piece.piece: i for i, piece in enumerate(model.pieces) if piece.type == CONTROL}
    texts = {"bos": spec.bos_piece, "eos": spec.eos_piece, "pad": spec.pad_piece}
    found = {name: (controls[text], text) for name, text in texts.items() if text in controls}
    if BYTE in kinds:
        found["unk"] = (kinds.index(UNKNOWN), spec.unk_piece)
    return found


def _named(path: Path, bos: int) -> dict[str, Token]:
    """Read the special tokens of a tokenizer.json and the files beside it; `unk` only if it falls back to bytes."""
    from tokenizers import Tokenizer

    model, parsed = Tokenizer.from_file(str(path)), json.loads(path.read_text(encoding="utf-8"))["model"]
    config, older = _beside(path, CONFIG), _beside(path, MAP)
    texts = {name: config.get(f"{name}_token") or older.get(f"{name}_token") for name in ("eos", "pad")}
    if parsed.get("byte_fallback"):
        texts["unk"] = parsed.get("unk_token")
    found: dict[str, Token] = {"bos": (bos, str(model.id_to_token(bos)))}
    for name, text in texts.items():
        content = text["content"] if isinstance(text, dict) else text
        if content and (number := model.token_to_id(content)) is not None:
            found[name] = (number, content)
    return found


def _beside(path: Path, name: str) -> Json:
    """Read a JSON file beside a tokenizer; {} if there is none that can be read."""
    try:
        found = json.loads(files.read(path.with_name(name)))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def export(path: Path, folder: Path) -> str:
    """Write the tokenizer at `path`, or in a folder there, into `folder`; return a line about it.

    A tokenizer.json is copied with the files beside it, which then name BOS, end and padding if they did not. A
    sentencepiece model gets one: without it transformers makes a tokenizer of the model's class, with other ids.
    """
    path = tokenizer_file(path)
    if path.suffix == ".json":
        shutil.copyfile(path, folder / FAST)
        _describe(path, folder, _beside(path, CONFIG) or DEFAULTS, _beside(path, MAP))
        return "fast, as it came"
    shutil.copyfile(path, folder / "tokenizer.model")
    try:
        text = tokenizer_json(path)
    except DataError as error:
        return f"{ALONE}: {str(error).removeprefix(f'{path}: ')}"
    compared = installed("tokenizers")
    if compared and (different := _different(path, text)) is not None:
        return f"{ALONE}: as a fast tokenizer {different!r} has other ids"
    (folder / FAST).write_text(text, encoding="utf-8")
    _describe(path, folder, DEFAULTS, {})
    if not compared:
        return "fast, not compared: tokenizers is not installed (pip install 'lasptrain[convert]')"
    return f"fast, same ids as tokenizer.model on {LINES:,} lines"


def _describe(path: Path, folder: Path, config: Json, older: Json) -> None:
    """Write the files beside a fast tokenizer, with the special tokens of the one at `path`."""
    texts = special(str(path)).texts()
    for name, keys in ((CONFIG, config), (MAP, older)):
        (folder / name).write_text(json.dumps(keys | texts, indent=1) + "\n", encoding="utf-8")


def _different(path: Path, text: str) -> str | None:
    """Return a line whose ids differ, or None."""
    from tokenizers import Tokenizer

    own, fast = load_tokenizer(path), Tokenizer.from_str(text)
    fast.encode_special_tokens = True
    for line in lines():
        if [own.bos, *own.encode(line)] != fast.encode(line).ids:
            return line
    return None


def lines(count: int = LINES, seed: int = 0) -> Iterator[str]:
    """Yield lines that are hard to tokenize: stray spaces, controls, scripts, emoji, digits, literal special tokens,
    marks that combine, text from right to left, long words, characters beside surrogates, code.
    """
    yield ""
    random_ = random.Random(seed)
    source = Path(random.__file__).read_text(encoding="utf-8").splitlines()
    hard = [" ", "  ", "\n", "\t", "\r\n", "<s>", "</s>", "<unk>", "<0x0A>", "▁", "0123456789", "3.14", "é", "e\u0301"]
    hard += ["汉字", "かな", "한국어", "Ünï", "🙂", "👩‍👩‍👧"]
    hard += ["\u200b", "\u00a0", "\ufeff", "\x00", "العربية", "’", "--", "<|endoftext|>", "[CLS]", "<pad>"]
    hard += ["a\u0301\u0323\u0489", "\u0301", "n\u0303o", "ﬁ", "①", "ｆｕｌｌ", "İı", "ß", "नमस्ते", "ภาษาไทย"]
    hard += ["🇩🇪🇫🇷", "❤\ufe0f", "👍🏽", "שלום", "\u202eabc\u202c", "\u2066x\u2069", "\x1b[0m", "\x7f", "\x85"]
    hard += ["\u2028", "\v\f", " \t \n\n  \r", "\ud7ff", "\ue000", "\ufffd", "\uffff", "\U00010000", "\U0010ffff"]
    hard += ["Donaudampfschiff" * 20, "ab" * 400, "=" * 300, " " * 70, "\n" * 9, "0" * 100, "__init__"]
    hard += ["https://a.b/c?d=%20&e#f", "if (a&&!b) {x[i]+=1;}", "\\frac{1}{2}"]
    for _ in range(count - 1):
        parts = random_.choices(hard, k=random_.randint(0, 4)) + random_.choices(source, k=random_.randint(0, 2))
        random_.shuffle(parts)
        yield random_.choice(("", " ")).join(parts)
