"""The tokenizer beside an export: as a fast tokenizer where every id is the same, and always as it was."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from data_tools.fast_tokenizer import tokenizer_json
from data_tools.tokenizer import load_tokenizer
from lasptrain.convert.verify import installed
from lasptrain.errors import DataError

LINES = 10_000
FAST = ("tokenizer.json", "tokenizer_config.json")


def export(path: Path, folder: Path) -> str:
    """Write the tokenizer at `path`, a sentencepiece model or a tokenizer.json, into `folder`; returns what came of it.

    A tokenizer.json is copied with the configuration beside it.
    """
    if path.suffix == ".json":
        for name in FAST:
            if (file := path.with_name(name)).is_file():
                shutil.copyfile(file, folder / name)
        return "fast, as it came"
    shutil.copyfile(path, folder / "tokenizer.model")
    if not installed("tokenizers"):
        return "tokenizer.model only, for sentencepiece: the package tokenizers is not installed"
    try:
        text = tokenizer_json(path)
    except DataError as error:
        return f"tokenizer.model only, for sentencepiece: {error}"
    different = _different(path, text)
    if different is not None:
        return f"tokenizer.model only, for sentencepiece: as a fast tokenizer {different!r} has other ids"
    (folder / FAST[0]).write_text(text, encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _bos(text),
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # "<s>" in a text is text
    }
    (folder / FAST[1]).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return f"fast, same ids as tokenizer.model on {LINES:,} lines"


def _bos(text: str) -> str:
    name: str = json.loads(text)["post_processor"]["single"][0]["SpecialToken"]["id"]
    return name


def _different(path: Path, text: str) -> str | None:
    """A line whose ids differ, or None."""
    from tokenizers import Tokenizer

    own, fast = load_tokenizer(path), Tokenizer.from_str(text)
    fast.encode_special_tokens = True
    for line in lines():
        if [own.bos, *own.encode(line)] != fast.encode(line).ids:
            return line
    return None


def lines(count: int = LINES, seed: int = 0) -> Iterator[str]:
    """Lines that are hard to cut: spaces everywhere, controls, scripts, emoji, digits, literal special tokens."""
    yield ""
    random_ = random.Random(seed)
    source = Path(random.__file__).read_text(encoding="utf-8").splitlines()
    hard = [" ", "  ", "\n", "\t", "\r\n", "<s>", "</s>", "<unk>", "<0x0A>", "▁", "0123456789", "3.14", "é", "e\u0301"]
    hard += [
        "汉字",
        "かな",
        "한국어",
        "Ünï",
        "🙂",
        "👩‍👩‍👧",
        "\u200b",
        "\u00a0",
        "\ufeff",
        "\x00",
        "العربية",
        "’",
        "--",
    ]
    for _ in range(count - 1):
        parts = random_.choices(hard, k=random_.randint(0, 4)) + random_.choices(source, k=random_.randint(0, 2))
        random_.shuffle(parts)
        yield random_.choice(("", " ")).join(parts)
