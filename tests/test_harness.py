"""What lm-evaluation-harness gets from a model of ours is what our own forward says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_tools.tokenizer import ByteTokenizer
from lasptrain.eval.load import Trained
from lasptrain.recipe.loading import load
from tests.test_eval import tiny
from tests.test_recipe import RECIPES

instance = pytest.importorskip("lm_eval.api.instance", reason="the extra lm-eval is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of another library


def harness() -> Any:
    """The model that the harness finds by name, reading 16 tokens at a time."""
    from lm_eval.api.registry import get_model

    from lasptrain.eval.harness import Harness

    assert get_model("lasptrain") is Harness
    return Harness(Trained(Path(), load(RECIPES / "quickstart.yaml"), tiny(), ByteTokenizer(), 0), segment=16)


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
            inner = model.reader.model
            ids.append(int(inner.logits(inner.hidden(torch.tensor([ids]))[0])[0, -1].argmax()))
    whole = ByteTokenizer().decode(ids[7:])
    options = {"until": [], "max_gen_toks": 12, "do_sample": False}
    assert model.generate_until(requests("generate_until", ("Go on:", options))) == [whole]
    stop = whole[2:4]
    cut = model.generate_until(requests("generate_until", ("Go on:", options | {"until": [stop]})))
    assert cut == [whole[: whole.index(stop)]]
    drawn = {"until": "never", "max_gen_toks": 12, "temperature": 1.0, "do_sample": True}
    assert model.generate_until(requests("generate_until", ("Go on:", drawn))) != [whole]
