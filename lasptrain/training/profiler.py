"""Profile of one step, for a person to look at: a trace of all operators and, on a GPU, every allocation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

EVENTS = 200_000  # allocations that a snapshot remembers


@contextmanager
def profiled(folder: Path, step: int, device: torch.device) -> Iterator[None]:
    """Run the body under PyTorch's profiler; write folder/step-N.json.gz, for https://ui.perfetto.dev, and on a GPU
    folder/step-N.pickle, for https://docs.pytorch.org/memory_viz.
    """
    folder.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU]
    cuda = device.type == "cuda"
    if cuda:
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.memory._record_memory_history(max_entries=EVENTS)
    try:
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:
            yield
        profile.export_chrome_trace(str(folder / f"step-{step}.json.gz"))
        if cuda:
            torch.cuda.memory._dump_snapshot(str(folder / f"step-{step}.pickle"))
    finally:
        if cuda:
            torch.cuda.memory._record_memory_history(enabled=None)
