"""The world that torchrun or Slurm started this process in: its place there, and where all of them meet."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

PORTS = range(20000, 30000)  # where Slurm jobs meet, by their id: below the ports that systems hand out


@dataclass(frozen=True)
class World:
    """One process's place: ranks count over all nodes, local ones on its own."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int

    @property
    def variables(self) -> dict[str, str]:
        """The environment that torch.distributed reads."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def slurm_world(environ: Mapping[str, str]) -> World | None:
    """The place of a task that `srun` started among several, else None (https://slurm.schedmd.com/srun.html, output
    environment variables).

    A batch script outside of `srun` has the job's variables too, but no step's, and is alone. MASTER_ADDR and
    MASTER_PORT, where given, are kept; else tasks meet on the first node, at a port that follows from the job's id.
    """
    if "SLURM_PROCID" not in environ or ("SLURM_JOB_ID" in environ and "SLURM_STEP_ID" not in environ):
        return None
    size = int(environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or 1)
    if size < 2:
        return None
    rank = int(environ["SLURM_PROCID"])
    nodes = next((environ[key] for key in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
                  if environ.get(key)), "127.0.0.1")  # fmt: skip
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or str(size)
    node = int(environ.get("SLURM_NODEID", "0"))
    per_node = expand_counts(tasks)
    job = int(environ.get("SLURM_JOB_ID", "0")) * 8 + int(environ.get("SLURM_STEP_ID", "0"))
    return World(
        rank,
        size,
        int(environ.get("SLURM_LOCALID", rank)),
        per_node[node] if node < len(per_node) else size,
        environ.get("MASTER_ADDR") or first_host(nodes),
        int(environ.get("MASTER_PORT") or PORTS[job % len(PORTS)]),
    )


def world_here() -> tuple[int, int] | None:
    """(rank, world size) when torchrun or Slurm started this process as one of several, else None.

    Slurm's variables are then handed on under the names that torch.distributed reads.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    world = slurm_world(os.environ)
    if world is None:
        return None
    os.environ |= world.variables
    return world.rank, world.size


def first_host(nodes: str) -> str:
    """The first name of a Slurm host list: `gpu[07-09,12]-ib,other` gives gpu07-ib."""
    found = re.match(r"([^,\[]*)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else nodes


def expand_counts(text: str) -> list[int]:
    """Tasks of each node: `2(x3),1` gives [2, 2, 2, 1]."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts
