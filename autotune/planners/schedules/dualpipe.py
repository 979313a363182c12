"""DualPipe (DeepSeek-V3, 2412.19437, section 3.2.1): two replicas, micro-batches from both ends, split backwards.

Bubble (P/2-1)(F&B + BW - 3W), where F&B is an overlapped pair that starts and ends as one. Here the pair runs as a
forward and then a backward, and what the forward gives leaves before the backward: (P/2-1)(F + B - W) where
F = B >= W, with B the input gradient alone. Weights twice, P+1 activations a rank. P even; m even, at least 2P.
"""

from __future__ import annotations

from autotune.planners.schedules.eight_steps import eight_steps
from autotune.planners.schedules.schedule import Order, Pipe, Place, Schedule, single_chunk


def place(pipe: Pipe) -> Place:
    """Stage s on rank s for the way down and on rank P-1-s for the way up."""
    return tuple((stage, pipe.ranks - 1 - stage) for stage in range(pipe.ranks))


def order(pipe: Pipe) -> Order:
    """Even micro-batches start at rank 0, odd ones at rank P-1: a rank's near side is the end that it is closer to."""
    ranks, half = pipe.ranks, pipe.ranks // 2
    ways = range(0, pipe.items, 2), range(1, pipe.items, 2)
    lists: Order = []
    for rank in range(ranks):
        depth = min(rank, ranks - 1 - rank)
        near, far = ways if rank < half else ways[::-1]
        lists.append(eight_steps(depth, half, (depth, ranks - 1 - depth), (near, far)))
    return lists


def refuse(pipe: Pipe) -> str | None:
    ranks, items = pipe.ranks, pipe.items
    if (reason := single_chunk(pipe)) is not None:
        return reason
    if ranks < 2 or ranks % 2:
        return f"an even number of pipeline ranks (found {ranks}; nearest {ranks + 1})"
    if items < 2 * ranks:
        return f"at least {2 * ranks} micro-batches (found {items}; nearest {2 * ranks})"
    if items % 2:
        return f"an even number of micro-batches (found {items}; nearest {items + 1})"
    return None


SCHEDULE = Schedule(
    order,
    place=place,
    refuse=refuse,
    splits=True,
    makespan=lambda pipe: 3.0 * pipe.items + pipe.ranks // 2 - 1,
    peak=lambda pipe: [pipe.ranks + 1] * pipe.ranks,
)
