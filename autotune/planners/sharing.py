"""Start and end of every event where ranks share something: a processor's cores, or the memory that copies go through.

The longest path of `planners.simulate.sweep` gives every rank a device of its own. Workers on a processor do not have
one: while more of them compute than there are cores, each advances at its share (processor sharing). A rank's bubble
is then another's speed, which is why schedules differ less there than on accelerators. What a message is, is work of a
core too. Copies between accelerators and their host share its memory likewise.

All that share one thing advance alike, so one clock of work done per member orders their ends: an event that starts
when the clock shows W and needs w ends when it shows W + w, however often the share changes in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import NamedTuple

from autotune.planners.resolve import Resolved

ALONE = -1  # of an event that shares nothing


class Capacity(NamedTuple):
    """What is on these lanes (None: on any) runs at full speed while no more than `most` of it run at once; more share
    that. `ranks`: each so many neighbouring pipeline ranks share one such thing; 0: all of them do.
    """

    lanes: frozenset[str] | None
    most: float
    ranks: int = 0


def sharers(
    listings: Sequence[Sequence[str]], event: Sequence[Sequence[int]], events: int, capacities: Sequence[Capacity]
) -> tuple[list[int], list[float]]:
    """(what each event shares, how many at once each shared thing carries). `listings`: the lane of each instruction
    of every rank's list, which `event` numbers step after step."""
    found, most, number = [ALONE] * events, list[float](), dict[tuple[int, int], int]()
    for rank, (lanes, events_of) in enumerate(zip(listings, event, strict=True)):
        place = dict[str, int]()
        for which, capacity in enumerate(capacities):
            unit = (which, rank // capacity.ranks if capacity.ranks else 0)
            if unit not in number:
                number[unit] = len(most)
                most.append(capacity.most)
            place |= dict.fromkeys(set(lanes) if capacity.lanes is None else capacity.lanes, number[unit])
        shared = [place.get(lane, ALONE) for lane in lanes]
        for position, at in enumerate(events_of):
            found[at] = shared[position % len(shared)]
    return found, most


def shared_sweep(
    resolved: Resolved, duration: Sequence[float], shares: Sequence[int], most: Sequence[float]
) -> tuple[list[float], list[float]]:
    """Start and end of every event when the events that share thing n run at full speed while they are no more than
    `most[n]`, and at their part of it beyond that; `shares`: see `sharers`."""
    followers: list[list[int]] = [[] for _ in resolved.waits]
    missing = list(map(len, resolved.waits))
    for number, wait in enumerate(resolved.waits):
        for earlier in wait:
            followers[earlier].append(number)
    start, end = [0.0] * resolved.events, [0.0] * resolved.events
    now, things = 0.0, range(len(most))
    work = [0.0 for _ in things]  # each thing's clock
    under: list[list[tuple[float, int]]] = [[] for _ in things]  # (what its clock shows at the end, event)
    timed: list[tuple[float, int]] = []  # (time of its end, event): what shares nothing
    ready = [number for number in resolved.order if not missing[number]]
    while True:
        for number in ready:
            start[number] = now
            thing = shares[number]
            if thing != ALONE and duration[number] > 0:
                heappush(under[thing], (work[thing] + duration[number], number))
            else:
                heappush(timed, (now + duration[number], number))
        ready = []
        first, ending = timed[0][0] if timed else float("inf"), ALONE
        rates = [min(1.0, most[thing] / len(under[thing])) if under[thing] else 1.0 for thing in things]
        for thing in things:
            if under[thing]:
                at = now + (under[thing][0][0] - work[thing]) / rates[thing]
                if at < first:
                    first, ending = at, thing
        if first == float("inf"):
            return start, end
        for thing in things:
            if thing != ending and under[thing]:
                work[thing] += (first - now) * rates[thing]
        if ending == ALONE:
            now, done = heappop(timed)
        else:
            work[ending], done = heappop(under[ending])
            now = first
        end[done] = now
        for follower in followers[done]:
            missing[follower] -= 1
            if not missing[follower]:
                ready.append(follower)
