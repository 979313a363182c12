"""List scheduling: whenever a rank is free it takes what is most due, or waits a little for what is more due.

Due dates are periodic: the k-th execution of a letter is due k cycles after its first, a cycle being the least time
between micro-batches that work and slots allow (cf. the repeated building block of 2405.15362). A rule shifts them:
forwards early or late, weight gradients into gaps or in time.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush

from autotune.planners.solvers.shop import Shop, Words, may_take

FAR = 1e6  # cycles: more due, or less, than anything else


@dataclass(frozen=True)
class Rule:
    """Shifts of due dates, in cycles, and how much of its own time a step may be put off for a more urgent one."""

    forward: float = 0.0
    weight: float = 0.0
    patience: float = 0.0
    early: float = FAR  # how many cycles before it is due a forward may start
    stretch: float = 1.0  # of the first half of the forward path and of the backward path: longer stays, looser
    pace: float = 1.0  # the due dates' cycle over the shop's: where the letters do not fit into the least cycle
    drain: bool = False  # a full rank with a forward at hand frees a slot before it goes on with backwards


def due(shop: Shop, rule: Rule) -> list[list[float]]:
    """[letter][micro-batch] -> when it is due."""
    cycle, stages = shop.cycle * rule.pace, shop.stages
    slow = {*range(stages // 2), *range(stages + stages // 2, 2 * stages)} if stages > shop.ranks else set()
    first = [0.0] * shop.letters
    for letter in shop.topological:
        for need, delay in shop.before[letter]:
            away = shop.rank[need] != shop.rank[letter]
            step = shop.seconds[need] * (rule.stretch if away and need in slow else 1.0)
            first[letter] = max(first[letter], first[need] + step + delay)
    shift = (rule.forward * cycle, 0.0, rule.weight * cycle)
    return [
        [first[letter] + shift[letter // stages] + k * cycle for k in range(shop.items)]
        for letter in range(shop.letters)
    ]


def dispatch(shop: Shop, rule: Rule) -> tuple[Words, float]:
    """The words that the dates lead to and the objective. Never deadlocks and never breaks the limit.

    Decisions are made in order of time, so what is in progress elsewhere, and when it will arrive, is known.
    """
    dates, patience, drain, early = due(shop, rule), rule.patience, rule.drain, rule.early * shop.cycle * rule.pace
    stages, items, limit, far = shop.stages, shop.items, shop.limit, float("inf")
    rank_of, seconds, before, after = shop.rank, shop.seconds, shop.before, shop.after
    near = 1e-9 * shop.scale
    ended: list[list[float]] = [[] for _ in range(shop.letters)]
    head = [far if before[letter] else 0.0 for letter in range(shop.letters)]  # when its next execution can start
    forwards = [[l for l in letters if l < stages] for letters in shop.of_rank]
    clock, freed, frees = [0.0] * shop.ranks, [0.0] * shop.ranks, shop.frees
    words: list[list[int]] = [[] for _ in range(shop.ranks)]
    events = [(0.0, rank_of[letter]) for letter in range(shop.letters) if not before[letter]]
    while events:
        now, rank = heappop(events)
        if clock[rank] > now + near:
            continue
        best, most, full = -1, far, False
        urgent: list[tuple[float, float]] = []  # (date, arrival) of what will be there later
        for letter in shop.of_rank[rank]:
            arrival = head[letter]
            if arrival == far:
                continue
            k = len(ended[letter])
            if limit and letter < stages:
                counts = [len(ended[l]) for l in forwards[rank]]
                if not may_take(k, counts, freed[rank], limit):
                    full |= arrival <= now + near
                    continue
            date = dates[letter][k]
            if letter < stages and date - early > arrival:
                arrival = date - early
            if arrival > now + near:
                urgent.append((date, arrival))
            elif date < most:
                best, most = letter, date
        if drain and full and best >= 0:
            weights = [l for l in shop.of_rank[rank] if l >= 2 * stages and head[l] <= now + near]
            if weights:
                best = min(weights, key=lambda l: dates[l][len(ended[l])])
                urgent = []
        if best < 0:
            if urgent:
                heappush(events, (min(arrival for _, arrival in urgent), rank))
            continue
        worth = now + patience * seconds[best] - near
        wait = [arrival for date, arrival in urgent if date < most and arrival < worth]
        if wait:
            heappush(events, (min(wait), rank))
            continue
        end = max(now, head[best]) + seconds[best]
        mine = ended[best]
        mine.append(end)
        k = len(mine)
        words[rank].append(best)
        clock[rank] = end
        freed[rank] += frees[best]
        heappush(events, (end, rank))
        head[best] = far
        if k < items:
            head[best] = _ready(ended, before[best], k)
        for follower, _ in after[best]:
            if len(ended[follower]) == k - 1:
                head[follower] = at = _ready(ended, before[follower], k - 1)
                if at < far:
                    heappush(events, (max(at, end if rank_of[follower] == rank else at), rank_of[follower]))
    value = max(clock[rank] - shop.offset[rank] for rank in range(shop.ranks))
    return tuple(map(tuple, words)), value


def _ready(ended: list[list[float]], before: tuple[tuple[int, float], ...], k: int) -> float:
    """When the k-th execution can start; infinity: not yet known."""
    at = 0.0
    for need, delay in before:
        if len(ended[need]) <= k:
            return float("inf")
        at = max(at, ended[need][k] + delay)
    return at
