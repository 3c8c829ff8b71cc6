"""The errors lasptrain raises on purpose, and their exit codes:

    LaspError
        RecipeError          2
        DataError            3
        CheckpointError      4
        SetupError           5
        NumericalError       6
            ReplicasError    6
        RankLostError        7
        ResourceError        8
        ConvertError         9
        Stopped             75 STOPPED, or 130 INTERRUPTED by Ctrl-C

A second signal exits with 143 TERMINATED. Anything else is a bug and exits with 70 INTERNAL.

A message is one line: it names the key or the file, what was found, and what fits. Only RecipeError may hold
several lines, one per problem.
"""

from typing import ClassVar

INTERNAL = 70
STOPPED = 75  # by a signal, saved; submit it again unchanged
INTERRUPTED = 130  # by Ctrl-C, saved
TERMINATED = 143  # by a second signal, not saved


class LaspError(Exception):
    """An error that the person at the keyboard can act on. `code` is the process's exit code."""

    code: ClassVar[int] = INTERNAL


class RecipeError(LaspError):
    """The recipe or an option on the command line does not fit; one line per problem."""

    code: ClassVar[int] = 2


class DataError(LaspError):
    """The corpus, the tokenizer or a token shard is missing, unreadable or damaged."""

    code: ClassVar[int] = 3


class CheckpointError(LaspError):
    """A checkpoint is missing, damaged, or belongs to a different run."""

    code: ClassVar[int] = 4


class SetupError(LaspError):
    """The environment does not fit: devices, topology, packages, or a run folder that is in use."""

    code: ClassVar[int] = 5


class NumericalError(LaspError):
    """The loss or the gradients are no longer numbers that can be trained on."""

    code: ClassVar[int] = 6


class ReplicasError(NumericalError):
    """Ranks that should hold the same parameters do not, so none of them may be saved."""


class RankLostError(LaspError):
    """Another rank died or stopped answering; never the cause, only the consequence."""

    code: ClassVar[int] = 7


class ResourceError(LaspError):
    """Memory or disk space ran out."""

    code: ClassVar[int] = 8


class Stopped(LaspError):
    """A signal has ended the run, with nothing left unsaved: code STOPPED, or INTERRUPTED by Ctrl-C."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code  # type: ignore[misc]  # of the signal, not of the class


class ConvertError(LaspError):
    """A model cannot be expressed in another format, or what was written does not compute the same."""

    code: ClassVar[int] = 9
