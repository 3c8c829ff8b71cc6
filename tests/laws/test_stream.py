"""A window in many segments leaves nothing behind and keeps nothing but states."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from lasptrain.data.loader import Slice
from lasptrain.models.language_model import LanguageModel, initial_values
from lasptrain.parallel.host import unread
from lasptrain.parallel.recurrence import SavedStates, ShardedRecurrence
from lasptrain.parallel.shard import fill
from lasptrain.training.segments import backward, keep_states
from tests.laws.test_layouts import CPU, config


def pieces(segments: int, length: int = 16) -> list[Slice]:
    tokens = torch.randint(1, 61, (1, segments * length + 1), generator=torch.Generator().manual_seed(0))
    starts = range(0, segments * length, length)
    return [Slice(tokens[:, i : i + length], tokens[:, i + 1 : i + length + 1], None) for i in starts]


def model() -> LanguageModel:
    made = LanguageModel(config("tnl"), 256, ShardedRecurrence("chunked"))
    fill(made, initial_values(made, 0, CPU))
    return made


def test_a_step_leaves_no_states_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[SavedStates]] = []

    class Watched(SavedStates):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(weakref.ref(self))

    trained = model()
    backward(trained, 3, pieces(2), 1.0)  # what is imported on first use may hold on to frames
    monkeypatch.setattr("lasptrain.training.segments.SavedStates", Watched)
    gc.collect()
    gc.disable()
    try:
        backward(trained, 3, pieces(6), 1.0)
        assert len(made) == 18 and not any(memory() for memory in made)
    finally:
        gc.enable()


def saved_bytes(segments: int) -> tuple[int, int]:
    """The most bytes that autograd kept at one time, and the bytes of kept states, for a window of so many segments."""
    alive: dict[int, int] = {}
    most = 0

    class Kept:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal most
            self.tensor = tensor
            alive[id(self)] = tensor.numel() * tensor.element_size()
            most = max(most, sum(alive.values()))

        def __del__(self) -> None:
            alive.pop(id(self), None)

    trained = model()
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        backward(trained, 3, pieces(segments), 1.0)
    kept, _ = keep_states(trained, 3, pieces(segments)[:-1])
    states = [m.initial_state for saved in kept for m in saved if m.initial_state is not None]
    assert not any(m.final_state is not None for saved in kept for m in saved)
    return most, sum(s.numel() * s.element_size() for s in states)


def test_memory_is_flat_but_for_the_kept_states() -> None:
    (few, few_states), (many, many_states) = saved_bytes(8), saved_bytes(32)
    assert many == few
    assert many_states == few_states // 6 * 30  # the first segment of all starts from zero


def test_a_placeholder_is_nan_of_one_element_and_no_view() -> None:
    x = unread((2, 3, 4), torch.zeros(1, dtype=torch.float64), torch.float32)
    assert x.isnan().all() and x.shape == (2, 3, 4) and x.dtype == torch.float32
    assert x.untyped_storage().nbytes() == 4 and not x._is_view()  # FSDP warns of modules that return views
