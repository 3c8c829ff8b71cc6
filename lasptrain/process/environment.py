"""Ranks that torchrun or Slurm has started."""

import os
import re

from lasptrain.errors import SetupError

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_NO_STEP = 1 << 31  # Slurm's numbers from here on are of batch scripts and shells, which are no steps


def joined_ranks(alone: bool = False) -> dict[str, str] | None:
    """Return this rank's variables as torchrun names them, from torchrun or Slurm; None if neither started ranks.

    `alone`: ranks are started here whatever Slurm says. Raises SetupError for variables of torchrun that are not all
    there or do not fit, and inside an allocation of several tasks or machines that is no step of srun.
    """
    return _of_torchrun() or (None if alone else _of_slurm())


def _of_torchrun() -> dict[str, str] | None:
    found = {name: os.environ[name] for name in _TORCHRUN if name in os.environ}
    left_over = [name for name in ("RANK", "WORLD_SIZE") if name in found]
    if not left_over:
        return None
    told = ", ".join(f"{name}={found[name]}" for name in left_over)
    fits = f"expected all five as torchrun sets them, or none: unset {' '.join(left_over)}"
    if missing := [name for name in _TORCHRUN if name not in found]:
        raise SetupError(f"{told}: found in the environment without {', '.join(missing)}; {fits}")
    numbers = [found[name] for name in _TORCHRUN if name != "MASTER_ADDR"]
    if not all(number.isdecimal() for number in numbers) or int(found["RANK"]) >= int(found["WORLD_SIZE"]):
        raise SetupError(f"{', '.join(f'{name}={value}' for name, value in found.items())}: no rank of a job; {fits}")
    return found


def _of_slurm() -> dict[str, str] | None:
    env = os.environ
    step = env.get("SLURM_STEP_ID", "")
    if not (step.isdecimal() and int(step) < _NO_STEP and "SLURM_PROCID" in env):
        _refuse_allocation()
        return None
    tasks = env.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks == "1":
        return None
    hosts = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    port = 20000 + (int(env.get("SLURM_JOB_ID", "0")) + 7919 * int(step)) % 20000
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": env.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": env.get("MASTER_ADDR", first_host(hosts)),
        "MASTER_PORT": env.get("MASTER_PORT", str(port)),
    }


def _refuse_allocation() -> None:
    """Raise SetupError inside an allocation of several tasks or machines: this process would be alone in it."""
    if "SLURM_JOB_ID" not in os.environ:
        return
    several = [name for name in ("SLURM_NTASKS", "SLURM_JOB_NUM_NODES") if os.environ.get(name, "1") != "1"]
    if several:
        found = ", ".join(f"{name}={os.environ[name]}" for name in several)
        raise SetupError(
            f"{found}: found without SLURM_STEP_ID, so no srun has started this process; expected srun lasptrain "
            "pretrain …, for a rank per task, or --nproc N, for N ranks on this machine alone"
        )


def first_host(hosts: str) -> str:
    """Return the first host of a Slurm list: `node[07-12,20],login` gives node07."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)", hosts)
    return "".join(part or "" for part in match.groups()) if match else hosts
