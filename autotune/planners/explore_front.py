"""The queue of a search for a Pareto front: branch and bound on vectors of objectives.

Each plan has lower bounds on its seconds and its bytes, and so on every objective. A plan is left where a simulated
one covers that vector: is, in each objective, no worse than the bound by more than the tolerance. All others are looked
at more closely, one look a turn, and simulated at last. Turns go round the objectives, best bound first in each, and
to the least product of all: so that a front which is cut short has its ends and its middle.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from math import log, sqrt
from typing import NamedTuple

from autotune.planners.alone import LOOKS
from autotune.planners.explore import FIRST, FRONT, NEVER, TOGETHER, Exploration, Waiting, looked
from autotune.planners.lower.traits import micro_batches
from autotune.planners.pareto import Archive, Vector
from autotune.planners.predict import TooSlow
from autotune.planners.trial import Outcome, Trial
from autotune.spec.front import preferred
from autotune.spec.objectives import OBJECTIVES, values
from autotune.spec.plan import Plan
from autotune.spec.prediction import Prediction

SHOWN = 64  # plans that are simulated to their end though others cover them: what a front is seen beside
ONE_LOOK = -1.0  # seconds that every look finds more than: other plans come first after each


class Floor(NamedTuple):
    """What a step of a plan takes at least."""

    seconds: float
    bytes: float


def halved(tolerance: float) -> float:
    """The tolerance that makes `tolerance` when it is used twice: for what is left unsimulated, and for what is left
    out of a front."""
    return sqrt(1 + tolerance) - 1


@dataclass
class FrontExploration(Exploration):
    """What a search for a front knows so far."""

    archive: Archive = field(default_factory=Archive)  # of the plans that were simulated and fit
    held: dict[Vector, Prediction] = field(default_factory=dict)  # the first one of each vector
    entries: dict[int, Waiting] = field(default_factory=dict)  # what waits, by number
    floors: dict[int, Floor] = field(default_factory=dict)  # of what waits and what is away
    heaps: list[list[tuple[Vector, int, int]]] = field(default_factory=list)  # (key, number, look); some are stale
    turn: int = 0
    pruned: int = 0  # plans whose bounds others cover
    fastest: float = NEVER  # seconds of a step that no plan of those that are done with undercuts

    @property
    def waiting(self) -> int:
        return len(self.entries)

    @property
    def least(self) -> float | None:
        """Seconds that no plan undercuts that is not done with."""
        return min((floor.seconds for floor in self.floors.values()), default=None)

    @property
    def bounds(self) -> list[Vector]:
        """The vectors of lower bounds of all that is not done with."""
        plans = {entry.number: entry.plan for entry in (*self.entries.values(), *self.tried)}
        return [self._vector(plan, self.floors[number]) for number, plan in plans.items() if number in self.floors]

    @property
    def tolerance(self) -> float:
        return halved(self.question.tolerance)

    def best(self) -> Prediction | None:
        """What would be locked."""
        found = self.archive.vectors
        if not found:
            return None
        return self.held[found[preferred(self.question.prefer, self.question.objectives, found)]]

    def incumbent(self) -> float:
        return NEVER  # there is none: `_trial` says what each plan has to beat

    def limit(self) -> float:
        return NEVER

    def prove(self, ended: Callable[[], bool]) -> bool:
        """Looks at and simulates plans until the front covers all that are left (True), or `ended` says that the budget
        has (False)."""
        first = True
        while self.entries:
            spent = self.count >= self.question.simulate_budget or ended()
            if spent and self.simulated and not first:
                return False
            hurried = not self.simulated
            batch = self._quickest(FIRST) if hurried else self._next(TOGETHER if self.workers.rate else FIRST)
            first = False
            self._try(batch, NEVER if hurried else ONE_LOOK)
        return True

    def _vector(self, plan: Plan, floor: Floor) -> Vector:
        return values(self.question, plan.world, floor.seconds, floor.bytes)

    def _admit(self, plan: Plan, least: int) -> None:
        seconds = self.bounder.time(plan) if self.trains else 0.0
        self._push(Waiting(0.0, self.bounded, plan), Floor(seconds, float(least)))

    def _push(self, entry: Waiting, floor: Floor) -> None:
        self.entries[entry.number], self.floors[entry.number] = entry, floor
        vector = self._vector(entry.plan, floor)
        keys: list[Vector] = [(value, *vector) for value in vector]
        if len(vector) > 1:
            keys.append((sum(log(value) if value > 0 else -NEVER for value in vector),))
        self.heaps = self.heaps or [[] for _ in keys]
        for heap, key in zip(self.heaps, keys, strict=True):
            heapq.heappush(heap, (key, entry.number, entry.look))

    def _pop(self) -> Waiting:
        """The plan whose turn it is."""
        heap = self.heaps[self.turn % len(self.heaps)]
        while True:  # each plan is in every heap
            _, number, look = heapq.heappop(heap)
            if number in self.entries and self.entries[number].look == look:
                return self.entries.pop(number)

    def _next(self, size: int, incumbent: float = NEVER) -> list[Waiting]:
        """Takes the next plans out of the queue that are not covered."""
        found: list[Waiting] = []
        while self.entries and len(found) < size:
            entry = self._pop()
            if self.archive.covered(self._vector(entry.plan, self.floors[entry.number]), self.tolerance):
                self._prune(entry)
            else:
                found.append(entry)
                self.turn += 1
        return found

    def _quickest(self, size: int) -> list[Waiting]:
        near = self._next(FRONT)
        if self.trains:
            near.sort(key=lambda entry: micro_batches(entry.plan, self.question.workload) * entry.plan.stages)
        for entry in near[size:]:
            self._push(entry, self.floors[entry.number])
        return near[:size]

    def _prune(self, entry: Waiting) -> None:
        """Is done with a plan that others cover."""
        self.pruned += 1
        self.fastest = min(self.fastest, self.floors.pop(entry.number).seconds)
        if not entry.look:  # fewer moves may take less than these, whatever these take
            self.offer(self._new(self.space.eased(entry.plan)))

    def _trial(self, entry: Waiting, wanted: float, limit: float, following: float) -> Trial:
        room = self.room(entry.plan)
        if not self.trains:
            return Trial(entry.plan, LOOKS, allowed=room)
        enough = self._enough(entry)
        limit = enough if len(self.simulated) >= SHOWN else NEVER
        return Trial(entry.plan, entry.look, enough, limit, following, room)

    def _enough(self, entry: Waiting) -> float:
        """Seconds from which on a step of the plan is of no use: some simulated plan then covers it."""
        slack, found = 1 + self.tolerance, NEVER
        asked = [OBJECTIVES[name] for name in self.question.objectives]
        units = [each.unit(self.question, entry.plan.world) for each in asked]
        size = self.floors[entry.number].bytes
        timed = [n for n, each in enumerate(asked) if each.quantity == "seconds"]
        sized = [n for n, each in enumerate(asked) if each.quantity == "bytes"]
        for vector in self.archive.vectors:
            if all(vector[n] <= slack * units[n] * size for n in sized):
                found = min(found, max((vector[n] / units[n] for n in timed), default=NEVER) / slack)
        return found

    def _settle(self, entry: Waiting, outcome: Outcome) -> Prediction | None:
        found = super()._settle(entry, outcome)
        if entry.number not in self.entries:
            self.floors.pop(entry.number, None)
        if found is not None:
            self.fastest = min(self.fastest, found.step_s)
            vector = values(self.question, found.plan.world, found.step_s, float(max(found.peak_bytes)))
            if self.archive.add(vector):
                self.held[vector] = found
        return found

    def _left(self, entry: Waiting, outcome: TooSlow) -> None:
        before = self.floors[entry.number]
        floor = Floor(max(before.seconds, outcome.seconds), max(before.bytes, outcome.bytes))
        if outcome.look is None:  # its simulation took as long as makes it of no use
            self.floors[entry.number] = floor
            self._prune(entry._replace(look=LOOKS))
        else:
            self._push(entry._replace(look=looked(outcome)), floor)

    def _so_far(self, best: Prediction) -> str:
        return f"{len(self.archive.vectors)} on the front, {self.waiting} plans left"
