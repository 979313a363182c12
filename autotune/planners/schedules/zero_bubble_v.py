"""ZB-V (Zero Bubble, 2401.10241, section 6): two chunks a rank in a V, no bubble at 1F1B's memory.

Rank r holds stages r and 2p-1-r, so the last stage is on the first rank and its backward starts there at once. Every
rank does 2p-1 forwards first, of which r are of the second chunk; with F = B = W no rank waits from its first start to
its last end, and each holds 2p activations of half a stage, as much as 1F1B's first rank. Stage traffic doubles.
"""

from __future__ import annotations

from autotune.planners.schedules.schedule import Order, Pipe, Schedule, Step, wave


class _Rank:
    """A rank's steps while they are made: each operation takes its micro-batches in order, chunk by chunk."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.stages = (rank, 2 * ranks - 1 - rank)
        self.steps: list[Step] = []
        self.next: dict[tuple[str, int], int] = {}

    def add(self, ops: str, chunk: int, times: int = 1) -> None:
        for op in ops * times:
            item = self.next.get((op, chunk), 0)
            self.next[op, chunk] = item + 1
            self.steps.append(Step(op, self.stages[chunk], item))


def _rank(rank: int, p: int, m: int) -> list[Step]:
    """m at least 2p-1."""
    made = _Rank(rank, p)
    made.add("F", 0, 2 * (p - rank) - 1)
    for _ in range(rank):
        made.add("F", 1)
        made.add("F", 0)
    made.add("FBW", 1, p - rank)
    for _ in range(m - made.next["F", 0]):
        made.add("FBW", 0)
        made.add("FBW", 1)
    for _ in range(m - made.next["F", 1]):
        made.add("BW", 0)
        made.add("FBW", 1)
    for _ in range(rank):  # the way back: the next ranks wait for B, and W is there to fill the time
        made.add("B", 0)
        made.add("B", 1)
    made.add("BW", 0, p - rank)
    for chunk in (1, 0):
        made.add("W", chunk, m - made.next.get(("W", chunk), 0))
    return made.steps


def order(pipe: Pipe) -> Order:
    """With fewer than 2p-1 micro-batches: that order, without those that are missing."""
    p, m = pipe.ranks, pipe.items
    whole = [_rank(rank, p, max(m, 2 * p - 1)) for rank in range(p)]
    return [[step for step in steps if step.item < m] for steps in whole]


def refuse(pipe: Pipe) -> str | None:
    return None if pipe.chunks == 2 else f"two chunks a rank (found {pipe.chunks}; nearest 2)"


def makespan(pipe: Pipe) -> float:
    """p-1 for the last rank's start, and more where too few micro-batches leave a wait for the way there and back."""
    p, m = pipe.ranks, pipe.items
    return 6.0 * m + max(p - 1, 4 * p - 2 - 2 * m)


def peak(pipe: Pipe) -> list[int]:
    p, m = pipe.ranks, pipe.items
    return [min(2 * m, 2 * p, m + rank + 1) for rank in range(p)]


SCHEDULE = Schedule(order, place=wave, refuse=refuse, makespan=makespan, peak=peak, splits=True, chunks=(2,))
