"""Counting a step's memory: what a hidden free does to the count, and messages that are let go of when they land."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest
import torch

from autotune.runners.flying import Flying
from autotune.runners.memory import most_alive, peak_during


@pytest.mark.parametrize(
    ("events", "peak"),
    [
        ([], 0),
        ([(0, 8), (8, 8), (0, -8), (16, 4)], 16),
        ([(0, 8), (0, -8), (0, 8), (0, -8)], 8),
        # A free that nobody saw: its memory is handed out again, whole, in part, or as a part of something larger.
        ([(0, 8), (0, 8), (0, -8)], 8),
        ([(0, 8), (4, 2), (100, 5)], 8),
        ([(0, 4), (4, 4), (0, 8), (100, 5)], 13),
        # What was there before the count began is given back.
        ([(50, -30), (0, 8)], 0),
    ],
)
def test_most_alive(events: list[tuple[int, int]], peak: int) -> None:
    assert most_alive(events) == peak


def test_a_step_is_counted_on_top_of_what_it_holds() -> None:
    kept = torch.zeros(1 << 18)

    def step() -> None:
        a = kept + 1
        b = a + 1
        del a
        (b + 1).sum()

    with torch.no_grad():
        peak = peak_during(step, {"kept": kept}, torch.device("cpu"))
    assert 3 * kept.nbytes <= peak <= 3 * kept.nbytes + 64


class Gate:
    """A handle that ends when it is told to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.open = threading.Event()
        self.error = error

    def wait(self) -> None:
        self.open.wait(20)
        if self.error:
            raise self.error


def settle(flying: Flying, waited: dict[int, float], count: int) -> None:
    """Drops until `count` messages are left."""
    deadline = time.monotonic() + 20
    while len(flying.messages) != count and time.monotonic() < deadline:
        flying.drop(waited)
        time.sleep(0.001)


def test_a_message_is_let_go_of_when_it_lands_and_not_before() -> None:
    flying, first, second, waited = Flying(), Gate(), Gate(), dict[int, float]()
    tensors = [torch.zeros(4), torch.zeros(4)]
    alive = [weakref.ref(t) for t in tensors]
    for position, (gate, tensor) in enumerate(zip((first, second), tensors, strict=True)):
        flying.keep(gate, position, tensor)
    tensors.clear()
    del tensor
    flying.drop(waited)
    assert not waited and all(ref() is not None for ref in alive)
    begin = time.perf_counter()
    first.open.set()
    settle(flying, waited, 1)
    gc.collect()
    assert alive[0]() is None and alive[1]() is not None
    assert list(waited) == [0] and begin <= waited[0] <= time.perf_counter()
    second.open.set()
    flying.drop(waited, all_of_them=True)
    gc.collect()
    assert alive[1]() is None and sorted(waited) == [0, 1] and not flying.messages


def test_a_message_that_fails_is_told() -> None:
    flying, gate = Flying(), Gate(RuntimeError("the peer is gone"))
    flying.keep(gate, 3, torch.zeros(1))
    gate.open.set()
    with pytest.raises(RuntimeError, match="the peer is gone"):
        flying.drop({}, all_of_them=True)


def test_its_thread_ends_with_it() -> None:
    flying, gate = Flying(), Gate()
    gate.open.set()
    before = set(threading.enumerate())
    flying.keep(gate, 0, None)
    (thread,) = set(threading.enumerate()) - before
    del flying
    thread.join(10)
    assert not thread.is_alive()
