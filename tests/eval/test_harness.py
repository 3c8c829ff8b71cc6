"""What lm-evaluation-harness gets from a model of ours is what our own forward says."""

from __future__ import annotations

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_tools.tokenizer import ByteTokenizer
from lasptrain.convert.export import export
from lasptrain.convert.verify import installed
from lasptrain.errors import RecipeError
from lasptrain.eval.inference import Reader
from lasptrain.eval.load import Trained
from lasptrain.recipe.loading import load
from tests.convert.test_convert import MODELS, make_run
from tests.eval.test_eval import tiny
from tests.recipe.test_recipe import RECIPES
from tests.support.program import ROOT

instance = pytest.importorskip("lm_eval.api.instance", reason="the extra lm-eval is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of another library


def harness(**options: Any) -> Any:
    """The model that the harness finds by name, reading 16 tokens at a time."""
    from lm_eval.api.registry import get_model

    from lasptrain.eval.harness import Harness

    assert get_model("lasptrain") is Harness
    trained = Trained(Path(), load(RECIPES / "quickstart.yaml"), tiny(), ByteTokenizer(), 0)
    return Harness(trained, **{"segment": 16, **options})


def requests(kind: str, *arguments: tuple[object, ...]) -> list[Any]:
    return [instance.Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def log_probabilities(text: str) -> tuple[Tensor, Tensor]:
    """Of every next byte [T, vocab], by one forward over BOS and the text; and the text's ids."""
    ids = torch.tensor([256, *text.encode()])
    model = tiny()
    with torch.no_grad():
        return model.logits(model.hidden(ids[None, :-1])[0])[0].double().log_softmax(-1), ids[1:]


def test_continuations_are_scored_as_one_forward_scores_them() -> None:
    pairs = [("The sky is", " blue"), ("The sky is", " green"), ("A space stays ", "here"), ("", "at once"), ("x", "")]
    model = harness()
    found = model.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        count = len(continuation) + (context == "A space stays ")  # its space belongs to the continuation
        logs, ids = log_probabilities(context + continuation)
        rows, labels = logs[len(logs) - count :], ids[len(ids) - count :]
        assert value == pytest.approx(float(rows.gather(1, labels[:, None]).sum()), rel=1e-5)
        assert greedy == bool((rows.argmax(1) == labels).all())
    (text,) = model.generate_until(requests("generate_until", ("Go", {"until": [], "max_gen_toks": 3})))
    if all(ord(letter) < 128 for letter in text):
        assert model.loglikelihood(requests("loglikelihood", ("Go", text)), disable_tqdm=True)[0][1]


def test_a_document_is_read_as_a_whole() -> None:
    text = "One state is carried over all of it. " * 8
    found = harness().loglikelihood_rolling(requests("loglikelihood_rolling", (text,), ("",)))
    logs, ids = log_probabilities(text)
    assert found == [pytest.approx(float(-F.nll_loss(logs, ids, reduction="sum")), rel=1e-5), 0.0]


def test_generation_is_greedy_and_ends_where_it_is_told() -> None:
    model, ids = harness(), [256, *b"Go on:"]
    for _ in range(12):
        with torch.no_grad():
            inner = model.model
            ids.append(int(inner.logits(inner.hidden(torch.tensor([ids]))[0])[0, -1].argmax()))
    whole = ByteTokenizer().decode(ids[7:])
    options = {"until": [], "max_gen_toks": 12, "do_sample": False}
    assert model.generate_until(requests("generate_until", ("Go on:", options))) == [whole]
    stop = whole[2:4]
    cut = model.generate_until(requests("generate_until", ("Go on:", options | {"until": [stop]})))
    assert cut == [whole[: whole.index(stop)]]
    for name in ("max_new_tokens", "max_tokens", "max_completion_tokens"):
        short = {"until": [""], name: 5, "do_sample": False}
        assert model.generate_until(requests("generate_until", ("Go on:", short))) == [
            ByteTokenizer().decode(ids[7:12])
        ]
    drawn = {"until": "never", "max_gen_toks": 12, "temperature": 1.0, "do_sample": True}
    assert model.generate_until(requests("generate_until", ("Go on:", drawn))) != [whole]


TEXTS = ["The sky is", "A", "Nothing is as long as a text that goes on and on", "", "The sky is", "x y z"]


@pytest.mark.parametrize("batch_size", [2, "4", "auto", "auto:3", 64])
def test_batches_answer_as_texts_one_by_one_and_in_the_order_asked(batch_size: int | str) -> None:
    alone, together = harness(batch_size=1), harness(batch_size=batch_size, segment=100)
    pairs = [(one, " " + other) for one in TEXTS for other in ("blue", "green grass", "t")]
    want, got = (m.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True) for m in (alone, together))
    assert [value for value, _ in got] == pytest.approx([value for value, _ in want], rel=1e-4)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in want]
    documents = requests("loglikelihood_rolling", *((one,) for one in TEXTS))
    want, got = (m.loglikelihood_rolling(documents) for m in (alone, together))
    assert got == pytest.approx(want, rel=1e-4)
    asked = [
        (one, {"until": ["\n", ""], "max_gen_toks": 4 + 4 * (i % 2), "temperature": 0}) for i, one in enumerate(TEXTS)
    ]
    want, got = (m.generate_until(requests("generate_until", *asked)) for m in (alone, together))
    assert got == want and len(set(got)) > 3


def test_several_texts_are_run_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = harness(batch_size=3)
    rows: list[int] = []
    read = Reader.read

    def counted(self: Reader, tokens: Tensor, **rest: Any) -> Any:
        rows.append(len(tokens))
        return read(self, tokens, **rest)

    monkeypatch.setattr(Reader, "read", counted)
    model.loglikelihood(requests("loglikelihood", *((one, " it") for one in TEXTS if one)), disable_tqdm=True)
    assert rows == [3, 1]  # a context is read once
    with pytest.raises(RecipeError, match="--batch_size: found '0'; expected a number from 1, or auto"):
        harness(batch_size="0")


def test_the_harness_finds_the_model_by_an_entry_point() -> None:
    from lasptrain.eval.harness import Harness

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = EntryPoint("lasptrain", project["entry-points"]["lm_eval.models"]["lasptrain"], "lm_eval.models")
    assert named.load() is Harness


def test_options_that_are_not_applied_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model = harness()
    options = {"until": "a", "max_gen_toks": 1, "top_k": 50, "num_beams": 1, "do_sample": False}
    model.generate_until(requests("generate_until", ("a", options), ("b", options | {"max_gen_toks": 2})))
    assert [record.message for record in caplog.records if "lasptrain" in record.message] == [
        "top_k=50: lasptrain does not generate with it, and leaves it out"
    ]


@pytest.mark.skipif(not installed("accelerate"), reason="the model hf of lm-eval needs accelerate")
@pytest.mark.parametrize("name", ["ssd-hybrid", "minimax"])
def test_scores_are_those_of_the_model_hf_on_the_export(name: str, tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    from lasptrain.eval.harness import Harness

    target, model = MODELS[name]
    run = make_run(tmp_path, model)
    out = export(run, tmp_path / "out", target, check=False).folder
    ours = Harness(str(run), batch_size=4)
    theirs = HFLM(str(out), device="cpu", dtype="float32", batch_size=4)
    texts = ["import os", "def f(x):\n    return", "class Thing", "# a comment about nothing", "x"]
    pairs = [(one, other) for one in texts for other in (" sys", "\n", " self.value = value", " 1")]
    want, got = (m.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True) for m in (theirs, ours))
    assert [value for value, _ in got] == pytest.approx([value for value, _ in want], rel=1e-4)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in want]
    documents = requests("loglikelihood_rolling", *((one + " and more of it" * 5,) for one in texts))
    got = ours.loglikelihood_rolling(documents)
    # Else the model hf puts BOS before the BOS that the tokenizer has put there, and scores that one too.
    plain = HFLM(str(out), device="cpu", dtype="float32", batch_size=4, add_bos_token=False)
    assert got == pytest.approx(plain.loglikelihood_rolling(documents), rel=1e-4)
    for options in ({"until": ["\n"], "max_new_tokens": 9}, {"until": [], "max_gen_toks": 12, "do_sample": False}):
        asked = [(one, options) for one in texts]
        want, got = (m.generate_until(requests("generate_until", *asked), disable_tqdm=True) for m in (theirs, ours))
        assert got == want and any(got)
