"""The queue of a search for a Pareto front: branch and bound on vectors of objectives.

Each plan has lower bounds on its seconds and its bytes, and so on every objective. A plan is left where a simulated
one covers that vector: is, in each objective, no worse than the bound by more than the tolerance. All others are looked
at more closely, and simulated where that is not enough. Turns go round the objectives, best bound first in each, and to
the least product of all: so that a front which is cut short has its ends and its middle. With a plan come others that
have the order of its steps, which is then lowered once.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from math import log, sqrt
from typing import NamedTuple

from autotune.planners.alone import LOOKS
from autotune.planners.explore import FIRST, FRONT, NEVER, TOGETHER, Exploration, Waiting
from autotune.planners.lower.traits import micro_batches
from autotune.planners.pareto import Archive, Vector
from autotune.planners.predict import TooSlow
from autotune.planners.resolve import uncollected
from autotune.planners.trial import Outcome, Trial, order_of
from autotune.spec.front import preferred
from autotune.spec.objectives import OBJECTIVES, values
from autotune.spec.plan import Plan
from autotune.spec.prediction import Prediction

SHOWN = 64  # plans that are simulated to their end though others cover them: what a front is seen beside
EVERY = 1000  # plans that are enumerated between two batches, so that a budget that ends then leaves a front
ALIKE = 8  # plans of a batch that have one order


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
    heaps: list[list[tuple[Vector, int]]] = field(default_factory=list)  # (key, number); some wait no longer
    alike: dict[tuple[object, ...], dict[int, Vector]] = field(default_factory=dict)  # what waits, by its order
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
    def slack(self) -> float:
        """What a plan that is left may be worse by than one that covers it, as a factor."""
        return 1 + halved(self.question.tolerance)

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

    def gather(self) -> None:
        """Bounds every plan of the space, and tries some as they come."""
        with uncollected():
            for number, plan in enumerate(self.space, 1):
                self.offer((plan,))
                if number % EVERY == 0 and self.entries:
                    self._turn()

    def prove(self, ended: Callable[[], bool]) -> bool:
        """Looks at and simulates plans until the front covers all that are left (True), or `ended` says that the budget
        has (False)."""
        first = True
        while self.entries:
            spent = self.count >= self.question.simulate_budget or ended()
            if spent and self.simulated and not first:
                return False
            first = False
            self._turn()
        return True

    def _turn(self) -> None:
        """Tries a batch; until a plan fits, of the most promising those that are simulated soonest."""
        batch = self._next(TOGETHER if self.workers.rate else FIRST) if self.simulated else self._quickest(FIRST)
        if batch:
            self._try(batch, NEVER)

    def _vector(self, plan: Plan, floor: Floor) -> Vector:
        return values(self.question, plan.world, floor.seconds, floor.bytes)

    def _admit(self, plan: Plan, least: int) -> None:
        seconds = self.bounder.time(plan) if self.trains else 0.0
        self._push(Waiting(0.0, self.bounded, plan), Floor(seconds, float(least)))

    def _push(self, entry: Waiting, floor: Floor) -> None:
        self.floors[entry.number] = floor
        vector = self._vector(entry.plan, floor)
        if self._covered(vector):
            self._prune(entry)
            return
        self.entries[entry.number] = entry
        self.alike.setdefault(order_of(entry.plan), {})[entry.number] = vector
        keys: list[Vector] = [(value, *vector) for value in vector]
        if len(vector) > 1:
            keys.append((sum(log(value) if value > 0 else -NEVER for value in vector),))
        self.heaps = self.heaps or [[] for _ in keys]
        for heap, key in zip(self.heaps, keys, strict=True):
            heapq.heappush(heap, (key, entry.number))

    def _covered(self, vector: Vector) -> bool:
        return self.archive.covered(vector, self.slack - 1)

    def _take(self, number: int) -> Waiting | None:
        """Takes a plan out of the queue; None where it is done with, now that the front covers it."""
        entry = self.entries.pop(number)
        order = order_of(entry.plan)
        vector = self.alike[order].pop(number)
        if not self.alike[order]:
            del self.alike[order]
        if self._covered(vector):
            self._prune(entry)
            return None
        return entry

    def _next(self, size: int, incumbent: float = NEVER) -> list[Waiting]:
        """Takes the next plans out of the queue that are not covered."""
        found: list[Waiting] = []
        while self.entries and len(found) < size:
            turn = self.turn % len(self.heaps)
            _, number = heapq.heappop(self.heaps[turn])  # each plan that waits is in every heap
            entry = self._take(number) if number in self.entries else None
            if entry is None:
                continue
            found.append(entry)
            self.turn += 1
            others = self.alike.get(order_of(entry.plan), {})
            axis = turn if turn < len(self.question.objectives) else 0
            near = heapq.nsmallest(min(ALIKE, size - len(found)), others, key=lambda n: (others[n][axis], others[n]))
            found += [each for each in map(self._take, near) if each is not None]
        return found

    def _quickest(self, size: int) -> list[Waiting]:
        near = self._next(FRONT)
        if self.trains:
            near.sort(key=lambda entry: micro_batches(entry.plan, self.question.workload) * entry.plan.stages)
        for entry in near[size:]:
            self._push(entry, self.floors[entry.number])
        return near[:size]

    def _prune(self, entry: Waiting) -> None:
        """Is done with a plan that others cover. Fewer moves may take less than these, whatever these take."""
        self.pruned += 1
        self.fastest = min(self.fastest, self.floors.pop(entry.number).seconds)
        self.offer(self._new(self.space.eased(entry.plan)))

    def _trial(self, entry: Waiting, wanted: float, limit: float, following: float) -> Trial:
        room = self.room(entry.plan)
        if not self.trains:
            return Trial(entry.plan, LOOKS, allowed=room)
        stairs, size = self._stairs(entry.plan), self.floors[entry.number].bytes
        enough = min((seconds for seconds, least in stairs if least <= size), default=NEVER)
        limit = enough if len(self.simulated) >= SHOWN else NEVER
        return Trial(entry.plan, 0, enough, limit, following, room, stairs)

    def _stairs(self, plan: Plan) -> tuple[tuple[float, float], ...]:
        """(seconds, bytes) from which on a plan on so many devices is covered, of each plan of the front."""
        asked = [OBJECTIVES[name] for name in self.question.objectives]
        slack = [(n, each.quantity, self.slack * each.unit(self.question, plan.world)) for n, each in enumerate(asked)]
        timed = [(n, unit) for n, quantity, unit in slack if quantity == "seconds"]
        sized = [(n, unit) for n, quantity, unit in slack if quantity == "bytes"]
        pairs = Archive(
            (max((v[n] / unit for n, unit in timed), default=0.0), max((v[n] / unit for n, unit in sized), default=0.0))
            for v in self.archive.vectors
        )
        return tuple((seconds, size) for seconds, size in pairs.vectors)

    def _settle(self, entry: Waiting, outcome: Outcome) -> Prediction | None:
        found = super()._settle(entry, outcome)
        self.floors.pop(entry.number, None)
        if found is not None:
            self.fastest = min(self.fastest, found.step_s)
            vector = values(self.question, found.plan.world, found.step_s, float(max(found.peak_bytes)))
            if self.archive.add(vector):
                self.held[vector] = found
        return found

    def _left(self, entry: Waiting, outcome: TooSlow) -> None:
        """Is done with a plan that its looks or its simulation have shown to be covered."""
        before = self.floors[entry.number]
        self.floors[entry.number] = Floor(max(before.seconds, outcome.seconds), max(before.bytes, outcome.bytes))
        self._prune(entry)

    def _so_far(self, best: Prediction) -> str:
        return f"{len(self.archive.vectors)} on the front, {self.waiting} plans left"
