"""The queue of a search: plans by their bounds, from the enumeration to the proof that the best one found is the best.

A plan is bounded when it is enumerated. When its turn comes it is bounded more closely, by its ranks alone, and goes
back into the queue where others then come before it. What does not fit brings in the plans that relieve it.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from autotune.planners.alone import LOOKS
from autotune.planners.bounds import Bounder
from autotune.planners.lower.traits import micro_batches
from autotune.planners.predict import TooLarge, TooSlow
from autotune.planners.resolve import uncollected
from autotune.planners.space import Enumeration
from autotune.planners.trial import Outcome, Trial, Workers
from autotune.spec.objectives import OBJECTIVES
from autotune.spec.plan import Plan
from autotune.spec.prediction import Prediction, Question

MEMORY = "memory of a device"  # what a reason begins with that no room is left
BATCH = 16  # plans that are ranked, at least
TOGETHER = 32  # plans tried between two looks at the clock: fewer leave processes waiting for each other
FIRST = 2  # before it is known how long one takes, and so whether another process is worth starting
FRONT = 64  # of the most promising plans, those among which the first to be simulated are
NEVER = float("inf")


def objective(question: Question, prediction: Prediction) -> float:
    """What is minimised."""
    if question.minimize == "tokens_per_s":
        return -prediction.tokens_per_s
    size = float(max(prediction.peak_bytes))
    return OBJECTIVES[question.minimize].value(question, prediction.plan.world, prediction.step_s, size)


def valued(question: Question, seconds: float) -> float:
    """The objective of a step of so many seconds."""
    return -question.workload.tokens / seconds if question.minimize == "tokens_per_s" else seconds


def seconds_of(question: Question, value: float) -> float:
    """The step seconds of an objective's value; for ever where no plan has the value."""
    if question.minimize != "tokens_per_s":
        return value
    return -question.workload.tokens / value if value < 0 else NEVER


class Waiting(NamedTuple):
    """A plan in the queue: `number` breaks ties. `look`: how many looks at its ranks alone have made its bound."""

    bound: float
    number: int
    plan: Plan
    look: int = 0


@dataclass
class Exploration:
    """Everything a search knows so far, and what it does next."""

    question: Question
    bounder: Bounder
    space: Enumeration
    workers: Workers
    allowed: int
    remember: Callable[[Sequence[Prediction]], None]
    progress: Callable[[str], None]
    simulated: list[Prediction] = field(default_factory=list)  # those that fit
    count: int = 0  # simulated
    bounded: int = 0
    queue: list[Waiting] = field(default_factory=list)
    tried: list[Waiting] = field(default_factory=list)  # the batch that is away
    derived: set[Plan] = field(default_factory=set)  # plans that others have led to
    rooms: Mapping[int, int] = field(default_factory=dict)  # what is allowed by how many devices a plan uses

    @property
    def trains(self) -> bool:
        return self.question.workload.kind == "train"

    @property
    def waiting(self) -> int:
        """Plans in the queue."""
        return len(self.queue)

    def room(self, plan: Plan) -> int:
        """Bytes that a device may have."""
        return self.rooms.get(plan.world, self.allowed)

    @property
    def least(self) -> float | None:
        """The bound of all that is not simulated."""
        return min((entry.bound for entry in (*self.queue, *self.tried)), default=None)

    def best(self) -> Prediction | None:
        return min(self.simulated, key=lambda p: objective(self.question, p), default=None)

    def incumbent(self) -> float:
        """The best value so far."""
        return min((objective(self.question, p) for p in self.simulated), default=NEVER)

    def limit(self) -> float:
        """The value from which a plan is not among the best few."""
        values = sorted(objective(self.question, p) for p in self.simulated)
        return values[BATCH - 1] if len(values) >= BATCH else NEVER

    def gather(self) -> None:
        """Bounds every plan of the space. One is tried as soon as there are a few, so that there is an answer; if that
        does not fit, another when there are twice as many."""
        due = FRONT
        with uncollected():  # what is made stays
            for plan in self.space:
                self.offer((plan,))
                if self.waiting >= due and not self.simulated:
                    due = 2 * self.waiting
                    self._try(self._quickest(1), NEVER)

    def prove(self, ended: Callable[[], bool]) -> bool:
        """Simulates best bound first until none is better (True), or `ended` says that the budget has (False)."""
        first = True
        while self.queue:
            incumbent = self.incumbent()
            proven = self.queue[0].bound >= incumbent
            if proven and self.count >= BATCH:
                return True
            spent = self.count >= self.question.simulate_budget or ended()
            if spent and self.simulated and not first:  # one batch is always tried, and a plan that fits looked for
                return False
            size = TOGETHER if self.workers.rate and not first else FIRST
            # At first nothing can be left out; and some plans are there to be ranked and measured alone.
            hurried = proven or first or incumbent == NEVER
            first = False
            batch = self._quickest(size) if hurried else self._next(size, incumbent)
            self._try(batch, NEVER if hurried or not self.queue else min(incumbent, self.queue[0].bound))
        return True

    def offer(self, plans: Iterable[Plan]) -> None:
        """Bounds plans and takes in those that may fit, or what relieves those that cannot."""
        waiting = list(plans)
        while waiting:
            plan = waiting.pop()
            self.bounded += 1
            if not self.trains:
                self._admit(plan, 0)
                continue
            least = self.bounder.memory(plan)
            if least > self.room(plan):
                self.space.reject(too_large(least, self.room(plan)))
                waiting += self._new(self.space.relieved(plan))
            else:
                self._admit(plan, least)

    def _new(self, plans: Iterable[Plan]) -> list[Plan]:
        """Those that no other plan has led to: several may, and each is to be tried once."""
        found = [plan for plan in plans if plan not in self.derived]
        self.derived.update(found)
        return found

    def _admit(self, plan: Plan, least: int) -> None:
        """Takes a plan in that takes at least so many bytes of a device."""
        if not self.trains:  # there is no bound: all are as promising
            self._wait(-NEVER if self.question.minimize == "tokens_per_s" else 0.0, plan)
        elif self.question.minimize == "peak_memory":
            self._wait(float(least), plan)
        else:
            self._wait(valued(self.question, self.bounder.time(plan)), plan)

    def _wait(self, bound: float, plan: Plan) -> None:
        heapq.heappush(self.queue, Waiting(bound, self.bounded, plan))

    def _next(self, size: int, incumbent: float) -> list[Waiting]:
        """Takes the plans out of the queue that may take least, as far as they may beat the best so far."""
        found: list[Waiting] = []
        while self.queue and len(found) < size and self.queue[0].bound < incumbent:
            found.append(heapq.heappop(self.queue))
        return found

    def _quickest(self, size: int) -> list[Waiting]:
        """Takes those of the most promising plans out of the queue that are simulated soonest."""
        front = [heapq.heappop(self.queue) for _ in range(min(len(self.queue), FRONT))]
        if self.trains:
            front.sort(key=lambda entry: micro_batches(entry.plan, self.question.workload) * entry.plan.stages)
        for entry in front[size:]:
            heapq.heappush(self.queue, entry)
        return front[:size]

    def _try(self, batch: list[Waiting], following: float) -> None:
        """Tries plans; those whose closer bound is above `following` go back into the queue."""
        self.tried = batch
        wanted, limit, fitting = self.incumbent(), self.limit(), list[Prediction]()
        trials = [self._trial(entry, wanted, limit, following) for entry in batch]
        for entry, outcome in zip(batch, self.workers.run(trials, self.waiting), strict=True):
            found = self._settle(entry, outcome)
            fitting += [found] if found else []
        self.tried = []
        self.simulated += fitting
        self.remember(fitting)
        best = self.best()
        if best is not None:
            self.progress(f"simulated {self.count}, {self._so_far(best)}")

    def _so_far(self, best: Prediction) -> str:
        return f"best {best.plan.describe()}: {best.step_s:.4g} s a step"

    def _trial(self, entry: Waiting, wanted: float, limit: float, following: float) -> Trial:
        """What is asked of a plan, in seconds. Objectives other than time are no reason to leave a plan."""
        if self.question.minimize == "peak_memory" or not self.trains:
            return Trial(entry.plan, LOOKS, allowed=self.room(entry.plan))
        times = (seconds_of(self.question, value) for value in (wanted, limit, following))
        return Trial(entry.plan, entry.look, *times, self.room(entry.plan))

    def _settle(self, entry: Waiting, outcome: Outcome) -> Prediction | None:
        """Takes in what came of a trial; the prediction of a plan that fits."""
        if isinstance(outcome, TooLarge):
            self._refuse(entry.plan, outcome.bytes)
            return None
        if not entry.look:  # fewer moves may take less time than these, whatever these take
            self.offer(self._new(self.space.eased(entry.plan)))
        if isinstance(outcome, TooSlow):
            self._left(entry, outcome)
            return None
        self.count += 1
        if max(outcome.peak_bytes) > self.room(outcome.plan):
            self._refuse(entry.plan, max(outcome.peak_bytes))
            return None
        self.offer(self._new(self.space.widened(entry.plan)))
        return outcome

    def _left(self, entry: Waiting, outcome: TooSlow) -> None:
        """A plan that was left goes back into the queue with the bound that was found."""
        bound = max(entry.bound, valued(self.question, outcome.seconds))
        seen = LOOKS if outcome.look is None else outcome.look + 1
        heapq.heappush(self.queue, Waiting(bound, entry.number, entry.plan, seen))

    def _refuse(self, plan: Plan, found: int) -> None:
        self.space.reject(too_large(found, self.room(plan)))
        self.offer(self._new(self.space.relieved(plan)))


def too_large(found: int, allowed: int) -> str:
    return f"{MEMORY}: at most {allowed / 2**30:.1f} GiB (found {found / 2**30:.1f} GiB)"


def deadline(began: float, seconds: float) -> Callable[[], bool]:
    """Whether a budget of so many seconds since `began` is over."""
    return lambda: time.monotonic() - began > seconds
