"""Stand-ins for `lasptrain.train.train`, each with its own way to end; run as a program, a launcher of them.

python -m tests.support.fake_train TARGET RECIPE NPROC [NODES NODE_RANK HOST:PORT [KEY=VALUE]…]
"""

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from lasptrain.errors import LaspError, NumericalError, Stopped
from lasptrain.process import signals
from lasptrain.recipe.loading import load
from lasptrain.recipe.schema import Recipe


def agree(recipe: Recipe, run: Path) -> None:
    """Every rank leaves a file of what it was given; rank 0 first waits for all."""
    total = torch.ones(1)
    dist.all_reduce(total)
    told = {"world": int(total), "dp": recipe.mesh.dp, "sp": recipe.mesh.sp, "vocab": recipe.model.vocab}
    (run / f"rank-{dist.get_rank()}.json").write_text(json.dumps(told | {"threads": os.environ["OMP_NUM_THREADS"]}))


def refuse(recipe: Recipe, run: Path) -> None:
    """The last rank stops with an error of ours; the others wait for it."""
    if dist.get_rank() == dist.get_world_size() - 1:
        raise NumericalError("step 3: loss nan; expected a number")
    dist.barrier()


def full(recipe: Recipe, run: Path) -> None:
    """As `refuse`, for want of room, of which there is none for the records of ranks either."""
    if dist.get_rank() == dist.get_world_size() - 1:
        (run / "ranks").rmdir()
        (run / "ranks").touch()
        raise OSError(errno.ENOSPC, "No space left on device", "metrics")
    dist.barrier()


def bug(recipe: Recipe, run: Path) -> None:
    """As `refuse`, with an error that is nobody's."""
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ZeroDivisionError("an accident")
    dist.barrier()


def die(recipe: Recipe, run: Path) -> None:
    """As `refuse`, by SIGKILL."""
    if dist.get_rank() == dist.get_world_size() - 1:
        (run / "fault").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def deaf(recipe: Recipe, run: Path) -> None:
    """As `die`, but the others do not notice and hear no signal, as if they waited inside NCCL."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.CODES)
    if dist.get_rank() == dist.get_world_size() - 1:
        die(recipe, run)
    time.sleep(600)


def die_in_nccl(recipe: Recipe, run: Path, meet: Callable[[Tensor], object] = dist.all_reduce) -> None:
    """As `die`, on GPUs: the others wait in a kernel for a rank that is gone."""
    x = torch.ones(1, device="cuda")
    meet(x)
    if dist.get_rank() == dist.get_world_size() - 1:
        die(recipe, run)
    meet(x)
    torch.cuda.synchronize()


def die_in_a_message(recipe: Recipe, run: Path) -> None:
    """As `die_in_nccl`, with two ranks that write into each other's memory."""
    die_in_nccl(recipe, run, trade)


def trade(x: Tensor) -> None:
    from lasptrain.parallel import mesh
    from lasptrain.parallel.p2p import between
    from lasptrain.parallel.p2p_symmetric import SymmetricP2P

    messages = between(mesh.world(), x.device, x.nbytes)
    assert isinstance(messages, SymmetricP2P)
    other = 1 - dist.get_rank()
    messages.send(x, other)()
    messages.recv(x, other)()


def die_once(recipe: Recipe, run: Path) -> None:
    """As `die` the first time, as `agree` the second time."""
    if not (run / "died").exists():
        dist.barrier()
        (run / "died").touch()
        die(recipe, run)
    agree(recipe, run)


def pause(recipe: Recipe, run: Path) -> None:
    """The last rank is stopped as by SIGSTOP, in its third segment of at most `launch.hang` seconds."""
    from lasptrain import train

    for segment in range(10**6):
        train.on_segment(recipe.launch.hang)
        if segment == 3 and dist.get_rank() == dist.get_world_size() - 1:
            (run / "fault").touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.01)


def pause_in_nccl(recipe: Recipe, run: Path, meet: Callable[[Tensor], object] = dist.all_reduce) -> None:
    """As `pause`, on GPUs: the others wait in a kernel for the one that is stopped."""
    from lasptrain import train

    x = torch.ones(1, device="cuda")
    meet(x)
    torch.cuda.synchronize()
    for segment in range(10**6):
        train.on_segment(recipe.launch.hang)
        if segment == 3 and dist.get_rank() == dist.get_world_size() - 1:
            (run / "fault").touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        meet(x)
        torch.cuda.synchronize()


def pause_in_a_message(recipe: Recipe, run: Path) -> None:
    """As `pause_in_nccl`, with two ranks that write into each other's memory."""
    pause_in_nccl(recipe, run, trade)


def heed(recipe: Recipe, run: Path) -> None:
    """Stops where training would, after a moment of saving."""
    from lasptrain import train

    with signals.deferred():
        (run / f"pid-{dist.get_rank()}").write_text(str(os.getpid()))
        try:
            while True:
                train.on_segment(recipe.launch.hang)
                time.sleep(0.01)
        except Stopped:
            (run / f"saving-{dist.get_rank()}").touch()
            time.sleep(recipe.train.steps)
            (run / f"saved-{dist.get_rank()}").touch()
            raise


def wait(recipe: Recipe, run: Path) -> None:
    """Says that it is there, and stays."""
    (run / f"pid-{dist.get_rank()}").write_text(str(os.getpid()))
    time.sleep(600)


def main() -> int:
    """Launches a target of this file; prints errors as the command line does."""
    from lasptrain.process.launcher import Nodes, launch
    from lasptrain.process.location import DEFAULT

    target, recipe, nproc, *rest = sys.argv[1:]
    nodes = Nodes(int(rest[0]), int(rest[1]), rest[2]) if len(rest) >= 3 else None
    overrides = rest[3:] if nodes else []
    restarts = int(os.environ.get("RESTARTS", "0"))
    try:
        return launch(
            load(recipe, overrides),
            DEFAULT,
            int(nproc) or None,
            nodes,
            f"tests.support.fake_train:{target}",
            max_restarts=restarts,
        )
    except LaspError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.code


if __name__ == "__main__":
    sys.exit(main())
