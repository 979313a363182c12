"""Messages between GPUs of one host through mapped memory: copy engines move them, and no thread block waits.

A send or receive of NCCL that waits for its peer keeps thread blocks from compute: with all of its blocks a pipeline's
step took 15 % longer, with two of them a message of 16 MiB takes 0.5 ms instead of 0.07. Here the sender copies into a
slot of the receiver's memory and raises a signal, the receiver copies out and lowers it; one warp of a stream waits.
Two slots a route, so that a message may land while the one before is copied out. Memory and signals are those of
`torch.distributed._symmetric_memory`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

SLOTS = 2
ALIGNMENT = 512  # bytes
TIMEOUT_MS = 600_000  # then the waiting stream fails, as a collective does
SIGNAL_BYTES = 4


class Route(NamedTuple):
    """From one rank of a group to another, messages of at most `size` bytes, in order."""

    source: int
    target: int
    size: int


class Place(NamedTuple):
    """Where a route's slots begin in its target's memory, how far apart they are, and its first signal."""

    begin: int
    stride: int
    signal: int


def layout(routes: Mapping[Any, Route]) -> tuple[dict[Any, Place], int, int]:
    """(places, bytes that every rank maps, signals of the two ranks that have most). The same on every rank."""
    filled, signals, places = Counter[int](), Counter[frozenset[int]](), dict[Any, Place]()
    for name, route in routes.items():
        stride, pair = -(-route.size // ALIGNMENT) * ALIGNMENT, frozenset(route[:2])
        places[name] = Place(filled[route.target], stride, signals[pair])
        filled[route.target] += SLOTS * stride
        signals[pair] += 2 * SLOTS  # of each slot: full, and empty again
    return places, max(filled.values(), default=0), max(signals.values(), default=0)


@dataclass
class Mailboxes:
    """This rank's ends of all routes. `send` and `receive` put their work on the current stream and return."""

    rank: int
    routes: Mapping[Any, Route]
    places: Mapping[Any, Place]
    memory: Any  # torch's handle of all ranks' mapped memory
    slots: dict[Any, tuple[Tensor, ...]] = field(default_factory=dict)  # uint8, of routes that begin or end here
    passed: Counter[Any] = field(default_factory=Counter)  # messages of each route so far

    @classmethod
    def open(cls, routes: Mapping[Any, Route], group: Any, device: torch.device) -> Mailboxes | None:
        """All ranks of the group call it, with the same routes; None, on all of them, where memory cannot be mapped."""
        places, size, signals = layout(routes)
        found = mapped_memory(max(size, ALIGNMENT), group, device, signals)
        if found is None:
            return None
        boxes = cls(dist.get_rank(group), routes, places, found[1])
        boxes.attach()
        return boxes

    def attach(self) -> None:
        """Views of the slots of every route that begins or ends here."""
        for name, route in self.routes.items():
            if self.rank in route[:2]:
                begin, stride, _ = self.places[name]
                whole = self.memory.get_buffer(route.target, (SLOTS * stride,), torch.uint8, begin)
                self.slots[name] = whole.split(stride)

    def send(self, name: Any, tensor: Tensor) -> None:
        """Copies the tensor into the peer's next slot, once that is empty."""
        route, at, full, empty = self._next(name)
        if self.passed[name] > SLOTS:
            self.memory.wait_signal(route.target, empty, TIMEOUT_MS)
        part = _bytes(tensor)
        self.slots[name][at][: len(part)].copy_(part)
        self.memory.put_signal(route.target, full, TIMEOUT_MS)

    def receive(self, name: Any, into: Tensor) -> Tensor:
        """Copies the next message out of its slot, once it is there; `into` is contiguous and of the message's size."""
        route, at, full, empty = self._next(name)
        self.memory.wait_signal(route.source, full, TIMEOUT_MS)
        part = _bytes(into)
        part.copy_(self.slots[name][at][: len(part)])
        self.memory.put_signal(route.source, empty, TIMEOUT_MS)
        return into

    def _next(self, name: Any) -> tuple[Route, int, int, int]:
        at = self.passed[name] % SLOTS
        self.passed[name] += 1
        signal = self.places[name].signal + 2 * at
        return self.routes[name], at, signal, signal + 1


def mapped_memory(size: int, group: Any, device: torch.device, signals: int = 0) -> tuple[Tensor, Any] | None:
    """(this rank's, uint8 [size], torch's handle of all ranks'), with so many signals for any two of them. All ranks of
    the group call it, with the same sizes; None, on all of them, where memory cannot be mapped."""
    from torch.distributed import _symmetric_memory as symmetric

    if not _all(group, device, _reachable(group, device)):
        return None
    slab, memory = None, None
    try:
        slab = symmetric.empty(size, dtype=torch.uint8, device=device)
        memory = symmetric.rendezvous(slab, group=group)
    except RuntimeError:  # no peer access after all, or handles that may not be passed on in this container
        pass
    fits = memory is not None and signals <= memory.signal_pad_size // SIGNAL_BYTES // dist.get_world_size(group)
    if slab is None or not _all(group, device, fits):
        return None
    return slab, memory


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _reachable(group: Any, device: torch.device) -> bool:
    """Whether this process sees every rank's device, in the ranks' order, and its own may read and write them all."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    first = (device.index or 0) - rank
    others = [first + other for other in range(size) if other != rank]
    if first < 0 or first + size > torch.cuda.device_count():
        return False
    return all(torch.cuda.can_device_access_peer(device, other) for other in others)


def _all(group: Any, device: torch.device, yes: bool) -> bool:
    word = torch.tensor(int(yes), device=device)
    dist.all_reduce(word, dist.ReduceOp.MIN, group=group)
    return bool(word.item())
