"""Zero Bubble's automatic schedule: the order made for a machine's times under a memory limit (2401.10241, section 3).

All choices of the paper's heuristic are tried, and ZB-H1 and ZB-H2 where they are within the limit; the order whose
longest rank takes least is kept. A limit of p activations gives the paper's ZB-1p, one of 2p its ZB-2p. As a tighter
limit now and then gives the better order, p and 2p are tried too when the limit is above them.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

from autotune.planners.schedules.schedule import Order, Pipe, Schedule, single_chunk
from autotune.planners.schedules.timing import peaks, timed
from autotune.planners.schedules.waves import Choices, laid_out
from autotune.planners.schedules.zero_bubble import h1, h2

CHOICES = tuple(Choices(*way) for way in product((False, True), repeat=3))


@lru_cache(maxsize=64)
def order(pipe: Pipe) -> Order:
    limit = pipe.limit or pipe.ranks
    limits = {limit, min(limit, pipe.ranks), min(limit, 2 * pipe.ranks)}
    found = [laid_out(pipe, tried, choices) for tried in sorted(limits) for choices in CHOICES]
    found += [known for known in (h1(pipe), h2(pipe)) if max(peaks(known, pipe.kept)) <= limit]

    def cost(candidate: Order) -> tuple[float, float, float]:
        timing = timed(candidate, pipe)
        return timing.longest_rank, timing.makespan, max(peaks(candidate, pipe.kept))

    return min(found, key=cost)


def refuse(pipe: Pipe) -> str | None:
    if pipe.limit < 0:
        return f"a limit of at least one activation, or 0 for one a rank (found {pipe.limit}; nearest 1)"
    return single_chunk(pipe)


SCHEDULE = Schedule(order, refuse=refuse, limits=lambda pipe: (pipe.ranks, 2 * pipe.ranks), splits=True, timed=True)
