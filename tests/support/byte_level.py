"""A tokenizer of bytes as a file that the package tokenizers reads."""

from pathlib import Path

import tokenizers


def byte_level(folder: Path) -> Path:
    """A tokenizer.json of bytes, as those of GPT-2's kind."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({"<s>": 0, **{letter: i for i, letter in enumerate(letters, 1)}}, [])
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<s>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    return folder / "tokenizer.json"
