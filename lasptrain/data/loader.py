"""From a step to the slices this rank trains on. The step determines everything; there is no loader state.

For M segments, C = window / (M · sp): rank r of its sp group reads, for segment m, the C + 1 tokens from
start + m·sp·C + r·C of the ring. The first C are inputs, the last C labels, so no rank needs its neighbour's token.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import NamedTuple

import torch

from lasptrain.data.dataset import Windows
from lasptrain.errors import DataError, RecipeError
from lasptrain.ops.cross_entropy import IGNORED


class Slice(NamedTuple):
    """This rank's piece of one segment, for b windows.

    tokens, labels: int64 [b, C]. doc_ids: int32 [b, C], number of documents that have started in the slice up to and
    including the token, or None where documents are not kept apart.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    doc_ids: torch.Tensor | None

    def to(self, device: torch.device, non_blocking: bool = False) -> Slice:
        """Copy to a device."""
        doc_ids = None if self.doc_ids is None else self.doc_ids.to(device, non_blocking=non_blocking)
        return Slice(
            self.tokens.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
            doc_ids,
        )

    def pinned(self) -> Slice:
        """Copy to page-locked memory, from which a GPU copies while its host goes on."""
        doc_ids = None if self.doc_ids is None else self.doc_ids.pin_memory()
        return Slice(self.tokens.pin_memory(), self.labels.pin_memory(), doc_ids)


MicroBatch = tuple[Slice, ...]  # one slice for each segment, in the order of the window


class SliceLoader:
    """Reads a split for one rank of a dp × sp mesh: `window` and `segment` are tokens, `batch` windows a step.

    `first` and `end`: the steps of a run that it reads, such as a stage's; the split's samples begin with `first`.
    """

    def __init__(
        self,
        split: Windows,
        *,
        window: int,
        batch: int,
        micro_batch: int,
        dp: int,
        dp_rank: int,
        sp: int,
        sp_rank: int,
        segment: int,
        seed: int,
        bos: int,
        reset: bool,
        repeat: bool = False,
        first: int = 0,
        end: int | None = None,
        prefetch: bool = True,
        pin: bool = False,
    ) -> None:
        """Check that all divides. Raises RecipeError where it does not, DataError for a split that is too short.

        `prefetch`: a thread reads the next step. `pin`: slices are in page-locked memory, which needs a GPU.
        """
        if not (0 <= dp_rank < dp and 0 <= sp_rank < sp):
            raise ValueError(f"rank ({dp_rank}, {sp_rank}) is not in a mesh of {dp} × {sp}")
        _check_divides("data.window", window, "segment", segment)
        _check_divides("segment", segment, "mesh.sp", sp)
        _check_divides("data.window", window, "the dataset's align", split.align)
        _check_divides("train.batch", batch, "mesh.dp × train.micro_batch", dp * micro_batch)
        if split.tokens < window and not repeat:
            fits = split.tokens // sp * sp
            raise DataError(
                f"{split.tokens // 1024:,} windows of 1,024 would fit, 0 of {window:,}: "
                f"split {split.name} has {split.tokens:,} tokens; longest window that fits: {fits:,}; "
                "data.repeat: true reads it again"
            )
        self.split, self.window, self.batch, self.micro_batch = split, window, batch, micro_batch
        self.dp, self.dp_rank, self.sp_rank, self.segment = dp, dp_rank, sp_rank, segment
        self.slice, self._first, self._end = segment // sp, first, end
        self.seed, self.bos, self.reset, self._pin = seed, bos, reset, pin
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch") if prefetch else None
        self._ahead: dict[int, Future[list[MicroBatch]]] = {}

    def window_starts(self, step: int) -> list[int]:
        """Places of the global batch's windows of a step."""
        return [self.split.window_start(self.window, self.seed, sample) for sample in self._samples(step)]

    def epochs_begun(self, step: int) -> dict[int, int]:
        """{source: epoch} by number, epochs from 2 on, of the sources whose tokens a step begins to read again."""
        begun = (self.split.begins(self.window, self.seed, sample) for sample in self._samples(step))
        return dict(filter(None, begun))

    def _samples(self, step: int) -> range:
        first = (step - self._first) * self.batch
        return range(first, first + self.batch)

    def read_step(self, step: int) -> list[MicroBatch]:
        """Read this rank's slices of a step: windows dp_rank, dp_rank + dp, …, `micro_batch` at a time."""
        starts = self.window_starts(step)[self.dp_rank :: self.dp]
        groups = range(0, len(starts), self.micro_batch)
        return [self._micro_batch(starts[i : i + self.micro_batch]) for i in groups]

    def step(self, step: int) -> list[MicroBatch]:
        """`read_step(step)`, normally read ahead, while a thread starts on the next; its errors are raised here."""
        if self._thread is None:
            return self.read_step(step)
        ahead = self._ahead.pop(step, None) or self._thread.submit(self.read_step, step)
        for other in self._ahead.values():
            other.cancel()
        last = step + 1 == self._end
        self._ahead = {} if last else {step + 1: self._thread.submit(self.read_step, step + 1)}
        return ahead.result()

    @cached_property
    def _held_out(self) -> Sequence[int]:
        return self.split.validation_starts(self.window)

    def validation_rounds(self, windows: int) -> int:
        """Number of calls of `validation_slices`, by every rank, that cover the first `windows` windows."""
        return -(-windows // (self.dp * self.micro_batch))

    def validation_slices(self, index: int, windows: int) -> MicroBatch:
        """Micro-batch `index` of the first `windows` windows, cut from the start of the split without shift or shuffle.

        Row j is window (index · micro_batch + j) · dp + dp_rank. Ranks left without a window get window 0 with every
        label IGNORED (only these have it): all ranks run the same number of times, and only real labels count.
        """
        rows = range(index * self.micro_batch, (index + 1) * self.micro_batch)
        numbers = [row * self.dp + self.dp_rank for row in rows]
        places = self._held_out
        slices = self._micro_batch([places[number] if number < windows else places[0] for number in numbers])
        filling = torch.tensor([number >= windows for number in numbers])
        return tuple(piece._replace(labels=piece.labels.masked_fill(filling[:, None], IGNORED)) for piece in slices)

    def close(self) -> None:
        """End the prefetch thread."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def _micro_batch(self, starts: list[int]) -> MicroBatch:
        offsets = range(self.sp_rank * self.slice, self.window, self.segment)
        return tuple(self._slice([start + offset for start in starts]) for offset in offsets)

    def _slice(self, starts: list[int]) -> Slice:
        rows = torch.stack([self.split.read(start, self.slice + 1) for start in starts])
        tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        doc_ids = (tokens == self.bos).cumsum(1, dtype=torch.int32) if self.reset else None
        found = Slice(tokens, labels, doc_ids)
        return found.pinned() if self._pin else found


def _check_divides(whole_key: str, whole: int, part_key: str, part: int) -> None:
    if part < 1 or whole < 1 or whole % part:
        near = sorted({max(part, 1) * max(1, whole // max(part, 1) + i) for i in (0, 1)})
        raise RecipeError(
            f"{whole_key}: {whole} is not a multiple of {part_key} = {part}; nearest: {', '.join(map(str, near))}"
        )
