"""Votes, by which one rank's error becomes the same error on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from lasptrain.errors import CheckpointError
from lasptrain.parallel.collectives import all_gather_object

T = TypeVar("T")
Group = dist.ProcessGroup | None  # None: all ranks


def vote(what: str, action: Callable[[], T], group: Group) -> list[T]:
    """Run `action` on every rank and return all results by rank, or raise the same CheckpointError on every rank."""
    ballot: tuple[dict[int, str], T | None]
    try:
        ballot = {}, action()
    except CheckpointException as error:  # DCP has gathered it: every rank has the errors of all
        ballot = {rank: reason_of(cause) for rank, (cause, _) in error.failures.items()}, None
    except Exception as error:
        ballot = {dist.get_rank(group): reason_of(error)}, None
    ballots: list[Any] = all_gather_object(ballot, group)
    ranks: dict[str, set[int]] = {}
    for reasons, _ in ballots:
        for rank, reason in reasons.items():
            ranks.setdefault(reason, set()).add(rank)
    if ranks:
        lines = (f"rank {', '.join(map(str, sorted(who)))}: {reason}" for reason, who in ranks.items())
        raise CheckpointError(f"{what}: {'; '.join(lines)}")
    return [value for _, value in ballots]


def vote_of_first(what: str, action: Callable[[], T], group: Group) -> T:
    """Run `action` on rank 0 alone and return its result on every rank, or raise as `vote` does."""
    return cast("T", vote(what, lambda: action() if dist.get_rank(group) == 0 else None, group)[0])


def reason_of(error: BaseException) -> str:
    """Return an error in the words of a message, without its class where it is plain without."""
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"
