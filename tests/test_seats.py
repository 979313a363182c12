"""Which backend joins ranks on GPUs: all ranks learn where the others sit, and whether two of them share a device."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from autotune.runners.seats import Seat, backend_for, exchange

BOTH = "cuda:nccl,cpu:gloo"
A, B = "GPU-0a", "GPU-0b"
WORLD = 4


@pytest.mark.parametrize(
    ("seats", "backend"),
    [
        ((Seat("n1", A),), BOTH),
        ((Seat("n1", A), Seat("n1", B)), BOTH),
        ((Seat("n1", A), Seat("n2", A)), BOTH),  # an identity that only its host tells apart
        ((Seat("n1", A), Seat("n1", A)), "gloo"),
        ((Seat("n1", A), Seat("n2", B), Seat("n2", A), Seat("n1", A)), "gloo"),  # not neighbours in rank order
    ],
)
def test_gloo_joins_only_ranks_that_share_a_device(seats: tuple[Seat, ...], backend: str) -> None:
    assert backend_for(seats) == backend


def stores(kind: str) -> list[dist.Store]:
    """A store of each rank: one in this process, or clients of one server."""
    wait = timedelta(seconds=20)
    if kind == "hash":
        return [dist.HashStore()] * WORLD
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=wait)
    clients = [dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=wait) for _ in range(WORLD - 1)]
    return [server, *clients]


@pytest.mark.parametrize("kind", ["hash", "tcp"])
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_every_rank_learns_every_seat(kind: str, devices: int) -> None:
    """Two ranks a host, each of which sees one device alone: what they agree on depends on whose device it is."""
    seats = [Seat(f"node-{rank // 2}", f"GPU-{rank % devices}") for rank in range(WORLD)]
    meeting = stores(kind)  # the server lives as long as its last client reads
    with ThreadPoolExecutor(WORLD) as threads:
        told = list(threads.map(exchange, meeting, range(WORLD), [WORLD] * WORLD, seats))
    assert told == [tuple(seats)] * WORLD
    assert {backend_for(each) for each in told} == {"gloo" if devices == 1 else BOTH}


def test_a_rank_that_never_says_where_it_sits_ends_the_wait() -> None:
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=0.2))
    with pytest.raises(dist.DistStoreError):
        exchange(store, 0, 2, Seat("n1", A))
