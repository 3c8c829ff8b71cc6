"""Inference is the training forward: prompts in segments and over ranks, tokens one at a time, batches of forks."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from lasptrain import architectures
from lasptrain.eval import inference
from lasptrain.eval.generate import Sampling, choose, decode, generate
from lasptrain.eval.inference import Reader, join
from lasptrain.models.language_model import LanguageModel, initial_values
from lasptrain.parallel import mesh as meshes
from lasptrain.parallel.recurrence import ShardedRecurrence
from lasptrain.parallel.shard import fill
from tests.support.gloo import spawn

VOCAB = 61
TIGHT = 1e-10  # relative, in fp64
CPU = torch.device("cpu")
Arch = Literal["tnl", "linear_transformer", "ssd", "sliding hybrid", "full hybrid"]
HYBRIDS: dict[str, dict[str, object]] = {
    "sliding hybrid": {"arch": "ssd", "softmax": [1], "kv_heads": 1, "sliding_window": 40},
    "full hybrid": {"arch": "minimax", "softmax": [0, 2]},
}


def model(arch: Arch = "tnl") -> LanguageModel:
    own: dict[str, dict[str, object]] = {
        "tnl": {"decay": "window"},
        "linear_transformer": {"decay": "none", "normalizer": True},
        "ssd": {"data_dependent": True, "conv": 15},
        **HYBRIDS,
    }
    sizes = {"dim": 24, "layers": 3, "heads": 3, "mlp": 20, "vocab": VOCAB}
    cfg = architectures.model({"arch": arch, **sizes, **own[arch]})
    made = LanguageModel(cfg, 300, ShardedRecurrence("chunked"), dtype=torch.float64).double()
    with torch.no_grad():
        fill(made, initial_values(made, 0, CPU))
        for parameter in made.parameters():
            if parameter.dim() == 2 and parameter.shape[0] != 3:
                parameter.mul_(4)
    return made


def text(length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def all_logits(made: LanguageModel, tokens: Tensor) -> Tensor:
    """The training forward's, fp64 [T, vocab]."""
    with torch.no_grad():
        x, _ = made.hidden(tokens)
        return torch.nn.functional.linear(made.norm(x), made.head_weight)[0].double()


def near(a: Tensor, b: Tensor, bound: float = 1e-5) -> None:
    assert float((a.double() - b.double()).norm() / b.double().norm()) < bound


@pytest.mark.parametrize(
    ("arch", "length"),
    [(arch, n) for arch in ("tnl", "ssd") for n in (1, 2, 63, 64, 65, 200)]
    + [(arch, n) for arch in ("linear_transformer", *HYBRIDS) for n in (1, 4, 65)],
)
def test_reading_in_segments_then_token_by_token_is_one_forward(arch: Arch, length: int) -> None:
    made, tokens = model(arch), text(length + 8)
    expected = all_logits(made, tokens)
    past = Reader(made, segment=37).read(tokens[:, :length])
    near(past.logits[0], expected[length - 1])
    for i in range(length, length + 8):
        past = Reader(made).read(tokens[:, i : i + 1], past)
        near(past.logits[0], expected[i])
    assert past.length == length + 8
    labels = tokens[0, 1:]
    wanted = torch.nn.functional.cross_entropy(expected[:-1], labels, reduction="none")
    near(Reader(made, segment=37).losses(tokens[0]), wanted, TIGHT)


@pytest.mark.parametrize("arch", ["tnl", *HYBRIDS])
def test_copies_of_a_snapshot_are_single_texts_and_leave_it_unharmed(arch: Arch) -> None:
    made, context = model(arch), text(100)
    reader = Reader(made)
    past = reader.read(context)
    endings = torch.cat([text(9, seed) for seed in (1, 2, 3)])
    together = reader.read(endings, join([past] * 3))
    for row, ending in enumerate(endings):
        alone = reader.read(torch.cat([context, ending[None]], 1))
        near(together.logits[row], alone.logits[0])
    near(reader.read(endings[:1], past).logits, together.logits[:1])
    joined = join([reader.read(context), reader.read(endings[:1])])
    rows = decode(made, joined, 12)
    assert rows[0] == decode(made, past, 12)[0]
    assert rows[1] == decode(made, reader.read(endings[:1]), 12)[0]


def test_scores_are_the_training_losses_and_exact_is_greedy_generation() -> None:
    made, prompt = model(), text(50)
    reader = Reader(made)
    past = reader.read(prompt)
    answer = decode(made, past, 6)[0]
    nats, hits = reader.score(past, answer[:-1], answer)
    whole = torch.cat([prompt[0], torch.tensor(answer)])
    near(nats, reader.losses(whole)[-6:])
    assert hits.all()
    wrong = [*answer[:3], (answer[3] + 1) % VOCAB, *answer[4:]]
    assert not reader.score(past, wrong[:-1], wrong)[1][3]
    nats, hits = reader.score(past, answer[:-1], [-100, *answer[1:5], -100])
    assert len(nats) == len(hits) == 4 and hits.all()


@pytest.mark.parametrize("arch", ["tnl", "ssd", "linear_transformer", *HYBRIDS])
def test_texts_of_different_lengths_are_read_scored_and_continued_together_as_alone(arch: Arch) -> None:
    """Across segments too, and with what stands before the shorter ones poisoned by other tokens."""
    made = model(arch)
    texts = [text(n, n)[0].tolist() for n in (70, 33, 70, 1, 37)]
    padding = [70 - len(one) for one in texts]
    tokens = torch.tensor([text(70, 99)[0].tolist()[:pad] + one for pad, one in zip(padding, texts, strict=True)])
    together = Reader(made, segment=33).read(tokens, padding=padding)
    alone = [Reader(made).read(torch.tensor([one])) for one in texts]
    for row, one in enumerate(alone):
        near(together.logits[row], one.logits[0])
    rows = [3, 0, 3, 4]
    answers = decode(made, together, 7)
    assert answers == [decode(made, one, 7)[0] for one in alone]
    endings = [answers[3], answers[0][:2] + text(5)[0].tolist(), text(1)[0].tolist(), text(12)[0].tolist()]
    found = Reader(made).score_batch(together.pick(rows), endings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "SCORED", 12)  # three tokens of each at a time
        in_pieces = Reader(made).score_batch(together.pick(rows), endings)
    for row, ending, (value, greedy), other in zip(rows, endings, found, in_pieces, strict=True):
        nats, hits = Reader(made).score(alone[row], ending[:-1], ending)
        assert value == pytest.approx(-float(nats.sum()), abs=1e-4) == other[0]
        assert greedy == bool(hits.all()) == other[1]
    assert [greedy for _, greedy in found][:2] == [True, False]
    told: list[list[int]] = []

    def ended(row: list[int]) -> bool:
        told.append(row)
        return len(row) >= (3 if row[:3] == answers[0][:3] else 4)

    assert decode(made, together, 7, ended=ended) == [row[:4] for row in answers]
    assert answers[0][:3] in told and answers[0][:4] not in told  # it had ended


def test_tokens_are_drawn_from_the_likeliest_by_temperature_and_top_p() -> None:
    logits = torch.tensor([[3.0, 2.0, 0.0, -1.0]]).expand(4000, 4)
    p = logits[0].softmax(-1)

    def frequencies(sampling: Sampling) -> Tensor:
        drawn = choose(logits, sampling, torch.Generator().manual_seed(1))
        return torch.bincount(drawn.flatten(), minlength=4) / 4000

    assert frequencies(Sampling()).tolist() == [1, 0, 0, 0]
    assert torch.allclose(frequencies(Sampling(1.0)), p, atol=0.03)
    kept = torch.tensor([p[0], p[1], 0, 0])  # .71 alone does not reach .8
    assert torch.allclose(frequencies(Sampling(1.0, top_p=0.8)), kept / kept.sum(), atol=0.03)
    for sampling in (Sampling(1.0, top_p=0.5), Sampling(1.0, top_p=0.0), Sampling(1e-320)):
        assert frequencies(sampling).tolist() == [1, 0, 0, 0]


def test_generation_repeats_with_its_seed_and_ends_at_a_stop() -> None:
    made, prompt = model(), text(20)[0].tolist()
    drawn = generate(made, prompt, 12, temperature=1.0, seed=3)
    assert drawn == generate(made, prompt, 12, temperature=1.0, seed=3)
    assert drawn != generate(made, prompt, 12, temperature=1.0, seed=4)
    past = Reader(made).read(torch.tensor([prompt]))
    row = decode(made, past, 12)[0]
    assert decode(made, past, 12, stop=row[5])[0] == row[: row.index(row[5])]


def _on_ranks(rank: int, world: int) -> None:
    grid = meshes.build(1, world)
    tokens = text(131)
    scans: dict[Arch, tuple[str, ...]] = {
        "tnl": ("ring", "all_gather", "all_scan"),
        "linear_transformer": ("all_gather",),
        "ssd": ("ring", "all_scan"),
        "sliding hybrid": ("ring", "all_gather"),
        "full hybrid": ("ring",),
    }
    for arch, names in scans.items():
        made = model(arch)
        expected = all_logits(made, tokens)
        wanted = torch.nn.functional.cross_entropy(expected[:-1], tokens[0, 1:], reduction="none")
        for scan in names:
            reader = Reader(made, grid, segment=14, scan=scan)
            for length in (1, 2, 41, 120):
                near(reader.read(tokens[:, :length]).logits[0], expected[length - 1])
            past = reader.read(tokens[:, :70])
            near(reader.read(tokens[:, 70:], past).logits[0], expected[-1])
            near(reader.losses(tokens[0]), wanted, TIGHT)
            near(reader.losses(tokens[0, 70:], past=reader.read(tokens[:, :70])), wanted[70:], TIGHT)


def test_ranks_read_together_what_one_reads_alone() -> None:
    spawn(3, _on_ranks)
