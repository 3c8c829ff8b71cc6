"""Order, windows, slices: every window once an epoch, and slices tile the window on every mesh."""

from collections import Counter
from collections.abc import Iterator
from itertools import accumulate, pairwise, product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data_tools.packing import BestFit, Layout, LongDocuments, best_fit, concat
from lasptrain.data.dataset import Split
from lasptrain.data.loader import SliceLoader
from lasptrain.data.order import permute, permuted, window_start
from lasptrain.data.shard import Int64s, Shard, ShardHeader, ShardWriter
from lasptrain.errors import DataError, RecipeError
from lasptrain.ops.cross_entropy import IGNORED

BOS = 1
WINDOW = 24


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    """A stream of 1,003 tokens in documents of 1 to 60 tokens: no two tokens but BOS are equal."""
    stream = torch.arange(2, 1005)
    lengths = np.random.default_rng(0).integers(1, 60, 100)
    starts = np.cumsum(lengths)
    stream[torch.from_numpy(starts[starts < len(stream)])] = BOS
    stream[0] = BOS
    return stream


@pytest.fixture(scope="module")
def split(tokens: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Split:
    """The stream in four shards."""
    folder = tmp_path_factory.mktemp("split")
    texts = np.split(tokens.numpy(), np.flatnonzero(tokens.numpy() == BOS)[1:])
    shards = []
    for number in range(4):
        header = ShardHeader(1005, BOS, "", "test", "train", "test")
        with ShardWriter(folder / f"{number}.ltok", header) as writer:
            for text in texts[number * len(texts) // 4 : (number + 1) * len(texts) // 4]:
                writer.add(text)
        shards.append(Shard(writer.path))
    return Split("train", shards, 1)


def make(split: Split, **changes: int | bool) -> SliceLoader:
    settings = {"window": WINDOW, "batch": 4, "micro_batch": 1, "dp": 1, "dp_rank": 0, "sp": 1, "sp_rank": 0}
    more = {"segment": WINDOW, "seed": 7, "bos": BOS, "reset": True, "prefetch": False}
    return SliceLoader(split, **(settings | more | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [*range(1, 40), 63, 64, 65, 255, 256, 257, 1000, 4097])
def test_permute_is_a_bijection(size: int) -> None:
    assert sorted(permute(size, i, seed=3) for i in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 255, 256, 257, 4097])
def test_many_indices_are_permuted_as_each_alone(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lasptrain.data.order.AT_ONCE", 1000)
    for seed, epoch in [(0, 0), (3, -1), (1 << 63, 7)]:
        assert list(permuted(size, seed, epoch)) == [permute(size, i, seed, epoch) for i in range(size)]


def test_permute_leaves_no_pattern() -> None:
    """Successive differences of the permutation are spread evenly: χ² per degree of freedom is near 1."""
    size, bins = 1 << 14, 128
    order = np.array([permute(size, i, seed=1) for i in range(size)])
    counts = np.bincount(np.diff(order) % size * bins // size, minlength=bins)
    expected = (size - 1) / bins
    assert 0.6 < ((counts - expected) ** 2 / expected).sum() / (bins - 1) < 1.5
    assert [permute(size, i, seed=1) for i in range(50)] != [permute(size, i, seed=2) for i in range(50)]
    assert [permute(size, i, 1, epoch=0) for i in range(50)] != [permute(size, i, 1, epoch=1) for i in range(50)]


@pytest.mark.parametrize(("total", "window", "align"), [(1003, 24, 1), (1003, 1003, 1), (960, 24, 24), (960, 48, 24)])
def test_an_epoch_uses_each_window_once_and_no_token_twice(total: int, window: int, align: int) -> None:
    windows = total // window
    left_out = set()
    for epoch in range(3):
        starts = [window_start(total, window, align, 5, epoch * windows + i) for i in range(windows)]
        used = [(start + i) % total for start in starts for i in range(window)]
        assert len(set(used)) == len(used) == windows * window
        assert all(start % align == 0 for start in starts)
        left_out.add(frozenset(set(range(total)) - set(used)))
    assert total % window == 0 or len(left_out) == 3


def test_the_order_is_pinned() -> None:
    """A run that resumes under a later version must see the same windows."""
    assert [window_start(1003, 24, 1, 7, sample) for sample in (0, 1, 41, 10**12)] == [149, 53, 79, 315]


def test_read_is_a_ring_over_shards(split: Split, tokens: torch.Tensor) -> None:
    assert split.tokens == len(tokens) and len(split.shards) == 4
    twice = torch.cat([tokens, tokens, tokens])
    for start, count in product([0, 1, 250, 501, 1000, 1002], [0, 1, 2, 500, 1003, 1500]):
        got = split.read(start, count)
        assert got.dtype == torch.int64 and torch.equal(got, twice[start : start + count])


MESHES = [(dp, sp, segments) for dp, sp, segments in product((1, 2, 4), (1, 2, 3, 4), (1, 2, 3))]


@pytest.mark.parametrize(("dp", "sp", "segments"), [mesh for mesh in MESHES if WINDOW % (mesh[1] * mesh[2]) == 0])
def test_slices_tile_the_window(split: Split, tokens: torch.Tensor, dp: int, sp: int, segments: int) -> None:
    ring = torch.cat([tokens, tokens])
    for step, micro_batch in ((0, 1), (9, 4 // dp), (10, 1)):  # step 10 straddles two epochs
        seen: list[int] = []
        for dp_rank in range(dp):
            ranks = [
                make(
                    split, dp=dp, dp_rank=dp_rank, sp=sp, sp_rank=r, segment=WINDOW // segments, micro_batch=micro_batch
                )
                for r in range(sp)
            ]
            starts = ranks[0].window_starts(step)[dp_rank::dp]
            micro_batches = [rank.step(step) for rank in ranks]
            for number, per_rank in enumerate(zip(*micro_batches, strict=True)):
                line = [per_rank[r][m] for m in range(segments) for r in range(sp)]
                rows = starts[number * micro_batch : (number + 1) * micro_batch]
                expected = torch.stack([ring[start : start + WINDOW + 1] for start in rows])
                assert torch.equal(torch.cat([piece.tokens for piece in line], 1), expected[:, :-1])
                assert torch.equal(torch.cat([piece.labels for piece in line], 1), expected[:, 1:])
                assert {piece.tokens.shape for piece in line} == {(micro_batch, WINDOW // (sp * segments))}
                for left, right in pairwise(line):
                    assert torch.equal(left.labels[:, -1], right.tokens[:, 0])
                seen += rows
        assert sorted(seen) == sorted(ranks[0].window_starts(step))


def lay_out(lengths: list[int], window: int, packing: LongDocuments | None) -> tuple[Layout, list[Int64s]]:
    """Documents of ids that occur once, and what is written of them, piece by piece."""
    starts = [0, *accumulate(length - 1 for length in lengths)][:-1]
    order = range(len(lengths))
    layout = best_fit(starts, lengths, order, BestFit(window, packing)) if packing else concat(starts, lengths, order)
    pieces = zip(layout.starts, layout.lengths, strict=True)
    return layout, [np.array([BOS, *range(2 + start, 1 + start + length)]) for start, length in pieces]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=3, max_size=50),
    packing=st.sampled_from([None, "continue", "cut"]),
    shards=st.integers(1, 3),
    mesh=st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3])),
    tokens_per_slice=st.integers(1, 5),
    packed_windows=st.integers(1, 2),
    seed=st.integers(0, 2**32),
)
def test_any_epoch_on_any_mesh_sees_every_token_once(
    lengths: list[int],
    packing: LongDocuments | None,
    shards: int,
    mesh: tuple[int, int, int],
    tokens_per_slice: int,
    packed_windows: int,
    seed: int,
) -> None:
    dp, sp, segments = mesh
    packed = sp * segments * tokens_per_slice
    window = packed * packed_windows
    assume(packed > 1)
    layout, texts = lay_out(lengths, packed, packing)
    total = layout.tokens
    assume(total >= window)
    again = sum((length - 2) // (packed - 1) for length in lengths if length > packed) if packing == "continue" else 0
    assert total + layout.left + layout.cut == sum(lengths) + again  # each further piece has a BOS of its own
    assert layout.left < packed and (packing == "cut" or layout.cut == 0)
    stream = torch.from_numpy(np.concatenate(texts))
    ids = Counter(stream[stream != BOS].tolist())
    assert set(ids.values()) <= {1} and (layout.left or layout.cut or len(ids) == sum(lengths) - len(lengths))
    with TemporaryDirectory() as folder:
        made = []
        for number, part in enumerate(np.array_split(np.arange(len(texts)), min(shards, len(texts)))):
            header = ShardHeader(sum(lengths) + 2, BOS, "", "", "train", "")
            with ShardWriter(Path(folder, f"{number}.ltok"), header) as writer:
                for piece in part:
                    writer.add(texts[piece])
            made.append(Shard(writer.path))
        split = Split("train", made, packed if packing else 1)
        sizes = {"window": window, "segment": window // segments, "batch": dp, "dp": dp, "sp": sp, "seed": seed}
        rank = {(d, r): make(split, **sizes, dp_rank=d, sp_rank=r) for d in range(dp) for r in range(sp)}
        seen: Counter[int] = Counter()
        for sample in range(total // window):  # one epoch
            micro = [rank[sample % dp, r].read_step(sample // dp)[0] for r in range(sp)]
            line = [micro[r][m] for m in range(segments) for r in range(sp)]
            start = rank[0, 0].window_starts(sample // dp)[sample % dp]
            assert not packing or start % packed == 0
            place = torch.arange(start, start + window + 1) % total
            seen.update(place[:-1].tolist())
            assert torch.equal(torch.cat([slice_.tokens[0] for slice_ in line]), stream[place[:-1]])
            assert torch.equal(torch.cat([slice_.labels[0] for slice_ in line]), stream[place[1:]])
            for slice_ in line:
                assert slice_.doc_ids is not None
                assert torch.equal(slice_.doc_ids[0], (slice_.tokens[0] == BOS).cumsum(0).int())
    assert len(seen) == total // window * window and set(seen.values()) == {1}


@pytest.mark.parametrize("long_documents", ["continue", "cut"])
def test_best_fit_cuts_only_what_does_not_fit(long_documents: LongDocuments, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many lengths: but for the rest, at most what one block leaves over, every window starts with a document."""
    monkeypatch.setattr("data_tools.packing.BLOCK", 500)
    lengths = np.random.default_rng(0).lognormal(3, 1, 4000).astype(int) + 2
    window = 128
    layout, texts = lay_out(lengths.tolist(), window, long_documents)
    stream = np.concatenate(texts)
    whole, cut = (int((stream[::window] == BOS).sum()), int((stream[::window] != BOS).sum()))
    assert layout.tokens == len(stream) == (whole + cut) * window and whole > 20 * cut
    concatenated = np.concatenate(lay_out(lengths.tolist(), window, None)[1])
    assert (concatenated[::window] != BOS).mean() > 0.9
    beyond = int((lengths - window).clip(0).sum())
    assert layout.cut == (beyond if long_documents == "cut" else 0) < beyond + 1 and beyond > 0
    assert lay_out([3] * 1200, 4, "cut")[0].tokens == 3600  # nothing fits anything: all is concatenated


def test_doc_counts_the_starts_within_the_slice(split: Split) -> None:
    loader = make(split, window=96, segment=32, sp=2, sp_rank=1)
    for piece in loader.step(3)[0]:
        assert piece.doc_ids is not None and piece.doc_ids.dtype == torch.int32
        for row, doc_ids in zip(piece.tokens.tolist(), piece.doc_ids.tolist(), strict=True):
            assert doc_ids == [row[: i + 1].count(BOS) for i in range(len(row))]
    assert make(split, reset=False).step(0)[0][0].doc_ids is None


def same(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return torch.equal(left, right)
    assert isinstance(left, (list, tuple)) and isinstance(right, (list, tuple))
    return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))


@pytest.fixture
def ahead(split: Split) -> Iterator[SliceLoader]:
    loader = make(split, prefetch=True, segment=8)
    yield loader
    loader.close()


def test_a_step_is_a_pure_function_and_prefetch_changes_nothing(split: Split, ahead: SliceLoader) -> None:
    direct = make(split, segment=8)
    expected = {step: direct.step(step) for step in range(12)}
    for step in [0, 1, 2, 7, 7, 3, 4, 11, 0]:
        assert same(ahead.step(step), expected[step])
        assert same(direct.step(step), expected[step])
    assert not same(expected[0], expected[1])
    assert not same(make(split, segment=8, seed=8).step(0), expected[0])


def test_the_thread_reads_ahead_and_its_errors_are_raised(ahead: SliceLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    read = ahead.read_step

    def fail_at_three(step: int) -> object:
        if step == 3:
            raise DataError("shard x: gone")
        return read(step)

    monkeypatch.setattr(ahead, "read_step", fail_at_three)
    ahead.step(1)
    ahead.step(2)
    with pytest.raises(DataError, match="shard x: gone"):
        ahead.step(3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_copies_slices_while_its_host_goes_on(split: Split) -> None:
    loader, plain = make(split, prefetch=True, pin=True), make(split)
    for step in range(3):
        (piece,) = loader.step(step)[0]
        assert piece.doc_ids is not None and all(
            part.is_pinned() for part in (piece.tokens, piece.labels, piece.doc_ids)
        )
        assert same(loader.step(step), plain.step(step))
    loader.close()


@pytest.mark.parametrize(("dp", "micro_batch", "windows"), [(1, 1, 5), (2, 1, 5), (2, 2, 5), (3, 1, 2), (1, 4, 41)])
def test_validation_windows_are_fixed_and_counted_once(
    split: Split, tokens: torch.Tensor, dp: int, micro_batch: int, windows: int
) -> None:
    found = {}
    for dp_rank, sp_rank in product(range(dp), range(2)):
        loader = make(
            split, dp=dp, dp_rank=dp_rank, sp=2, sp_rank=sp_rank, batch=dp * micro_batch, micro_batch=micro_batch
        )
        for index in range(loader.validation_rounds(windows)):
            (piece,) = loader.validation_slices(index, windows)
            assert piece.tokens.shape == (micro_batch, WINDOW // 2)
            for row, labels in zip(piece.tokens, piece.labels, strict=True):
                if (labels == IGNORED).any():
                    assert (labels == IGNORED).all()
                else:
                    start = int((tokens.unfold(0, WINDOW // 2, 1) == row).all(1).nonzero().item())
                    assert start not in found
                    found[start] = labels
    assert sorted(found) == [i * WINDOW // 2 for i in range(2 * windows)]
    for start, labels in found.items():
        assert torch.equal(labels, tokens[start + 1 : start + 1 + WINDOW // 2])


def test_too_short_says_the_arithmetic(split: Split) -> None:
    with pytest.raises(DataError, match=r"0 windows of 1,024 would fit, 0 of 2,048: split train has 1,003 tokens") as e:
        make(split, window=2048, segment=2048)
    assert "longest window that fits: 1,003" in str(e.value)
    assert make(split, window=1003, segment=1003).step(0)[0][0].tokens.shape == (1, 1003)
    with pytest.raises(DataError, match="no tokens"):
        Split("validation", [], 1).read(0, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segment": 7}, "data.window: 24 is not a multiple of segment = 7; nearest: 21, 28"),
        ({"sp": 5}, "segment: 24 is not a multiple of mesh.sp = 5; nearest: 20, 25"),
        (
            {"dp": 2, "micro_batch": 3},
            "train.batch: 4 is not a multiple of mesh.dp × train.micro_batch = 6; nearest: 6",
        ),
    ],
)
def test_what_does_not_divide_is_refused(split: Split, changes: dict[str, int], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make(split, **changes)
    assert str(caught.value) == message


def test_a_window_on_a_grid(split: Split, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the dataset's align = 16"):
        make(Split("train", split.shards, 16))
