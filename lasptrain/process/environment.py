"""Ranks that torchrun or Slurm has started."""

import os
import re

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def joined_ranks() -> dict[str, str] | None:
    """Return this rank's variables as torchrun names them, from torchrun or Slurm; None if neither started ranks."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return {"LOCAL_RANK": env["RANK"], **{key: value for key, value in env.items() if key in _TORCHRUN}}
    tasks = env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1"))
    if "SLURM_PROCID" not in env or tasks == "1":
        return None
    hosts = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": env.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": env.get("MASTER_ADDR", first_host(hosts)),
        "MASTER_PORT": env.get("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000)),
    }


def first_host(hosts: str) -> str:
    """Return the first host of a Slurm list: `node[07-12,20],login` gives node07."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)", hosts)
    return "".join(part or "" for part in match.groups()) if match else hosts
