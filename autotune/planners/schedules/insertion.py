"""Puts the passes of a sharded vocabulary into any pipeline's order (2411.05288, section 5).

First every backward moves to where there is time for the barriers before it (see delay); the order of the stages' own
steps is then fixed. A list schedule on the order's own clock inserts the passes: each starts as soon as its inputs
are there and its rank is free, so they fill the warm-up and go one after another in the steady state. What is made
this way cannot deadlock: it is the record of a run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from autotune.planners.schedules.delay import delays
from autotune.planners.schedules.interlaced import interlaced
from autotune.planners.schedules.schedule import Order, Pipe, Place, Step
from autotune.planners.schedules.timing import inputs_ready, timed
from autotune.planners.schedules.vocabulary import (
    AHEAD,
    BARRIER,
    EMBED,
    EMBED_W,
    LATE,
    LOOKUP,
    PRODUCTS,
    Vocabulary,
)

GOOD = 1.03  # times the order's own makespan and the passes' work: no other delay is tried then
BETTER = 0.98  # times the makespan of an earlier delay: what a later one must be below


def insert(order: Order, pipe: Pipe, place: Place, vocabulary: Vocabulary, product: float) -> Order:
    """The order with EMBED, EMBED_W and the output's passes on every rank, under the stage number `pipe.stages`.

    Where ranks do the passes together, the order is that of the interlaced pipeline whatever `order` is.

    `product` is the duration of one matrix product of a micro-batch with a shard, as a share of a stage's forward.

    Every rank takes the micro-batches' passes in one order, which their barriers need. Where they come from two
    directions it is that of the delayed order's own clock: a pass waits for earlier ones alone, so no rank waits for a
    micro-batch whose step would, on that clock, come after what waits for it.
    """
    if vocabulary.together:
        return interlaced(pipe, vocabulary)
    best: Order = []
    least = math.inf
    for later in delays(order, pipe, vocabulary.barriers):
        try:
            clock = _Clock(later, pipe, place, vocabulary, product)
            made = clock.run()
        except ValueError:  # backwards that come with too few forwards before them to let the passes begin
            continue
        makespan = max(clock.now)
        if makespan < BETTER * least:
            best, least = made, makespan
        if least <= GOOD * (timed(order, pipe).makespan + pipe.items * sum(clock.seconds[op] for op in clock.items)):
            break
    return best


@dataclass
class _Clock:
    """A list schedule in the making: what has been placed, and when it ends."""

    steps: list[list[Step]]  # of the stages, in fixed order
    pipe: Pipe
    place: Place
    vocabulary: Vocabulary
    product: float
    out: Order = field(init=False)
    now: list[float] = field(init=False)
    at: list[int] = field(init=False)  # of each rank, how many of `steps` are placed
    ops: tuple[str, ...] = field(init=False)  # the passes, by number
    count: list[list[int]] = field(init=False)  # of each rank, how many of each pass are placed
    known: dict[str, list[float | None]] = field(init=False)  # [pass][number of its item]: when any rank may start it
    done: dict[tuple[str, int, int], tuple[float, int]] = field(default_factory=dict)
    ended: dict[tuple[str, int], tuple[int, float]] = field(default_factory=dict)  # (pass, item): ranks, latest end

    def __post_init__(self) -> None:
        ranks, p, last = range(self.pipe.ranks), self.vocabulary.passes, self.pipe.stages - 1
        self.out, self.now, self.at = [[] for _ in ranks], [0.0 for _ in ranks], [0 for _ in ranks]
        self.ops = (EMBED, EMBED_W, *p)
        self.count = [[0] * len(self.ops) for _ in ranks]
        unit = sum(self.pipe.times.of("F", s) for s in range(last + 1)) / (last + 1)
        self.seconds = {op: count * self.product * unit for op, count in PRODUCTS.items()}
        self.seconds |= dict.fromkeys((EMBED, EMBED_W), LOOKUP * unit)
        self.barrier, self.late = BARRIER * unit, LATE * unit
        # Where every stage is on one rank, that rank's list is clock enough.
        one = all(len(ranks) == 1 for ranks in self.place)
        ends = [range(len(steps)) for steps in self.steps] if one else timed(self.steps, self.pipe).end
        self.items = dict.fromkeys(p, self.passed(("F",), last, ends))  # the items of every pass, in order
        self.items[EMBED] = self.passed(("F",), 0, ends)
        self.items[EMBED_W] = self.passed(("B", "BW"), 0, ends)
        self.number = {op: {item: n for n, item in enumerate(items)} for op, items in self.items.items()}
        # Nothing comes after the last; nor does anything hold up the first embeddings.
        self.known = {op: [None] * len(self.items[op]) + [math.inf] for op in self.ops}
        self.ahead = AHEAD * len(self.place[0])
        first = min(self.ahead, self.pipe.items)
        self.known[EMBED][:first] = [0.0] * first

    def passed(self, ops: Sequence[str], stage: int, ends: Sequence[Sequence[float]]) -> list[int]:
        """The items in the order in which their step at `stage` ends, whichever rank it is on."""
        steps = [
            (ends[rank][at], rank, step.item)
            for rank in self.place[stage]
            for at, step in enumerate(self.steps[rank])
            if step.stage == stage and step.op in ops
        ]
        return [item for _, _, item in sorted(steps)]

    def run(self) -> Order:
        """Places one step after another, always the one that starts first; of several on a rank, passes first."""
        best = [self.next(rank) for rank in range(self.pipe.ranks)]
        while True:
            chosen: tuple[float, int, Step] | None = None
            for rank, found in enumerate(best):
                if found and (chosen is None or found[0] < chosen[0]):
                    chosen = found[0], rank, found[1]
            if chosen is None:
                break
            start, rank, step = chosen
            for other in self.put(rank, start, step):
                best[other] = self.next(other)
        if any(at < len(steps) for at, steps in zip(self.at, self.steps, strict=True)):
            raise ValueError("the order deadlocks once its backwards wait for the vocabulary's barriers")
        return self.out

    def next(self, rank: int) -> tuple[float, Step] | None:
        """(start, step) of what a rank can start first, as far as is known; of equals the pass named first."""
        now, first, chosen = self.now[rank], math.inf, -1
        for number, (placed, known) in enumerate(zip(self.count[rank], self.known.values(), strict=True)):
            ready = known[placed]
            if ready is None:
                continue
            if ready < now:
                ready = now
            if ready < first:
                first, chosen = ready, number
        if self.at[rank] < len(self.steps[rank]):
            step = self.steps[rank][self.at[rank]]
            ready = self.step_ready(rank, step)
            if ready is not None and max(now, ready) < first:
                return max(now, ready), step
        if chosen < 0:
            return None
        op = self.ops[chosen]
        return first, Step(op, self.pipe.stages, self.items[op][self.count[rank][chosen]])

    def over(self, op: str, item: int) -> float | None:
        """When a pass's barrier is over; None: not yet known."""
        ranks, end = self.ended.get((op, item), (0, 0.0))
        return end + self.barrier if ranks == self.pipe.ranks else None

    def allow(self, op: str, item: int, at: float, later: int = 0) -> None:
        """A pass may start with an item, or with that `later` after it."""
        number = self.number[op][item] + later
        if number < len(self.items[op]):
            self.known[op][number] = at

    def step_ready(self, rank: int, step: Step) -> float | None:
        """When a stage's step has its inputs, those from the vocabulary's passes included."""
        last = self.pipe.stages - 1
        ready = inputs_ready(step, rank, last, self.done, self.pipe.times.hop)
        also: float | None = 0.0
        if step.op == "F" and step.stage == 0:
            also = self.over(EMBED, step.item)
        elif step.op in ("B", "BW") and step.stage == last:
            also = self.over(self.vocabulary.passes[self.vocabulary.barriers - 1], step.item)
        return None if ready is None or also is None else max(ready, also)

    def put(self, rank: int, start: float, step: Step) -> Sequence[int]:
        """Places a step; gives the ranks that may have more to do now."""
        own = step.stage < self.pipe.stages
        self.now[rank] = start + (self.pipe.times.of(step.op, step.stage) if own else self.seconds[step.op])
        self.out[rank].append(step)
        everyone, now, passes = range(self.pipe.ranks), self.now[rank], self.vocabulary.passes
        if not own:
            self.count[rank][self.ops.index(step.op)] += 1
            ranks, end = self.ended.get((step.op, step.item), (0, 0.0))
            self.ended[step.op, step.item] = ranks + 1, max(end, now)
            if ranks + 1 < self.pipe.ranks:
                return (rank,)
            if step.op in passes[:-1]:
                self.allow(passes[passes.index(step.op) + 1], step.item, max(end, now) + self.barrier)
            return everyone
        self.at[rank] += 1
        op, stage, last = step.op[0], step.stage, self.pipe.stages - 1
        if op != "W":
            self.done[op, stage, step.item] = now, rank
        if op == "F" and stage == 0:  # embeddings need nothing, but take memory until the first stage has used them
            self.allow(EMBED, step.item, now, self.ahead)
        if op == "F" and stage == last:
            self.allow(passes[0], step.item, now + self.barrier)
        if op == "B" and stage == 0:
            self.allow(EMBED_W, step.item, now + self.barrier + self.late)
        beside = stage + (1 if step.op == "F" else -1)
        if stage == 0 or not 0 <= beside <= last:
            return everyone
        return tuple({rank, *self.place[beside]})
