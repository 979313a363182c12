"""ZB-H1 and ZB-H2 (Zero Bubble, 2401.10241, section 2): 1F1B whose weight gradients fill the bubble.

The backward of a stage is two steps: B, which the stage before waits for, and W, which nothing waits for. Rank s puts
off its first s (H1) or 2s (H2) weight gradients and does them where 1F1B would wait. Against 1F1B's bubble of
(p-1)(F+B+W), the longest span of a rank has one of (p-1)(F+B-W) with H1 and of (p-1)(F+B-2W) with H2: none at unit
cost. The whole makespan keeps p-1 with both, as the last rank starts p-1 later. H1 holds p activations on every rank,
as 1F1B does on its first; H2 holds 2p-1. With fewer micro-batches than that the orders are right but fill less.
"""

from __future__ import annotations

from autotune.planners.schedules.schedule import Order, Pipe, Schedule, Step


def _rank(rank: int, items: int, warm: int, behind: int, one_each: bool) -> list[Step]:
    """A rank's steps: `warm` forwards first, then W no more than `behind` micro-batches behind B.

    `one_each`: once the forwards are over every B has its W, however few are behind.
    """
    steps = [Step("F", rank, item) for item in range(min(warm, items))]
    forwards, weights = len(steps), 0
    for item in range(items):
        steps.append(Step("B", rank, item))
        if item + 1 - weights > behind or (one_each and forwards == items):
            steps.append(Step("W", rank, weights))
            weights += 1
        if forwards < items:
            steps.append(Step("F", rank, forwards))
            forwards += 1
    return steps + [Step("W", rank, item) for item in range(weights, items)]


def h1(pipe: Pipe) -> Order:
    return [_rank(rank, pipe.items, pipe.ranks - rank, rank, False) for rank in range(pipe.ranks)]


def h2(pipe: Pipe) -> Order:
    p = pipe.ranks
    return [_rank(rank, pipe.items, 2 * (p - rank) - 1, 2 * rank, True) for rank in range(p)]


def makespan(pipe: Pipe) -> float:
    """Of both: p-1, and one more for each micro-batch short of p, as F and B alone then fill the way there and back."""
    p, m = pipe.ranks, pipe.items
    return 3.0 * m + max(p - 1, 2 * p - 1 - m)


H1 = Schedule(h1, splits=True, makespan=makespan, peak=lambda pipe: [min(pipe.items, pipe.ranks)] * pipe.ranks)
H2 = Schedule(h2, splits=True, makespan=makespan, peak=lambda pipe: [min(pipe.items, 2 * pipe.ranks - 1)] * pipe.ranks)
