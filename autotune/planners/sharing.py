"""Start and end of every event where ranks share processors: more workers compute at once than there are cores.

The longest path of `planners.simulate.sweep` gives every rank a device of its own. Workers on a processor do not have
one: while more of them compute than there are cores, each advances at its share (processor sharing). A rank's bubble
is then another's speed, which is why schedules differ less there than on accelerators.

All that compute advance alike, so one clock of work done per rank orders their ends: an event that starts when the
clock shows W and needs w ends when it shows W + w, however often the share changes in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

from autotune.planners.resolve import Resolved


def shared_sweep(
    resolved: Resolved, duration: Sequence[float], compute: Sequence[bool], capacity: float
) -> tuple[list[float], list[float]]:
    """Start and end of every event when `capacity` compute events at once run at full speed, and more share it."""
    followers: list[list[int]] = [[] for _ in resolved.waits]
    missing = list(map(len, resolved.waits))
    for number, wait in enumerate(resolved.waits):
        for earlier in wait:
            followers[earlier].append(number)
    start, end = [0.0] * resolved.events, [0.0] * resolved.events
    now = work = 0.0
    computing: list[tuple[float, int]] = []  # (what the clock of work shows at its end, event)
    timed: list[tuple[float, int]] = []  # (time of its end, event): what takes no core
    ready = [number for number in resolved.order if not missing[number]]
    while True:
        for number in ready:
            start[number] = now
            if compute[number] and duration[number] > 0:
                heappush(computing, (work + duration[number], number))
            else:
                heappush(timed, (now + duration[number], number))
        ready = []
        if not computing and not timed:
            return start, end
        rate = min(1.0, capacity / len(computing)) if computing else 1.0
        first = now + (computing[0][0] - work) / rate if computing else float("inf")
        if timed and timed[0][0] <= first:
            at, done = heappop(timed)
            work += (at - now) * rate if computing else 0.0
            now = at
        else:
            work, done = heappop(computing)
            now = first
        end[done] = now
        for follower in followers[done]:
            missing[follower] -= 1
            if not missing[follower]:
                ready.append(follower)
