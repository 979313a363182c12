"""DualPipeV (deepseek-ai/DualPipe, after Sea AI Lab's "cut in half"): DualPipe's steps on a V, without replicas.

Stage s is on rank s on the way down and on rank 2P-1-s on the way up. Bubble (P-1)(F&B + BW - 3W) of one chunk, where
F&B is an overlapped pair that starts and ends as one: 2(P-1) at unit cost. Here the pair runs as a forward and then a
backward, and what the forward gives leaves before the backward: (P-1)(F + B - W) where F = B >= W, P-1 at unit cost.
Every rank holds 2P+1 chunk activations. m at least 2P.
"""

from __future__ import annotations

from autotune.planners.schedules.eight_steps import eight_steps
from autotune.planners.schedules.schedule import Order, Pipe, Schedule, wave


def order(pipe: Pipe) -> Order:
    ranks, items = pipe.ranks, range(pipe.items)
    return [eight_steps(rank, ranks, (rank, 2 * ranks - 1 - rank), (items, items)) for rank in range(ranks)]


def refuse(pipe: Pipe) -> str | None:
    if pipe.chunks != 2:
        return f"two chunks a rank (found {pipe.chunks}; nearest 2)"
    if pipe.items < 2 * pipe.ranks:
        return f"at least {2 * pipe.ranks} micro-batches (found {pipe.items}; nearest {2 * pipe.ranks})"
    return None


SCHEDULE = Schedule(
    order,
    place=wave,
    refuse=refuse,
    splits=True,
    makespan=lambda pipe: 6.0 * pipe.items + pipe.ranks - 1,
    peak=lambda pipe: [2 * pipe.ranks + 1] * pipe.ranks,
    chunks=(2,),
)
