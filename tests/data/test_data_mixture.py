"""Several sources: exact shares, each read as if it were alone, whatever the mesh."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import windows
from data_tools.dataset import open_dataset
from data_tools.prepare import Preparation, prepare
from data_tools.prepared import check_held_out
from lasptrain.data.dataset import TokenDataset
from lasptrain.data.loader import SliceLoader
from lasptrain.data.mixture import SPAN, Mixture, mix, shares
from lasptrain.errors import DataError, RecipeError
from lasptrain.recipe.loading import load
from lasptrain.recipe.sections import Part
from lasptrain.recipe.yaml12 import dump
from tests.recipe.test_recipe import RECIPES

WINDOW, WEIGHTS, BLOCK = 32, (0.6, 0.3, 0.1), 10
COUNTS = (6, 3, 1)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[TokenDataset]:
    """Three sources of different sizes that share no byte but BOS: digits, small letters, capitals."""
    folder = tmp_path_factory.mktemp("parts")
    found = []
    for name, letters, documents in (("a", "0123456789", 90), ("b", "abcdefghij", 50), ("c", "ABCDEFGHIJ", 40)):
        (folder / name).mkdir()
        for number in range(documents):
            text = "".join(letters[(number * 7 + i * (number + 1)) % 10] for i in range(5 + number % 40))
            (folder / name / f"{number:03}.txt").write_text(text)
        prepare(Preparation([str(folder / name)], "bytes", validation_ppm=300_000, workers=1), folder / f"{name}.set")
        found.append(TokenDataset.open(folder / f"{name}.set"))
    return found


def kind(tokens: torch.Tensor) -> int:
    """Which source tokens are of; they must be of one."""
    letters = [t for t in tokens.flatten().tolist() if t != 256]
    (found,) = {0 if t < 58 else 1 if t > 96 else 2 for t in letters}
    return found


def loader(parts: list[TokenDataset], split: str = "train", **changes: int) -> SliceLoader:
    sizes = {"window": WINDOW, "batch": 4, "micro_batch": 1, "dp": 1, "dp_rank": 0, "sp": 1, "sp_rank": 0}
    sizes |= {"segment": WINDOW} | changes
    mixed = mix(parts, WEIGHTS, BLOCK).split(split)
    return SliceLoader(mixed, **sizes, seed=3, bos=256, reset=True, repeat=True, prefetch=False, pin=False)


def test_shares_are_exact_and_each_source_keeps_its_own_order(parts: list[TokenDataset]) -> None:
    assert tuple(shares(WEIGHTS, BLOCK)) == COUNTS
    mixed = mix(parts, WEIGHTS, BLOCK).split("train")
    for block in range(7):
        starts = [mixed.window_start(WINDOW, 3, block * BLOCK + i) for i in range(BLOCK)]
        by_source: dict[int, list[int]] = {k: [s % SPAN for s in starts if s // SPAN == k] for k in range(3)}
        assert [len(by_source[k]) for k in range(3)] == list(COUNTS)
        for k, count in enumerate(COUNTS):
            own = [parts[k].whole("train").window_start(WINDOW, 3, block * count + i) for i in range(count)]
            assert own == by_source[k]
    orders = {tuple(mixed.window_start(WINDOW, 3, b * BLOCK + i) // SPAN for i in range(BLOCK)) for b in range(7)}
    assert len(orders) > 4  # sources take other places in every block


def test_windows_of_a_source_are_all_read_before_one_is_read_again(parts: list[TokenDataset]) -> None:
    """In a block of a thousand windows too, which is long for small sources, and may be longer than the run."""
    mixed = mix(parts, WEIGHTS, 1000).split("train")
    assert isinstance(mixed, Mixture)
    last = [-1] * 3
    for sample in range(1500):
        number, own = mixed.sample(3, sample)
        assert own == last[number] + 1
        last[number] = own
    assert mixed.counted(3, 1500) == [own + 1 for own in last]


def test_a_window_is_of_one_source_and_the_same_on_every_mesh(parts: list[TokenDataset]) -> None:
    seen = Counter[int]()
    for step in range(5):
        whole = [micro[0].tokens for micro in loader(parts).read_step(step)]
        seen.update(kind(window) for window in whole)
        for dp, sp, segment in ((2, 1, 32), (1, 4, 16), (4, 2, 8)):
            for d in range(dp):
                slices = [
                    loader(parts, dp=dp, dp_rank=d, sp=sp, sp_rank=r, segment=segment).read_step(step)
                    for r in range(sp)
                ]
                for number, micro in enumerate(zip(*slices, strict=True)):
                    pieces = [piece.tokens for segments in zip(*micro, strict=True) for piece in segments]
                    assert torch.equal(torch.cat(pieces, 1), whole[number * dp + d])
    assert seen == {0: 12, 1: 6, 2: 2}


def test_epochs_begin_where_tokens_are_read_again(parts: list[TokenDataset]) -> None:
    """Each source's own, in the order of the mixture; several in one window that is longer than a source."""
    mixed = mix(parts, WEIGHTS, BLOCK).split("train")
    assert isinstance(mixed, Mixture)
    newest = [1, 1, 1]
    for sample in range(600):
        number, own = mixed.sample(3, sample)
        epoch = own // (parts[number].whole("train").tokens // WINDOW) + 1
        assert mixed.begins(WINDOW, 3, sample) == ((number, epoch) if epoch > newest[number] else None)
        newest[number] = max(newest[number], epoch)
    assert min(newest) > 2
    whole, read = parts[2].whole("train"), set[int]()
    for sample in range(60):
        if whole.begins(WINDOW, 3, sample):
            assert len(read) == whole.tokens // WINDOW  # as many as fit
            read.clear()
        read.add(whole.window_start(WINDOW, 3, sample))
    long = 2 * whole.tokens + 1
    assert [whole.begins(long, 3, sample) for sample in range(3)] == [(0, 3), (0, 5), (0, 7)]


def test_held_out_windows_come_from_every_source_in_turn(parts: list[TokenDataset]) -> None:
    validation_starts = loader(parts, "validation")
    windows = sum(len(part.whole("validation").validation_starts(WINDOW)) for part in parts)
    found = [kind(validation_starts.validation_slices(i, windows)[0].tokens) for i in range(windows)]
    assert found[:3] == [0, 1, 2] and validation_starts.validation_rounds(windows) == windows


def test_held_out_windows_that_do_not_fit_are_refused(parts: list[TokenDataset]) -> None:
    """Of every source one at least; the source that is too short is named."""
    held = [part.whole("validation").tokens for part in parts]
    shortest = min(range(3), key=lambda k: held[k])
    mixed = {"source": tuple(Part(path=str(part.folder), weight=1) for part in parts)}
    recipe = load(RECIPES / "quickstart.yaml").replace(data=mixed)

    def check(windows: int, window: int) -> None:
        asked = recipe.replace(eval={"windows": windows, "window": window})
        check_held_out(asked, [part.manifest for part in parts])

    fit = sum(tokens // WINDOW for tokens in held)
    check(fit, WINDOW)
    with pytest.raises(DataError, match=f"found {fit + 1} of {WINDOW} tokens, but {fit} fit into the {held[0]:,} tok"):
        check(fit + 1, WINDOW)
    check(3, held[shortest])
    told = f"but 0 fit into the {held[shortest]:,} tokens of {parts[shortest].folder} that are held out; expected "
    with pytest.raises(DataError, match=f"{told}eval.windows: 0 or eval.window: {held[shortest]} at most"):
        check(3, held[shortest] + 1)


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 3000))
def test_shares_add_up_and_are_no_further_off_than_one(weights: list[float], block: int) -> None:
    exact = [weight / sum(weights) * block for weight in weights]
    try:
        counts = shares(weights, block)
    except DataError as refusal:
        assert min(exact) < 1 and ("the least that fits is" in str(refusal) or block < len(weights))
        return
    assert sum(counts) == block and all(abs(c - e) < 1 for c, e in zip(counts, exact, strict=True))


def test_what_cannot_be_mixed_is_refused(parts: list[TokenDataset], tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"data\.source\.1\.weight: 0\.001 is no window in 8; the least that fits is 0\.14"
    ):
        shares([1.0, 0.001], 8)
    (tmp_path / "d.txt").write_text("text of another tokenizer " * 50)
    model = str(RECIPES.parent / "tokenizers" / "python-4k.model")
    other = TokenDataset.open(
        prepare(Preparation([str(tmp_path / "d.txt")], model, validation_ppm=0), tmp_path / "set")
    )
    with pytest.raises(DataError, match=r"made with tokenizer python-4k\.model, .* sources that are mixed share one"):
        mix([parts[0], other], [1.0, 1.0], 8)


def test_a_recipe_names_several_sources(parts: list[TokenDataset], tmp_path: Path) -> None:
    pairs = ", ".join(f"{{path: {part.folder}, weight: {w}}}" for part, w in zip(parts, WEIGHTS, strict=True))
    changes = [f"data.source=[{pairs}]", "data.tokenizer=bytes", "data.mix_block=10", "data.window=32"]
    recipe = load(RECIPES / "quickstart.yaml", changes)
    dataset = open_dataset(recipe.data)
    assert dataset.fingerprint == mix(parts, WEIGHTS, BLOCK).fingerprint
    assert dataset.fingerprint != mix(parts, WEIGHTS, 20).fingerprint
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    firsts = [windows.show_windows(tmp_path, at=number * SPAN)[0] for number in range(3)]
    assert [(one.folder, one.place) for one in firsts] == [(part.folder, 0) for part in parts]
    for one in windows.show_windows(tmp_path, step=2):
        number = [part.folder for part in parts].index(one.folder)
        (again,) = windows.show_windows(tmp_path, at=number * SPAN + one.place)
        assert again == one and kind(torch.tensor([ord(c) for *_, text in one.documents for c in text])) == number
    with pytest.raises(DataError, match=r"--at: found 844424930131968, of source 3; .* has 3 sources"):
        windows.show_windows(tmp_path, at=3 * SPAN)
    with pytest.raises(RecipeError, match=r"--step: found 999999; .* has train\.steps = "):
        windows.show_windows(tmp_path, step=999_999)
    text = str(windows.preview(recipe))
    assert "64 windows of 32 tokens in 32 steps, mixed 10 at a time" in text
    assert f"{parts[2].folder}: 1 of 10 windows (10.00 %)" in text
