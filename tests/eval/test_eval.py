"""The evaluator itself: tasks as defined, scorers on known rows, perfect and blind models, runs that are continued."""

from __future__ import annotations

import json
import os
import random
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from data_tools.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from lasptrain.architectures.tnl import Tnl
from lasptrain.cli import eval as commands
from lasptrain.cli.eval import parse_lengths
from lasptrain.errors import DataError, RecipeError, SetupError
from lasptrain.eval import main, perplexity, predictions, report, summary
from lasptrain.eval.generate import decode
from lasptrain.eval.inference import Reader
from lasptrain.eval.runner import EvalConfig, EvalRunner, ResultsLog, answer
from lasptrain.eval.score import METRICS, bootstrap, interval, wilson
from lasptrain.eval.tasks import TASKS
from lasptrain.eval.tasks.files import asked_of, open_files, rows, task_name
from lasptrain.eval.tasks.recall import associations
from lasptrain.eval.tasks.sample import Sample, SampleRequest
from lasptrain.models.language_model import LanguageModel, initial_values
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.parallel.shard import fill
from lasptrain.recipe.loading import find_file
from lasptrain.recipe.sections import Task
from lasptrain.run.metrics import read_metrics
from tests.support import program
from tests.support.tables import cells, printed

MODEL = find_file(Path("tokenizers/python-4k.model"))
TOKENIZERS = [ByteTokenizer(), load_tokenizer(str(MODEL))]
LENGTH = 8192
ASKED = {  # how often a reference stands in its prompt
    "passkey": 2,
    "niah_single_1": 1,
    "niah_single_2": 1,
    "niah_single_3": 1,
    "niah_multikey_1": 1,
    "niah_multikey_2": 1,
    "niah_multikey_3": 1,
    "niah_multivalue": 1,
    "niah_multiquery": 1,
    "kv_retrieval": 1,
}
ORDER = [0, 9, 4, 2, 6, 1, 3, 5, 7, 8]  # of ten places, so that any first few lie everywhere
TEXT = ("It rains today.", "The harbour is quiet!", "Who has seen the third boat?")


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bytes", "pieces"])
@pytest.mark.parametrize("task", TASKS)
def test_a_sample_is_as_long_as_asked_and_always_the_same(task: str, tokenizer: Tokenizer) -> None:
    ask = SampleRequest(tokenizer, LENGTH, index=4, text=TEXT)
    sample = TASKS[task](ask)
    random.seed(7)
    assert sample == TASKS[task](ask)
    assert sample.prompt != TASKS[task](SampleRequest(tokenizer, LENGTH, index=5, text=TEXT)).prompt
    assert sample.prompt != TASKS[task](SampleRequest(tokenizer, LENGTH, index=4, seed=1, text=TEXT)).prompt
    assert len(sample.labels) == len(sample.inputs) + 1
    assert sample.prompt[0] == tokenizer.bos and tokenizer.bos not in sample.prompt[1:]
    total = len(sample.prompt) + max(sample.budget, len(sample.inputs))
    assert LENGTH - 130 < total <= LENGTH
    text = tokenizer.decode(sample.prompt)
    assert task in ("copy", "mqar") or sample.prompt[1:] + sample.labels == tokenizer.encode(
        text + tokenizer.decode(sample.labels)
    )
    for reference in sample.references if task in ASKED else ():
        assert text.count(reference) == ASKED[task]
        assert sample.control is None or reference not in tokenizer.decode(sample.control)
    if task in ASKED:
        assert sample.references and all(
            reference in tokenizer.decode(sample.labels) for reference in sample.references
        )
        question = text[-150:]
        assert sample.depth is None or not any(reference in question for reference in sample.references)


@pytest.mark.parametrize("index", range(10))
def test_a_single_needle_stands_at_its_depth(index: int) -> None:
    for task in ("passkey", "niah_single_1", "niah_multikey_2", "kv_retrieval"):
        sample = TASKS[task](SampleRequest(ByteTokenizer(), LENGTH, index))
        place = ByteTokenizer().decode(sample.prompt).rindex(sample.references[0])
        assert sample.depth == pytest.approx(ORDER[index] / 9)
        assert sample.depth == pytest.approx(place / len(sample.prompt), abs=0.06)
        end = place + len(sample.references[0])
        assert sample.distance == pytest.approx(len(sample.prompt) - 1 - end, abs=25)


def test_the_first_few_needles_lie_everywhere() -> None:
    for places in (2, 3, 10, 64):
        for count in range(2, places + 1):
            depths = sorted(
                SampleRequest(ByteTokenizer(), LENGTH, index, depths=places).depth for index in range(count)
            )
            assert depths[0] == 0 and depths[-1] == 1 and len(set(depths)) == count
            assert max(b - a for a, b in pairwise(depths)) < 2 / (count - 1) + 1 / (places - 1)
    asked = EvalConfig(("passkey",), (512,), samples=5)
    records = EvalRunner(asked, ByteTokenizer()).answers(Reader(tiny()), set(), True, print)
    assert [record["depth"] for record in records] == pytest.approx([place / 9 for place in ORDER[:5]])


def test_a_question_is_asked_and_counted_once(tmp_path: Path) -> None:
    for window, lengths in ((256, {512, 256}), (512, {512}), (1024, {512, 1024}), (65536, {16384, 65536})):
        assert set(commands._usual_lengths(window)) == lengths and len(commands._usual_lengths(window)) == len(lengths)
    questions = EvalRunner(EvalConfig(("copy", "copy"), (128, 128), samples=2), ByteTokenizer())
    records = list(questions.answers(Reader(tiny()), set(), True, print))
    assert [record["index"] for record in records] == [0, 1]
    lines = [{"identity": {}}, *records, *records]  # as earlier versions left them
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (cell,) = report.cells(ResultsLog(tmp_path, {}).records)
    assert cell["n"] == 2


def test_pairs_stand_in_noise_and_one_is_asked() -> None:
    for index in (0, 1, 4, 9):
        sample = TASKS["pairs"](SampleRequest(ByteTokenizer(), 4096, index))
        *text, key = ByteTokenizer().decode(sample.prompt).split(" ")
        facts = [(i, word) for i, word in enumerate(text) if re.fullmatch("[a-z]{2}[A-Z]", word)]
        assert len(facts) == 64 and facts[-1][0] - facts[0][0] == 63
        assert {word[-1] for _, word in facts if word[:2] == key} == set(sample.references)
        assert facts[0][0] / (len(text) - 64) == pytest.approx(ORDER[index] / 9, abs=0.03)


def test_the_needle_prompt_is_rulers() -> None:
    text = ByteTokenizer().decode(TASKS["niah_single_1"](SampleRequest(ByteTokenizer(), 1024, 0)).prompt)
    pattern = (
        r"A special magic number is hidden within the following text\. Make sure to memorize it\. "
        r"I will quiz you about the number afterwards\.\nOne of the special magic numbers for (\S+) is: \d{7}\.\n"
        r"(The grass is green\. The sky is blue\. The sun is yellow\. Here we go\. There and back again\.\n)+"
        r"What is the special magic number for \1 mentioned in the provided text\? "
        r"The special magic number for \1 mentioned in the provided text is"
    )
    assert re.fullmatch(pattern, text)
    several = ByteTokenizer().decode(TASKS["niah_multiquery"](SampleRequest(ByteTokenizer(), 2048, 0)).prompt)
    assert several.startswith("Some special magic numbers are hidden") and several.count("numbers for") == 6
    assert re.search(r"What are all the special magic numbers for \S+, \S+, \S+, and \S+ mentioned", several)


def test_variables_form_one_chain() -> None:
    sample = TASKS["vt"](SampleRequest(ByteTokenizer(), LENGTH, 3))
    text = ByteTokenizer().decode(sample.prompt).split("Memorize and track")[-1]
    found = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", text)
    assert [name for name, _ in found] == list(sample.references)
    assert [source for _, source in found[1:]] == list(sample.references[:-1])
    assert text.rstrip().endswith(f"5 variables are assigned the value {found[0][1]}, they are:")


def test_words_are_as_frequent_as_defined() -> None:
    sample = TASKS["cwe"](SampleRequest(TOKENIZERS[1], LENGTH, 0))
    listed = re.findall(r"\d+\. (\w+)", TOKENIZERS[1].decode(sample.prompt).split("Below is")[-1])
    counts = {word: listed.count(word) for word in listed}
    assert {word for word, count in counts.items() if count == 30} == set(sample.references)
    assert set(counts.values()) == {30, 3}
    sample = TASKS["fwe"](SampleRequest(ByteTokenizer(), LENGTH, 0))
    body = ByteTokenizer().decode(sample.prompt).split("coded words. ")[1].split("\n")[0].split()
    ranked = [body.count(word) for word in ("...", *sample.references)]
    assert (
        ranked[0]
        > ranked[1]
        > ranked[2]
        > ranked[3]
        == max(body.count(word) for word in set(body) - {"...", *sample.references[:2]})
    )
    assert ranked[0] / ranked[1] == pytest.approx(4, rel=0.1)


def test_associations_are_zoologys() -> None:
    near = far = 0
    drawn = associations(50, 64, 4, 100, torch.Generator().manual_seed(0))
    for tokens, labels in zip(*(part.tolist() for part in drawn), strict=True):
        pairs = dict(zip(tokens[:8:2], tokens[1:8:2], strict=True))
        assert len(pairs) == 4 and all(0 < key < 50 <= value < 100 for key, value in pairs.items())
        asked = [i for i, label in enumerate(labels) if label != -100]
        assert len(asked) == 4 and {tokens[i]: labels[i] for i in asked} == pairs
        assert all(i >= 8 and i % 2 == 0 for i in asked)
        near, far = near + sum(i < 12 for i in asked), far + sum(i >= 60 for i in asked)
    assert near > 5 * far > 0  # p(g) falls as g^(α − 1)


@pytest.mark.parametrize(
    ("metric", "prediction", "references", "expected"),
    [
        ("match_all", "it is One and two", ("one", "TWO", "three"), 2 / 3),
        ("match_all", "one", ("one", "uno", "eins"), 1 / 3),
        ("match_part", "one", ("one", "uno", "eins"), 1),  # lm-evaluation-harness: 1/3
        ("match_part", "two", ("one", "uno"), 0),
        ("match_all", "x\x00one\ttwo", ("x\none\ntwo",), 1),
        ("first_int", " 123. 456", ("123",), 1),
        ("first_int", "0123", ("123",), 0),
        ("first_int", "none", ("123",), 0),
        ("first_int", "456 123", ("123",), 0),
        ("word", '"ab-1".', ("ab-1",), 1),
        ("word", "xab-1", ("ab-1",), 0),
        ("f1", "The cat sat", ("a cat", "dog"), 2 / 3),
        ("f1", "", ("cat",), 0),
    ],
)
def test_scorers(metric: str, prediction: str, references: tuple[str, ...], expected: float) -> None:
    assert METRICS[metric](prediction, references) == pytest.approx(expected)


def test_intervals() -> None:
    assert wilson(20, 20) == pytest.approx((0.839, 1), abs=5e-4)
    assert wilson(18, 20) == pytest.approx((0.699, 0.972), abs=5e-4)
    assert wilson(250, 500) == pytest.approx((0.456, 0.544), abs=5e-4)
    values = [i % 4 / 3 for i in range(100)]
    found = bootstrap(values)
    assert found is not None
    low, high = found
    assert 0.40 < low < 0.45 and 0.55 < high < 0.60 and bootstrap(values) == (low, high)
    assert interval([1.0, 0.0, 1.0]) == wilson(2, 3) and interval(values) == (low, high)


def test_samples_that_do_not_differ_are_not_certain() -> None:
    assert interval([0.4]) == wilson(0.4, 1) and interval([0.4] * 3) == pytest.approx(wilson(1.2, 3))
    assert bootstrap([6.0]) is None and bootstrap([6.0, 6.5]) == (6.0, 6.5)
    asked = {"index": 0, "tokens": 1024, "seconds": 1.0, "depth": None, "answer_nll": 2.0, "score": 0.4}
    nats: dict[str, object] = {"task": "ppl_by_position", "length": 1024, "index": 0, "nats": {"256": 6.0}}
    text, curve = report.cells([{"task": "vt", "length": 1024} | asked, nats])
    assert text["answer_nll_ci95"] is None and curve["curve"] == [{"x": 256, "nats": 6.0, "ci95": None}]
    assert "40 ±44" in json.dumps(report._grid([text]), ensure_ascii=False)
    assert "1 document of" in str(report.curves([curve])[0].title)


def tiny(vocab: int = 257) -> LanguageModel:
    cfg = Tnl(dim=16, layers=2, heads=2, mlp=16, vocab=vocab, decay="window")
    model = LanguageModel(cfg, 512, ShardedRecurrence("chunked"))
    with torch.no_grad():
        fill(model, initial_values(model, 0, torch.device("cpu")))
    return model


def test_the_map_shows_where_a_blind_model_fails() -> None:
    records = []
    for length in (1024, 2048, 4096):
        for index in range(20):
            sample = TASKS["passkey"](SampleRequest(ByteTokenizer(), length, index, depths=5))
            assert sample.distance is not None
            right = float(sample.distance <= 1024)
            records.append(
                {"task": "passkey", "length": length, "index": index, "tokens": len(sample.prompt), "seconds": 0.1}
                | {"depth": sample.depth, "distance": sample.distance, "metric": "first_int", "answer_nll": 1 - right}
                | {"score": right, "exact": right, "accuracy": right}
            )
    found = report.cells(records)
    assert [cell["score"] for cell in found] == [1, 0.6, 0.4]
    assert found[0]["score_ci95"] == wilson(20, 20)
    depths, lengths, values = report.depth_map("passkey", found)
    assert depths == [0, 0.25, 0.5, 0.75, 1] and lengths == [1024, 2048, 4096]
    assert [values[depth, 4096] for depth in depths] == [0, 0, 0, 1, 1]
    assert "100 ±8, nll 0.00 (20)" in json.dumps(report._grid(found), ensure_ascii=False)


def test_exact_is_what_greedy_generation_finds_and_answers_are_kept(tmp_path: Path) -> None:
    reader, tokenizer = Reader(tiny()), ByteTokenizer()
    asked = EvalConfig(("passkey", "copy"), (512,), samples=3, control=True)
    identity = asked.identity()
    ledger = ResultsLog(tmp_path, identity)
    notes: list[str] = []
    answers = EvalRunner(asked, tokenizer).answers(reader, ledger.done, True, notes.append)
    for record in [next(answers) for _ in range(2)]:
        ledger.add(record)
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"task": "passkey", "len')  # killed while it wrote
    continued = ResultsLog(tmp_path, identity)
    assert continued.records == json.loads(json.dumps(ledger.records))
    for record in EvalRunner(asked, tokenizer).answers(reader, continued.done, True, notes.append):
        continued.add(record)
    whole = list(EvalRunner(asked, tokenizer).answers(reader, set(), True, notes.append))
    assert len(whole) == 6 and not notes

    def timeless(records: list[dict[str, object]]) -> list[dict[str, object]]:
        return [{key: value for key, value in json.loads(json.dumps(r)).items() if key != "seconds"} for r in records]

    assert timeless(ResultsLog(tmp_path, identity).records) == timeless(whole)
    assert all("control_nll" in record for record in whole)
    with pytest.raises(SetupError, match="--out"):
        ResultsLog(tmp_path, identity | {"seed": 1})
    found = report.cells(whole)
    report.write(tmp_path, found, {"name": "tiny", "step": 1})
    assert json.loads((tmp_path / "results.json").read_text())["cells"][0]["n"] == 3
    assert "passkey" in (tmp_path / "report.html").read_text() and "http" not in (tmp_path / "report.html").read_text()
    assert {file.name for file in report.plot(tmp_path, found)} == {"heatmap.png"}


def test_a_page_shows_samples_and_says_what_its_numbers_are(tmp_path: Path) -> None:
    """Whatever a model has answered: neither HTML nor control characters of it are obeyed."""
    asked = {"task": "a|b.jsonl", "length": 4096, "depth": None, "tokens": 9, "seconds": 1.0}
    records = [
        asked
        | {"index": index, "score": 1.0, "accuracy": 1.0, "exact": 0.0, "answer_nll": 0.25, "metric": "f1"}
        | {"prompt_end": f"<b>{index}", "prediction": "\x1b[2J<script>\r", "references": ["right"]}
        for index in range(7)
    ]
    copied = asked | {"task": "copy", "index": 0, "accuracy": 0.5, "exact": 0.0, "answer_nll": 2.0}
    report.write(tmp_path, report.cells([*records, copied]), {"name": "<i>", "step": 1}, [*records, copied])
    page = (tmp_path / "report.html").read_text()
    assert "a|b.jsonl at 4K: 5 of 7 samples" in page and "…&lt;b&gt;4<" in page and "&lt;b&gt;5" not in page
    assert "\\x1b[2J&lt;script&gt;\\r" in page and ">right<" in page and "100 % by score, 0 % by exact" in page
    assert "<dt>nll 0.12</dt><dd>loss on the right answer, in nats per token" in page and "<dt>97 ±3</dt>" in page
    assert "copy at 4K: 1 of 1 samples" in page and "<script" not in page and "<i>" not in page
    assert all(character.isprintable() or character in "\n\t" for character in page)


def test_answers_that_are_none_are_named(tmp_path: Path) -> None:
    for line, number in (("7", 1), ('{"identity": {}}\n{"task": "a"}', 2), ('\n{"identity": {}}\n[]', 3)):
        (tmp_path / "samples.jsonl").write_text(f"{line}\n")
        with pytest.raises(DataError, match=rf"samples\.jsonl:{number}: found no answer; expected those of an earlier"):
            ResultsLog(tmp_path, {})
    (tmp_path / "samples.jsonl").write_bytes(b'{"identity": {}}\n{"task": "\xff\n' + b"[" * 100_000)
    assert ResultsLog(tmp_path, {}).records == []


def test_a_sample_of_a_run_prints_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Into a log neither: a terminal will show it."""
    monkeypatch.setattr(summary, "generate", lambda *_: [*b"\x1b[2J\rend\n"])
    shown = "".join(summary._sample(tiny(), ByteTokenizer(), [*b"a\x07\tb"], 9).values())
    assert r"a\x07" in shown and r"\x1b" in shown and r"\rend" in shown
    assert all(character.isprintable() or character in "\n\t" for character in shown)


def test_a_right_answer_is_seen_as_right() -> None:
    reader, tokenizer = Reader(tiny()), ByteTokenizer()
    prompt = [tokenizer.bos, *tokenizer.encode("a prompt")]
    row = decode(reader.model, reader.read(torch.tensor([prompt])), 8)[0]
    sample = Sample(prompt, row[:-1], row, (tokenizer.decode(row),), 8)
    record = answer(reader, tokenizer, sample, control=False, is_main=True)
    assert record["exact"] == record["accuracy"] == 1
    wrong = [(row[0] + 1) % 256, *row[1:]]
    record = answer(reader, tokenizer, Sample(prompt, wrong[:-1], wrong), control=False, is_main=True)
    assert record["exact"] == 0 and record["accuracy"] < 1 and "score" not in record


def test_what_does_not_fit_is_said_and_the_rest_is_asked() -> None:
    notes: list[str] = []
    questions = EvalRunner(EvalConfig(("cwe", "copy", "ppl_by_position"), (256,), samples=1), ByteTokenizer())
    found = list(questions.answers(Reader(tiny()), set(), True, notes.append))
    assert [record["task"] for record in found] == ["copy"]
    assert len(notes) == 2 and re.search(r"cwe not run: .*256 tokens are too few.*at least \d+", notes[0])
    with pytest.raises(RecipeError, match="expected some of passkey"):
        EvalConfig(("niah",), (256,))


def test_losses_by_position_and_against_context() -> None:
    reader, document = Reader(tiny()), torch.randint(257, (2048,), generator=torch.Generator().manual_seed(0))
    losses = reader.losses(document)
    found = perplexity.by_position(reader, document)
    assert {end: count for end, (_, count) in found.items()} == {256: 256, 512: 256, 1024: 512, 2048: 1023}
    assert found[512][0] == pytest.approx(float(losses[256:512].mean()))
    curve = perplexity.against_context(reader, document)
    assert list(curve) == [0, 95, 383, 1535]
    assert curve[1535] == pytest.approx(float(losses[-512:].mean()))
    alone = torch.cat([document[:1], document[-512:]])
    assert curve[0] == pytest.approx(float(reader.losses(alone).mean()))


def test_files_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "niah_single_1").mkdir()
    ruler = tmp_path / "niah_single_1" / "validation.jsonl"
    row = {"index": 734, "input": "hay needle 5 hay", "outputs": ["5"], "length": 4096, "answer_prefix": " It is"}
    ruler.write_text(json.dumps(row) + "\n" + json.dumps(row | {"outputs": ["5", "6"]}) + "\n")
    assert task_name(ruler) == "niah_single_1"
    (length, sample), (_, second) = (asked_of(row, ByteTokenizer()) for row in rows(ruler))
    assert length == 4096 and sample.budget == 128 and sample.metric == "match_all"
    assert ByteTokenizer().decode(sample.prompt) == "hay needle 5 hay It is"
    assert ByteTokenizer().decode(second.labels) == " 5, 6" and second.references == ("5", "6")
    plain = tmp_path / "mine.jsonl"
    plain.write_text('{"prompt": "1 + 1 =", "answer": "2", "budget": 3, "metric": "first_int"}\n')
    ((length, sample),) = (asked_of(row, ByteTokenizer()) for row in rows(plain))
    assert (length, sample.budget, sample.metric) == (16, 3, "first_int")
    squad = tmp_path / "squad.json"
    question = {"question": "Who?", "answers": [{"text": "Ann"}, {"text": "Ann"}, {"text": "Ann B."}]}
    squad.write_text(json.dumps({"data": [{"paragraphs": [{"context": "Ann B. came.", "qas": [question]}]}]}))
    (only,) = rows(squad)
    assert only.references == ("Ann", "Ann B.") and only.prompt.endswith("Question: Who?\nAnswer:")
    for text, message in (('{"prompt": 3}', r"bad.jsonl:1: found keys prompt"), ("{", "bad.jsonl:1: Expecting")):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(DataError, match=message):
            list(rows(tmp_path / "bad.jsonl"))


def rows_of(file: Path, *lengths: int | None, **given: object) -> Path:
    """Writes RULER's rows, of those lengths."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, length in enumerate(lengths):
        row = {"index": 7, "input": f"hay {number} hay ", "outputs": [f"{number}"], "answer_prefix": "It is"} | given
        lines.append(json.dumps(row | ({} if length is None else {"length": length})) + "\n")
    file.write_text("".join(lines))
    return file


def test_files_are_told_apart_and_each_has_one_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    niah, subset = "niah_single_1", "validation.jsonl"
    files = [
        rows_of(tmp_path / "4096" / "data" / niah / subset, 3000, 4090),
        rows_of(tmp_path / "10000" / "data" / niah / subset, 9981, 9000),
        rows_of(tmp_path / "4096" / "data" / "vt" / subset, 1900, 1800),
        rows_of(tmp_path / "a" / niah / subset, 5000, 7000),
        rows_of(tmp_path / "my b" / niah / subset, 5000, 8192),
        rows_of(tmp_path / "mine.jsonl", None, None),
        rows_of(tmp_path / "some.jsonl", None, 300),
        rows_of(tmp_path / "512" / "vt" / subset, 513),  # not what the folder says
    ]
    found = open_files(files, ByteTokenizer())
    assert [(file.name, file.length) for file in found] == [
        (f"{niah}/{subset}", 4096),
        (f"{niah}/{subset}", 10000),
        (f"vt/{subset}", 4096),
        (f"a/{niah}/{subset}", 8192),
        (f"my b/{niah}/{subset}", 8192),
        ("mine.jsonl", 128),
        ("some.jsonl", 512),
        (f"vt/{subset}", 1024),
    ]
    assert [file.rows for file in found] == [2, 2, 2, 2, 2, 2, 2, 1] and not {file.name for file in found} & set(TASKS)
    bare = tmp_path / "copy"  # like a task
    bare.write_text(
        '{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": [{"text": "a"}]}]}]}]}'
    )
    assert open_files([bare], ByteTokenizer())[0].name == f"{tmp_path.name}/copy"
    monkeypatch.chdir(files[3].parent)
    (alone,) = open_files([Path(subset)], ByteTokenizer())
    assert (alone.name, alone.length) == (f"{niah}/{subset}", 8192)
    with pytest.raises(RecipeError, match=r"--file: found .*mine\.jsonl twice; expected each file once"):
        open_files([files[5], tmp_path / "a" / ".." / "mine.jsonl"], ByteTokenizer())


DEEP = "[" * 100_000
LINES = {
    "{": "Expecting property name",
    "[]": "found list; expected an object",
    "7": "found int; expected an object",
    DEEP: "nested too deep; expected a question",
    "1" + "0" * 5000: "Exceeds the limit",
    '{"prompt": "a", "\x1b[2J": 1}'.replace("\x1b", "\\u001b"): r"found keys prompt, \\x1b\[2J; expected input and",
    '{"prompt": "a", "answer": 2}': "answer: found 2; expected text",
    '{"prompt": "a", "answer": true}': "answer: found True; expected text",
    '{"prompt": ["a"], "answer": "b"}': r'prompt: found \["a"\]; expected text',
    '{"prompt": "a", "answers": null}': "found keys prompt; expected input and outputs",
    '{"prompt": "a", "answers": {"b": 1}}': r'answers: found \{"b": 1\}; expected text',
    '{"input": "a", "outputs": []}': r"outputs: found \[\]; expected at least one answer",
    '{"input": "a", "outputs": ["1", 2]}': "outputs: found 2; expected text",
    '{"input": "a", "outputs": ["1", null]}': "outputs: found None; expected text",
    '{"input": "a", "outputs": [" "]}': r'outputs: found \[" "\]; expected at least one answer, none of them blank',
    '{"input": "\\ud800", "outputs": ["1"]}': "input: found a lone surrogate, character 0; expected Unicode",
    '{"input": "a", "outputs": ["b\\udfff"]}': "outputs: found a lone surrogate, character 1",
    '{"input": "a", "outputs": ["b"], "answer_prefix": "\\ud800"}': "answer_prefix: found a lone surrogate",
    '{"prompt": "a", "answer": "b", "gap": "\\ud800"}': "gap: found a lone surrogate",
    '{"input": "a", "outputs": ["1"], "length": "64"}': "length: found '64'; expected a number from 1 to",
    '{"input": "a", "outputs": ["1"], "length": 0}': "length: found 0; expected a number",
    '{"input": "a", "outputs": ["1"], "length": 1e400}': "length: found inf; expected a number",
    '{"input": "a", "outputs": ["1"], "budget": -5}': "budget: found -5; expected a number from 1 to",
    '{"input": "a", "outputs": ["1"], "budget": 1.5}': r"budget: found 1\.5",
    '{"input": "a", "outputs": ["1"], "budget": true}': "budget: found True",
    '{"input": "a", "outputs": ["1"], "answer_prefix": 3}': "answer_prefix: found 3; expected text",
    '{"input": "a", "outputs": ["1"], "others": 3}': "others: found 3; expected an object",
    '{"input": "a", "outputs": ["1"], "metric": "bleu"}': "metric: found 'bleu'; expected one of",
    '{"input": "a", "outputs": ["1"], "metric": ["f1"]}': r'metric: found \["f1"\]; expected text',
}


@pytest.mark.parametrize("last", LINES, ids=lambda line: line[:60])
def test_a_file_that_cannot_be_scored_is_refused_as_a_whole(tmp_path: Path, last: str) -> None:
    """By one line with the file and the row, as data that does not fit; null is as if it were not there."""
    file = tmp_path / "rows.jsonl"
    good = '{"prompt": "1 + 1 =", "answer": "2", "length": null, "gap": null, "answer_prefix": null, "budget": null}'
    file.write_text(f"\ufeff{good}\n\ufeff\n{good}\n{last}\n")
    with pytest.raises(DataError, match=rf"^--file: {re.escape(str(file))}:4: {LINES[last]}") as caught:
        open_files([file], ByteTokenizer())
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def squad(question: object = None, **paragraph: object) -> str:
    """SQuAD's form, with one question."""
    qas = [{"question": "q", "answers": [{"text": "a"}]}, question]
    return json.dumps({"data": [{"paragraphs": [{"context": "c", "qas": qas} | paragraph]}]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "rows.json: Expecting value"),
        (DEEP, "rows.json: nested too deep"),
        ("[]", "rows.json: data: found no list; expected SQuAD's form"),
        ('{"data": [7]}', r"rows.json: data\[0\]\.paragraphs: found no list"),
        (squad(), r"rows.json: data\[0\]\.paragraphs\[0\]\.qas\[1\]\.answers: found no list"),
        (squad({"answers": [{"text": 7}]}), r"qas\[1\]\.answers\[0\]: text: found 7; expected text"),
        (
            squad({"answers": [{"text": "\ud800"}]}),
            r"qas\[1\]\.answers\[0\]: text: found a lone surrogate, character 0",
        ),
        (squad({"answers": [{"text": " "}]}), r"qas\[1\]: answers: found \[\" \"\]; expected at least one answer"),
        (squad({"answers": ["b"]}), r"qas\[1\]\.answers\[0\]: text: found None; expected text"),
        (squad({"answers": [{"text": "b"}]}), r"qas\[1\]: question: found None; expected text"),
        (squad({"question": "q", "answers": [{"text": "b"}]}, context=5), r"paragraphs\[0\]: context: found 5"),
    ],
)
def test_what_is_not_in_squads_form_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(DataError, match=message):
        open_files([tmp_path / "rows.json"], ByteTokenizer())


def test_files_that_hold_no_questions_are_named(tmp_path: Path) -> None:
    """Without waiting for a pipe; and the command ends as for any other data that does not fit."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.json").symlink_to("loop.json")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bytes.jsonl").write_bytes(b'{"prompt": "\xff"}')
    for name, message in {
        "pipe.jsonl": "pipe.jsonl: cannot be read: it is no regular file; expected .jsonl, .ndjson, or SQuAD's .json",
        "loop.json": "loop.json: cannot be read: Too many levels",
        "../nowhere/gone.json": "gone.json: cannot be read: No such file",
        ".": "cannot be read: Is a directory",
        "empty.jsonl": "empty.jsonl: found nothing to ask; expected at least one row",
        "bytes.jsonl": "bytes.jsonl:1: byte 12 is not UTF-8",
    }.items():
        with pytest.raises(DataError, match=f"--file: .*{message}"):
            open_files([tmp_path / name], ByteTokenizer())


def test_a_file_has_one_score_beside_a_task_of_its_name(tmp_path: Path) -> None:
    rows_of(tmp_path / "passkey" / "validation.jsonl", 500, 400, 200)
    rows_of(tmp_path / "passkey.jsonl", None, None, budget=4)

    def asked(most: int | None) -> EvalConfig:
        files = open_files([tmp_path / "passkey" / "validation.jsonl", tmp_path / "passkey.jsonl"], ByteTokenizer())
        return EvalConfig(("passkey",), (512,), samples=1, files=files, rows=most)

    def answers(most: int | None) -> list[str]:
        ledger = ResultsLog(tmp_path / "out", {})
        questions = asked(most)
        ledger.check(questions.files)
        made = list(EvalRunner(questions, ByteTokenizer()).answers(Reader(tiny()), ledger.done, True, print))
        for record in made:
            ledger.add(record)
        found = report.cells(ledger.records)
        report.write(tmp_path / "out", found, {"name": "tiny"})
        assert all(questions.covers(cell["task"], cell["length"]) for cell in found)
        table = [[text and re.sub(r".*\((.*)\)", r"\1", text) for text in row] for row in report._grid(found)]
        return [f"{len(made)} new", *(" | ".join(row) for row in table)]

    first, *rest = answers(2)
    assert (first, rest) == (
        "5 new",
        ["task | 32 | 512", "passkey |  | 1", "passkey/validation.jsonl |  | 2 of 3", "passkey.jsonl | 2 | "],
    )
    assert answers(2) == ["0 new", *rest]
    assert answers(9)[0] == "1 new" and answers(None)[0] == "0 new"
    assert answers(None)[3] == "passkey/validation.jsonl |  | 3"
    (of_file,) = (c for c in report.cells(ResultsLog(tmp_path / "out", {}).records) if c["task"].startswith("passkey/"))
    assert [(part["length"], part["n"]) for part in of_file["by_length"]] == [(256, 1), (512, 2)]
    assert len(report.by_length([of_file])) == 1
    for lengths in ((500, 400, 201), (500, 400, 200, 100), (600, 400, 200)):  # the last has another column
        rows_of(tmp_path / "passkey" / "validation.jsonl", *lengths)
        with pytest.raises(SetupError, match=r"other rows than .*passkey/validation\.jsonl has now.*--out"):
            answers(None)
    assert len(ResultsLog(tmp_path / "out", {}).records) == 6


def test_predictions_are_what_rulers_evaluator_reads(tmp_path: Path) -> None:
    file = rows_of(tmp_path / "data" / "niah_single_1" / "validation.jsonl", 300, None, 200, others={"id": 5}, budget=3)
    files = open_files([file], ByteTokenizer())
    asked = EvalConfig((), (512,), files=files)
    records = list(EvalRunner(asked, ByteTokenizer()).answers(Reader(tiny()), set(), True, print))
    pred = tmp_path / "pred"
    predictions.begin(pred, files)
    predictions.check(pred, files, [])
    predictions.write(pred, files, records[:2])
    predictions.check(pred, files, records)
    predictions.write(pred, files, [records[2], *records[:2]])
    lines = [json.loads(line) for line in (pred / "niah_single_1.jsonl").read_text().splitlines()]
    assert lines == [
        {"index": 7, "pred": record["prediction"], "input": f"hay {number} hay It is", "outputs": [f"{number}"]}
        | {"others": {"id": 5}, "truncation": -1, "length": length}
        for number, (record, length) in enumerate(zip(records, (300, -1, 200), strict=True))
    ]
    with pytest.raises(SetupError, match=r"niah_single_1\.jsonl: holds something else"):
        predictions.check(pred, files, records[:2])
    other = rows_of(tmp_path / "other" / "niah_single_1" / "validation.jsonl", 900)
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"prompt": "1 + 1 =", "answer": "2"}\n')
    for paths, message in (([], "no --file"), ([file, other], "would both be"), ([plain], "without input and outputs")):
        with pytest.raises(RecipeError, match=f"--ruler-predictions: .*{message}"):
            predictions.begin(pred, open_files(paths, ByteTokenizer()))
    with pytest.raises(RecipeError, match=r"--ruler-predictions: .*plain\.jsonl: .*; expected a folder"):
        predictions.begin(plain, files)


def test_a_recipe_can_name_every_task() -> None:
    assert get_args(Task) == tuple(TASKS)


def test_lengths() -> None:
    assert parse_lengths("4k,100") == (4096, 100)
    with pytest.raises(RecipeError, match=r"--lengths: found '1m\.\.4k'; expected the shorter one first"):
        parse_lengths("1m..4k")
    assert parse_lengths("4k..256k") == (4096, 16384, 65536, 262144)
    assert parse_lengths("4k..128K")[-2:] == (65536, 131072)
    for wrong in ("x", "0", "4g", "", "1025m"):
        with pytest.raises(RecipeError, match="--lengths"):
            parse_lengths(wrong)


@pytest.mark.slow
def test_a_run_is_asked_while_it_trains_and_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"Document {i}: " + " ".join(str(i * j) for j in range(600)))
    (tmp_path / "tiny.yaml").write_text(
        "model: {arch: tnl, decay: window, dim: 16, layers: 2, heads: 2, mlp: 24}\n"
        "data: {source: text, tokenizer: bytes, window: 480, cache: cache, validation: 200000}\n"
        "optim: {lr: 1e-2, schedule: constant}\n"
        "train: {steps: 2, batch: 2, precision: fp32}\n"
        "eval: {windows: 2, sample: 0, tasks: [passkey, copy], lengths: [512], samples: 2}\n"
    )

    def lasptrain(*arguments: str, expected: int = 0) -> str:
        started = program.start("lasptrain", *arguments, folder=tmp_path, logs=tmp_path / "logs", OMP_NUM_THREADS="1")
        code, printed, said = started.end()
        assert code == expected, said
        return printed + said

    lasptrain("pretrain", "tiny.yaml", "--nproc", "2", "--set", "mesh.sp=2")
    (logged,) = read_metrics(tmp_path / "runs" / "tiny", "eval")
    assert logged["passkey@512/score"] in (0, 0.5, 1)
    monkeypatch.chdir(tmp_path)
    run = Path("runs", "tiny")
    asked = EvalConfig(("passkey", "copy", "ppl_by_position", "ppl_vs_context"), (512, 1024), samples=2)
    main.evaluate(run, asked, None, 4096, 1)
    first = json.loads((run / "eval" / "step-2" / "results.json").read_text())
    output = lasptrain(
        *("eval", "runs/tiny", "--n", "2", "--tasks", "passkey,copy,ppl_by_position,ppl_vs_context"),
        *("--lengths", "512,1024", "--out", "spread", "--nproc", "2"),
    )
    assert "0/8  passkey at 512, sample 1" in output and "ppl_vs_context: 2 documents of 1,024 tokens" in output
    output = lasptrain("eval", "runs/tiny", "--tasks", "pairs", "--lengths", "256", "--out", "few", expected=2)
    assert output.endswith(
        "error: pairs not run: --lengths: 256 tokens are too few for this task; expected at least 351\n"
    )
    (tmp_path / "empty.jsonl").touch()  # earlier answers are none to what cannot be asked
    assert "too few for this task" in lasptrain("eval", "runs/tiny", "--tasks", "passkey", "--lengths", "1", expected=2)
    assert "found nothing to ask" in lasptrain("eval", "runs/tiny", "--file", "empty.jsonl", expected=3)
    file = rows_of(tmp_path / "my rows" / "passkey" / "validation.jsonl", 500, 400, 300, budget=2)
    given: Any = {"files": [file.relative_to(tmp_path)], "predictions": Path("pred"), "out": Path("files"), "nproc": 1}
    with printed() as tables:
        commands.evaluate(run, **given, tasks="passkey", lengths="512", samples=2)
    output, counts = capsys.readouterr().out, [(row[0], row[1].partition("(")[2]) for row in cells(tables[0])]
    assert counts == [("passkey", "2)"), ("passkey/validation.jsonl", "2 of 3)")]
    assert "pred/passkey.jsonl: 2 of 3 rows" in output
    with printed() as tables:
        commands.evaluate(run, **given)
    assert cells(tables[0])[-1][1].endswith("(3)")
    assert "pred/passkey.jsonl: 3 of 3 rows" in capsys.readouterr().out
    with pytest.raises(RecipeError, match=r"--lengths: .*--tasks"):
        commands.evaluate(run, **given, lengths="512")
    file.write_text(file.read_text() + '{"input": ""}\n')
    with pytest.raises(DataError, match=r"--file: .*jsonl:4: found keys input"):
        commands.evaluate(run, **(given | {"out": Path("none")}))
    assert not Path("none").exists()
    second = json.loads((tmp_path / "spread" / "results.json").read_text())
    assert second["sp"] == 2 and first["sp"] == 1
    for alone, spread in zip(first["cells"], second["cells"], strict=True):
        assert alone["n"] == spread["n"] == 2
        for measure in {"answer_nll", "accuracy"} & set(alone):
            assert alone[measure] == pytest.approx(spread[measure], rel=1e-4)
        for one, other in zip(alone.get("curve", ()), spread.get("curve", ()), strict=True):
            assert one["x"] == other["x"] and one["nats"] == pytest.approx(other["nats"], rel=1e-4)
    assert logged["copy@512/answer_nll"] == pytest.approx(first["cells"][2]["answer_nll"], rel=1e-4)
    drawn = [main.generate(run, ["1 2 ", "Doc"], 5, 0.8, 0.9, seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 2
