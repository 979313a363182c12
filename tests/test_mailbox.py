"""Messages through mapped memory: order, slots and signals, with threads for ranks and the host's memory for GPUs'."""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from autotune.kernels.mailbox import SLOTS, Mailboxes, Route, layout


@dataclass
class Host:
    """What torch's symmetric memory gives to all ranks: a slab each, and signals that hold one word at most."""

    slabs: list[Tensor]
    signals: dict[tuple[int, int, int], threading.Semaphore] = field(
        default_factory=lambda: defaultdict(lambda: threading.Semaphore(0))
    )
    raised: dict[tuple[int, int, int], int] = field(default_factory=lambda: defaultdict(int))


@dataclass
class Memory:
    """One rank's handle."""

    host: Host
    rank: int

    def get_buffer(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype, begin: int) -> Tensor:
        return self.host.slabs[rank][begin : begin + shape[0]]

    def put_signal(self, to: int, channel: int, timeout: int) -> None:
        key = (self.rank, to, channel)
        self.host.raised[key] += 1
        assert self.host.raised[key] == 1, "a signal was raised that had not been lowered"
        self.host.signals[key].release()

    def wait_signal(self, by: int, channel: int, timeout: int) -> None:
        key = (by, self.rank, channel)
        assert self.host.signals[key].acquire(timeout=20), "nobody raised the signal"
        self.host.raised[key] -= 1


def ends(routes: dict[str, Route], rank: int, host: Host) -> Mailboxes:
    places, _, _ = layout(routes)
    boxes = Mailboxes(rank, routes, places, Memory(host, rank))
    boxes.attach()
    return boxes


ROUTES = {
    "up.x": Route(0, 1, 1000),
    "down.d": Route(1, 0, 1000),
    "down.x": Route(1, 0, 24),
    "on": Route(1, 2, 513),
    "back": Route(2, 0, 2048),
}


def test_routes_share_neither_memory_nor_signals() -> None:
    places, size, signals = layout(ROUTES)
    for rank in range(3):
        spans = sorted((p.begin, p.begin + SLOTS * p.stride) for n, p in places.items() if ROUTES[n].target == rank)
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
        assert all(end <= size for _, end in spans)
    assert all(places[n].stride >= r.size for n, r in ROUTES.items())
    between = [places[n].signal for n, r in ROUTES.items() if {r.source, r.target} == {0, 1}]
    assert sorted(between) == [0, 2 * SLOTS, 4 * SLOTS]
    assert signals == 6 * SLOTS


@pytest.mark.parametrize("seed", range(4))
def test_messages_arrive_whole_and_in_order(seed: int) -> None:
    """Every route carries its messages while others wait: the sender runs ahead of the receiver by its slots alone."""
    draw = random.Random(seed)
    _, size, _ = layout(ROUTES)
    host = Host([torch.zeros(size, dtype=torch.uint8) for _ in range(3)])
    sent = {
        name: [torch.randn(draw.randint(1, route.size // 8), dtype=torch.float64) for _ in range(9)]
        for name, route in ROUTES.items()
    }
    boxes = [ends(ROUTES, rank, host) for rank in range(3)]  # streams of one rank would share its counters too
    works: list[Callable[[], Any]] = []
    for name, route in ROUTES.items():
        works.append(lambda n=name, r=route: [boxes[r.source].send(n, m) for m in sent[n]])  # type: ignore[misc]
        works.append(
            lambda n=name, r=route: [boxes[r.target].receive(n, torch.empty_like(m)) for m in sent[n]]  # type: ignore[misc]
        )
    draw.shuffle(works)
    with ThreadPoolExecutor(len(works)) as pool:
        results = [f.result(timeout=60) for f in [pool.submit(w) for w in works]]
    got = [r for r in results if isinstance(r[0], Tensor)]
    assert len(got) == len(ROUTES)
    for name in ROUTES:
        assert any(all(map(torch.equal, r, sent[name])) for r in got)


def test_a_message_larger_than_its_slot_is_refused() -> None:
    host = Host([torch.zeros(layout(ROUTES)[1], dtype=torch.uint8) for _ in range(3)])
    with pytest.raises(RuntimeError, match="size"):
        ends(ROUTES, 1, host).send("down.x", torch.zeros(1024))
