"""A tokenizer.json, a folder that holds one, and a sentencepiece model are equals; the first encodes as transformers
does.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import PreTrainedTokenizerFast

from data_tools.fast_tokenizer import tokenizer_json
from data_tools.tokenizer import load_tokenizer
from lasptrain.convert.tokenizer import lines, special
from lasptrain.errors import DataError
from tests.console.test_cli import lasptrain, refused
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

MODEL = Path(__file__).parents[2] / "tokenizers" / "python-4k.model"
TEXTS = list(lines(600, seed=1))


def byte_level() -> Tokenizer:
    """BPE over bytes, split as GPT-4's kind does, with a token that is added and not special."""
    split = Regex(r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    over_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(split, "isolated"), over_bytes])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<s>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    made.add_tokens(["汉字"])
    return made


def metaspace() -> Tokenizer:
    """Unigram over text with U+2581 for spaces, normalised, as sentencepiece makes by default."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=900, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)  # in which "<s>" is a piece like others
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    return made


MADE: dict[str, Callable[[], Tokenizer]] = {"byte-level": byte_level, "metaspace": metaspace}


@pytest.fixture(scope="module", params=MADE)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer that names BOS."""
    made = tmp_path_factory.mktemp(request.param)
    MADE[request.param]().save(str(made / "tokenizer.json"))
    (made / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    return made


def test_ids_and_texts_are_those_of_transformers(folder: Path) -> None:
    """On 10,000 lines. What looks like a special token is text; where a model knows "<s>" as a piece, it is spelled."""
    ours = load_tokenizer(folder)
    file = str(folder / "tokenizer.json")
    theirs = PreTrainedTokenizerFast(tokenizer_file=file, bos_token="<s>", split_special_tokens=True)
    hard = list(lines())
    want = theirs(hard, add_special_tokens=False)["input_ids"]
    back = theirs.batch_decode(want, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    spelled = [theirs.convert_tokens_to_ids(letter) for letter in "<s>"]
    found = [ours.encode(line) for line in hard]
    assert found == [[letter for i in ids for letter in (spelled if i == ours.bos else [i])] for ids in want]
    assert len(hard) == 10_000 and len({i for ids in found for i in ids}) > 500
    assert [ours.decode(ids) for ids in found] == back
    assert (ours.bos, ours.vocab_size) == (theirs.bos_token_id, len(theirs))
    if "byte-level" in folder.name:
        assert back == hard
        assert [sum(ours.token_bytes[i] for i in ids) for ids in found] == [len(line.encode()) for line in hard]
    else:
        assert any(ours.bos in ids for ids in want)


def test_a_folder_is_its_file_and_a_model_comes_first(tmp_path: Path, folder: Path) -> None:
    assert load_tokenizer(folder).sha256 == load_tokenizer(folder / "tokenizer.json").sha256
    assert special(str(folder)) == special(str(folder / "tokenizer.json"))
    both = shutil.copytree(folder, tmp_path / "both")
    shutil.copy(MODEL, both / "tokenizer.model")
    assert load_tokenizer(both).sha256 == load_tokenizer(MODEL).sha256
    assert special(str(both)) == special(str(MODEL))


def test_numbers_may_be_left_out(tmp_path: Path) -> None:
    """As in files whose added tokens begin at a round number."""
    made = Tokenizer(models.WordLevel({"a": 0, "<s>": 500, "b": 3}, unk_token="<s>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}}')
    found = load_tokenizer(tmp_path)
    assert (found.bos, found.vocab_size, len(found.token_bytes)) == (500, 501, 501)
    assert found.encode("a b") == [0, 3] and found.token_bytes[3] == 1 and found.token_bytes[4] == 0
    many = (tmp_path / "tokenizer.json").read_text().replace("500", "4000000000")
    (tmp_path / "tokenizer.json").write_text(many)
    with pytest.raises(DataError, match="3 tokens with numbers up to 4,000,000,000; expected numbers with few"):
        load_tokenizer(tmp_path)


def test_the_commands_take_a_folder(tmp_path: Path) -> None:
    """And a text with "<s>" in it, also where that is a piece; the check of equal tokenizers says that they are."""
    metaspace().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXTS if line.strip()))
    options = ("--validation", "0", "--out", "out")
    done = lasptrain("data", "prepare", "a.jsonl", "--tokenizer", ".", *options, cwd=tmp_path)
    assert done.returncode == 0 and "  tokenizer    tokenizer.json, 900 pieces" in done.stdout, done.stderr
    (tmp_path / "same").mkdir()
    (tmp_path / "same" / "tokenizer.json").write_text(tokenizer_json(MODEL))
    done = lasptrain("data", "tokenizer", "check", "same", "a.jsonl", "--against", str(MODEL), cwd=tmp_path)
    assert done.returncode == 0 and f"0 texts have other ids than {MODEL} gives them" in done.stdout, done


NO_BOS = (
    r"tokenizer\.json: {}, and every document starts with one; expected bos_token in tokenizer_config\.json beside it, "
    r'the text of a token: \{{"bos_token": "…"\}}; special tokens there: <s>, <\|endoftext\|>'
)


def test_what_a_tokenizer_without_bos_needs_is_said(tmp_path: Path) -> None:
    made = tmp_path / "mine"
    made.mkdir()
    byte_level().save(str(made / "tokenizer.json"))
    refused(3, NO_BOS.format("names no BOS"), "data", "tokenizer", "inspect", "mine", cwd=tmp_path)
    (made / "tokenizer_config.json").write_text('{"bos_token": "[BOS]"}')
    with pytest.raises(DataError, match=NO_BOS.format(r"names \[BOS\] as BOS, which it does not have")):
        load_tokenizer(made)
    (made / "tokenizer_config.json").write_text('{"bos_token": "<|endoftext|>"}')
    assert load_tokenizer(made).bos == 1
    (made / "tokenizer.json").unlink()
    fits = "a tokenizer.json, a folder that holds one, a sentencepiece .model, or bytes fits"
    with pytest.raises(DataError, match=f"mine: holds no tokenizer.model and no tokenizer.json; {fits}"):
        load_tokenizer(made)


def test_a_model_without_bos_says_what_it_needs(tmp_path: Path) -> None:
    model = io.BytesIO()
    settings: dict[str, Any] = {"vocab_size": 700, "bos_id": -1, "minloglevel": 2, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=model, **settings)
    (tmp_path / "a.model").write_bytes(model.getvalue())
    said = "a.model: the model has no BOS piece, and every document starts with one; expected a model that was trained "
    said += "with bos_id, or a tokenizer.json whose tokenizer_config.json names another piece as bos_token"
    with pytest.raises(DataError, match=said):
        load_tokenizer(tmp_path / "a.model")
