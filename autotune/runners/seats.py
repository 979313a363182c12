"""Where the ranks of a world sit: which device of which host each computes on, and whether two share one.

Counting devices does not tell: a task that Slurm gave one GPU of eight sees a single device, as does each of eight
processes on a host that has only one. So every rank says where it sits, and all of them draw the same conclusion.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Collection
from dataclasses import astuple, dataclass
from typing import Protocol

import torch
import torch.distributed as dist


class Store(Protocol):
    """What is used of a torch.distributed store; `get` waits until the key is there."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...


@dataclass(frozen=True)
class Seat:
    host: str
    device: str  # the device's own identity, which no mask of visible devices changes


def seat_here(device: torch.device) -> Seat:
    """The seat of a rank that computes on `device`, a GPU that this process sees."""
    return Seat(socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid))


def exchange(store: Store, rank: int, world: int, seat: Seat) -> tuple[Seat, ...]:
    """Every rank's seat, in rank order: each rank writes its own into `store` and waits for the others'.

    Raises torch.distributed.DistStoreError where a rank has not written within the store's timeout.
    """
    store.set(f"seat/{rank}", json.dumps(astuple(seat)))
    return tuple(Seat(*json.loads(store.get(f"seat/{other}"))) for other in range(world))


def backend_for(seats: Collection[Seat]) -> str:
    """What joins the ranks on these GPUs: NCCL for CUDA tensors and gloo for the host's; gloo alone where two ranks
    share a device, which NCCL refuses: messages then go through the host, for correctness and not for speed."""
    return "cuda:nccl,cpu:gloo" if len(set(seats)) == len(seats) else "gloo"


def hosts() -> tuple[tuple[int, ...], ...]:
    """The ranks of each host, in the order of their first ranks: every rank of the world asks at the same time."""
    names: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    return tuple(tuple(r for r, name in enumerate(names) if name == host) for host in dict.fromkeys(names))
