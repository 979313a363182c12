"""Hanayo (Liu et al., 2308.15762): stages in waves over the ranks, which shrinks the bubble without a second copy.

W waves are 2 W chunks a rank, S = 2 P W stages that go down the ranks and up again; where they turn, one rank holds two
neighbouring stages and hands over without a message. Bubble of P micro-batches: about (2P - 2) / (3PW + P - 1).

The order comes from list scheduling at unit cost, BW twice as long as F: once with each of two priorities, and the
shorter order stays. A micro-batch enters when its activations fit beside all that those inside may still need, so no
rank exceeds the limit or waits for room: `pipe.limit` chunk activations, by default 3/2 of the P v of one full wave.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush

from autotune.planners.schedules.schedule import Order, Pipe, Schedule, Step, wave

# (way, item, S, m) -> the ready step with less runs first. A way is 0 to S - 1 for F, S to 2S - 1 for BW.
Priority = Callable[[int, int, int, int], int]


def _oldest(way: int, item: int, stages: int, items: int) -> int:
    """Backwards first; among them, and among forwards, the oldest micro-batch, and of its steps the furthest."""
    return ((way < stages) * items + item) * 2 * stages + 2 * stages - 1 - way


def _deepest(way: int, item: int, stages: int, items: int) -> int:
    """Forwards first, the deepest stage first; of backwards that with the longest way to go."""
    return (stages - 1 - way if way < stages else way) * items + item


def limit(pipe: Pipe) -> int:
    """Chunk activations that no rank exceeds."""
    return pipe.limit or 3 * pipe.ranks * pipe.chunks // 2


def order(pipe: Pipe) -> Order:
    return min((_listed(pipe, priority) for priority in (_deepest, _oldest)), key=lambda made: made[0])[1]


def _listed(pipe: Pipe, priority: Priority) -> tuple[int, Order]:
    """(makespan, order): in every slot, each idle rank takes the ready step of least priority."""
    stages, items, chunks = pipe.stages, pipe.items, pipe.chunks
    homes = [ranks[0] for ranks in wave(pipe)]
    homes += homes[::-1]  # [way] -> rank
    steps = 2 * stages * items
    ready: list[list[int]] = [[] for _ in range(pipe.ranks)]  # heaps of priority * steps + way * items + item
    free = [0] * pipe.ranks  # [rank] -> the slot from which it is idle
    needed = [0] * pipe.ranks  # [rank] -> chunk activations held or still to come of the micro-batches inside
    most = limit(pipe) - chunks
    done: list[list[int]] = [[] for _ in range(4)]  # [slot mod 4] -> ways and items of steps that end there
    lists: Order = [[] for _ in range(pipe.ranks)]
    inside = slot = 0
    left = steps
    while left or any(done):
        for number in done[slot % 4]:
            way, item = divmod(number, items)
            if way >= stages:
                needed[homes[way]] -= 1
            if way < 2 * stages - 1:
                following = priority(way + 1, item, stages, items) * steps + number + items
                heappush(ready[homes[way + 1]], following)
        done[slot % 4] = []
        while inside < items and max(needed) <= most:
            heappush(ready[0], priority(0, inside, stages, items) * steps + inside)
            needed = [count + chunks for count in needed]
            inside += 1
        for rank, heap in enumerate(ready):
            if heap and free[rank] <= slot:
                number = heappop(heap) % steps
                way, item = divmod(number, items)
                backward = way >= stages
                lists[rank].append(Step("BW", 2 * stages - 1 - way, item) if backward else Step("F", way, item))
                free[rank] = slot + 1 + backward
                done[free[rank] % 4].append(number)
                left -= 1
        slot += 1
    return max(free), lists


def refuse(pipe: Pipe) -> str | None:
    ranks, chunks = pipe.ranks, pipe.chunks
    if ranks < 2:
        return f"at least two pipeline ranks (found {ranks}; nearest 2)"
    if chunks % 2:
        return f"an even number of chunks, two a wave (found {chunks}; nearest {chunks + 1})"
    if 0 < pipe.limit < chunks:
        return f"a limit that holds one micro-batch, {chunks} chunk activations (found {pipe.limit}; nearest {chunks})"
    return None


SCHEDULE = Schedule(  # no closed forms: the order is searched
    order,
    place=wave,
    refuse=refuse,
    chunks=(2, 4),
    limits=lambda pipe: (pipe.ranks * pipe.chunks, 0),
)
